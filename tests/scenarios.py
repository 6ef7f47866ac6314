"""End to end as a table: rows of commands as a user types them, and what the run must be in the end.

A line of a row is `$ COMMAND` (run in the row's own folder), or one of the events in `_EVENTS`. Rows with a cluster get
one of their own (tests/slurm), so several rows run at a time. tests/test_scenarios.py runs them; the block of each row
is printed with its commands on top, ready to paste.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster

TINY = "$ hpc submit tiny.yaml launch.cluster=slurm"
WHOLE_RUN_S = 240  # of a machine that others use; a row takes 15 to 45 s


@dataclass(frozen=True)
class Row:
    """One scenario. `weights` names the row whose final weights it must equal, byte for byte."""

    name: str
    tells: str
    script: str
    cluster: dict[str, Any] | None = None
    state: str = "finished"
    attempts: int = 1
    causes: tuple[str, ...] = ()
    weights: str | None = None


ROWS = [
    Row(
        "pack",
        "scans and a table into one HDF5 file, its checksums compared",
        "$ hpc pack scans/*.nii -o packed.h5 --labels scans/labels.csv --split 70/15/15\n"
        "$ hpc inspect packed.h5 --verify --png montage.png",
        state="no run",
    ),
    Row(
        "one-task",
        "an undisturbed run here, in the foreground",
        "$ hpc train tiny.yaml launch.cluster=local",
    ),
    Row(
        "two-tasks",
        "an undisturbed run of two ranks here",
        "$ hpc train tiny.yaml launch.tasks_per_node=2 launch.cpus=2",
    ),
    Row(
        "local-stop",
        "submitit's local executor, stopped with USR2 in mid-epoch, goes on by itself",
        "$ hpc submit tiny.yaml launch.cluster=local\nwait for step 50\nsignal USR2\nwait for end",
        attempts=2,
        causes=("SIGUSR2",),
        weights="one-task",
    ),
    Row(
        "local-cancel",
        "cancelled as it starts: it stops, and does not come back",
        "$ hpc submit tiny.yaml launch.cluster=local\nwait for attempt\n$ hpc cancel tiny\nwait for silence\n$ hpc ls",
        state="cancelled",
        causes=("SIGTERM",),
    ),
    Row(
        "local-kill",
        "kill -9 of the batch shell: the ranks save and leave; resume goes on",
        "$ hpc submit tiny.yaml launch.cluster=local\nwait for step 50\nsignal KILL\nwait for silence\n"
        "$ hpc resume tiny\nwait for end",
        attempts=2,
        causes=("SIGTERM",),
        weights="one-task",
    ),
    Row(
        "preempted-at-once",
        "GraceTime 0: SIGTERM to shell and tasks; SLURM requeues, we do not",
        f"{TINY} launch.partition=gpu\nwait for step 50\npreempt\nwait for requeue\n$ hpc ls\nwait for end",
        cluster={},
        attempts=2,
        causes=("SIGTERM",),
        weights="one-task",
    ),
    Row(
        "preempted-with-grace",
        "GraceTime 8: SIGTERM to the tasks only; the tail requeues",
        f"{TINY} launch.partition=grace\nwait for step 50\npreempt\nwait for requeue\nwait for end\n$ hpc show tiny",
        cluster={},
        attempts=2,
        causes=("SIGTERM",),
        weights="one-task",
    ),
    Row(
        "two-nodes",
        "two ranks on two nodes, preempted with grace",
        f"{TINY} launch.nodes=2 launch.partition=grace\nwait for step 50\npreempt\nwait for requeue\nwait for end",
        cluster={},
        attempts=2,
        causes=("SIGTERM",),
        weights="two-tasks",
    ),
    Row(
        "time-limit",
        "USR2 ahead of the time limit: saved and requeued, never TIMEOUT",
        f"{TINY} launch.time=60s\nfreeze at step 50\nwait for requeue\nmore time\nwait for end",
        cluster={},
        attempts=2,
        causes=("SIGUSR2",),
        weights="one-task",
    ),
    Row(
        "scancel",
        "a cancelled job saves and never comes back; resume brings it back",
        f"{TINY}\nwait for step 50\nscancel\nwait for the job to go\n$ hpc ls\nexpect attempts 1\n"
        "$ hpc resume tiny\nwait for end",
        cluster={},
        attempts=2,
        causes=("SIGTERM",),
        weights="one-task",
    ),
    Row(
        "hpc-cancel",
        "hpc cancel ends a run for good",
        f"{TINY}\nwait for step 50\n$ hpc cancel tiny\nwait for the job to go\n$ hpc ls",
        cluster={},
        state="cancelled",
        causes=("SIGTERM",),
    ),
    Row(
        "hand-made",
        "sbatch of the run's own script by hand is the same run",
        f"partition gpu DOWN\n{TINY}\n$ hpc cancel tiny\nwait for the job to go\npartition gpu UP\n"
        "sbatch by hand\nwait for end",
        cluster={},
        weights="one-task",
    ),
    Row(
        "no-requeue",
        "where requeue is refused, the same script is submitted once more, under the same token",
        f"partition gpu DOWN\n{TINY}\n$ hpc cancel tiny\nwait for the job to go\npartition gpu UP\n"
        "$ sed -i s/--requeue/--no-requeue/ runs/*/job.sbatch\n"
        "sbatch by hand\nwait for step 50\nsignal USR2\nwait for end\n$ hpc ls",
        cluster={},
        attempts=2,
        causes=("SIGUSR2",),
        weights="one-task",
    ),
]


@dataclass
class Playing:
    """A row as it runs: its folder, its cluster, what it printed."""

    row: Row
    folder: Path
    goldens: dict[str, "Future[Playing]"]
    cluster: Cluster | None = None
    log: list[str] = field(default_factory=list)
    by_hand: str = ""

    @property
    def run(self) -> Path:
        return max((self.folder / "runs").glob("tiny-*"), key=lambda path: path.stat().st_mtime)

    def read(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads((self.run / name).read_text()))
        except (OSError, ValueError):
            return {}

    @property
    def job(self) -> str:
        return self.by_hand or str(self.read("submit.json")["job"])

    def environment(self) -> dict[str, str]:
        own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        return {**(self.cluster.environment() if self.cluster else os.environ), **own}

    def command(self, text: str) -> None:
        started = time.monotonic()
        done = subprocess.run(text, shell=True, cwd=self.folder, env=self.environment(), capture_output=True, text=True)
        self.log += [f"$ {text}   # {time.monotonic() - started:.1f} s", done.stdout + done.stderr]
        assert done.returncode == 0, f"{text}: exit code {done.returncode}\n{self.block()}"

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = WHOLE_RUN_S) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}\n{self.block()}"
            time.sleep(0.1)
        self.log.append(f"# {what}")

    def block(self) -> str:
        """Commands and output of the row, then what its tasks wrote."""
        logs = sorted(self.folder.glob("runs/*/logs/*_log.*"))
        told = [f"--- {path.name}\n{path.read_text()}" for path in logs if path.stat().st_size]
        cluster = [self.cluster.evidence()] if self.cluster and self.cluster.daemons else []
        return "\n".join([f"===== {self.row.name}: {self.row.tells}", *self.log, *told, *cluster])

    def weights(self) -> str:
        final = max(self.run.glob("checkpoints/g*"), key=lambda path: path.name.split("-s")[1])
        return hashlib.sha256((final / "model.safetensors").read_bytes()).hexdigest()


def _queue(play: Playing, wanted: str) -> bool:
    assert play.cluster
    answer = play.cluster.run("squeue", "-h", "--states=all", "-j", play.job, "-o", "%T", check=False).stdout.strip()
    return answer in wanted.split("|")


def _release(play: Playing) -> None:
    """SLURM holds a requeued job back for two minutes."""
    assert play.cluster
    play.wait(lambda: _queue(play, "PENDING"), "the job is pending again")
    play.cluster.release(play.job)


def _freeze(play: Playing, step: str) -> None:
    """Stop the tasks' clock until SLURM signals them (CONT, then USR2): the run need not last as long as its limit.

    SLURM may send USR2 up to 60 s early, even before the first step.
    """

    def there() -> bool:
        attempted = list(play.run.glob("events/001-*"))
        return int(play.read("state.json").get("step", 0)) >= int(step) or bool(attempted and _queue(play, "PENDING"))

    play.wait(there, f"step {step}, or stopped before")
    for rank in _ranks(play):
        os.kill(rank, signal.SIGSTOP)


def _ranks(play: Playing) -> list[int]:
    """Pids of the run's ranks on this machine."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if _is_rank(path, play.run)]


