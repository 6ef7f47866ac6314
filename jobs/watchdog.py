"""A watchdog on every rank: it ends a run that has gone silent, and says which rank and node are behind."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hpc.allocation import Allocation
from hpc.errors import UserError
from hpc.preempt import ExitCode
from hpc.rundir import RunDir, read_json
from hpc.units import percentile
from jobs.lastresort import LastResort

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # its stub leaves it out

_PERIOD_S = 1.0
_LEASE_S = 10.0
"""hpc.attempt takes a holder whose state.json is older than 60 s for dead, where nobody can be asked."""
_WINDOW = 512
"""Step times that the 99th percentile is taken of."""
_TIMES_P99 = 10
_FIRST_STEP_S = 1800.0
"""Compilation and the choice of kernels are part of it."""
_AWAY_S = 2.0
"""A watchdog that was away for longer was stopped with its process (SIGSTOP), or kept from running."""
_LAST_RESORT = 5
"""Times the limit: then the process is ended from outside; its Python cannot run while C holds the lock."""
_LEAVE_S = 30.0
_RECORD_S = 5.0
_STDERR = 2
_KEY = "beat/{}"
_IN_TORCH = ("torch/distributed/", "torch/autograd/")
"""Where a rank is that waits for others: in a collective, or in a backward pass that reduces the gradients."""

UNKNOWN = "unknown"
"""The node of a rank that has never been heard."""
_ROOT = str(Path(__file__).resolve().parent.parent)

Beat = dict[str, Any]


class Watchdog:
    """Ends this rank with exit code 76 when its loop has been silent for longer than allowed.

    Allowed are max(`hang_after`, 10 times the 99th percentile of the step times so far) seconds without a `beat`, from
    the end of the first step on; within `phase`, at any time, that phase's own limit. Another rank whose limit has not
    passed yet (it saves, it evaluates) is waited for. Before it leaves, a watchdog writes the stacks of all threads to
    stderr and the event `hang`, whose `stuck` names rank and node of those that the others wait for. Nothing that fails
    there keeps it from leaving; the other ranks are left to srun --kill-on-bad-exit, or to hpc.localstep.

    A process that was stopped and continued starts a new silence. Where C code holds Python's lock for ever, no thread
    of ours runs: the other ranks name this one, and jobs/lastresort.py ends it after 5 times the limit (by SIGABRT).

    On rank 0 it also keeps the run's lease: state.json, which is written at steps alone, is touched every 10 s.
    """

    def __init__(self, run: RunDir, allocation: Allocation, hang_after: float, peers: Peers | None = None) -> None:
        """`hang_after` in seconds; `peers` is how the ranks hear of each other, None for a single rank."""
        self._run, self._allocation, self._hang_after, self._peers = run, allocation, hang_after, peers
        self._period = min(_PERIOD_S, hang_after / 12)
        self._patience = 3 * self._period
        self._first: int | None = None
        self._step: int | None = None
        self._armed = False
        self._timed = False
        self._times: deque[float] = deque(maxlen=_WINDOW)
        self._phases: list[tuple[str, float]] = []
        self._heard = self._last_tick = time.monotonic()
        self._ticks = 0
        self._leaves = False
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._last_resort: LastResort | None = None

    # What the loop says.

    def start(self) -> Watchdog:
        """Watch the thread that made this watchdog, until `close`."""
        tasks: list[tuple[float, Callable[[], None]]] = [(self._period, self._watch)]
        if self._peers:
            tasks.append((self._period, self._talk))
        if self._allocation.rank == 0:
            tasks.append((_LEASE_S, self._keep_lease))
        with suppress(OSError):  # as where a user may start no more processes
            self._last_resort = LastResort()
        self._heard = self._last_tick = time.monotonic()
        self._threads = [
            threading.Thread(target=self._each, args=task, name=f"watchdog{task[1].__name__}", daemon=True)
            for task in tasks
        ]
        for thread in self._threads:
            thread.start()
        return self

    def beat(self, step: int) -> None:
        """A sign of life, at each boundary: `step` steps are done."""
        now = time.monotonic()
        if self._first is None:
            self._first = step
        self._armed = self._armed or step > self._first
        if self._timed and self._step is not None and step > self._step:
            self._times.append(now - self._heard)
        self._heard, self._step, self._timed = now, step, True

    @contextmanager
    def phase(self, name: str, limit_s: float) -> Iterator[None]:
        """Allow `limit_s` seconds between signs of life in here; its beginning and its end are such signs."""
        self._turn(lambda: self._phases.append((name, limit_s)))
        try:
            yield
        finally:
            self._turn(lambda: self._phases.pop())

    def _turn(self, to_another: Callable[[], object]) -> None:
        self._heard, self._timed = time.monotonic(), False  # first: no limit is held against the other phase's silence
        to_another()
        self._arm_last_resort()

    def close(self) -> None:
        """Stop watching; joins its threads (one that waits for a dead server is left behind)."""
        self._closed.set()
        for thread in self._threads:
            thread.join(_RECORD_S)
        self._threads = []
        if self._last_resort:
            self._last_resort.close()

    # What the watchdog does.

    def _each(self, period: float, task: Callable[[], None]) -> None:
        while not self._closed.wait(period):
            task()

    def _limit(self) -> tuple[str, float]:
        """The phase, and how long it may be silent."""
        with suppress(IndexError):  # it ends meanwhile
            return self._phases[-1]
        if not self._armed:
            return "first step", _FIRST_STEP_S
        return "training", max(self._hang_after, _TIMES_P99 * percentile(list(self._times), 0.99))

    def _watch(self) -> None:
        now = time.monotonic()
        if now - self._last_tick > self._period + _AWAY_S:
            self._heard = now
        self._last_tick = now
        self._arm_last_resort()
        phase, limit = self._limit()
        silent = now - self._heard
        if silent > limit and not (self._peers and self._peers.busy(self._patience)):
            self._fire(phase, limit, silent)

    def _arm_last_resort(self) -> None:
        if self._last_resort:
            self._last_resort.allow(_LAST_RESORT * self._limit()[1])

    def _talk(self) -> None:
        """Tell the other ranks of ours, and hear of them once we are silent; a thread's, for a store may not answer."""
        assert self._peers
        self._ticks += 1
        phase, limit = self._limit()
        silent = time.monotonic() - self._heard
        beat: Beat = {"node": self._allocation.node, "step": self._step, "phase": phase, "tick": self._ticks}
        beat["left"] = round(limit - silent, 3)
        suspicious = silent > limit / 2
        if suspicious:
            beat["at"], beat["waits"] = place(sys._current_frames().get(self._main))
        if self._leaves:
            beat["leaves"] = True
        self._peers.tell(beat, listen=suspicious)

    def _keep_lease(self) -> None:
        with suppress(OSError, UserError):
            held = read_json(self._run.state)
            ours = held.get("generation") == self._allocation.generation
            if ours and held.get("phase") not in ("ended", "stopped"):
                os.utime(self._run.state)

    def _fire(self, phase: str, limit: float, silent: float) -> None:
        """Stacks, word, and out: exit code 76 whatever fails, and soon whatever blocks."""
        faulthandler.dump_traceback_later(_LEAVE_S, exit=True, file=_STDERR)
        self._leaves = True
        stuck = self._peers.stuck(self._patience) if self._peers else [self._alone(phase)]
        who = self._allocation
        with suppress(OSError):
            names = " and ".join(f"rank {one['rank']} on {one['node']} ({one['why']})" for one in stuck)
            line = (
                f"\nrank {who.rank} on {who.node}: nothing has happened for {silent:.1f} s in {phase} after step "
                f"{self._step} (limit {limit:.1f} s); behind: {names}. All threads:\n"
            )
            os.write(_STDERR, line.encode())
            faulthandler.dump_traceback(file=_STDERR)
        fields = {"rank": who.rank, "node": who.node, "phase": phase, "step": self._step, "limit": round(limit, 3)}
        fields |= {"silent": round(silent, 3), "stuck": stuck}
        record = threading.Thread(target=self._record, kwargs=fields, daemon=True)
        record.start()
        record.join(_RECORD_S)
        if self._peers:  # the others judge by what they hear of each other: rank 0 hosts that
            time.sleep(self._patience)
        os._exit(ExitCode.HANG)

    def _alone(self, phase: str) -> dict[str, Any]:
        where, _ = place(sys._current_frames().get(self._main))
        beat = {"node": self._allocation.node, "step": self._step, "phase": phase, "at": where}
        return _stuck(self._allocation.rank, beat, "it hears of no other rank")

    def _record(self, **fields: Any) -> None:
        try:
            self._run.event("hang", f"rank{self._allocation.rank}", self._allocation.generation, **fields)
        except OSError as error:
            with suppress(OSError):
                os.write(_STDERR, f"the hang is not recorded: {error}\n".encode())


