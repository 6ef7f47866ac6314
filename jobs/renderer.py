"""What is drawn while the training goes on: one thread, in order, of a bounded number of figures that wait."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

_LOG = logging.getLogger(__name__)
MOST = 32
"""That wait: an evaluation's samples are kept in memory until then."""


class Renderer:
    """Of one attempt. What it is given tells its own errors."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._waiting: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._busy = self._told = False

    def put(self, draw: Callable[[], None]) -> None:
        """Draw it when all before are drawn; left out, and told once, where too many wait."""
        with self._lock:
            if len(self._waiting) >= MOST:
                if not self._told:
                    _LOG.warning("figures take longer than the epochs: those of some evaluations are left out")
                self._told = True
                return
            self._waiting.append(draw)
            if self._thread is None:
                self._thread = threading.Thread(target=self._draw_on, name="figures", daemon=True)
                self._thread.start()
            self._lock.notify_all()

    def _draw_on(self) -> None:
        while True:
            with self._lock:
                self._busy = False
                self._lock.notify_all()
                self._lock.wait_for(lambda: self._waiting)
                draw, self._busy = self._waiting.popleft(), True
            draw()

    def forget(self) -> None:
        """Draw none of those that wait."""
        with self._lock:
            self._waiting.clear()

    def wait(self, most_s: float | None = None) -> None:
        """Until all are drawn, or for most_s: then those that wait are forgotten."""
        until = None if most_s is None else time.monotonic() + most_s
        with self._lock:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not self._lock.wait_for(lambda: not self._waiting and not self._busy, left):
                _LOG.warning("%d evaluations are without their figures", len(self._waiting) + self._busy)
                self._waiting.clear()
