"""The parts of each training step by time: waiting for data, host, forward, backward, optimizer, saving.

    with clock.phase("forward"): ...            # around the work
    clock.end(loader.waited)                    # the step is done
    clock.flush(engine)                         # mean seconds of the steps since the last flush

On CUDA forward, backward and optimizer are timed by events on the current stream: they are recorded as the work is
queued, and read one step later at the earliest, when the device has passed them, so nothing waits for the device.
What no part has taken is the host's: Python, normalising and augmenting, logging, agreeing with other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from hpc.steptimes import PHASES, STEP

if TYPE_CHECKING:
    from jobs.engine import Engine

_ON_DEVICE = ("forward", "backward", "optimizer")
_MEASURED = tuple(phase for phase in PHASES if phase != "host")
_Kind = type[BaseException] | None


class _Timed:
    """A part of a step that the CPU works off."""

    __slots__ = ("_began", "_name", "_spent")

    def __init__(self, spent: dict[str, float], name: str) -> None:
        self._spent, self._name, self._began = spent, name, 0.0

    def __enter__(self) -> None:
        self._began = perf_counter()

    def __exit__(self, kind: _Kind, error: BaseException | None, trace: TracebackType | None) -> None:
        self._spent[self._name] += perf_counter() - self._began


class _Recorded:
    """A part that is queued for a GPU: an event before it, an event after it."""

    __slots__ = ("_began", "_events", "_name")

    def __init__(self, events: _Events, name: str) -> None:
        self._events, self._name = events, name

    def __enter__(self) -> None:
        self._began = self._events.mark()

    def __exit__(self, kind: _Kind, error: BaseException | None, trace: TracebackType | None) -> None:
        self._events.open.append((self._name, self._began, self._events.mark()))


class _Events:
    """Events of the current CUDA stream, used again and again."""

    def __init__(self) -> None:
        self.open: list[tuple[str, Any, Any]] = []
        """(part, event before, event after) of the step under way"""
        self._spare: list[Any] = []

    def mark(self) -> Any:
        event: Any = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def close(self) -> list[tuple[str, Any, Any]]:
        """Those of the step under way."""
        found, self.open = self.open, []
        return found

    def read(self, pairs: Sequence[tuple[str, Any, Any]], spent: dict[str, float]) -> None:
        """Add what the parts of a step took, once the device has passed them."""
        for name, before, after in pairs:
            after.synchronize()
            spent[name] += before.elapsed_time(after) / 1e3
            self._spare += [before, after]


@dataclass
class _Step:
    """A step that is done: its wall time, its parts, and the events of those that are not read yet."""

    seconds: float
    spent: dict[str, float]
    pairs: list[tuple[str, Any, Any]] = field(default_factory=list)


class StepClock:
    """Of one rank. Parts of a step do not overlap; a part may come several times in it."""

    def __init__(self, device: torch.device) -> None:
        self._events = _Events() if device.type == "cuda" else None
        self._spent = dict.fromkeys(_MEASURED, 0.0)
        self._phases: dict[str, AbstractContextManager[None]] = {name: _Timed(self._spent, name) for name in _MEASURED}
        if self._events:
            self._phases |= {name: _Recorded(self._events, name) for name in _ON_DEVICE}
        self._done: list[_Step] = []
        self._totals, self._steps = dict.fromkeys((*PHASES, STEP), 0.0), 0
        self._mark, self._waited = perf_counter(), 0.0

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around a part of the step: forward, backward, optimizer or save."""
        return self._phases[name]

    def begin(self, waited: float) -> None:
        """An epoch begins: what was done since the last step counts for none, but for saving.

        waited: seconds that the loader has waited so far.
        """
        if self._events:
            self._events.open.clear()
        for name in _MEASURED:
            self._spent[name] *= name == "save"
        self._mark, self._waited = perf_counter() - self._spent["save"], waited
        self._totals, self._steps = dict.fromkeys((*PHASES, STEP), 0.0), 0

    def end(self, waited: float) -> None:
        """A step is done; the next one begins here."""
        now = perf_counter()
        self._spent["data"] = waited - self._waited
        pairs = self._events.close() if self._events else []
        self._done.append(_Step(now - self._mark, dict(self._spent), pairs))
        for name in _MEASURED:
            self._spent[name] = 0.0
        self._mark, self._waited = now, waited

    def flush(self, engine: Engine, newest: bool = True) -> dict[str, float]:
        """Mean seconds of each part, and of the step, over ranks and the steps since the last flush; {} for none.

        Every rank. newest: with the newest step, which the device may still be busy with.
        """
        keep = 0 if newest or not self._events else 1
        ready = self._done[: len(self._done) - keep]
        if not ready:
            return {}
        del self._done[: len(ready)]
        sums = torch.tensor([self._sums(ready)], dtype=torch.float64)
        mean = (engine.sum(sums)[0] / engine.world_size).tolist()
        found = dict(zip(self._totals, mean, strict=True))
        for key, value in found.items():
            self._totals[key] += value
        self._steps += len(ready)
        return {key: value / len(ready) for key, value in found.items()}

    def _sums(self, steps: Sequence[_Step]) -> list[float]:
        """Seconds of all parts, then of the steps."""
        spent, whole = dict.fromkeys(PHASES, 0.0), 0.0
        for step in steps:
            if self._events:
                self._events.read(step.pairs, step.spent)
            for name in _MEASURED:
                spent[name] += step.spent[name]
            whole += step.seconds
        spent["host"] = max(whole - sum(spent.values()), 0.0)
        return [*spent.values(), whole]

    def epoch(self) -> dict[str, float]:
        """The same of all steps that were flushed since `begin`; {} for none."""
        return {key: value / self._steps for key, value in self._totals.items()} if self._steps else {}
