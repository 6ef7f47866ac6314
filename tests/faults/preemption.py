"""A1 to A14, E1, E3: preempted, at the time limit, cancelled, in each phase, many times; submissions cut off."""

import json

from hpc import stepledger
from hpc.rundir import RunDir
from tests.faults.rows import at_most_an_interval, freed, lost, saved, saves, scripted
from tests.playing import Playing

TINY = "$ hpc submit tiny.yaml launch.cluster=slurm"
HERE = "$ hpc submit tiny.yaml launch.cluster=local"
GRACE = f"{TINY} launch.partition=grace"
ONE_JOB = "$ test $(squeue --noheader --states=all --format=%k | grep -c ^tiny-) = 1"
DISPLACED = "preempt\nwait for the node\nwait for requeue"
PREEMPTED = f"{DISPLACED}\nwait for end"
BY_HAND = (
    f"partition grace DOWN\n{GRACE}\n$ hpc cancel tiny\nwait for the job to go\npartition grace UP\n"
    "$ sed -i s/--signal=USR2/--signal=B:USR2/ runs/*/job.sbatch\nsbatch by hand"
)


def _restarts_once(play: Playing) -> str:
    [again] = [event["restart"] for event in play.events("start") if event["generation"] == 2]
    assert again == 1, f"SLURM counts {again} restarts"
    return ""


def _quiet_readers(play: Playing) -> str:
    told = play.outputs()
    assert "Traceback" not in told and "worker" not in told, "the log shows an error of the readers"
    return ""


def _never_timed_out(play: Playing) -> str:
    assert "DUE TO TIME LIMIT" not in play.outputs(), "the job met its time limit"
    return ""


def _latencies(play: Playing) -> str:
    phases = ("import", "build", "first step", "validation", "save", "figure", "four at once")
    return ", ".join(f"{phase} {took:.1f} s" for phase, took in zip(phases, saves(play), strict=True))


def _one_save(play: Playing) -> str:
    told = play.events("signal")[-1]
    saves = [event["step"] for event in play.events("checkpoint") if event["generation"] == told["generation"]]
    count, later = saves.count(told["step"]), max(saves) > told["step"]
    assert count == 1 and not later, f"{count} checkpoints at step {told['step']}, of {saves}"
    code = next(event["code"] for event in play.events("end") if event["generation"] == told["generation"])
    assert code == 75, f"left with {code}"
    return "1 checkpoint, exit code 75"


def _no_hang(play: Playing) -> str:
    assert not play.events("hang"), "a watchdog took 3 s for a hang"
    return ""


def _same_stop(play: Playing) -> str:
    for told in play.events("signal"):
        ends = [path.read_text().splitlines()[-1] for path in play.run.glob(f"ledger/{told['generation']:03d}-*")]
        steps = [json.loads(line)["step"] for line in ends]
        assert steps == [told["step"]] * 2, f"stopped at step {told['step']}, the ranks at {steps}"
    return "the same last step"


def _rows_alone(play: Playing) -> str:
    attempts = [len([event for event in RunDir(row).read_events() if event["event"] == "start"]) for row in play.runs]
    lost = sum(stepledger.read(RunDir(row)).lost for row in play.runs)
    assert attempts == [2] * 3, f"attempts of the rows: {attempts}"
    return f"{len(attempts)} rows, {max(attempts) - 1} restart each, {lost} steps lost"


