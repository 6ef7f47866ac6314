"""Rows of commands as a user types them, and what the run must be in the end (tests/scenarios.py, tests/faults).

A line of a row is `$ COMMAND` (run in the row's own folder), or one of the events of tests/events.py. A row with a
cluster has one of its own (tests/slurm), so that several are played at a time. All that a row types and gets is kept,
with its commands on top, ready to paste.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc import stepledger
from hpc.rundir import RunDir
from tests.slurm.cluster import Cluster

WHOLE_RUN_S = 240  # of a machine that others use; a row takes 15 to 45 s


@dataclass(frozen=True)
class Row:
    """One row. `weights` names the undisturbed run (tests/stage.py) whose steps and final weights it must equal."""

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
    lost: int | None = 0
    """Steps that were done and had to be done again; None: the row says itself how many may be."""
    soak: bool = False
    """Long: runs under `make soak` only."""


@dataclass
class Playing:
    """A row as it runs: its folder, its cluster, what it printed."""

    row: Row
    folder: Path
    undisturbed: Callable[[str], "Playing"] | None = None
    cluster: Cluster | None = None
    log: list[str] = field(default_factory=list)
    by_hand: str = ""
    displacer: str = ""
    when: dict[str, float] = field(default_factory=dict)
    """What happened, by time.time()."""
    taken: list[socket.socket] = field(default_factory=list)
    """Ports that a row keeps from others."""

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

    def events(self, kind: str, run: Path | None = None) -> list[dict[str, Any]]:
        """The run's events of a kind, by time."""
        return [event for event in RunDir(run or self.run).read_events() if event["event"] == kind]

    def step(self, run: Path | None = None) -> int:
        """The last step that the attempt under way has done; 0 before its first, and where there is none."""
        folder = RunDir(run or self.run)
        state = self.read("state.json", folder.path)
        try:
            text = stepledger.path(folder, state.get("generation", 0), 0).read_text()
        except OSError:
            return 0
        if state["phase"] in ("stopped", "ended"):
            return 0
        whole = text.rpartition("\n")[0].rpartition("\n")[2]
        return int(json.loads(whole)["step"]) if whole else 0

    @property
    def job(self) -> str:
        return self.by_hand or str((self.read("submit.json") or self.read("state.json"))["job"])

    def environment(self) -> dict[str, str]:
        own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        return {**(self.cluster.environment() if self.cluster else os.environ), **own}

    def command(self, text: str) -> None:
        started = time.monotonic()
        done = subprocess.run(text, shell=True, cwd=self.folder, env=self.environment(), capture_output=True, text=True)
        self.log += [f"$ {text}   # {time.monotonic() - started:.1f} s", done.stdout + done.stderr]
        assert done.returncode == 0, f"{text}: exit code {done.returncode}\n{self.block()}"

    def wait(self, condition: Callable[[], Any], what: str, often: float = 0.1, run: Path | None = None) -> None:
        """`run`: is under way, and must not end before."""
        seconds = WHOLE_RUN_S * (5 if self.row.soak else 1)
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}\n{self.block()}"
            told = self.read("state.json", run) if run else {}
            ended = told.get("phase") == "ended" and "reason" in told and not condition()  # in the tail's words
            assert not ended, f"{told.get('reason')}, before {what}\n{self.block()}"
            time.sleep(often)
        self.log.append(f"# {what}")

    def block(self) -> str:
        """Commands and output of the row, then what its tasks wrote."""
        cluster = [self.cluster.evidence()] if self.cluster and self.cluster.daemons else []
        return "\n".join([f"===== {self.row.name}: {self.row.tells}", *self.log, self.outputs(), *cluster])

    def outputs(self) -> str:
        """What the tasks of all runs wrote."""
        logs = sorted(self.folder.glob("runs/**/logs/*_log.*"))
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in logs if path.stat().st_size)


def listed(play: Playing) -> list[dict[str, Any]]:
    """What `hpc ls` shows."""
    command, environ = ["hpc", "ls", "--json"], play.environment()
    shown = subprocess.run(command, cwd=play.folder, env=environ, capture_output=True, text=True, check=True)
    return list(json.loads(shown.stdout))
