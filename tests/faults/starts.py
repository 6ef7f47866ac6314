"""E1, E3, E4, G5, G6, G10: submissions cut off in the middle, two starts of one run, and what others may do to it."""

import subprocess
import sys
from pathlib import Path

from tests.faults.fault import Fault
from tests.faults.rows import at_most_an_interval, lost, scripted, within
from tests.playing import Playing

ROOT = Path(__file__).resolve().parent.parent.parent

TINY = "$ hpc submit tiny.yaml launch.cluster=slurm"
HERE = "$ hpc submit tiny.yaml launch.cluster=local"
ONE_JOB = "$ test $(squeue --noheader --states=all --format=%k | grep -c ^tiny-) = 1"


def _in_time(play: Playing) -> str:
    took = play.when["refused"]
    assert within(took, 5), f"the second start left after {took:.1f} s"
    return f"second start left after {took:.1f} s"


def _met_elsewhere(play: Playing) -> str:
    asked = 0
    for listener in play.taken:
        with listener:
            try:
                listener.accept()[0].close()
            except BlockingIOError:
                continue
        asked += 1
    assert asked == len(play.taken), f"{asked} of {len(play.taken)} taken ports were tried"
    return f"met at port {asked + 1} of 5, in the first attempt"


def _links(folder: Path, number: int) -> str:
    """What is made in a folder of runs that a group shares: the list of bad nodes, its lock, and what is made aside."""
    ours = folder / "precious"
    ours.write_text("ours\n")
    names = (".bad-nodes.lock", ".bad-nodes.json", ".bad-nodes.json.PID")
    code = (
        "import os, pathlib, sys; from hpc import badnodes; runs, ours, name = map(pathlib.Path, sys.argv[1:])\n"
        "(runs / str(name).replace('PID', f'{os.getpid()}')).symlink_to(ours)\n"
        "badnodes.remember(runs, 'cluster', 'run', {'node0': 'no GPU'})"
    )
    for name in names:
        runs = folder / f"runs{name}"
        runs.mkdir(mode=0o777)
        command = [sys.executable, "-c", code, runs, ours, name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert ours.read_text() == "ours\n", f"written through a link, {name}\n{done.stderr}"
        refused = "OSError" in done.stderr and name == ".bad-nodes.lock"
        assert refused or (runs / ".bad-nodes.json").is_file(), f"nothing is remembered, {name}\n{done.stderr}"
        assert not (runs / ".bad-nodes.json").is_symlink(), f"the link is still there, {name}\n{done.stderr}"
    return f"{len(names)} links, 0 followed"


STARTS = [
    scripted(
        "E1",
        "the controller is stopped while 'hpc submit' calls sbatch, and is back before sbatch gives up",
        "exactly one job",
        f"controller stops\n$ ! hpc submit tiny.yaml launch.cluster=slurm\n$ ! ls runs\ncontroller starts\n"
        f"controller is away during hpc submit tiny.yaml launch.cluster=slurm\n{ONE_JOB}\nwait for end",
        lost,
        cluster={},
        weights="one-task",
    ),
    scripted(
        "E1",
        "the controller hangs while 'hpc submit' calls sbatch, which gives up; then it does what it was asked",
        "exactly one job, whose record is there after the next command",
        f"controller hangs during hpc submit tiny.yaml launch.cluster=slurm\n$ hpc ls\n{ONE_JOB}\nwait for end",
        lost,
        cluster={"message_timeout": 2},
        weights="one-task",
    ),
    scripted(
        "E3",
        "SIGKILL of 'hpc submit' between sbatch and its record",
        "the next command adopts the job: exactly one",
        f"kill after sbatch: hpc submit tiny.yaml launch.cluster=slurm\n$ hpc ls\n"
        f"$ hpc resume tiny || true\n{ONE_JOB}\nwait for end",
        lost,
        cluster={},
        weights="one-task",
    ),
    scripted(
        "E4",
        "the run's script started twice; then all killed, and the lease another host's: fresh, and 61 s old",
        "the second start names the holder within 5 s; a stale lease is taken over, at most one interval lost",
        f"{HERE}\nwait for step 60..100\na second start is refused: is held by process\nall of it is killed\n"
        "the lease is elsewhere's, 50 s old\na second start is refused: on elsewhere\n"
        "the lease is elsewhere's, 61 s old\n$ bash runs/*/job.sbatch",
        *(_in_time, at_most_an_interval),
        attempts=2,
        weights="one-task",
        lost=None,
    ),
    scripted(
        "E4",
        "sbatch of the run's script while the run goes on",
        "the second job ends at once and names the first; the run is not touched",
        f"{TINY}\nwait for step 20..60\n$ sbatch runs/*/job.sbatch\nwait for the words is held by job\nwait for end",
        lost,
        soak=5,
        cluster={},
        weights="one-task",
    ),
    scripted(
        "G5",
        "umask 000; then a script that the group may write, and a checkpoint that is another user's",
        "the run is its owner's alone, whatever the umask; what others could have changed is refused in one line",
        "$ umask 000; hpc submit tiny.yaml launch.cluster=local\nwait for step 60..100\n$ hpc cancel tiny\n"
        "wait for the tail of attempt 1\n$ find runs/tiny-* -maxdepth 0 -perm /077 | diff - /dev/null\n"
        "$ find runs/*/code runs/*/job.sbatch runs/*/checkpoints/ -perm /022 | diff - /dev/null\n"
        "$ chmod g+w runs/*/job.sbatch\na second start is refused: can be written by others (mode 0620)\n"
        "$ chmod g-w runs/*/job.sbatch\n$ chown -R nobody runs/*/checkpoints/g*\n"
        "$ hpc resume tiny\nwait for the tail of attempt 2\nwait for the words belongs to nobody\n"
        "$ chown -R root runs/*/checkpoints/g*\n$ hpc resume tiny\n"
        "wait for attempt 3\nwait for end",
        lost,
        root=True,
        attempts=3,
        causes=("SIGTERM",),
        weights="one-task",
    ),
    Fault(
        "G6",
        "links to a file of ours planted under the names of all files made in a shared folder of runs",
        "nothing is written through a link",
        _links,
        soak=20,
    ),
    scripted(
        "G10",
        "somebody listens where the ranks are to meet, and at the next port",
        "they meet at the third, in the first attempt",
        f"{HERE} launch.tasks_per_node=2 launch.cpus=2\nothers take 2 ports\nwait for end",
        *(_met_elsewhere, lost),
        weights="two-tasks",
    ),
]
