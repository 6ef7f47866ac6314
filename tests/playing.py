"""What a row of tests/scenarios.py may say: commands, events, and how the end is checked."""

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

WHOLE_RUN_S = 240  # of a machine that others use; a row takes 15 to 45 s


@dataclass(frozen=True)
class Row:
    """One scenario. `weights` names the row whose final weights it must equal, byte for byte."""

    name: str
    tells: str
    script: str
    cluster: dict[str, Any] | None = None
    state: str = "finished"
    attempts: int | tuple[int, ...] = 1
    """Of the run; of each run where there are several."""
    causes: tuple[str, ...] = ()
    """What its attempts were stopped by; where there are several runs, each attempt but the last by the one named."""
    weights: str | None = None
    soak: bool = False
    """Long: runs under `make soak` only."""


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

    @property
    def runs(self) -> list[Path]:
        """All runs; of a sweep the rows in their order."""
        sweeps = [path.parent for path in (self.folder / "runs").glob("*/rows.txt")]
        rows = [sweep / name for sweep in sweeps for name in (sweep / "rows.txt").read_text().split()]
        return rows + [path.parent for path in sorted((self.folder / "runs").glob("*/experiment.yaml"))]

    def row_of(self, number: str) -> Path:
        return self.runs[int(number)]

    def read(self, name: str, run: Path | None = None) -> dict[str, Any]:
        try:
            return dict(json.loads(((run or self.run) / name).read_text()))
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

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        seconds = WHOLE_RUN_S * (5 if self.row.soak else 1)
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}\n{self.block()}"
            time.sleep(0.1)
        self.log.append(f"# {what}")

    def block(self) -> str:
        """Commands and output of the row, then what its tasks wrote."""
        logs = sorted(self.folder.glob("runs/**/logs/*_log.*"))
        told = [f"--- {path.name}\n{path.read_text()}" for path in logs if path.stat().st_size]
        cluster = [self.cluster.evidence()] if self.cluster and self.cluster.daemons else []
        return "\n".join([f"===== {self.row.name}: {self.row.tells}", *self.log, *told, *cluster])

    def weights(self, run: Path) -> str:
        final = max(run.glob("checkpoints/g*"), key=lambda path: path.name.split("-s")[1])
        return hashlib.sha256((final / "model.safetensors").read_bytes()).hexdigest()


def _result(play: Playing, run: Path) -> bool:
    """Whether a run is finished; one that has failed will never be."""
    state = play.read("state.json", run)
    told = state.get("reason") if state.get("phase") == "ended" else None  # by the batch script's tail
    assert not told or (run / "result.json").exists(), f"{run.name} failed: {told}\n{play.block()}"
    return (run / "result.json").exists()


def _queue(play: Playing, wanted: str, job: str | None = None) -> bool:
    command = ("squeue", "-h", "--states=all", "-j", job or play.job, "-o", "%T")
    answer = _cluster(play).run(*command, check=False).stdout.strip()
    return answer in wanted.split("|")


def _release(play: Playing, job: str | None = None) -> None:
    """SLURM holds a requeued job back for two minutes."""
    play.wait(lambda: _queue(play, "PENDING", job), "the job is pending again")
    _cluster(play).release(job or play.job)


def _at_step(play: Playing, number: str, step: str) -> None:
    def there() -> bool:
        state = play.read("state.json", play.row_of(number))
        return int(state.get("step", 0)) >= int(step) and state.get("phase") not in ("stopped", "ended")

    play.wait(there, f"row {number} at step {step}")


def _row_job(play: Playing, number: str) -> str:
    return str(play.read("state.json", play.row_of(number))["job"])


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
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if _is_rank(path, play.runs)]


def _is_rank(cmdline: Path, runs: list[Path]) -> bool:
    try:
        words = cmdline.read_bytes().split(b"\0")[1:5]
    except OSError:
        return False
    return words[:3] == [b"-u", b"-m", b"jobs.run"] and words[3] in [str(run).encode() for run in runs]


def _signal(play: Playing, name: str) -> None:
    if play.cluster:
        play.cluster.run("scancel", f"--signal={name}", play.job)
    else:
        subprocess.run(["kill", f"-{name}", str(play.read("state.json")["pid"])], check=True)


def _by_hand(play: Playing) -> None:
    assert play.cluster
    play.by_hand = play.cluster.submit(play.run / "job.sbatch", cwd=play.folder)
    play.log.append(f"$ sbatch runs/{play.run.name}/job.sbatch\nSubmitted batch job {play.by_hand}")


