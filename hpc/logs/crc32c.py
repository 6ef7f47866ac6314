"""CRC-32C (Castagnoli), the checksum of TensorBoard's records: google_crc32c where installed, else pure Python."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

_POLYNOMIAL = 0x82F63B78  # reflected
_ONES = 0xFFFFFFFF
_LANE = 256  # bytes per lane: the lanes are summed side by side, and joined one after the other
_LANES_PAY = 16 * _LANE  # below this the table loop is faster


def _byte_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _byte_table()


def _advance(state: int, data: bytes) -> int:
    table = _TABLE
    for byte in data:
        state = table[(state ^ byte) & 255] ^ (state >> 8)
    return state


@cache
def _lane_tables() -> tuple[list[list[int]], list[bytes]]:
    """Tables that move a state over one lane of zero bytes, and the byte table cut into its four byte planes."""
    zeros = bytes(_LANE)
    shift = [[_advance(byte << (8 * place), zeros) for byte in range(256)] for place in range(4)]
    planes = [bytes((word >> (8 * place)) & 255 for word in _TABLE) for place in range(4)]
    return shift, planes


def _lane_states(data: bytes) -> list[bytes]:
    """State of every lane of `data` (a whole number of lanes) from zero, as four byte planes, lowest byte first.

    One byte column of all lanes is looked up at a time, so `bytes.translate` and integer XOR do the work in C.
    """
    planes = _lane_tables()[1]
    lanes = len(data) // _LANE
    low = second = third = high = 0
    for column in range(_LANE):
        index = (low ^ int.from_bytes(data[column::_LANE], "little")).to_bytes(lanes, "little")
        low = second ^ int.from_bytes(index.translate(planes[0]), "little")
        second = third ^ int.from_bytes(index.translate(planes[1]), "little")
        third = high ^ int.from_bytes(index.translate(planes[2]), "little")
        high = int.from_bytes(index.translate(planes[3]), "little")
    return [plane.to_bytes(lanes, "little") for plane in (low, second, third, high)]


def crc32c_python(data: bytes) -> int:
    """CRC-32C of `data` with the standard library alone: about 100 MB/s on long data, 10 on short."""
    state, done = _ONES, 0
    if len(data) >= _LANES_PAY:
        done = len(data) - len(data) % _LANE
        (zero, one, two, three), _ = _lane_tables()
        for a, b, c, d in zip(*_lane_states(data[:done]), strict=True):
            moved = zero[state & 255] ^ one[(state >> 8) & 255] ^ two[(state >> 16) & 255] ^ three[state >> 24]
            state = moved ^ (a | b << 8 | c << 16 | d << 24)
    return _advance(state, data[done:]) ^ _ONES


def _choose() -> Callable[[bytes], int]:
    try:
        module = importlib.import_module("google_crc32c")
    except ImportError:
        return crc32c_python
    # Its own Python fallback is slower than ours.
    value: Callable[[bytes], int] = module.value
    return value if module.implementation == "c" else crc32c_python


crc32c: Callable[[bytes], int] = _choose()
"""CRC-32C of the given bytes, as an unsigned 32-bit number."""


def masked_crc32c(data: bytes) -> int:
    """The CRC as TensorFlow's record format stores it (tensorflow/core/lib/hash/crc32c.h): rotated, plus a constant."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & _ONES