def _is_rank(cmdline: Path, run: Path) -> bool:
    try:
        return cmdline.read_bytes().split(b"\0")[1:5] == [b"-u", b"-m", b"jobs.run", str(run).encode()]
    except OSError:
        return False


def _signal(play: Playing, name: str) -> None:
    if play.cluster:
        play.cluster.run("scancel", f"--signal={name}", play.job)
    else:
        subprocess.run(["kill", f"-{name}", str(play.read("state.json")["pid"])], check=True)


def _by_hand(play: Playing) -> None:
    assert play.cluster
    play.by_hand = play.cluster.submit(play.run / "job.sbatch", cwd=play.folder)
    play.log.append(f"$ sbatch runs/{play.run.name}/job.sbatch\nSubmitted batch job {play.by_hand}")


def _expect_attempts(play: Playing, count: str) -> None:
    time.sleep(2)
    found = len(list((play.run / "events").glob("*-shell.jsonl")))
    assert found == int(count), f"{found} attempts, not {count}\n{play.block()}"


def _cluster(play: Playing) -> Cluster:
    assert play.cluster
    return play.cluster


_EVENTS: dict[str, Callable[..., Any]] = {
    r"wait for step (\d+)": lambda play, step: play.wait(
        lambda: int(play.read("state.json").get("step", 0)) >= int(step), f"step {step}"
    ),
    r"wait for attempt": lambda play: play.wait(lambda: play.read("state.json"), "the first attempt has begun"),
    r"wait for silence": lambda play: play.wait(lambda: not _ranks(play), "no rank is left"),
    r"wait for end": lambda play: play.wait(lambda: play.read("result.json"), "result.json is there"),
    r"wait for requeue": _release,
    r"wait for the job to go": lambda play: play.wait(lambda: _queue(play, "CANCELLED|"), "the job is gone"),
    r"preempt": lambda play: _cluster(play).preempt(play.job),
    r"scancel": lambda play: _cluster(play).run("scancel", play.job),
    r"freeze at step (\d+)": _freeze,
    r"signal (\w+)": _signal,
    r"sbatch by hand": _by_hand,
    r"partition (\w+) (\w+)": lambda play, name, state: _cluster(play).run(
        "scontrol", "update", f"PartitionName={name}", f"State={state}"
    ),
    r"more time": lambda play: _cluster(play).run("scontrol", "update", f"JobId={play.job}", "TimeLimit=30"),
    r"expect attempts (\d+)": _expect_attempts,
}


