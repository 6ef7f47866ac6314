"""A11, A12, C4, C5, D1 and D3: crashes, lost nodes, other data, memory, losses that are no numbers, hangs."""

from functools import partial

from hpc import stepledger
from hpc.rundir import RunDir
from tests.faults.rows import at_most_an_interval, lost, saved, scripted
from tests.playing import Playing

TINY = "$ hpc submit tiny.yaml launch.cluster=slurm"
HERE = "$ hpc submit tiny.yaml launch.cluster=local"
TWO_HERE = f"{HERE} launch.tasks_per_node=2 launch.cpus=2"
NODES = f"{TINY} launch.instance=cedia-a100-40gb-nodes launch.nodes=2"
IMPATIENT = {"node_timeout": 3, "message_timeout": 2}
RETURNS = "\nwait for requeue\nwait for end"
CHANGED = (
    "$ sed s/scan003,ball/scan003,cube/ scans/labels.csv > labels.csv\n"
    "$ hpc pack scans/*.nii -o scans.h5 --labels labels.csv --split 80/20/0"
)


def _three_restarts(play: Playing) -> str:
    ends = play.events("end")
    assert [event["cause"] for event in ends] == ["stopped"] + ["crash"] * 4, f"{ends}"
    assert ends[-1]["again"] is False, "it was started once more"
    why = play.log[-1]
    assert "raises at step 14" in why and "restart 3 of 3" in why, f"hpc why says: {why}"
    assert "4 crashes since step" in ends[-1]["reason"], f"it ended with: {ends[-1]['reason']}"
    return "1 preemption, 4 crashes, 3 restarts"


def _nothing_late(play: Playing) -> str:
    """What the old attempt wrote after the new one had begun: nothing that a reader takes for the run's."""
    began = next(event["time"] for event in play.events("start") if event["generation"] == 2)
    late = [event for event in RunDir(play.run).read_events() if event["generation"] == 1 and event["time"] > began]
    assert not [event for event in late if event["event"] in ("checkpoint", "signal")], f"{late}"
    return f"lost node requeued after {began - play.when['lost']:.0f} s"


def _noticed(play: Playing) -> str:
    told = play.outputs()  # the old batch script has ended it, or the new attempt has begun
    assert "nothing more is written" in told or "is held by generation 2" in told, "the old rank never noticed"
    return ""


def _hang_is_named(play: Playing, silent: int) -> str:
    [told] = [event for event in play.events("hang") if event["rank"] == 1 - silent]
    names = [(stuck["rank"], stuck["node"]) for stuck in told["stuck"]]
    assert names == [(silent, f"node{silent}")], f"named {names}"
    assert "All threads:" in play.outputs() and "Thread 0x" in play.outputs(), "no stacks in the log"
    [ended] = [event for event in play.events("end") if event["generation"] == 1]
    assert (ended["cause"], ended["code"], ended["again"]) == ("hang", 76, True), f"{ended}"
    late = told["silent"] - told["limit"]
    assert late < 5, f"found {late:.1f} s after the limit"
    return f"found {late:.1f} s after the limit, rank {silent} on node{silent} named"


def _skipped_and_rolled_back(play: Playing) -> str:
    """The decisions are in the events of rank 0; that all ranks took them is in the ledger of each."""
    [back] = play.events("rollback")
    assert set(back["passed_over"]) >= set(range(85, 90)), f"passed over {back['passed_over']}"
    steps = stepledger.read(RunDir(play.run)).steps
    skipped = {step for step, ranks in steps.items() if any(entry.get("skipped") for entry in ranks.values())}
    alike = all(entry.get("skipped") for step in skipped for entry in steps[step].values())
    assert alike and {65, *back["passed_over"]} <= skipped, f"skipped {sorted(skipped)}"
    return f"{len(skipped)} of 160 steps passed over, by both ranks"


def _change_is_logged(play: Playing) -> str:
    assert len(play.events("accept-data-change")) == 1 and len(play.events("data-changed")) == 1
    assert "scans.h5 is not the data" in play.outputs()
    return "refused, then accepted"