def _submit_meanwhile(play: Playing, command: str) -> None:
    """The controller stops as the command calls sbatch, and is there again before sbatch gives up (9 s)."""
    programs, cluster = play.folder / "programs", _cluster(play)
    programs.mkdir()
    waiting = f'touch "{programs}/now"\nwhile [ ! -e "{programs}/go" ]; do sleep 0.05; done\n'
    test_only = 'case "$*" in *--test-only*) exec /usr/bin/sbatch "$@";; esac\n'
    (programs / "sbatch").write_text(f'#!/bin/sh\n{test_only}{waiting}exec /usr/bin/sbatch "$@"\n')
    (programs / "sbatch").chmod(0o755)
    before = {**play.environment()}
    before["PATH"] = f"{programs}{os.pathsep}{before['PATH']}"
    submitting = subprocess.Popen(command, shell=True, cwd=play.folder, env=before, stdout=subprocess.PIPE, text=True)
    play.wait((programs / "now").exists, "sbatch is called")
    cluster.stop_controller()
    (programs / "go").touch()
    time.sleep(3)
    cluster.start_controller()
    play.log += [f"$ {command}", submitting.communicate(timeout=60)[0]]
    assert submitting.returncode == 0, play.block()


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
    r"wait until none is under way": lambda play: play.wait(lambda: not _live(play), "none is under way"),
    r"wait for end": lambda play: play.wait(lambda: _result(play, play.run), "result.json is there"),
    r"wait for requeue": _release,
    r"wait for the job to go": lambda play: play.wait(lambda: _queue(play, "CANCELLED|PREEMPTED|"), "the job is gone"),
    r"wait for row (\d+)": lambda play, number: play.wait(
        lambda: _result(play, play.row_of(number)), f"row {number} is finished"
    ),
    r"wait for all": lambda play: play.wait(
        lambda: all(_result(play, run) for run in play.runs), "all runs are finished"
    ),
    r"row (\d+) at step (\d+)": _at_step,
    r"preempt row (\d+)": lambda play, number: _cluster(play).preempt(_row_job(play, number)),
    r"requeue row (\d+)": lambda play, number: _release(play, _row_job(play, number)),
    r"cancel row (\d+)": lambda play, number: play.command(f"hpc cancel {play.row_of(number).name}"),
    r"controller stops": lambda play: _cluster(play).stop_controller(),
    r"controller starts": lambda play: _cluster(play).start_controller(),
    r"controller is away during (hpc submit .*)": _submit_meanwhile,
    r"preempt": lambda play: _cluster(play).preempt(play.job),
    r"scancel": lambda play: _cluster(play).run("scancel", play.job),
    r"freeze at step (\d+)": _freeze,
    r"signal (\w+)": _signal,
    r"signal the ranks (\w+)": lambda play, name: [os.kill(pid, signal.Signals[f"SIG{name}"]) for pid in _ranks(play)],
    r"wait for the tail": lambda play: play.wait(
        lambda: play.read("state.json").get("phase") == "stopped", "the batch script's tail has decided"
    ),
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


def _listed(play: Playing) -> list[dict[str, Any]]:
    command, environ = ["hpc", "ls", "--json"], play.environment()
    shown = subprocess.run(command, cwd=play.folder, env=environ, capture_output=True, text=True, check=True)
    return list(json.loads(shown.stdout))


def _live(play: Playing) -> list[str]:
    return [line["run"] for line in _listed(play) if line["state"] in ("running", "pending", "requeued")]


def _check(playing: Playing) -> None:
    row = playing.row
    if row.state == "no run":
        return
    status = {line["run"]: line for line in _listed(playing)}
    runs = playing.runs
    assert sorted(status) == sorted(run.name for run in runs), f"hpc ls shows {sorted(status)}\n{playing.block()}"
    attempts = row.attempts if isinstance(row.attempts, tuple) else (row.attempts,) * len(runs)
    for run, count in zip(runs, attempts, strict=True):
        told = status[run.name]
        assert told["state"] == row.state, f"{run.name}: {told['state']}, not {row.state}\n{playing.block()}"
        assert told["attempts"] == count, f"{run.name}: {told['attempts']} attempts, not {count}\n{playing.block()}"
        _check_run(playing, run, row.causes if len(runs) == 1 else row.causes * (count - 1))


def _check_run(playing: Playing, run: Path, expected: tuple[str, ...]) -> None:
    row = playing.row
    lines = [json.loads(line) for path in run.glob("events/*") for line in path.read_text().splitlines()]
    causes = tuple(line["cause"] for line in lines if line["event"] == "signal")
    assert causes == expected, f"{run.name}: stopped by {causes}, not {expected}\n{playing.block()}"
    metrics = run / "metrics.jsonl"
    if row.state == "finished" and metrics.exists():
        steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines())]
        assert steps == sorted(set(steps)), f"an epoch was evaluated twice: {steps}\n{playing.block()}"
    if row.weights:
        golden = playing.goldens[row.weights].result(timeout=WHOLE_RUN_S * 2)
        same = playing.weights(run) == golden.weights(golden.run)
        assert same, f"{run.name}: the weights differ from {row.weights}\n{playing.block()}"