def _twice_in_one_epoch(play: Playing) -> str:
    steps = [event["step"] for event in play.events("signal")]
    epochs = [(step - 1) // 40 for step in steps]
    most = max(epochs.count(epoch) for epoch in epochs)
    assert most >= 2, f"stopped at {steps}"
    return f"{len(steps)} stops, {most} in one epoch"


TEN = [(4, 8), (14, 18), (24, 28), (44, 48), (54, 58), (64, 68), (84, 88), (94, 98), (124, 128), (134, 138)]

SECOND_SHELL = "$ sbatch runs/*/job.sbatch\nwait for the words is held by job"
AWAY = (
    "controller stops\n$ ! hpc submit tiny.yaml launch.cluster=slurm\n$ ! ls runs\ncontroller starts\n"
    "controller is away during hpc submit tiny.yaml launch.cluster=slurm launch.time=60s"
)

PREEMPTION = [
    scripted(
        "A1 A3 A10",
        "preempted ten times in a row, GraceTime 8, three times inside one epoch; two reading threads",
        "saved at the step's end, the tail requeues; each step once, in order; no error of the readers",
        f"{GRACE} data.threads=2 model.pause=0.05\n"
        + "".join(f"wait for step {first}..{last}\n{DISPLACED}\n" for first, last in TEN)
        + "wait for end",
        *(_restarts_once, _quiet_readers, _twice_in_one_epoch, lost, saved, freed),
        soak=5,
        cluster={},
        attempts=11,
        causes=("SIGTERM",) * 10,
        weights="one-task",
    ),
    scripted(
        "A2 E3",
        "'hpc submit' killed between sbatch and its record; then preempted, GraceTime 0, KillWait 5",
        "the next command adopts the job: exactly one; saved before SIGKILL, SLURM requeues, we do not",
        "kill after sbatch: hpc submit tiny.yaml launch.cluster=slurm launch.partition=gpu model.pause=0.1\n"
        f"$ hpc ls\n$ cat runs/tiny-*/s*.json | grep job\n$ ! hpc resume tiny\n{ONE_JOB}\n"
        f"wait for step 30..80\n{PREEMPTED}",
        *(_restarts_once, at_most_an_interval, saved, freed),
        cluster={},
        attempts=2,
        causes=("SIGTERM",),
        weights="one-task",
        lost=None,
    ),
    *[
        scripted(
            "A4",
            f"preempted, preempt_send_user_signal {'on' if user else 'off'}, {'B:' * batch}USR2@N",
            "as A1, whoever gets which signal",
            (BY_HAND if batch else GRACE) + f"\nwait for step 20..100\n{PREEMPTED}",
            *(_restarts_once, lost, saved, freed),
            soak=5,
            cluster={"user_signal": user},
            attempts=2,
            causes=(cause,),
            weights="one-task",
        )
        # off and USR2@N is A1
        for user, batch, cause in ((False, True, "SIGTERM"), (True, False, "SIGUSR2"), (True, True, "SIGUSR2"))
    ],
    scripted(
        "A5 E1",
        "the controller is stopped while 'hpc submit' calls sbatch, and is back before sbatch gives up; a time limit",
        "exactly one job; saved and requeued ahead of its limit, never TIMEOUT; 0 steps lost",
        f"{AWAY}\n{ONE_JOB}\nfreeze at step 20..100\nwait for requeue\nmore time\nwait for end",
        *(_never_timed_out, lost, saved),
        cluster={},
        attempts=2,
        causes=("SIGUSR2",),
        weights="one-task",
    ),
    scripted(
        "A6 A7",
        "a signal while torch is imported, in the build, first step, validation, a save, a figure; four in 50 ms",
        "heard in each, 0 steps lost, the time to the save is printed; of the four one checkpoint, exit code 75",
        f"{HERE} model.linger=0.5\n"
        "signal TERM during the import of torch\nsignal USR2 during the build\nsignal TERM during the first step\n"
        "signal USR2 during validation\nsignal TERM during a save\nsignal USR2 during a figure\n"
        "wait for step 124..140\nsignal the ranks TERM TERM TERM USR2\nwait for end",
        *(_one_save, lost, _latencies),
        soak=20,
        attempts=8,
        causes=("SIGTERM", "SIGUSR2") * 3 + ("SIGTERM",),
        weights="one-task",
    ),
    scripted(
        "A8 D4",
        "of two ranks the second stopped (SIGSTOP) for 5 s, train.hang_after 15 s; then SIGTERM to one rank only, each",
        "nothing happens; then the same stop step in both ledgers, and no hang",
        f"{HERE} launch.tasks_per_node=2 launch.cpus=2 train.hang_after=15s\nwait for step 5..20\nsignal rank 1 STOP\n"
        "wait 5 s\nsignal rank 1 CONT\nwait for step 30..60\nsignal rank 0 TERM\nwait for attempt 2\n"
        "wait for step 80..120\nsignal rank 1 TERM\nwait for end",
        *(_no_hang, _same_stop, lost),
        attempts=3,
        causes=("SIGTERM", "SIGTERM"),
        weights="two-tasks",
    ),
    *[
        scripted(
            "A8",
            f"preempted, GraceTime 8, two nodes; rank {rank} leaves 2 s after the other",
            "srun ends the other rank, and the run is requeued all the same",
            f"{GRACE} launch.instance=cedia-a100-40gb-nodes launch.nodes=2 model.late={late}\n"
            f"wait for step 20..100\n{PREEMPTED}",
            *(_same_stop, _restarts_once, lost, saved, freed),
            here=1 - rank,
            soak=5,
            cluster={},
            attempts=2,
            causes=("SIGTERM",),
            weights="two-tasks",
        )
        for rank, late in enumerate(("[2,0]", "[0,2]"))
    ],
    scripted(
        "A9 E1 E4",
        "the controller hangs as 'hpc submit' calls sbatch, which gives up; sbatch of the script as the run goes on; "
        "scancel",
        "exactly one job; the second one ends at once and names the first; saved, CANCELLED, not started again until "
        "hpc resume",
        f"controller hangs during hpc submit tiny.yaml launch.cluster=slurm model.pause=0.1\n$ hpc ls\n{ONE_JOB}\n"
        f"wait for step 10..30\n{SECOND_SHELL}\nscancel\n"
        "wait for the job to go\nexpect attempts 1\n$ hpc ls\n$ hpc resume tiny\nwait for end",
        *(lost, saved),
        cluster={"message_timeout": 2},
        attempts=2,
        causes=("SIGTERM",),
        weights="one-task",
    ),
    scripted(
        "A14",
        "each index of an array preempted in turn, the last one too",
        "that task alone is requeued; no sibling is touched",
        "$ hpc sweep tiny.yaml launch.cluster=slurm train.keep=2,3,4\n"
        "row 0 at step 10..30\npreempt row 0\nrow 1 at step 40..60\npreempt row 1\nrow 2 at step 70..90\n"
        "preempt row 2\nrequeue row 0\nrequeue row 1\nrequeue row 2\nwait for all\n$ hpc ls tiny-sweep",
        _rows_alone,
        soak=5,
        cluster={"nodes": 3},
        attempts=2,
        causes=("SIGTERM",),
        weights="one-task",
    ),
]
