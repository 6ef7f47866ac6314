"""E4, G5, G6, G10: two starts of one run, and what others on the machine may do to it."""

import subprocess
import sys
from pathlib import Path

from tests.faults.fault import Fault
from tests.faults.rows import at_most_an_interval, scripted, within
from tests.playing import Playing

ROOT = Path(__file__).resolve().parent.parent.parent

HERE = "$ hpc submit tiny.yaml launch.cluster=local"


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
    aside = "..bad-nodes.json.guessed"
    names = (".bad-nodes.lock", ".bad-nodes.json", aside)
    code = (
        "import pathlib, secrets, sys; from hpc import badnodes; runs, ours, name = map(pathlib.Path, sys.argv[1:])\n"
        "secrets.token_hex = lambda size: 'guessed'\n"  # the worst case: the link is where the file is made aside
        "(runs / name).symlink_to(ours)\n"
        "badnodes.remember(runs, 'cluster', 'run', {'node0': 'no GPU'})"
    )
    for name in names:
        runs = folder / f"runs{name}"
        runs.mkdir(mode=0o777)
        command = [sys.executable, "-c", code, runs, ours, name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert ours.read_text() == "ours\n", f"written through a link, {name}\n{done.stderr}"
        refused = (name, "Error" in done.stderr) in ((".bad-nodes.lock", True), (aside, True))
        assert refused or (runs / ".bad-nodes.json").is_file(), f"nothing is remembered, {name}\n{done.stderr}"
        assert not (runs / ".bad-nodes.json").is_symlink(), f"the link is still there, {name}\n{done.stderr}"
    return f"{len(names)} links, 0 followed"


STARTS = [
    scripted(
        "E4 G5",
        "the script started twice; all killed, and the lease another host's: fresh, then 61 s old; umask 000, a script "
        "that the group may write, another user's checkpoint",
        "the second start names the holder within 5 s, a stale lease is taken over, at most one interval lost; the run "
        "is its owner's alone, and what others could have changed is refused",
        "$ umask 000; hpc submit tiny.yaml launch.cluster=local\nwait for step 60..100\n"
        "a second start is refused: is held by process\nall of it is killed\n"
        "the lease is elsewhere's, 50 s old\na second start is refused: on elsewhere\n"
        '$ test -z "$(find runs/tiny-* -maxdepth 0 -perm /077)"\n'
        '$ test -z "$(find runs/*/code runs/*/job.sbatch runs/*/checkpoints/ -perm /022)"\n'
        "$ chmod g+w runs/*/job.sbatch\na second start is refused: can be written by others (mode 0620)\n"
        "$ chmod g-w runs/*/job.sbatch\n$ chown -R nobody runs/*/checkpoints/g*\n"
        "the lease is elsewhere's, 61 s old\n$ bash runs/*/job.sbatch 2>&1 | grep nobody\n"
        "$ chown -R root runs/*/checkpoints/g*\n$ bash runs/*/job.sbatch",
        *(_in_time, at_most_an_interval),
        root=True,
        attempts=3,
        weights="one-task",
        lost=None,
    ),
    Fault(
        "G6",
        "links to a file of ours planted as the list of bad nodes, its lock and its new text, in a group's folder",
        "nothing is written through a link",
        _links,
        soak=20,
    ),
    scripted(
        "G10 C5",
        "somebody listens where two ranks are to meet, and at the next port; then SIGKILL of rank 1",
        "they meet at the third; the step fails without a hang and is started again; at most one interval lost",
        f"{HERE} launch.tasks_per_node=2 launch.cpus=2\nothers take 2 ports\nwait for step 60..100\n"
        "signal rank 1 KILL\nwait for end",
        *(_met_elsewhere, at_most_an_interval),
        attempts=2,
        weights="two-tasks",
        lost=None,
    ),
]
