"""The fields of a TensorBoard event that we read, decoded from protobuf's wire format without protobuf.

Field numbers: tensorboard/compat/proto/{event,summary,tensor}.proto. What is not listed here is skipped.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DT_FLOAT, _DT_DOUBLE = 1, 2
_SESSION_START = 1

Field = tuple[int, int, int, bytes]
"""Field number, wire type, the integer of a varint (else 0), the raw bytes of any other (else none)."""


class EventError(ValueError):
    """The bytes of a record are not an event."""


@dataclass(frozen=True, slots=True)
class Image:
    """A picture as it was logged."""

    encoded: bytes
    """The bytes of a PNG file (or JPEG, GIF: TensorBoard does not say which)."""
    width: int
    """Pixels."""
    height: int


@dataclass(frozen=True, slots=True)
class Value:
    """One tag of a summary; scalar and image are both None for kinds that we do not read."""

    tag: str
    scalar: float | None = None
    image: Image | None = None


@dataclass(frozen=True, slots=True)
class Event:
    wall_time: float = 0.0
    """Seconds since 1970."""
    step: int = 0
    file_version: str = ""
    """brain.Event:2 in the first record of a file."""
    start: bool = False
    """SessionLog.START: the writer begins again at `step` (`SummaryWriter(purge_step=...)`)."""
    values: tuple[Value, ...] = ()


def decode(payload: bytes) -> Event:
    """The event in the payload of one record. Raises EventError."""
    wall_time, step, version, start = 0.0, 0, "", False
    values: list[Value] = []
    for number, wire, integer, raw in _fields(payload):
        if number == 1 and wire == _FIXED64:
            wall_time = _unpack("<d", raw)
        elif number == 2 and wire == _VARINT:
            step = integer - (1 << 64) if integer >> 63 else integer
        elif number == 3 and wire == _BYTES:
            version = _text(raw)
        elif number == 5 and wire == _BYTES:
            values += [_value(inner) for field, kind, _, inner in _fields(raw) if field == 1 and kind == _BYTES]
        elif number == 7 and wire == _BYTES:
            start = any(field == 1 and status == _SESSION_START for field, _, status, _ in _fields(raw))
    return Event(wall_time, step, version, start, tuple(values))


Point = tuple[str, int, float, float]
"""A scalar: tag, step, wall time in seconds since 1970, value."""

_DOUBLE, _FLOAT = struct.Struct("<d"), struct.Struct("<f")
_HEADS = 4096  # of tags that are remembered at once


def scalars_of(payloads: Iterable[bytes]) -> Iterator[tuple[Point, ...] | Event]:
    """Each payload decoded: an event of scalars alone as a tuple of Points, fast; any other as `decode` gives it.

        for payloads in (reader := RecordReader(path, start)).payloads():
            for one in scalars_of(payloads):
                if type(one) is tuple: points, else an Event

    One item per payload, in their order. What stands before the number of a scalar is the same in all events of its
    tag, so it is decoded once. Raises EventError, behind the items before it.
    """
    known: dict[bytes, str] = {}
    for payload in payloads:
        points = _points(payload, known)
        if points is None:
            event = decode(payload)
            if len(known) >= _HEADS:
                known.clear()
            known.update((head, value.tag) for value in event.values if (head := _head(value.tag)))
            points = _points(payload, known) if event.values else None
            yield event if points is None else points
        else:
            yield points


def _points(payload: bytes, known: dict[bytes, str]) -> tuple[Point, ...] | None:
    """None where anything but wall time, step and scalars of known heads is in the event."""
    size = len(payload)
    if size < 13 or payload[0] != 0x09:
        return None
    step, place = _step(payload) if payload[9] == 0x10 else (0, 9)  # step 0 is not written
    if step < 0 or place + 2 > size or payload[place] != 0x2A:
        return None
    length, place = payload[place + 1], place + 2
    if length > 127:
        if place >= size or payload[place] > 127:
            return None
        length, place = length & 127 | payload[place] << 7, place + 1
    if place + length != size:
        return None
    (wall_time,) = _DOUBLE.unpack_from(payload, 1)
    found = []
    while place + 2 < size:
        end = place + payload[place + 1] - 2  # where the number begins
        tag = known.get(payload[place:end])
        if tag is None or end + 4 > size:
            return None
        found.append((tag, step, wall_time, _FLOAT.unpack_from(payload, end)[0]))
        place = end + 4
    return tuple(found) if found and place == size else None


def _head(tag: str) -> bytes:
    """What stands before the number of a scalar of this tag; nothing for a tag that takes the slow road."""
    name = tag.encode()
    if len(name) > 120:  # its lengths take two bytes
        return b""
    return b"\x0a" + bytes([len(name) + 7]) + b"\x0a" + bytes([len(name)]) + name + b"\x15"


def _step(payload: bytes) -> tuple[int, int]:
    """The step behind the wall time, and the place behind it; -1 for a negative or torn one."""
    first, second, third = payload[10:13]
    if first < 128:
        return first, 11
    if second < 128:
        return first & 127 | second << 7, 12
    if third < 128:
        return first & 127 | (second & 127) << 7 | third << 14, 13
    try:
        step, place = _varint(payload, 10)
    except EventError:
        return -1, 10
    return (step, place) if step < 1 << 63 else (-1, 10)


def last_step(payload: bytes) -> int | None:
    """The step of an event with a summary, None for any other; its values are not decoded. Raises EventError."""
    step, summary = 0, False
    for number, wire, integer, _ in _fields(payload):
        if number == 2 and wire == _VARINT:
            step = integer - (1 << 64) if integer >> 63 else integer
        summary = summary or (number == 5 and wire == _BYTES)
    return step if summary else None


def as_kept(value: float) -> float:
    """A number as an event file keeps it, in 32 bits."""
    try:
        return float(_unpack("<f", struct.pack("<f", value)))
    except OverflowError:
        return math.copysign(math.inf, value)


def _value(payload: bytes) -> Value:
    """Summary.Value: add_scalar writes simple_value, add_scalar(new_style=True) a tensor, add_figure an image."""
    tag, scalar, image = "", None, None
    for number, wire, _, raw in _fields(payload):
        if number == 1 and wire == _BYTES:
            tag = _text(raw)
        elif number == 2 and wire == _FIXED32:
            scalar = _unpack("<f", raw)
        elif number == 4 and wire == _BYTES:
            image = _image(raw)
        elif number == 8 and wire == _BYTES:
            scalar = _tensor(raw)
    return Value(tag, scalar, image)


def _image(payload: bytes) -> Image:
    """Summary.Image: height, width, colorspace, encoded_image_string."""
    height = width = 0
    encoded = b""
    for number, _, integer, raw in _fields(payload):
        if number == 1:
            height = integer
        elif number == 2:
            width = integer
        elif number == 4:
            encoded = raw
    return Image(encoded, width, height)


def _tensor(payload: bytes) -> float | None:
    """The number in a TensorProto of one float or double; None for any other tensor (texts, PR curves)."""
    kind, content = 0, b""
    for number, _, integer, raw in _fields(payload):
        if number == 1:
            kind = integer
        elif number in (4, 5, 6):  # tensor_content, float_val, double_val
            content += raw
    if kind == _DT_FLOAT and len(content) == 4:
        return _unpack("<f", content)
    return _unpack("<d", content) if kind == _DT_DOUBLE and len(content) == 8 else None


def _fields(payload: bytes) -> Iterator[Field]:
    """The fields of one message in their order."""
    place, end = 0, len(payload)
    while place < end:
        key, place = _varint(payload, place)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            integer, place = _varint(payload, place)
            yield number, wire, integer, b""
            continue
        if wire == _BYTES:
            length, place = _varint(payload, place)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise EventError(f"not an event: wire type {wire} at byte {place}")
        if length > end - place:
            raise EventError(f"not an event: a field of {length} bytes at byte {place} of {end}")
        yield number, wire, 0, payload[place : place + length]
        place += length


def _varint(payload: bytes, place: int) -> tuple[int, int]:
    """The integer that begins at `place`, and the place behind it."""
    value = shift = 0
    for position in range(place, min(place + 10, len(payload))):
        byte = payload[position]
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, position + 1
        shift += 7
    raise EventError(f"not an event: no end of the number at byte {place}")


def _unpack(form: str, raw: bytes) -> float:
    value: float = struct.unpack(form, raw)[0]
    return value


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")
