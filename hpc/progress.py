"""How far a run is and how fast: metrics.jsonl read incrementally, and the time left, right across resumes."""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from hpc.records import Records
from hpc.rundir import RunDir

_MOST_BYTES = 1 << 20
"""Read of the metrics of a run that is seen for the first time."""
_WINDOW_S, _SURE_S = 600.0, 30.0
"""The pace is that of the last ten minutes; of less than this it is that of the whole attempt."""
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"


class Series:
    """The evaluations of a run by step, each line read once; a later attempt takes back the steps it repeats."""

    def __init__(self, run: RunDir) -> None:
        self._path = run.metrics
        self._offset = 0
        self._rest = b""
        self._generation = 0
        self._lines: dict[int, dict[str, Any]] = {}

    def update(self) -> None:
        """Read what was appended since the last time."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            if size < self._offset:  # another file
                self._offset, self._rest, self._lines, self._generation = 0, b"", {}, 0
            if size == self._offset:
                return
            skipped = self._offset == 0 and size > _MOST_BYTES
            file.seek(size - _MOST_BYTES if skipped else self._offset)
            *whole, self._rest = (self._rest + file.read()).split(b"\n")
            self._offset = file.tell()
        for line in whole[1:] if skipped else whole:
            self._add(line)

    def _add(self, text: bytes) -> None:
        try:
            line = json.loads(text)
            step, generation = int(line["step"]), int(line["generation"])
        except (ValueError, KeyError, TypeError):
            return
        if generation > self._generation:
            self._generation = generation
            self._lines = {known: old for known, old in self._lines.items() if known < step}
        self._lines[step] = line

    def loss(self) -> list[float]:
        """Training loss of each evaluated step."""
        return self._numbers("train", "loss") or self._numbers("metrics", "loss")

    def metric(self, name: str) -> list[float]:
        """A validation metric of each evaluated step."""
        return self._numbers("metrics", name)

    def samples_per_second(self) -> float | None:
        """Of the last epoch."""
        return next(iter(reversed(self._numbers("samples_per_second", "train"))), None)

    def _numbers(self, section: str, key: str) -> list[float]:
        values = [(self._lines[step].get(section) or {}).get(key) for step in sorted(self._lines)]
        return [float(value) for value in values if isinstance(value, int | float)]


class Pace:
    """Steps per second of a run's current attempt, and the time that it needs for the rest."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._generation = -1
        self._trains = False
        self._first = (0.0, 0)
        """Time and step at which this attempt began to train."""
        self._seen: deque[tuple[float, int]] = deque()
        """Time and step, by the job's own clock."""

    def update(self, records: Records) -> None:
        state = records.state
        if records.generation != self._generation:
            self._generation, self._trains = records.generation, False
            self._first = (records.began, resumed_step(self._run, records.generation))
            self._seen.clear()
        if not self._trains and (since := training_began(self._run, records.generation)):
            self._trains, self._first = True, (max(since, records.began), self._first[1])
        point = (float(state.get("time", 0)), int(state.get("step", 0)))
        if not self._seen or point[1] > self._seen[-1][1]:
            self._seen.append(point)
        while self._seen[-1][0] - self._seen[0][0] > _WINDOW_S:
            self._seen.popleft()

    def rate(self) -> float | None:
        """Steps per second; None before there are any."""
        if not self._seen:
            return None
        now, step = self._seen[-1]
        since, before = self._seen[0] if now - self._seen[0][0] >= _SURE_S else self._first
        return (step - before) / (now - since) if step > before and now > since else None

    def left_s(self, steps: int, now: float) -> float | None:
        """Seconds until the last step, None where that is not known yet. `now`: the time, by our clock."""
        rate = self.rate()
        if not rate or not steps:
            return None
        seen, step = self._seen[-1]
        return max((steps - step) / rate - max(now - seen, 0), 0.0)


def resumed_step(run: RunDir, generation: int) -> int:
    """The step that an attempt went on from: that of the last checkpoint before it."""
    saved = [
        event for event in run.read_events() if event["event"] == "checkpoint" and event["generation"] < generation
    ]
    return int(max(saved, key=lambda event: (event["generation"], event["step"]))["step"]) if saved else 0


def training_began(run: RunDir, generation: int) -> float | None:
    """When an attempt was through with its preparations: its event file has the second in its name."""
    names = [path.name for path in run.tensorboard.glob(f"*.g{generation:03d}")]
    found = [int(match[1]) for name in names if (match := re.search(r"tfevents\.(\d+)\.", name))]
    return float(min(found)) if found else None


def sparkline(values: Sequence[float], width: int, plain: bool = False) -> str:
    """At most `width` blocks from the lowest to the highest of these values; `plain`: of ASCII."""
    blocks = _ASCII_BLOCKS if plain else _BLOCKS
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite or width < 1:
        return ""
    if len(finite) > width:
        bounds = [round(index * len(finite) / width) for index in range(width + 1)]
        finite = [sum(finite[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(finite), max(finite)
    span = high - low
    top = len(blocks) - 1
    return "".join(blocks[round((value - low) / span * top)] if span > 0 else blocks[top // 2] for value in finite)


def bar(share: float, width: int, plain: bool = False) -> str:
    full, empty = ("#", ".") if plain else ("█", "░")
    done = round(min(max(share, 0.0), 1.0) * width)
    return full * done + empty * (width - done)