def _named_as_memory(play: Playing) -> str:
    [ended] = [event for event in play.events("end") if event["generation"] == 1]
    assert (ended["cause"], ended["again"]) == ("memory", True), f"{ended}"
    return "named as out of memory"


FAILURES = [
    scripted(
        "A11",
        "raises at step 14, always; preempted once before",
        "at most 3 restarts without progress, the reason in 'hpc why'; the preemption does not count",
        f"{TINY} launch.partition=grace model.crash_at=14 train.checkpoint_every=1h model.pause=0.3\n"
        "wait for step 3\npreempt\nwait for requeue\n"
        + "".join(f"wait for attempt {number}\nwait for requeue\n" for number in (2, 3, 4))
        + "wait for attempt 5\nwait for the tail\n$ hpc why tiny",
        _three_restarts,
        soak=5,
        cluster={},
        state="failed",
        attempts=5,
        causes=("SIGTERM",),
    ),
    scripted(
        "A12",
        "slurmd of the node killed, the batch shell and the ranks live on",
        "requeued as the node is lost; the old rank writes nothing once the new attempt has begun",
        f"{TINY} model.pause=0.25\nwait for step 20..40\nthe node's slurmd is killed{RETURNS}",
        *(_nothing_late, _noticed, lost),
        soak=5,
        cluster=IMPATIENT,
        attempts=2,
        weights="one-task",
        lost=None,
    ),
    scripted(
        "A12",
        "slurmd of the second of two nodes killed, its rank lives on; a third node is free",
        "requeued on the nodes that are left; the old rank writes nothing once the new attempt has begun",
        f"{NODES} model.pause=0.25\nwait for step 20..40\nthe slurmd of node1 is killed\nwait for requeue\n"
        "wait for attempt 2\n$ squeue --noheader --format=%N | grep -x 'node.0,2.'\nwait for end",
        *(_nothing_late, lost),
        here=0,
        soak=5,
        cluster=IMPATIENT | {"nodes": 3},
        attempts=2,
        causes=("SIGTERM",),
        weights="two-tasks",
        lost=None,
    ),
    scripted(
        "C4",
        "one label of the data changed between two attempts",
        "refused in one line that names the file; 'hpc resume --accept-data-change' goes on, and is logged",
        f"{HERE}\nwait for step 20..100\n$ hpc cancel tiny\nwait for silence\n{CHANGED}\n"
        "$ hpc resume tiny\nwait for the tail of attempt 2\n$ hpc resume tiny --accept-data-change\n"
        "wait for attempt 3\nwait for end",
        *(_change_is_logged, lost),
        soak=5,
        attempts=3,
        causes=("SIGTERM",),
    ),
    scripted(
        "C5",
        "rank 1 of two killed by the kernel for its memory",
        "named as out of memory, started again; at most one save interval lost",
        f"{NODES} launch.mem=1GB model.hog_at=60{RETURNS}",
        *(_named_as_memory, at_most_an_interval),
        soak=5,
        cluster={"memory_limit": "kernel"},
        attempts=2,
        weights="two-tasks",
        lost=None,
    ),
    scripted(
        "D1",
        "a loss that is no number on rank 1 of two: at one step, and at five in a row",
        "skipped, then rolled back, by all ranks alike; stopped in between and resumed, it ends as if undisturbed",
        f"spoil steps 65 85 86 87 88 89\n{TWO_HERE}\nwait for step 86..100\nsignal rank 0 USR2\nwait for end",
        *(_skipped_and_rolled_back, saved),
        soak=5,
        attempts=2,
        causes=("SIGUSR2",),
        weights="spoilt",
        lost=None,
    ),
    *(
        scripted(
            "D3",
            f"SIGSTOP of rank {silent} of two, for ever; train.hang_after 5 s",
            "found within 5 s of the limit, stacks in the log, rank and node named, exit code 76, started again",
            f"{NODES} train.hang_after=5s\nwait for step 60..100\nsignal rank {silent} STOP{RETURNS}",
            *(partial(_hang_is_named, silent=silent), at_most_an_interval),
            here=silent,
            soak=5,
            cluster={},
            attempts=2,
            weights="two-tasks",
            lost=None,
        )
        for silent in (0, 1)
    ),
]