def play(row: Row, folder: Path, goldens: "dict[str, Future[Playing]]") -> Playing:
    """Run one row from its first line to its last. AssertionError carries the block."""
    playing = Playing(row, folder, goldens)
    if row.cluster is not None:
        playing.cluster = Cluster(**row.cluster).start()
    try:
        for line in row.script.splitlines():
            _line(playing, line)
        _check(playing)
    finally:
        if playing.cluster:
            playing.cluster.stop()
    return playing


def _line(playing: Playing, line: str) -> None:
    if line.startswith("$ "):
        playing.command(line.removeprefix("$ "))
        return
    for pattern, event in _EVENTS.items():
        if match := re.fullmatch(pattern, line):
            playing.log.append(f"# {line}")
            event(playing, *match.groups())
            return
    raise AssertionError(f"{line!r} is no event; known: {', '.join(_EVENTS)}")


def _check(playing: Playing) -> None:
    row = playing.row
    if row.state == "no run":
        return
    run = playing.run
    command = ["hpc", "ls", "--json"]
    environ = playing.environment()
    shown = subprocess.run(command, cwd=playing.folder, env=environ, capture_output=True, text=True, check=True)
    status = next(line for line in json.loads(shown.stdout) if line["run"] == run.name)
    assert status["state"] == row.state, f"state {status['state']}, not {row.state}\n{playing.block()}"
    assert row.attempts == status["attempts"], f"{status['attempts']} attempts\n{playing.block()}"
    lines = [json.loads(line) for path in run.glob("events/*") for line in path.read_text().splitlines()]
    causes = tuple(line["cause"] for line in lines if line["event"] == "signal")
    assert causes == row.causes, f"stopped by {causes}, not {row.causes}\n{playing.block()}"
    if row.state == "finished":
        steps = [line["step"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
        assert steps == sorted(set(steps)), f"an epoch was evaluated twice: {steps}\n{playing.block()}"
    if row.weights:
        golden = playing.goldens[row.weights].result(timeout=WHOLE_RUN_S * 2)
        assert playing.weights() == golden.weights(), f"the weights differ from {row.weights}\n{playing.block()}"
