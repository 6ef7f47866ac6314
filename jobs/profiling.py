"""train.profile: a torch profiler trace of some steps, in the run's folder of TensorBoard events.

Rank 0 alone. A stop inside the window leaves the trace of the steps so far; the next attempt traces the rest into a
file of its own. Whatever fails here is one warning, never the end of the run.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hpc.rundir import RunDir
from jobs.engine import Engine
from jobs.watchdog import Watchdog

_LOG = logging.getLogger(__name__)
_LIMIT_S = 600.0
"""Silence that is no hang while the profiler starts, or its trace is written."""


class Profiling:
    """Of one attempt."""

    def __init__(self, run: RunDir, window: tuple[int, int] | None, engine: Engine, watchdog: Watchdog) -> None:
        """window: steps [start, stop), counted from 0 over the whole run; None: nothing is traced."""
        self._run, self._window, self._watchdog = run, window if engine.is_main else None, watchdog
        self._generation, self._device = engine.allocation.generation, engine.device
        self._running: Any = None
        self._first = self._next = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step after `number` others."""
        start, stop = self._window or (0, 0)
        if not start <= number < stop:
            yield
            return
        if self._running is None:
            self._first = self._next = number
            self._safely(self._start)
        with record_function(f"ProfilerStep#{number}"):  # the name that TensorBoard's plugin tells steps by
            yield
        self._next = number + 1
        if self._next == stop:
            self.close()
            self._window = None

    def close(self) -> None:
        """Write what was traced so far, if anything was."""
        if self._running is not None:
            self._safely(self._write)

    def _safely(self, do: Callable[[], None]) -> None:
        try:
            with self._watchdog.phase("profile", _LIMIT_S):
                do()
        except Exception as error:  # of the profiler, the driver below it, or the disk
            _LOG.warning("no profiler trace from step %d on: %s", self._first, error)
            self._running = self._window = None

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            activities.append(ProfilerActivity.CUDA)
        started = profile(activities=activities, record_shapes=True)
        started.start()
        self._running = started

    def _write(self) -> None:
        running, self._running = self._running, None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the kernels of the last step are part of it
        running.stop()
        final = self._run.trace(self._generation, self._first, self._next)
        final.parent.mkdir(exist_ok=True)
        aside = final.with_name(f".{secrets.token_hex(4)}.json")  # no trace to TensorBoard before it is whole
        try:
            running.export_chrome_trace(str(aside))
            aside.rename(final)
        finally:
            aside.unlink(missing_ok=True)
        _LOG.info("profiler trace of steps %d to %d: %s", self._first, self._next, final)
