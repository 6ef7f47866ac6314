"""What of a run's event files is yet to be sent: lost steps are dropped, steps that may still be lost held back.

A cursor is two places: `start`, the first record that is still held back, where the next reading begins, and `head`,
how far the files had been read. What lies before `head` and below `below` has been sent.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from hpc.logs.event import Event, EventError, Image, scalars_of
from hpc.logs.event import Point as Logged
from hpc.logs.records import FOOTER, HEADER, Ending, RecordReader
from hpc.logs.series import event_files
from hpc.logs.sinks.base import Point

Kind = TypeVar("Kind")
_Kept = dict[str, dict[int, tuple[float, Kind, int]]]
"""For each tag and step: wall time, value, number of the record."""
_MOST_DAMAGED = 50  # a note is short
_EDGE = 4096
"""Bytes at both ends of what was read of a file, by which it is known again."""


@dataclass(frozen=True)
class Cursor:
    """How far a sink is with a run; kept by the sink itself, as a note of the run."""

    start: tuple[int, int] = (0, 0)
    """Number of the file, and byte."""
    head: tuple[int, int] = (0, 0)
    below: int | None = 0
    """Steps below this one were sent as far as `head`; None: all."""
    last: int = -1
    """Highest step sent."""
    records: int = 0
    """Whole records before `start`."""
    mark: str = ""
    """Of the files up to `start`: they are still those that were read."""
    damaged: tuple[tuple[int, int, str], ...] = ()
    """Files that were read up to a hole or a flipped byte only: number, byte, what."""

    def dump(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, told: dict[str, Any]) -> Cursor:
        """Raises ValueError, TypeError or KeyError for what is no cursor."""
        start, head = (tuple(map(int, told[name])) for name in ("start", "head"))
        below = None if told["below"] is None else int(told["below"])
        damaged = tuple((int(number), int(byte), str(what)) for number, byte, what in told.get("damaged", ()))
        last, records, mark = int(told["last"]), int(told["records"]), str(told["mark"])
        return cls(start[:2], head[:2], below, last, records, mark, damaged)  # type: ignore[arg-type]


class LostSteps(Exception):
    """Steps that were sent have been taken back: the sink's run is no longer what happened."""


