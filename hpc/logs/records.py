"""The records of a TensorBoard event file, each verified by its checksums, and how the file ends.

Frame, little endian (TFRecord): u64 length | u32 masked CRC-32C of those 8 bytes | payload | u32 masked CRC-32C of it.
A file has no header, footer or index: every end of a record is a legal place to resume from.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from hpc.logs.crc32c import masked_crc32c

HEADER = 12
FOOTER = 4
_HOLE = bytes(4096)  # a page, the unit in which a network file system loses data
_BUFFER = 1 << 20


class Ending(StrEnum):
    """What lies behind the last whole record."""

    COMPLETE = "complete"
    """Nothing."""
    TORN = "torn"
    """The beginning of a record: its writer was killed, or is still writing."""
    ZEROS = "zeros"
    """A hole of zero bytes: a network file system that has not shown the data yet, or lost it in a crash."""
    FLIPPED = "flipped"
    """Bytes that are not those that were written: a checksum does not fit."""


@dataclass(frozen=True, slots=True)
class Record:
    offset: int
    """Byte at which its frame begins."""
    payload: bytes

    @property
    def end(self) -> int:
        return self.offset + HEADER + len(self.payload) + FOOTER


def frame(payload: bytes) -> bytes:
    """The bytes of one record."""
    length = struct.pack("<Q", len(payload))
    return b"".join(
        (length, struct.pack("<I", masked_crc32c(length)), payload, struct.pack("<I", masked_crc32c(payload)))
    )


class RecordReader:
    """Iterates over the whole records of a file from `start` (the end of a record) to the first fault or its end.

    Afterwards `ending` says what follows the last whole record, `valid` where that is, and `size` how long the
    file was. Memory is bounded by the largest record: a length is believed when its own checksum fits and the file is
    that long. Raises OSError where the file cannot be read.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path = path
        self.valid = start
        self.size = start
        self.records = 0
        self.ending = Ending.COMPLETE

    @property
    def rest(self) -> int:
        """Bytes behind the last whole record."""
        return self.size - self.valid

    def __iter__(self) -> Iterator[Record]:
        with self.path.open("rb", buffering=_BUFFER) as file:
            self.size = max(self.valid, file.seek(0, 2))
            file.seek(self.valid)
            while (payload := self._next(file)) is not None:
                record = Record(self.valid, payload)
                self.valid = record.end
                self.records += 1
                yield record

    def _next(self, file: BinaryIO) -> bytes | None:
        """The payload at `valid`; None and the ending set where no whole record follows."""
        header = file.read(min(HEADER, self.rest))
        if len(header) < HEADER:
            self.ending = _short_ending(header)
            return None
        (length,) = struct.unpack_from("<Q", header)
        if struct.unpack_from("<I", header, 8)[0] != masked_crc32c(header[:8]):
            self.ending = Ending.FLIPPED if any(header[8:]) else Ending.ZEROS
            return None
        if length > self.rest - HEADER - FOOTER:
            self.ending = Ending.TORN
            return None
        body = file.read(length + FOOTER)
        if len(body) < length + FOOTER:  # cut while it was read
            self.ending = Ending.TORN
            return None
        payload, stored = body[:length], body[length:]
        if struct.unpack("<I", stored)[0] != masked_crc32c(payload):
            self.ending = Ending.FLIPPED if any(stored) and _HOLE not in payload else Ending.ZEROS
            return None
        return payload


def _short_ending(header: bytes) -> Ending:
    """The ending where less than a header is left. No event is empty, so a length of zero is a hole."""
    if not header:
        return Ending.COMPLETE
    return Ending.ZEROS if len(header) >= 8 and not any(header) else Ending.TORN
