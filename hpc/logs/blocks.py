"""Whole records in bytes that have come over the wire: how far they reach, and what stands behind them."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hpc.logs.crc32c import crc32c, masked_crc32c
from hpc.logs.event import EventError, decode
from hpc.logs.records import FOOTER, HEADER, Ending

_HOLE = bytes(4096)
_HEADERS: dict[bytes, int] = {}
"""Headers that have been found right, and the lengths in them: few lengths come again and again."""
_MOST_HEADERS = 4096


@dataclass(frozen=True, slots=True)
class Block:
    """What some bytes hold, that begin where a record does."""

    valid: int
    """Bytes up to the end of the last whole record."""
    records: int
    last: int
    """Where the last whole record begins; -1 without one."""
    ending: Ending
    """What lies behind it; TORN where more bytes may complete it."""
    needed: int
    """Bytes from the beginning that would complete the next record, where its header is whole; else 0."""


def whole_records(data: bytes) -> Block:
    """Verify the records in `data` one after the other, up to the first that is not whole."""
    place, records, last, size = 0, 0, -1, len(data)
    headers, crc, unpack = _HEADERS, crc32c, struct.Struct("<I").unpack_from
    while place + HEADER <= size:
        head = data[place : place + HEADER]
        length = headers.get(head, -1)
        if length < 0:
            length = _length(head)
            if length < 0:
                return Block(place, records, last, Ending.FLIPPED if any(head[8:]) else Ending.ZEROS, 0)
        body = place + HEADER
        end = body + length
        if end + FOOTER > size:
            return Block(place, records, last, Ending.TORN, end + FOOTER)
        summed = crc(data[body:end])
        (stored,) = unpack(data, end)
        if (((summed >> 15) | (summed << 17)) + 0xA282EAD8) & 0xFFFFFFFF != stored:
            hole = not stored or _HOLE in data[body:end]
            return Block(place, records, last, Ending.ZEROS if hole else Ending.FLIPPED, 0)
        last, records, place = place, records + 1, end + FOOTER
    rest = data[place:]
    if not rest:
        return Block(place, records, last, Ending.COMPLETE, 0)
    return Block(place, records, last, Ending.ZEROS if len(rest) >= 8 and not any(rest) else Ending.TORN, 0)


def _length(head: bytes) -> int:
    """The length in a header; -1 where its checksum does not fit."""
    length, stored = struct.unpack("<QI", head)
    if masked_crc32c(head[:8]) != stored:
        return -1
    if len(_HEADERS) >= _MOST_HEADERS:
        _HEADERS.clear()
    _HEADERS[head] = int(length)
    return int(length)


def last_event(data: bytes, block: Block) -> tuple[int | None, float]:
    """Step and wall time (seconds since 1970) of the last whole record; step None of one that carries no data."""
    if block.last < 0:
        return None, 0.0
    try:
        event = decode(data[block.last + HEADER : block.valid - FOOTER])
    except EventError:
        return None, 0.0
    return (event.step if event.values else None), event.wall_time