class Pending:
    """Scalars and pictures after a cursor, by tag and step, as they are true now. Raises LostSteps."""

    def __init__(self, folder: Path, cursor: Cursor) -> None:
        self.files = event_files(folder) if folder.is_dir() else []
        self.cursor = cursor
        self._damaged = [one for one in cursor.damaged if one[0] < cursor.start[0]]
        self.restarts: list[tuple[float, int]] = []
        """Wall time and step of each start that was read."""
        self._scalars: _Kept[float] = {}
        self._images: _Kept[Image] = {}
        self._places = array("q")
        self._ends = list(cursor.start)
        self._first, self._count = cursor.start[0], 0
        if cursor.start != (0, 0) and cursor.mark != mark_of(self.files, cursor.start):
            raise LostSteps
        self._read()

    def _read(self) -> None:
        for number in range(self._first, len(self.files)):
            offset = self.cursor.start[1] if number == self._first else 0
            reader = RecordReader(self.files[number], offset)
            try:
                for payloads in reader.payloads():
                    for payload, found in zip(payloads, scalars_of(payloads), strict=True):
                        self._take(number, offset, found)
                        offset += HEADER + len(payload) + FOOTER
            except EventError as error:
                self._damaged.append((number, offset, str(error)))
            else:
                if reader.ending in (Ending.ZEROS, Ending.FLIPPED):
                    self._damaged.append((number, reader.valid, reader.ending.value))
            self._ends = [number, offset]

    def _take(self, number: int, offset: int, found: tuple[Logged, ...] | Event) -> None:
        here = len(self._places) // 2
        self._places.append(number)
        self._places.append(offset)
        if isinstance(found, tuple):
            for tag, step, wall_time, scalar in found:
                self._scalars.setdefault(tag, {})[step] = (wall_time, scalar, here)
            return
        if found.start:
            self._restart((number, offset), found.wall_time, found.step)
        for value in found.values:
            if value.scalar is not None:
                self._scalars.setdefault(value.tag, {})[found.step] = (found.wall_time, value.scalar, here)
            elif value.image is not None:
                self._images.setdefault(value.tag, {})[found.step] = (found.wall_time, value.image, here)

    def _restart(self, place: tuple[int, int], wall_time: float, step: int) -> None:
        if place >= self.cursor.head and step <= self.cursor.last:
            raise LostSteps
        self.restarts.append((wall_time, step))
        _drop(self._scalars, step)
        _drop(self._images, step)

    @property
    def damaged(self) -> list[str]:
        """Sentences about holes and flipped bytes."""
        return [f"{self.files[number].name}: {what}, damaged at byte {byte}" for number, byte, what in self._damaged]

    @property
    def head(self) -> tuple[int, int]:
        return self._ends[0], self._ends[1]

    def points(self, below: int | None) -> list[Point]:
        """The scalars of all steps below this one that were not sent, by step and tag."""
        found = [
            Point(tag, step, round(wall * 1000), value)
            for tag, steps in self._scalars.items()
            for step, (wall, value, here) in steps.items()
            if (below is None or step < below) and not self._sent(step, here)
        ]
        return sorted(found, key=lambda point: (point.step, point.tag))

    def has(self, tag: str, step: int) -> bool:
        """Whether the files read have a scalar of this tag at this step."""
        return step in self._scalars.get(tag, ())

    def pictures(self, below: int | None) -> Iterator[tuple[str, int, Image]]:
        """Likewise the pictures: tag, step and picture."""
        for tag, steps in sorted(self._images.items()):
            for step, (_, image, here) in sorted(steps.items()):
                if (below is None or step < below) and not self._sent(step, here):
                    yield tag, step, image

    def _sent(self, step: int, here: int) -> bool:
        place = (self._places[2 * here], self._places[2 * here + 1])
        return place < self.cursor.head and (self.cursor.below is None or step < self.cursor.below)

    def after(self, below: int | None, last: int) -> Cursor:
        """The cursor once everything below this step was sent, `last` being the highest of it."""
        held = [] if below is None else [*_from(self._scalars, below), *_from(self._images, below)]
        count = min(held, default=len(self._places) // 2)
        start = (self._places[2 * count], self._places[2 * count + 1]) if held else self.head
        records, mark = self.cursor.records + count, mark_of(self.files, start)
        damaged = tuple(self._damaged[:_MOST_DAMAGED])
        return Cursor(start, self.head, below, max(last, self.cursor.last), records, mark, damaged)

    def halfway(self, below: int, last: int) -> Cursor:
        """The cursor while everything below this step was sent, and the rest of it follows."""
        return replace(self.cursor, head=self.head, below=below, last=max(last, self.cursor.last))

    def sizes(self, start: tuple[int, int]) -> list[tuple[Path, int]]:
        """Bytes of each file before a place, and before its damage."""
        ends = {number: byte for number, byte, _ in self._damaged}
        sizes = (_size(path, number, start) for number, path in enumerate(self.files))
        return [
            (path, min(size, ends.get(number, size)))
            for number, (path, size) in enumerate(zip(self.files, sizes, strict=True))
        ]


def _drop(kept: _Kept[Kind], step: int) -> None:
    """What is of this step or later ones."""
    for steps in kept.values():
        for lost in [one for one in steps if one >= step]:
            del steps[lost]


def _from(kept: _Kept[Kind], step: int) -> Iterator[int]:
    """The records of what is of this step or later ones."""
    return (here for steps in kept.values() for at, (_, _, here) in steps.items() if at >= step)


def mark_of(files: Sequence[Path], start: tuple[int, int]) -> str:
    """Hash over the names of the files up to a place, their bytes before it, and both ends of those. Raises OSError."""
    told = hashlib.sha256()
    for number, path in enumerate(files[: start[0] + 1]):
        size = _size(path, number, start)
        told.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            told.update(file.read(min(size, _EDGE)))
            file.seek(max(0, size - _EDGE))
            told.update(file.read(min(size, _EDGE)))
    return told.hexdigest()[:16]


def _size(path: Path, number: int, start: tuple[int, int]) -> int:
    if number > start[0]:
        return 0
    return start[1] if number == start[0] else path.stat().st_size
