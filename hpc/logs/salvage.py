"""What of a damaged event file is whole: its records, what lies between them, and where it begins to fit again."""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from hpc.logs.crc32c import masked_crc32c
from hpc.logs.event import Event, EventError, Point, decode, scalars_of
from hpc.logs.records import FOOTER, HEADER, Ending, RecordReader

_BLOCK = 1 << 20
_ZEROS = bytes(4)
_NEAR = 64  # records of one moment are compared with so many before them
_VALUES = re.compile(rb"\x09.{8}\x10[\x80-\xff]{0,8}[\x00-\x7f]\x2a", re.DOTALL)
"""An event with a wall time, a step and values as its first fields."""
_HIGH = bytes(range(128, 256))


class Fault(StrEnum):
    """What is wrong with a stretch of a file."""

    TORN = "torn"
    """The beginning of a record whose rest is missing."""
    ZEROS = "zeros"
    """A hole of zero bytes."""
    PAYLOAD = "flipped payload"
    """The header fits, the payload's checksum does not: one record."""
    HEADER = "flipped header"
    """The length's checksum does not fit: where the record ends is not known."""
    DUPLICATE = "duplicate"
    """Records that stand right before, again."""
    FOREIGN = "foreign"
    """A record that is whole and no event."""


@dataclass(frozen=True, slots=True)
class Damage:
    begin: int
    """Byte at which it begins."""
    end: int
    fault: Fault
    after_step: int | None
    """Step of the last event with values before it; None without any."""
    before_step: int | None = None
    """Step of the first one behind it: steps between the two may be lost."""


@dataclass(slots=True)
class Survey:
    """One file, read to its end."""

    size: int = 0
    records: int = 0
    """Whole records that are events and no duplicates: what a repair keeps."""
    valid: int = 0
    """Bytes up to the first fault."""
    first: int = 0
    """Whole records before it."""
    last_step: int | None = None
    damages: list[Damage] = field(default_factory=list)
    kept: list[tuple[int, int]] = field(default_factory=list)
    """Byte ranges of whole records, in their order."""


def survey(path: Path) -> Survey:
    """Reads a file past all its faults. Memory: the largest record, and 8 bytes per record. Raises OSError."""
    return _Walk(path).run()


class _Walk:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = Survey()
        self.sums = array("q")
        """Of every whole event so far, duplicates left out: a million take 8 MB."""
        self.wall = float("-inf")
        self.step: int | None = None
        self.again: int | None = None
        """Inside a duplicate: which record should come again next."""

    def run(self) -> Survey:
        place = 0
        while True:
            reader = RecordReader(self.path, place)
            self._whole(reader)
            self.found.size = reader.size
            if reader.ending is Ending.COMPLETE:
                break
            with self.path.open("rb") as file:
                fault, place = _beyond(file, reader)
            self._damage(reader.valid, place, fault)
            if place >= reader.size:
                break
        if not self.found.damages:
            self.found.valid, self.found.first = self.found.size, self.found.records
        return self.found

    def _whole(self, reader: RecordReader) -> None:
        place = reader.valid
        for payloads in reader.payloads():
            if self._take_all(place, payloads):
                place = reader.valid
                continue
            for payload, event in zip(payloads, _events(payloads), strict=True):
                end = place + HEADER + len(payload) + FOOTER
                self._take(place, end, payload, event)
                place = end

    def _take_all(self, begin: int, payloads: list[bytes]) -> bool:
        """The fast road for what nearly all records are: events with values, in order of time, none of them twice.

        Their first fields are looked at alone, in columns: all steps of a block have as many digits, as a rule.
        False, and nothing done, where one record is something else.
        """
        first = _VALUES.match(payloads[0])
        if first is None or self.again is not None or len(set(payloads)) < len(payloads):
            return False
        width = first.end()
        heads = b"".join([payload[:width] for payload in payloads])
        if not _alike(heads, width, len(payloads)):
            return False
        walls = [wall for (wall,) in struct.iter_unpack(f"<xd{width - 9}x", heads)]
        if not walls[0] >= self.wall or walls != sorted(walls):
            return False
        if walls[0] == self.wall:
            near = set(self.sums[-_NEAR:])
            if any(hash(payload) in near for payload in payloads[: walls.count(self.wall)]):
                return False
        highest = bytes(max(zip(*[heads[place::width] for place in range(width - 2, 9, -1)], strict=True)))[::-1]
        for step in (heads[10 : width - 1], highest, heads[10 - width : -1]):
            self._tell_step(sum((byte & 127) << 7 * place for place, byte in enumerate(step)))
        self.wall = walls[-1]
        self.sums.extend(map(hash, payloads))
        self._keep(begin, begin + sum(map(len, payloads)) + (HEADER + FOOTER) * len(payloads), len(payloads))
        return True

    def _take(self, begin: int, end: int, payload: bytes, event: tuple[Point, ...] | Event | None) -> None:
        if event is None:
            self._damage(begin, end, Fault.FOREIGN)
            return
        step: int | None
        if isinstance(event, tuple):
            _, step, wall, _ = event[0]
        else:
            wall, step = event.wall_time, event.step if event.values else None
        if self._repeats(hash(payload), wall):
            self._damage(begin, end, Fault.DUPLICATE)
            return
        self.wall = wall
        if step is not None:
            self._tell_step(step)
        self._keep(begin, end, 1)

    def _keep(self, begin: int, end: int, records: int) -> None:
        found = self.found
        found.records += records
        if found.kept and found.kept[-1][1] == begin:
            begin = found.kept.pop()[0]
        found.kept.append((begin, end))

    def _repeats(self, sum_: int, wall: float) -> bool:
        """Whether the record was there before. A repeated stretch begins where the clock goes back or stands."""
        if self.again is not None and self.again < len(self.sums) and self.sums[self.again] == sum_:
            self.again += 1
            return True
        self.again = None
        if wall <= self.wall:
            first = max(len(self.sums) - _NEAR, 0) if wall == self.wall else 0
            with suppress(ValueError):
                self.again = self.sums.index(sum_, first) + 1
                return True
        self.sums.append(sum_)
        return False

    def _tell_step(self, step: int) -> None:
        damages, found = self.found.damages, self.found
        for place in range(len(damages) - 1, -1, -1):
            one = damages[place]
            if one.before_step is not None:
                break
            damages[place] = Damage(one.begin, one.end, one.fault, one.after_step, step)
        found.last_step = step if found.last_step is None else max(step, found.last_step)
        self.step = step

    def _damage(self, begin: int, end: int, fault: Fault) -> None:
        damages = self.found.damages
        if not damages:
            self.found.valid, self.found.first = begin, self.found.records
        if damages and damages[-1].end == begin and damages[-1].fault is fault is not Fault.PAYLOAD:
            begin = damages.pop().begin
        damages.append(Damage(begin, end, fault, self.step))


