"""Names of samples and groups: one array of UTF-8 bytes instead of a Python object for each of a million samples."""

import json
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_LENGTH = 1024
"""bytes of one name"""
_BLOCK = 4096


class Names(Sequence[str]):
    """A read-only sequence of texts over an (N,) array of zero-padded UTF-8; each is decoded when it is asked for."""

    def __init__(self, stored: NDArray[np.bytes_]) -> None:
        self.stored = stored

    def __len__(self) -> int:
        return len(self.stored)

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[str]: ...
    def __getitem__(self, key: int | slice) -> str | Sequence[str]:
        return Names(self.stored[key]) if isinstance(key, slice) else self.stored[key].decode()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _BLOCK):
            yield from (name.decode() for name in self.stored[start : start + _BLOCK].tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    def __repr__(self) -> str:
        return f"Names({', '.join(self[:3])}{', ...' if len(self) > 3 else ''})"


def encode_names(names: Sequence[str]) -> NDArray[np.bytes_]:
    """(N,) zero-padded UTF-8. ValueError for a name that is empty, longer than 1024 bytes, or holds a zero byte."""
    encoded = [name.encode() for name in names]
    for name, code in zip(names, encoded, strict=True):
        if not 0 < len(code) <= MAX_LENGTH or 0 in code:
            raise ValueError(f"name {name[:50]!r} cannot be stored; use 1 to {MAX_LENGTH} bytes of UTF-8 without zeros")
    return np.array(encoded, np.bytes_)


def decodes(stored: NDArray[np.bytes_]) -> bool:
    """Whether all are UTF-8."""
    try:
        for _ in Names(stored):
            pass
    except UnicodeDecodeError:
        return False
    return True


def first_repeated(names: Names) -> str | None:
    """A name that occurs twice, if there is one."""
    ordered = np.sort(names.stored)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    return ordered[twice[0]].decode() if len(twice) else None


def first_divided(groups: Names, part: ArrayLike) -> NDArray[np.int64]:
    """Rows of the first group, in order of names, that lies in two parts; empty if there is none."""
    order, parts = np.argsort(groups.stored, kind="stable"), np.asarray(part)
    ordered = groups.stored[order]
    divided = (ordered[1:] == ordered[:-1]) & (parts[order][1:] != parts[order][:-1])
    found = np.flatnonzero(divided)
    return np.flatnonzero(groups.stored == ordered[found[0]]) if len(found) else np.zeros(0, np.int64)


def json_blocks(names: Sequence[str]) -> Iterator[bytes]:
    """The JSON list of the names, piece by piece."""
    yield b"["
    for start in range(0, len(names), _BLOCK):
        block = json.dumps(list(names[start : start + _BLOCK]), ensure_ascii=False)[1:-1]
        yield (", " if start else "").encode() + block.encode()
    yield b"]"