@dataclass(frozen=True)
class Heard:
    """The last word of a rank, and since when (our clock) it has not changed."""

    beat: Beat
    since: float


class Peers:
    """What the ranks know of each other, through the store of their process group, by a connection of its own.

    A store whose host is stopped never answers, whatever its timeout: `tell` is for a thread that may wait for ever.
    """

    def __init__(self, store: TCPStore, allocation: Allocation) -> None:
        """Connect to a store that `rendezvous.connect` returned."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self._connection = TCPStore(store.host, store.port, is_master=False, timeout=timedelta(seconds=_LEAVE_S))
        self._rank, self._world = allocation.rank, allocation.world_size
        self._table: dict[int, Heard] = {}
        self._asked: float | None = None
        self._answered = 0.0
        self._listening = self._lost = False

    def tell(self, beat: Beat, listen: bool) -> None:
        """Leave word of this rank, and hear the others where that matters (and once, for the names of their nodes)."""
        if self._lost:
            return
        try:
            self._connection.set(_KEY.format(self._rank), json.dumps(beat))
            if listen or not all(self._table.get(rank, Heard({}, 0)).beat for rank in range(self._world)):
                self._listen(anew=listen and not self._listening)
            self._listening = listen
        except RuntimeError:  # rank 0 has left, or its node has
            self._lost = True

    def _listen(self, anew: bool) -> None:
        self._asked = time.monotonic()
        ranks = list(range(self._world))
        if not self._connection.check([_KEY.format(rank) for rank in ranks]):
            ranks = [rank for rank in ranks if self._connection.check([_KEY.format(rank)])]
        texts = dict(zip(ranks, self._connection.multi_get([_KEY.format(rank) for rank in ranks]), strict=True))
        now = time.monotonic()
        beats = {rank: json.loads(texts.get(rank, b"{}")) for rank in range(self._world)}
        self._table = {
            rank: Heard(beat, now if anew or (old := self._table.get(rank)) is None or old.beat != beat else old.since)
            for rank, beat in beats.items()
        }
        self._asked, self._answered = None, now

    def busy(self, patience: float) -> bool:
        """Whether another rank lives and may still take its time: it saves, or evaluates."""
        others = [heard for rank, heard in self._table.items() if rank != self._rank and self._listening]
        return any(
            heard.beat.get("left", 0) > 0 and self._answered - heard.since <= patience and "leaves" not in heard.beat
            for heard in others
        )

    def stuck(self, patience: float) -> list[dict[str, Any]]:
        """The ranks that the others wait for: rank, node, step, phase, place in the code where known, and why."""
        asked = self._asked
        if asked is not None and not self._lost and time.monotonic() - asked > patience:
            return [self._host_of_store("its store does not answer")]
        found = behind(self._as_heard(), self._answered, patience) if self._listening else {}
        if self._lost and len(found) in (0, self._world):
            return [self._host_of_store("it has left")]
        return [_stuck(rank, self._table[rank].beat, why) for rank, why in found.items()]

    def _as_heard(self) -> dict[int, Heard]:
        """What is known, but that we live: on a busy node our own words may be late, too."""
        own = {rank: Heard(heard.beat, self._answered) for rank, heard in self._table.items() if rank == self._rank}
        return {**self._table, **own}

    def _host_of_store(self, why: str) -> dict[str, Any]:
        node = self._table.get(0, Heard({}, 0)).beat.get("node", UNKNOWN)
        return _stuck(0, {"node": node}, why)


def behind(table: Mapping[int, Heard], now: float, patience: float) -> dict[int, str]:
    """Which ranks the others wait for, and why we think so; all of them where none stands out.

    First those without a sign of life (a rank that has said that it leaves owes none), then those with the fewest
    steps, then those that are in no collective while others are. `now` is when the table was read; `patience` how long
    a word may stay the same, both in seconds.
    """
    ages = {rank: now - heard.since for rank, heard in table.items() if "leaves" not in heard.beat}
    longest = max(ages.values(), default=0.0)
    if quiet := [rank for rank, age in ages.items() if age > max(patience, longest / 2)]:
        return dict.fromkeys(quiet, "no sign of life")
    steps = {rank: -1 if heard.beat.get("step") is None else heard.beat["step"] for rank, heard in table.items()}
    last = [rank for rank, step in steps.items() if step == min(steps.values())]
    if len(last) < len(table):
        return {rank: f"{max(steps.values()) - steps[rank]} steps behind" for rank in last}
    elsewhere = [rank for rank, heard in table.items() if not heard.beat.get("waits")]
    if 0 < len(elsewhere) < len(table):
        return dict.fromkeys(elsewhere, "the others wait in a collective")
    return dict.fromkeys(table, "no rank stands out")


def _stuck(rank: int, beat: Beat, why: str) -> dict[str, Any]:
    known = {key: beat[key] for key in ("step", "phase", "at") if beat.get(key) is not None}
    return {"rank": rank, "node": beat.get("node", UNKNOWN), **known, "why": why}


def place(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is (`loader.py:120 __next__, threading.py:327 wait`), and whether it waits for other ranks there.

    First the innermost line of this project's code, then the innermost of all.
    """
    innermost, ours, waits = "", "", False
    while frame:
        code = frame.f_code
        at = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
        innermost = innermost or at
        if code.co_filename.startswith(_ROOT) and "site-packages" not in code.co_filename:
            ours = ours or at
        waits = waits or any(part in code.co_filename for part in _IN_TORCH)
        frame = frame.f_back
    return ", ".join(dict.fromkeys(filter(None, [ours, innermost]))), waits