def _alike(heads: bytes, width: int, records: int) -> bool:
    """Whether each head of so many bytes is a wall time, a step of as many digits as the others and a summary's tag."""
    if len(heads) != records * width:
        return False
    fixed = ((0, 0x09), (9, 0x10), (width - 1, 0x2A))
    if any(heads[place::width].count(byte) != records for place, byte in fixed):
        return False
    return heads[width - 2 :: width].isascii() and not any(
        heads[place::width].translate(None, _HIGH) for place in range(10, width - 2)
    )


def _events(payloads: list[bytes]) -> Iterator[tuple[Point, ...] | Event | None]:
    """One item per payload, None for what is no event."""
    done = 0
    while done < len(payloads):
        try:
            for one in scalars_of(payloads[done:]):
                done += 1
                yield one
        except EventError:
            done += 1
            yield None


def _beyond(file: BinaryIO, reader: RecordReader) -> tuple[Fault, int]:
    """The fault at the reader's `valid`, and where whole events begin again: the file's size where none does."""
    place, size = reader.valid, reader.size
    file.seek(place)
    header = file.read(HEADER)
    fault = {Ending.TORN: Fault.TORN, Ending.ZEROS: Fault.ZEROS}.get(reader.ending, Fault.HEADER)
    if (length := _length(header, 0)) is not None and place + HEADER + length + FOOTER <= size:
        fault = Fault.PAYLOAD if fault is Fault.HEADER else fault
        end = place + HEADER + length + FOOTER
        # What a payload contains is not looked at where its record ends as it should.
        if end == size or _event_at(file, end, size):
            return fault, end
    return fault, _next_event(file, place + 1, size)


def _length(block: bytes, place: int) -> int | None:
    """The length in a header whose checksum fits."""
    if place + HEADER > len(block):
        return None
    length, stored = struct.unpack_from("<QI", block, place)
    fits = stored == masked_crc32c(block[place : place + 8])
    return int(length) if fits else None


def _next_event(file: BinaryIO, place: int, size: int) -> int:
    """The first whole event from `place` on. A record is under 4 GiB (protobuf allows 2): half its length is zeros."""
    while place + HEADER <= size:
        file.seek(place)
        block = file.read(min(_BLOCK, size - place))
        at = 0
        while (zeros := block.find(_ZEROS, at + 4)) >= 0 and zeros - 4 + HEADER <= len(block):
            at = zeros - 4
            if not any(block[at : at + HEADER]):  # in a hole
                rest = block[at:].lstrip(b"\0")
                at = len(block) - len(rest) - HEADER + 1
                continue
            if (length := _length(block, at)) is not None and length and _event_at(file, place + at, size):
                return place + at
            at += 1
        if place + len(block) >= size or len(block) < HEADER:
            break
        place += len(block) - HEADER + 1
    return size


def _event_at(file: BinaryIO, place: int, size: int) -> bool:
    file.seek(place)
    length = _length(file.read(HEADER), 0)
    if not length or place + HEADER + length + FOOTER > size:
        return False
    body = file.read(length + FOOTER)
    if len(body) < length + FOOTER or struct.unpack("<I", body[length:])[0] != masked_crc32c(body[:length]):
        return False
    try:
        decode(body[:length])
    except EventError:
        return False
    return True
