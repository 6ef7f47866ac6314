"""When a run saves and when it stops by itself: by the clock, the time limit, and how long its saves take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from hpc import limits, saves
from hpc.allocation import Allocation

_LOG = logging.getLogger(__name__)
_ASK_EVERY_S = 30.0
_SHARE = 4
"""An interval of so many saves, where saves must be frequent: a quarter of the time the disk is at rest."""


class Schedule:
    """Rank 0's; `slow_s` tells the 95th percentile of the seconds that a save takes, None before the first."""

    def __init__(self, every_s: float, allocation: Allocation, slow_s: Callable[[], float | None]) -> None:
        self._every_s, self._slow_s = every_s, slow_s
        self._end, self._notice_s = allocation.end_time, allocation.notice_s
        # A save that takes longer must not have each attempt stop as it begins.
        self._most_margin_s = (self._end - time.time()) / 2 if self._end else 0.0
        self._saved_at = time.monotonic()
        self._asked_at = -float("inf")
        self._warned = False

    def saved(self) -> None:
        """A save has begun now."""
        self._saved_at = time.monotonic()

    def save_due(self) -> bool:
        return time.monotonic() - self._saved_at > self.interval_s

    @property
    def interval_s(self) -> float:
        """Seconds between saves: shorter than asked where a preempted job is killed before a save can end."""
        slow = self._slow_s()
        if slow is None or self._notice_s is None or slow < self._notice_s:
            return self._every_s
        shorter = min(self._every_s, _SHARE * slow)
        if not self._warned:
            self._warned = True
            _LOG.warning(
                "a save takes %.0f s, and a preempted job has %d s here: it may lose what it did since its last save, "
                "which it now makes every %.0f s",
                *(slow, self._notice_s, shorter),
            )
        return shorter

    def ending(self) -> bool:
        """Whether the time limit is so near that the run must save now, whether or not it has been told."""
        margin = min(saves.notice_for(self._slow_s() or 0.0), self._most_margin_s)
        if self._end is None or time.time() < self._end - margin:
            return False
        if time.monotonic() - self._asked_at > _ASK_EVERY_S:  # an administrator may have given it more time
            self._asked_at = time.monotonic()
            self._end = limits.end_time()
        return self._end is not None and time.time() >= self._end - margin
