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

from hpc.logs.crc32c import crc32c, masked_crc32c

HEADER = 12
FOOTER = 4
_HOLE = bytes(4096)  # a page, the unit in which a network file system loses data
_BUFFER = 1 << 20
_HEAD = struct.Struct("<QI")
_FOOT = struct.Struct("<I")


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

    def __init__(self, path: Path, start: int = 0, stop: int | None = None) -> None:
        """`stop`: bytes behind it are not there for this reader."""
        self.path = path
        self._stop = stop
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
            self._measure(file)
            file.seek(self.valid)
            while (payload := self._next(file)) is not None:
                record = Record(self.valid, payload)
                self.valid = record.end
                self.records += 1
                yield record

    def _measure(self, file: BinaryIO) -> None:
        size = file.seek(0, 2)
        self.size = max(self.valid, size if self._stop is None else min(size, self._stop))

    def payloads(self) -> Iterator[list[bytes]]:
        """The payloads of the whole records, some hundred KB at a time: the fast road, without an object per record.

        The records of a list follow each other; `valid` and `records` count them when the list is handed out.
        """
        with self.path.open("rb", buffering=0) as file:
            self._measure(file)
            need = 0
            while need <= self.rest:
                file.seek(self.valid)
                wanted = min(max(_BUFFER, need), self.rest)
                block = file.read(wanted)
                found, used, need = _whole(block)
                self.valid += used
                self.records += len(found)
                if found:
                    yield found
                if len(block) < wanted or not (used or need > wanted):
                    break
        yield from ([record.payload] for record in self)

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


@dataclass(frozen=True, slots=True)
class Scan:
    """What lies in a file from the start of a scan on."""

    valid: int
    """Byte behind the last whole record."""
    records: int
    """Whole records that were passed."""
    ending: Ending
    size: int
    """Bytes of the file (at most `stop`)."""


def scan(path: Path, start: int = 0, stop: int | None = None) -> Scan:
    """Verifies every record from `start` (the end of a record) on and decodes none.

    With google_crc32c this is as fast as a bare loop over frames and checksums in Python. To read payloads at
    that speed use `RecordReader.payloads`, and `hpc.logs.event.scalars_of` to decode them. Raises OSError.
    """
    reader = RecordReader(path, start, stop)
    for _ in reader.payloads():
        pass
    return Scan(reader.valid, reader.records, reader.ending, reader.size)


def _whole(block: bytes) -> tuple[list[bytes], int, int]:
    """Payloads of the whole records at a block's beginning, the bytes they take, and those that the next block needs.

    It stops at whatever does not fit: the careful reader tells what that is. Of a record that goes on behind the block
    the length is believed only with its checksum.
    """
    found: list[bytes] = []
    append, head, foot, crc = found.append, _HEAD.unpack_from, _FOOT.unpack_from, crc32c
    known: dict[int, int] = {}
    place, size = 0, len(block)
    while place + HEADER <= size:
        length, stored = head(block, place)
        if known.get(length) != stored:
            if masked_crc32c(block[place : place + 8]) != stored:
                break
            known[length] = stored
        end = place + HEADER + length
        if end + FOOTER > size:
            return found, place, HEADER + length + FOOTER
        payload = block[place + HEADER : end]
        sum_ = crc(payload)
        if foot(block, end)[0] != ((sum_ >> 15 | sum_ << 17) + 0xA282EAD8) & 0xFFFFFFFF:
            break
        append(payload)
        place = end + FOOTER
    return found, place, 0
