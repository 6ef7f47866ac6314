"""One run of a drill as it goes: at chosen steps it is stopped or killed, and it is seen when it is back at its work.

All is done from outside, as a cluster does it: on SLURM by scancel and scontrol, here by signals to the ranks.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path

from hpc import slurm, stepledger
from hpc.errors import UserError
from hpc.ledger import Seen
from hpc.preempt import NOTICE
from hpc.rundir import RunDir, read_json

FINISHED = "finished"
_HELD = "BeginTime"
"""SLURM's reason of a job that it makes wait after a requeue."""
_SOON = "now+1"
_AGAIN_S = 5.0
"""After so long a job that is still made to wait is moved again: its own script may have put its start off."""
_HEARD_S = 2.0
"""After so long a signal has reached its run; one step may be under way then, still."""
_GONE = 2
"""So many looks in a row that find a run neither alive nor finished make sure that it has ended."""


class Road(StrEnum):
    """How a run is stopped."""

    NOTICE = "USR2"
    TERM = "SIGTERM"
    REQUEUE = "requeue"
    KILL = "SIGKILL"

    @property
    def words(self) -> str:
        return _WORDS[self]

    @property
    def clean(self) -> bool:
        """Whether the run hears of it, and saves."""
        return self is not Road.KILL


_WORDS = {
    Road.NOTICE: "USR2 to ranks",
    Road.TERM: "SIGTERM to ranks",
    Road.REQUEUE: "user's requeue",
    Road.KILL: "SIGKILL of a rank",
}
_SIGNALS = {Road.NOTICE: NOTICE, Road.TERM: signal.SIGTERM, Road.KILL: signal.SIGKILL}


@dataclass
class Injection:
    """One stop of a run: where it is wanted, and what was seen of it. Times are seconds since 1970."""

    road: Road
    share: float
    """Of the run's steps, at which it is wanted; 0 to 1."""
    generation: int = 0
    """The attempt that was stopped; 0: none."""
    step: int = 0
    """That was done last as the signal was sent."""
    sent: float = 0.0
    back: float | None = None
    """When the next attempt did the first step that was new, or the run was finished."""
    work_s: float | None = None
    """Time that the attempt had spent on the steps that were lost."""
    longest_s: float = 0.0
    """The longest time between two steps of that attempt: a validation, say."""
    ignored: bool = False
    """The attempt went on as if nothing had been sent."""
    refused: str = ""
    """Why it is not possible here."""
    pick: float = 0.0
    """Which of the ranks here is killed, as a share of their number."""
    after_save_s: float | None = None
    """It comes so long after a new checkpoint, where another like it came before: the batch script makes a run wait
    that crashes twice without one."""

    def target(self, total: int) -> int:
        """The step after which it is due, of so many; never the last."""
        return min(max(math.ceil(self.share * total), 1), max(total - 1, 1))


class Steps:
    """Rank 0's steps of one attempt, each with the time at which it was first seen; a file's lines are read once."""

    def __init__(self, run: RunDir, generation: int = 0) -> None:
        self.generation = generation
        self.seen: dict[int, float] = {}
        self._path = stepledger.path(run, generation, 0)
        self._offset = 0

    @property
    def last(self) -> int:
        return next(reversed(self.seen), 0)

    @property
    def longest_s(self) -> float:
        return max((late - early for early, late in pairwise(self.seen.values())), default=0.0)

    def update(self) -> None:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return
        self._offset += len(whole) + bool(whole)
        for line in whole.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # torn
                self.seen[int(json.loads(line)["step"])] = time.time()


