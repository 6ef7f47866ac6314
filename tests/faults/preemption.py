"""A1 to A14: preempted, at the limit of its time, cancelled, in each phase and many times in a row."""

from tests.faults.rows import at_most_an_interval, freed, lost, saved, saves, scripted
from tests.playing import Playing

TINY = "$ hpc submit tiny.yaml launch.cluster=slurm"
HERE = "$ hpc submit tiny.yaml launch.cluster=local"
GRACE = f"{TINY} launch.partition=grace"
PREEMPTED = "preempt\nwait for the node\nwait for requeue\nwait for end"
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
    phases = ("import", "build", "first step", "validation", "save", "figure")
    return ", ".join(f"{phase} {took:.1f} s" for phase, took in zip(phases, saves(play), strict=True))


def _one_save(play: Playing) -> str:
    [told] = play.events("signal")
    after = [event for event in play.events("checkpoint") if event["generation"] == 1 and event["step"] > told["step"]]
    at = [event for event in play.events("checkpoint") if event["generation"] == 1 and event["step"] == told["step"]]
    assert len(at) == 1 and not after, f"{len(at)} checkpoints at step {told['step']}, {len(after)} after it"
    code = next(event["code"] for event in play.events("end") if event["generation"] == 1)
    assert code == 75, f"left with {code}"
    return "1 checkpoint, exit code 75"


def _same_stop(play: Playing) -> str:
    last = {path.name: path.read_text().splitlines()[-1].split(",")[0] for path in play.run.glob("ledger/001-*")}
    assert len(last) == 2 and len(set(last.values())) == 1, f"the ranks ended at {last}"
    return "the same last step"


def _twice_in_one_epoch(play: Playing) -> str:
    steps = [event["step"] for event in play.events("signal")]
    epochs = [(step - 1) // 40 for step in steps]
    most = max(epochs.count(epoch) for epoch in epochs)
    assert most >= 2, f"stopped at {steps}"
    return f"{len(steps)} stops, {most} in one epoch"


TEN = [(4, 8), (14, 18), (24, 28), (44, 48), (54, 58), (64, 68), (84, 88), (94, 98), (124, 128), (134, 138)]

PREEMPTION = [
    scripted(
        "A1 A3",
        "preempted, GraceTime 8; two reading threads",
        "saved at the step's end, the tail requeues; 0 steps lost, no error of the readers",
        f"{GRACE} data.threads=2\nwait for step 20..100\n{PREEMPTED}",
        *(_restarts_once, _quiet_readers, lost, saved, freed),
        cluster={},
        attempts=2,
        causes=("SIGTERM",),
        weights="one-task",
    ),
    scripted(
        "A2",
        "preempted, GraceTime 0, KillWait 5",
        "saved before SIGKILL; SLURM requeues, we do not; at most one save interval lost",
        f"{TINY} launch.partition=gpu\nwait for step 40..100\n{PREEMPTED}",
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
        "A5",
        "a time limit, USR2@N",
        "saved and requeued ahead of it, never TIMEOUT; 0 steps lost",
        f"{TINY} launch.time=60s\nfreeze at step 20..100\nwait for requeue\nmore time\nwait for end",
        *(_never_timed_out, lost, saved),
        soak=5,
        cluster={},
        attempts=2,
        causes=("SIGUSR2",),
        weights="one-task",
    ),
    scripted(
        "A6",
        "a signal in each phase: importing torch, building, first step, validation, while saving, while drawing",
        "heard in each; 0 steps lost; the time to the save is printed",
        f"{HERE} model.linger=0.5\n"
        "signal TERM during the import of torch\nsignal USR2 during the build\nsignal TERM during the first step\n"
        "signal USR2 during validation\nsignal TERM during a save\nsignal USR2 during a figure\nwait for end",
        *(lost, _latencies),
        soak=5,
        attempts=7,
        causes=("SIGTERM", "SIGUSR2") * 3,
        weights="one-task",
    ),
    scripted(
        "A7",
        "SIGTERM three times and USR2 within 50 ms",
        "exactly one new checkpoint, exit code 75",
        f"{HERE}\nwait for step 20..100\nsignal the ranks TERM TERM TERM USR2\nwait for end",
        *(_one_save, lost, saved),
        attempts=2,
        causes=("SIGTERM",),
        weights="one-task",
    ),
    *[
        scripted(
            "A8",
            f"SIGTERM to rank {rank} only, of two",
            "the same stop step in both ledgers; no hang",
            f"{HERE} launch.tasks_per_node=2 launch.cpus=2\n"
            f"wait for step 20..100\nsignal rank {rank} TERM\nwait for end",
            *(_same_stop, lost),
            soak=20,
            attempts=2,
            causes=("SIGTERM",),
            weights="two-tasks",
        )
        for rank in (0, 1)
    ],
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
        "A9",
        "scancel",
        "saved, CANCELLED, not started again; hpc resume brings it back with 0 steps lost",
        f"{TINY}\nwait for step 20..100\nscancel\nwait for the job to go\nexpect attempts 1\n"
        "$ hpc ls\n$ hpc resume tiny\nwait for end",
        *(lost, saved),
        cluster={},
        attempts=2,
        causes=("SIGTERM",),
        weights="one-task",
    ),
    scripted(
        "A10",
        "preempted ten times in a row, three times inside one epoch",
        "each step once, in the order of the undisturbed run; 0 steps lost",
        f"{GRACE}\n"
        + "".join(f"wait for step {first}..{last}\npreempt\nwait for requeue\n" for first, last in TEN)
        + "wait for end",
        *(lost, _twice_in_one_epoch, saved),
        soak=5,
        cluster={},
        attempts=11,
        causes=("SIGTERM",) * 10,
        weights="one-task",
    ),
    scripted(
        "A14",
        "each index of an array preempted in turn, the last one too",
        "that task alone is requeued; no sibling is touched",
        "$ hpc sweep tiny.yaml launch.cluster=slurm train.keep=2,3,4\n"
        "row 0 at step 10..30\npreempt row 0\nrow 1 at step 40..60\npreempt row 1\nrow 2 at step 70..90\n"
        "preempt row 2\nrequeue row 0\nrequeue row 1\nrequeue row 2\nwait for all\n$ hpc ls tiny-sweep",
        lambda play: "three rows, each restarted once, 0 steps lost",  # as Row has it checked
        soak=5,
        cluster={"nodes": 3},
        attempts=2,
        causes=("SIGTERM",),
        weights="one-task",
    ),
]
