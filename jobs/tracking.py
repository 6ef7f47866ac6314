"""TensorBoard events and metrics.jsonl, written so that every reader shows one value per step after any resume.

purge_step is given on the first attempt too: TensorBoard's Python loader takes the first SessionLog.START of a run for
"not a restart". One writer per attempt, in a later second than the last: readers order files by the second in their
name. Not all readers know START, so the values of lost steps leave the older files (docs/decisions/0014). The disk is
met by a thread alone (jobs/events_writer.py); the lines of metrics.jsonl, one an epoch, are written at once.
"""

from __future__ import annotations

import io
import logging
import time
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hpc.allocation import scratch_folders
from hpc.rundir import RunDir, append_line
from jobs import event_file
from jobs.events_writer import EventsWriter
from jobs.spool import Spool

_LOG = logging.getLogger(__name__)
CLOSE_S = 10.0
"""What the end of an attempt may take, of the time before a node is taken away."""
_MOST_LINES = 10_000


class Tracker:
    """The one writer of an attempt (rank 0)."""

    def __init__(
        self, run: RunDir, generation: int, resumed_step: int, stage_s: float | Literal["off"] = "off"
    ) -> None:
        """stage_s: seconds for which events may wait on the node's own disk."""
        self._run, self._generation = run, generation
        spool = None if stage_s == "off" else Spool(scratch_folders())
        self._writer = EventsWriter(run.tensorboard, f".g{generation:03d}", resumed_step, self._held, spool)
        if stage_s != "off":
            self._writer.every = float(stage_s)
        self._lines: list[dict[str, Any]] = []
        self._refused = False

    def _held(self) -> bool:
        return self._run.last_generation() <= self._generation

    def go_back(self, step: int) -> None:
        """Take back what was written after `step`."""
        self._writer.cut(step)

    def scalars(self, step: int, values: dict[str, float], when: float | None = None) -> None:
        """One value per tag at a step (steps done so far); `when`: Unix time, now unless said."""
        if values:
            self._writer.put(event_file.scalars(step, time.time() if when is None else when, values))

    def picture(self, step: int, tag: str, pixels: NDArray[np.uint8]) -> None:
        """(height, width, 3); it is encoded by the thread that calls."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        height, width = pixels.shape[:2]
        self._writer.put(event_file.picture(step, time.time(), tag, buffer.getvalue(), (height, width)))

    def evaluation(self, line: dict[str, Any]) -> float:
        """One line of metrics.jsonl; one that the disk refuses is tried again later. Its Unix time in seconds."""
        stamp = self._stamp()
        self._lines = [*self._lines[-_MOST_LINES:], {**stamp, **line}]
        self._write_lines()
        return float(stamp["time"])

    def _stamp(self) -> dict[str, Any]:
        return {"generation": self._generation, "time": round(time.time(), 3)}

    def _write_lines(self) -> None:
        try:
            while self._lines:
                append_line(self._run.metrics, self._lines[0])
                self._lines.pop(0)
        except OSError as error:
            if not self._refused:
                _LOG.warning("%s is not written for now: %s", self._run.metrics.name, error)
            self._refused = True
        else:
            self._refused = False

    def flush(self, wait_s: float = 0.0) -> None:
        """Write what waits, in a thread; wait_s: for at most so long until it is done."""
        self._writer.flush(wait_s)

    def close(self, wait_s: float = CLOSE_S) -> None:
        """In at most wait_s, whatever the disk does."""
        self._write_lines()
        self._writer.close(wait_s)
