"""TensorBoard events and metrics.jsonl, written so that every reader shows one value per step after any resume.

purge_step is given on the first attempt too: TensorBoard's Python loader takes the first SessionLog.START of a run for
"not a restart". One writer per attempt, in a later second than the last: readers order files by the second in their
name. A disk that refuses turns the events off with one warning (lines of metrics.jsonl are still tried); it never
stops training.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from hpc.rundir import RunDir, append_line

_LOG = logging.getLogger(__name__)
_SKEW_S = 3.0


class Tracker:
    """The one writer of an attempt (rank 0)."""

    def __init__(self, run: RunDir, generation: int, resumed_step: int) -> None:
        self._run = run
        self._generation = generation
        self._writer: SummaryWriter | None = None
        self._refused = False
        self._attempt(lambda: self._open(resumed_step))

    def _open(self, resumed_step: int) -> None:
        folder = self._run.tensorboard
        taken = [int(m[1]) for path in folder.glob("*tfevents*") if (m := re.search(r"tfevents\.(\d+)\.", path.name))]
        if taken and max(taken) > time.time() + _SKEW_S:
            _LOG.warning("a clock is wrong: %s holds events of the future; readers may show old values last", folder)
        else:
            while taken and int(time.time()) <= max(taken):
                time.sleep(0.05)
        # Values of lost steps go; those of the step that was saved stay.
        purge = resumed_step + 1 if resumed_step else 0
        self._writer = SummaryWriter(str(folder), purge_step=purge, filename_suffix=f".g{self._generation:03d}")

    def _attempt(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            if not self._refused:
                _LOG.warning("TensorBoard events are off for the rest of this attempt: %s", error)
            self._writer, self._refused = None, True

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One value per tag at a step (steps done so far)."""
        for tag, value in values.items():
            if (writer := self._writer) is not None:
                self._attempt(partial(writer.add_scalar, tag, value, step))

    def figure(self, step: int, tag: str, figure: Any) -> None:
        if (writer := self._writer) is not None:
            self._attempt(partial(writer.add_figure, tag, figure, step))

    def evaluation(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self._attempt(lambda: append_line(self._run.metrics, {"generation": self._generation, **line}))

    def flush(self) -> None:
        if (writer := self._writer) is not None:
            self._attempt(writer.flush)

    def close(self) -> None:
        if (writer := self._writer) is not None:
            self._attempt(writer.close)
