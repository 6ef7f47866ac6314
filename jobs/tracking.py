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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from hpc.rundir import RunDir, append_line

_LOG = logging.getLogger(__name__)
_SKEW_S = 3.0


class Tracker:
    """The one writer of an attempt (rank 0)."""

    def __init__(self, run: RunDir, generation: int, resumed_step: int) -> None:
        self._run = run
        self._generation = generation
        self._resumed_step = resumed_step
        self._writer: SummaryWriter | None = None
        self._refused = False

    def go_back(self, step: int) -> None:
        """Take back what was written after `step`."""
        self.close()
        self._writer, self._resumed_step = None, step

    def _open(self) -> SummaryWriter:
        folder = self._run.tensorboard
        taken = [int(m[1]) for path in folder.glob("*tfevents*") if (m := re.search(r"tfevents\.(\d+)\.", path.name))]
        if taken and max(taken) > time.time() + _SKEW_S:
            _LOG.warning("a clock is wrong: %s holds events of the future; readers may show old values last", folder)
        else:
            while taken and int(time.time()) <= max(taken):
                time.sleep(0.05)
        # Values of lost steps go; those of the step that was saved stay.
        purge = self._resumed_step + 1 if self._resumed_step else 0
        return SummaryWriter(str(folder), purge_step=purge, filename_suffix=f".g{self._generation:03d}")

    def _write(self, write: Callable[[SummaryWriter], Any]) -> None:
        """The first one opens the file: training need not wait for the clock's next second."""
        if self._refused:
            return
        try:
            if self._writer is None:
                self._writer = self._open()
            write(self._writer)
        except OSError as error:
            self._refuse(error)

    def _refuse(self, error: OSError) -> None:
        if not self._refused:
            _LOG.warning("TensorBoard events are off for the rest of this attempt: %s", error)
        self._writer, self._refused = None, True

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One value per tag at a step (steps done so far)."""

        def write(writer: SummaryWriter) -> None:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)

        self._write(write)

    def picture(self, step: int, tag: str, pixels: NDArray[np.uint8]) -> None:
        """(height, width, 3)."""
        self._write(lambda writer: writer.add_image(tag, pixels, step, dataformats="HWC"))

    def evaluation(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        try:
            append_line(self._run.metrics, {"generation": self._generation, **line})
        except OSError as error:
            self._refuse(error)

    def flush(self) -> None:
        if self._writer is not None:
            self._write(SummaryWriter.flush)

    def close(self) -> None:
        if self._writer is not None:
            self._write(SummaryWriter.close)
