"""The series of a run as they are true: one value per tag and step, the last attempt's, without the steps it lost.

Readers disagree about a resumed run (TensorBoard's two loaders, EventAccumulator and tbparse give four answers for the
same two files); this one follows the writer: SessionLog.START at step N (`SummaryWriter(purge_step=N)`) says that
everything from step N on is written again, for every tag.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from hpc.errors import UserError
from hpc.logs.event import Event, EventError, Image, Point, decode, scalars_of
from hpc.logs.records import FOOTER, HEADER, Ending, RecordReader

Kind = TypeVar("Kind")
Series = dict[str, list[tuple[int, float, Kind]]]
"""For each tag, by step: (step, wall time in seconds since 1970, value)."""

_log = logging.getLogger(__name__)
_NAME = re.compile(r"tfevents\.(\d+)\.?(.*)")


def event_files(folder: Path) -> list[Path]:
    """The event files directly in `folder`, oldest attempt first. Raises UserError where there is no such folder.

    TensorBoard takes every name with `tfevents` in it, copying tools' hidden temporary files too; those are left out.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of event files; 'hpc ls' lists the runs")
    found = (path for path in folder.iterdir() if "tfevents" in path.name and not path.name.startswith("."))
    return sorted((path for path in found if path.is_file()), key=_attempt_order)


def _attempt_order(path: Path) -> tuple[int, list[tuple[int, str]]]:
    """Time in the name, then host, process and writer, their numbers as numbers: writer 10 comes after writer 2."""
    match = _NAME.search(path.name)
    seconds, rest = (int(match[1]), match[2]) if match else (0, path.name)
    parts = re.findall(r"(\d+)|(\D+)", rest)
    return seconds, [(int(digits), "") if digits else (-1, text) for digits, text in parts]


def read_events(path: Path) -> Iterator[Event]:
    """The events of one file up to its first fault; a damaged file is named in the log (a torn tail is not)."""
    reader = RecordReader(path)
    for record in reader:
        try:
            yield decode(record.payload)
        except EventError as error:
            _log.warning("%s: byte %d: %s; the rest of the file is left out", path, record.offset, error)
            return
    _tell(reader)


def _tell(reader: RecordReader) -> None:
    if reader.ending in (Ending.ZEROS, Ending.FLIPPED):
        _log.warning(
            "%s: %s at byte %d; the rest of the file is left out", reader.path, reader.ending.value, reader.valid
        )


def scalars(folder: Path) -> Series[float]:
    """The scalars of a run's folder of event files (not of folders in it). Raises UserError."""
    kept: dict[str, dict[int, tuple[float, float]]] = {}
    for path in event_files(folder):
        for one in read_points(path):
            if isinstance(one, tuple):
                for tag, step, wall_time, value in one:
                    kept.setdefault(tag, {})[step] = (wall_time, value)
                continue
            if one.start:
                _purge(kept, one.step)
            for found in one.values:
                if found.scalar is not None:
                    kept.setdefault(found.tag, {})[one.step] = (one.wall_time, found.scalar)
    return _by_step(kept)


def read_points(path: Path) -> Iterator[tuple[Point, ...] | Event]:
    """Like `read_events`, but events of scalars alone as tuples of Points: as fast as a bare protobuf loop."""
    reader = RecordReader(path)
    for payloads in reader.payloads():
        done = 0
        try:
            for one in scalars_of(payloads):
                done += 1
                yield one
        except EventError as error:
            offset = reader.valid - sum(HEADER + len(left) + FOOTER for left in payloads[done:])
            _log.warning("%s: byte %d: %s; the rest of the file is left out", path, offset, error)
            return
    _tell(reader)


def images(folder: Path) -> Series[Image]:
    """The pictures of a run's folder of event files, encoded as they were logged. Raises UserError."""
    kept: dict[str, dict[int, tuple[float, Image]]] = {}
    for path in event_files(folder):
        for event in read_events(path):
            if event.start:
                _purge(kept, event.step)
            for value in event.values:
                if value.image is not None:
                    kept.setdefault(value.tag, {})[event.step] = (event.wall_time, value.image)
    return _by_step(kept)


def _by_step(kept: dict[str, dict[int, tuple[float, Kind]]]) -> Series[Kind]:
    return {tag: [(step, *steps[step]) for step in sorted(steps)] for tag, steps in sorted(kept.items()) if steps}


def _purge(kept: dict[str, dict[int, tuple[float, Kind]]], start: int) -> None:
    for steps in kept.values():
        for step in [step for step in steps if step >= start]:
            del steps[step]