@dataclass
class Way:
    """A run with the stops that are in store for it. `advance` does what is due; it never waits."""

    name: str
    run: RunDir
    cluster: str
    injections: list[Injection] = field(default_factory=list)
    words: str = "waits for its turn"
    """What it does now."""
    ended: str = ""
    """finished, or in a sentence what became of it; empty while it runs."""
    total: int = 0
    """Steps of the whole run, 0 until that is known."""

    def __post_init__(self) -> None:
        self.steps = self._before = Steps(self.run)
        self._out: Injection | None = None
        self._hastened = 0.0
        self._gone = 0

    @property
    def sent(self) -> list[Injection]:
        """The stops that were sent."""
        return [one for one in self.injections if one.generation]

    def advance(self) -> None:
        """Look at the run's files, and send the stop that is due."""
        try:
            state = read_json(self.run.state)
        except UserError:
            return
        self._follow(int(state.get("generation", 0)))
        self.total = int(state.get("steps") or self.total)
        finished = self.run.result.exists()
        if self._out:
            self._look_back(self._out, finished)
        elif self.total and not finished and (wanted := self._due()):
            self._send(wanted, str(state.get("job") or ""), int(state["pid"]))
        if finished:
            self.ended = self.words = FINISHED

    def look(self, seen: Seen) -> None:
        """Take note of SLURM's answer, or of the process here; let a requeued job start at once."""
        status = seen.status
        if status.live or status.state == FINISHED:
            self._gone = 0
        else:
            self._gone += 1
            if self._gone >= _GONE and not self.ended:
                self.words = self.ended = " ".join(f"{status.state}: {status.detail}".split())
        if status.state in ("pending", "requeued") and not self._hastened:
            why = f" ({status.detail})" if status.detail else ""
            self.words = f"{'waits for its restart' if self._out else status.state}{why}"
        elif status.detail in ("starting", "training") and not self.sent:
            self.words = status.detail
        if self._out and seen.job and seen.job.state == "PENDING" and seen.job.reason == _HELD:
            self._hasten(seen.job.job)

    def _follow(self, generation: int) -> None:
        """The steps of this attempt; of the one before, what is lost is known once the new one does its first step."""
        self.steps.update()
        if generation == self.steps.generation:
            return
        if self.steps.seen:  # an attempt that failed before its first step changes nothing
            self._before = self.steps
        self.steps = Steps(self.run, generation)
        self.steps.update()

    def _due(self) -> Injection | None:
        wanted = next((one for one in self.injections if not (one.generation or one.refused)), None)
        if not wanted or self.steps.last < wanted.target(self.total):
            return None
        return wanted if wanted.after_save_s is None or self._has_saved(wanted.after_save_s) else None

    def _has_saved(self, since_s: float) -> bool:
        """Whether a new checkpoint is as old as this, or no stop came before."""
        before = max((one.sent for one in self.sent), default=None)
        if before is None:
            return True
        saves = [event for event in self.run.read_events() if event["event"] == "checkpoint"]
        known = max((event["step"] for event in saves if event["time"] < before), default=0)
        new = [event["time"] for event in saves if event["step"] > known]
        return bool(new) and time.time() > min(new) + since_s

    def _send(self, wanted: Injection, job: str, shell: int) -> None:
        now = time.time()
        try:
            if self.cluster == "slurm":
                _send_on_slurm(wanted.road, job)
            elif not _send_here(wanted, shell):
                return  # between two attempts
        except slurm.SlurmError as refusal:
            wanted.refused = self.words = str(refusal)
            return
        wanted.generation, wanted.step, wanted.sent = self.steps.generation, self.steps.last, now
        self._out, self._hastened = wanted, 0.0
        self.words = f"{wanted.road} sent at step {wanted.step}"

    def _look_back(self, out: Injection, finished: bool) -> None:
        """Whether the run is where it was: a new attempt has done a step that the old one had not."""
        came = self.steps.generation > out.generation and self.steps.last > self._before.last
        if not (came or finished):
            return
        out.back, self._out = time.time(), None
        out.longest_s = self._before.longest_s if self.steps.generation > out.generation else self.steps.longest_s
        if came:
            begun = self._before.seen
            first = next(iter(self.steps.seen)) - 1
            out.work_s = max(out.sent - begun.get(first, next(iter(begun.values()))), 0.0)
        elif self.steps.generation == out.generation:
            out.ignored = sum(seen > out.sent + _HEARD_S for seen in self.steps.seen.values()) > 1
        self.words = f"back after {out.back - out.sent:.1f} s"

    def _hasten(self, job: str) -> None:
        """SLURM makes a requeued job wait for two minutes; its owner may move that."""
        if time.time() < self._hastened + _AGAIN_S:
            return
        self._hastened = time.time()
        try:
            slurm.update(job, StartTime=_SOON)
            self.words = "waits for its restart (its start was moved to now)"
        except slurm.SlurmError as refusal:
            self.words = f"waits for its restart, two minutes as a rule (it cannot be moved: {refusal})"


def _send_on_slurm(road: Road, job: str) -> None:
    """Raises SlurmError."""
    if road is Road.REQUEUE:
        slurm.requeue(job)
    else:
        slurm.send(job, _SIGNALS[road].name)


def _send_here(wanted: Injection, shell: int) -> bool:
    """False where there is no rank now."""
    ranks = _ranks(shell)
    if wanted.road is Road.KILL and ranks:
        ranks = [ranks[int(wanted.pick * len(ranks))]]
    for pid in ranks:
        with suppress(ProcessLookupError):  # it has ended just now
            os.kill(pid, _SIGNALS[wanted.road])
    return bool(ranks)


def _ranks(shell: int) -> list[int]:
    """What hpc.localstep, a child of the batch shell, has started."""
    parents = dict(_parents())
    return sorted(pid for pid, parent in parents.items() if parents.get(parent) == shell and _is_rank(pid))


def _is_rank(pid: int) -> bool:
    try:
        return b"jobs.run" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _parents() -> Iterator[tuple[int, int]]:
    """Each process of this machine with its parent."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            yield int(path.parent.name), int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            continue


def clean_stops(roads: Sequence[Road], draw: random.Random) -> list[Injection]:
    """Each road once, in the parts of a run that follow each other, somewhere in its own part."""
    return [Injection(road, (part + draw.random()) / len(roads)) for part, road in enumerate(roads)]


def kills(count: int, draw: random.Random, every_s: float) -> list[Injection]:
    """At random steps, and at random times between two saves, which are so far apart."""
    shares = sorted(draw.random() for _ in range(count))
    return [Injection(Road.KILL, share, pick=draw.random(), after_save_s=every_s * draw.random()) for share in shares]
