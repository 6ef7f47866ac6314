"""A TensorBoard event file: its records encoded, appended whole, and cut back to the step that a run goes on from.

Encoded by hand (tensorboard/compat/proto/{event,summary}.proto): a step's scalars take microseconds and need neither
protobuf nor TensorBoard. Storage is called by `os` alone, so that tests/faults/shim.py can be its disk.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from hpc.logs.event import decode
from hpc.logs.records import Ending, RecordReader, frame
from hpc.logs.series import event_files

_LOG = logging.getLogger(__name__)
_HIGHEST = 3.4028234663852886e38  # of a float of 32 bits
_TIME = struct.Struct("<Bd")
_FLOAT = struct.Struct("<f")
_uid = itertools.count()
VERSION = frame(b"\x1a\x0dbrain.Event:2")
"""The record that every file begins with."""


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(content)) + content


def _event(step: int, wall_time: float, rest: bytes) -> bytes:
    return frame(_TIME.pack(9, wall_time) + b"\x10" + _varint(step) + rest)


@lru_cache(maxsize=4096)
def _scalar_head(tag: str) -> bytes:
    name = _field(1, tag.encode())
    return b"\x0a" + _varint(len(name) + 5) + name + b"\x15"


def _float(value: float) -> bytes:
    try:
        return _FLOAT.pack(value)
    except OverflowError:
        return _FLOAT.pack(float("inf") if value > _HIGHEST else float("-inf"))


def scalars(step: int, wall_time: float, values: Mapping[str, float]) -> bytes:
    """One record: a value per tag at a step; wall_time in seconds since 1970."""
    inner = b"".join([_scalar_head(tag) + _float(value) for tag, value in values.items()])
    return _event(step, wall_time, _field(5, inner))


def picture(step: int, wall_time: float, tag: str, png: bytes, size: tuple[int, int]) -> bytes:
    """One record; size: height and width in pixels."""
    shape = b"\x08" + _varint(size[0]) + b"\x10" + _varint(size[1]) + b"\x18\x03"
    value = _field(1, tag.encode()) + _field(4, shape + _field(4, png))
    return _event(step, wall_time, _field(5, _field(1, value)))


def beginning(first_step: int) -> bytes:
    """Two records: the version, and SessionLog.START: all from this step on is written again."""
    return VERSION + _event(first_step, time.time(), b"\x3a\x02\x08\x01")


class EventFile:
    """Appended to by one thread; what `append` refused is not in it, as far as the disk lets us."""

    def __init__(self, folder: Path, suffix: str) -> None:
        """A name in a later second than any other's, without waiting for it: readers go by the second in the name.

        Raises OSError.
        """
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(m[1]) for path in folder.glob("*tfevents*") if (m := re.search(r"tfevents\.(\d+)\.", path.name))]
        second = max([int(time.time()), *(one + 1 for one in taken)])
        name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.{next(_uid)}{suffix}"
        self.path = folder / name
        self.size = 0
        """Bytes of whole records that are known to be on the disk."""
        self._descriptor: int | None = None

    def append(self, records: bytes) -> None:
        """All of them, durable; or none: the file is then cut back to its last whole record. Raises OSError."""
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            rest = memoryview(records)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)  # network file systems tell of a full disk only here
        except OSError:
            self._take_back()
            raise
        self.size += len(records)

    def _open(self) -> int:
        new = 0 if self.size else os.O_CREAT
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | new, 0o644)
        try:
            there = os.fstat(descriptor).st_size
            if there > self.size:
                os.ftruncate(descriptor, self.size)
            if there < self.size:
                raise OSError(f"{self.path} has lost {self.size - there} of its bytes")
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def _take_back(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self.size)
        self.close()
        if not self.size:
            with suppress(OSError):
                self.path.unlink()

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)


def cut_back(folder: Path, step: int) -> list[bytes]:
    """Take what belongs to later steps out of all event files, and what a killed writer has left of a record.

    Each is cut at its first record of a later step, never rewritten before: a reader that has it open is not misled.
    The records of earlier steps that stood behind (pictures take their time) are given back. What cannot be cut is
    told, and left to the readers that know SessionLog.START.
    """
    late: list[bytes] = []
    for path in event_files(folder) if folder.is_dir() else []:
        try:
            late += _cut_file(path, step)
        except OSError as error:
            _LOG.warning("%s keeps values of lost steps: %s", path, error)
    return late


def _cut_file(path: Path, step: int) -> list[bytes]:
    reader, end, late = RecordReader(path), None, []
    for record in reader:
        if (at := _summary_step(record.payload)) is None:
            continue
        if at > step:
            end = record.offset if end is None else end
        elif end is not None:
            late.append(frame(record.payload))
    if end is None and reader.ending is Ending.TORN:
        end = reader.valid
    if end is None:
        return []
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return late


def _summary_step(payload: bytes) -> int | None:
    """The step of an event with values, None of any other. Events of another writer may have another order."""
    if payload[:1] == b"\x09" and payload[9:10] == b"\x10":
        step = shift = 0
        for place in range(10, min(20, len(payload))):
            step |= (payload[place] & 127) << shift
            shift += 7
            if payload[place] < 128:
                return step if payload[place + 1 : place + 2] == b"\x2a" else None
    with suppress(ValueError):
        event = decode(payload)
        return event.step if event.values else None
    return None
