"""Signals and exit codes: a handler only raises a flag; the loop decides at a step boundary.

Who gets which signal (SLURM 22.05, tasks started by srun in the background of the batch shell): preemption sends the
tasks SIGTERM (again at the end of GraceTime), a time limit sends them USR2 first (`--signal=USR2@N` without `B:`).
USR1 is left alone: NCCL may use it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType


class ExitCode(IntEnum):
    """What a task or the batch script leaves with."""

    DONE = 0
    CRASH = 1
    BAD_INPUT = 2
    """Never retried."""
    STORAGE = 74
    STOPPED = 75
    """A clean stop: stop.json says at which step."""
    HANG = 76
    """A rank was silent for too long: its watchdog left word, and ended it."""
    BAD_NODE = 77


NOTICE = signal.SIGUSR2
"""What comes ahead of a time limit (`--signal=USR2@N`)."""
READY = signal.SIGUSR1
"""What hpc.localstep sends to the batch shell (never to a rank) once it hears the others."""
STOP_SIGNALS = (NOTICE, signal.SIGTERM, signal.SIGINT)


class BrokenOff(BaseException):
    """A stop signal came within `StopFlag.breaks_off`; no library's `except Exception` catches it."""


class StopFlag:
    """Raised by USR2, TERM or INT in the process that installed it; children ignore these signals.

    The first signal names the cause; later ones change nothing, so that TERM after USR2 ends the same way.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._pid = os.getpid()
        self._breaks = False
        self.received: float | None = None
        """When this process heard the first signal, by time.time()."""

    def install(self) -> StopFlag:
        """Hear the stop signals from now on (main thread only); a fork resets them to be ignored."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._raise)
        os.register_at_fork(after_in_child=ignore_stops)
        return self

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid and not self._signal:
            self._signal, self.received = int(number), time.time()
            if self._breaks:
                self._breaks = False
                raise BrokenOff

    @contextmanager
    def breaks_off(self) -> Iterator[None]:
        """In here a signal, or one before, raises BrokenOff at once: for long work of which nothing is kept then."""
        self._breaks = True
        try:
            if self._signal:
                raise BrokenOff
            yield
        finally:
            self._breaks = False

    def notice(self) -> None:
        """As if the notice of the time limit had come."""
        if not self._signal:
            self._signal, self.received = int(NOTICE), time.time()

    @property
    def cause(self) -> str | None:
        """Name of the first signal, or None."""
        return signal.Signals(self._signal).name if self._signal else None

    def agree(self, max_over_ranks: Callable[[int], int]) -> str | None:
        """The cause that all ranks stop for, or None: the highest signal number seen by any rank.

        `max_over_ranks` is a collective, so every rank must call this at the same step boundary.
        """
        agreed = max_over_ranks(self._signal)
        if agreed:  # a signal that came meanwhile is for the next time: the others have not heard of it
            self._signal = agreed
        return signal.Signals(agreed).name if agreed else None


def ignore_stops() -> None:
    """Be deaf to the stop signals, and so what this process executes, until it has handlers of its own."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
