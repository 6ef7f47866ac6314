"""What others would show of a run's event files: TensorBoard's two loaders, EventAccumulator and tbparse.

Their rules were seen on TensorBoard 2.21 and tbparse 0.0.9, and are compared with them in the tests. Scalars alone.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hpc.logs.crc32c import masked_crc32c
from hpc.logs.event import Event, EventError, decode
from hpc.logs.records import FOOTER, HEADER, Ending, RecordReader
from hpc.logs.salvage import survey
from hpc.logs.series import event_files

TITLES = ("reader", "points", "twice", "false", "missing")


class Reader(StrEnum):
    """In which way it reads."""

    DEFAULT = "TensorBoard"
    """The data server: drops what a tag has at later steps; does not look at a payload's checksum."""
    PYTHON = "TensorBoard --load_fast=false"
    """Hears each SessionLog.START but the first."""
    ACCUMULATOR = "EventAccumulator"
    """Hears each."""
    TBPARSE = "tbparse"
    """Keeps all."""


@dataclass(frozen=True, slots=True)
class Shown:
    """By one reader, opened now, of all scalars of a run: counts of points."""

    reader: Reader
    points: int
    twice: int
    """At a step that the tag has already."""
    false: int
    """With another value than the true one, or at a step that was lost and not made again."""
    missing: int
    """True ones that it does not show."""

    @property
    def right(self) -> bool:
        return not (self.twice or self.false or self.missing)


Points = list[tuple[str, int, float]]
"""(tag, step, value), in the order of reading."""


def shown(folder: Path) -> list[Shown]:
    """By each reader, of the event files in and under `folder`; true is what can be salvaged, of the last attempt."""
    inner = sorted(path for path in folder.rglob("*") if path.is_dir())
    folders = [files for one in (folder, *inner) if (files := event_files(one))]
    counted = {reader: Counter[str]() for reader in Reader}
    for files in folders:
        truth = _truth(files)
        # Readers go by the plain order of names.
        read = sorted(files, key=lambda path: path.name)
        for reader in Reader:
            counted[reader].update(_counts(_points(read, reader), truth))
    return [Shown(reader, *(counted[reader][key] for key in TITLES[1:])) for reader in Reader]


def rows(found: list[Shown]) -> list[tuple[str, str, str, str, str]]:
    """As a table under TITLES."""
    return [(one.reader, str(one.points), str(one.twice), str(one.false), str(one.missing)) for one in found]


def _truth(files: list[Path]) -> dict[tuple[str, int], float]:
    kept: dict[tuple[str, int], float] = {}
    for path in files:
        for event in _salvaged(path):
            if event.start:
                kept = {place: value for place, value in kept.items() if place[1] < event.step}
            kept |= {(tag, step): value for tag, step, value in _scalars(event)}
    return kept


def _salvaged(path: Path) -> Iterator[Event]:
    for begin, end in survey(path).kept:
        for record in RecordReader(path, begin, end):
            yield decode(record.payload)


def _scalars(event: Event) -> Points:
    return [(value.tag, event.step, value.scalar) for value in event.values if value.scalar is not None]


def _counts(points: Points, truth: dict[tuple[str, int], float]) -> dict[str, int]:
    """`twice` is told apart from `false`: a step that is there twice may be there with one true value."""
    places = Counter((tag, step) for tag, step, _ in points)
    false = sum(truth.get((tag, step)) != value for tag, step, value in points)
    there = {(tag, step) for tag, step, value in points if truth.get((tag, step)) == value}
    twice = sum(count - 1 for count in places.values())
    return {"points": len(points), "twice": twice, "false": false, "missing": len(truth) - len(there)}


def _points(files: list[Path], reader: Reader) -> Points:
    found: dict[str, list[tuple[int, float]]] = {}
    started = False
    for path in files:
        for event in _read(path, reader is Reader.DEFAULT):
            if event.start and (reader is Reader.ACCUMULATOR or (reader is Reader.PYTHON and started)):
                found = {tag: [one for one in kept if one[0] < event.step] for tag, kept in found.items()}
            started = started or event.start
            for tag, step, value in _scalars(event):
                kept = found.setdefault(tag, [])
                while reader is Reader.DEFAULT and kept and kept[-1][0] >= step:
                    kept.pop()
                kept.append((step, value))
    return [(tag, step, value) for tag, kept in found.items() for step, value in kept]


def _read(path: Path, flips: bool) -> Iterator[Event]:
    """The events up to where a reader stops. `flips`: flipped payloads are read on, as far as they decode."""
    place = 0
    while True:
        reader = RecordReader(path, place)
        for record in reader:
            try:
                yield decode(record.payload)
            except EventError:
                return
        if not (flips and reader.ending in (Ending.FLIPPED, Ending.ZEROS)):
            return
        flipped = _flipped(path, reader.valid)
        if flipped is None:
            return
        yield flipped[0]
        place = flipped[1]


def _flipped(path: Path, place: int) -> tuple[Event, int] | None:
    """The event whose payload's checksum does not fit, and where it ends; None where its length does not, either."""
    with path.open("rb") as file:
        file.seek(place)
        header = file.read(HEADER)
        length, stored = struct.unpack("<QI", header)
        if stored != masked_crc32c(header[:8]):
            return None
        payload = file.read(length)
    try:
        return decode(payload), place + HEADER + length + FOOTER
    except EventError:
        return None
