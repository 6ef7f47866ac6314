"""Volumes that are there twice: equal ones by a digest, alike ones (noise, another scale, a shift) by a hash.

The perceptual hash is pHash's (Zauner, Implementation and benchmarking of perceptual image hash functions, 2010) on
three axes: the signs of the low frequencies of the cosine transform, about their median. Of T1 templates of different
people 17 % of the bits differ or more, of one with noise, gamma, another scale or a shift 6 % or less.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ACTIONS = ("keep", "drop", "error")
_CELLS, _FREQUENCIES = 32, {1: 64, 2: 16, 3: 8}
"""Means per axis that are transformed; frequencies per axis that are kept, by the number of axes."""
_ALIKE = 0.08
"""Share of bits that may differ between two of a kind."""
_FEWEST_BITS = 200
"""With fewer (volumes of less than 6 voxels an axis) chance would make some alike."""
_AT_ONCE = 4096


@dataclass(frozen=True)
class Print:
    """What tells a volume from others."""

    digest: str
    """SHA-256 of shape and voxels."""
    bits: NDArray[np.uint64]
    """The perceptual hash, packed; empty where the volume is too small for one."""
    num_bits: int


@dataclass(frozen=True)
class Twins:
    """Numbers of two volumes, the earlier first, that are equal or (`alike`) nearly so."""

    first: int
    second: int
    alike: bool


def fingerprint(data: NDArray[Any]) -> Print:
    """Of a volume or an image, whatever dtype its intensities are stored in."""
    digest = hashlib.sha256(repr(data.shape).encode())
    for plane in data:
        digest.update(np.ascontiguousarray(plane, "<f8").tobytes())
    bits = _perceptual(data)
    words = np.packbits(np.pad(bits, (0, -bits.size % 64))).view(np.uint64)
    return Print(digest.hexdigest(), words, bits.size)


def find_twins(prints: Sequence[Print]) -> list[Twins]:
    """Each volume with the first one that it equals or is alike to: at most one line for a volume."""
    twins, seen = [], dict[str, int]()
    for number, one in enumerate(prints):
        if (first := seen.setdefault(one.digest, number)) != number:
            twins.append(Twins(first, number, alike=False))
    unique = np.array(sorted(seen.values()), np.int64)
    for bits in {prints[number].num_bits for number in unique.tolist()} - {0}:
        twins += _alike(prints, unique[[prints[number].num_bits == bits for number in unique.tolist()]], bits)
    return sorted(twins, key=lambda pair: pair.second)


def _alike(prints: Sequence[Print], numbers: NDArray[np.int64], bits: int) -> list[Twins]:
    table = np.stack([prints[number].bits for number in numbers.tolist()])
    found = []
    for start in range(0, len(numbers), _AT_ONCE):
        block = table[start : start + _AT_ONCE]
        first = np.full(len(block), -1)
        for other in range(start + len(block)):  # the earliest wins: from the last one down would overwrite it
            near = np.bitwise_count(block ^ table[other]).sum(axis=1, dtype=np.int64) <= _ALIKE * bits
            near &= (np.arange(start, start + len(block)) > other) & (first < 0)
            first[near] = other
        found += [
            Twins(int(numbers[first[row]]), int(numbers[start + row]), alike=True) for row in np.flatnonzero(first >= 0)
        ]
    return found


def _perceptual(data: NDArray[Any]) -> NDArray[np.bool_]:
    """The low frequencies of the means of up to 32 cells an axis, without the mean, each against their median."""
    kept = _FREQUENCIES.get(data.ndim, 4)
    low = data.astype(np.float64)
    for axis in range(data.ndim):
        cells = min(_CELLS, data.shape[axis])
        low = np.moveaxis(_cosines(min(kept, cells), cells) @ np.moveaxis(_means(low, axis, cells), axis, -2), -2, axis)
    flat = low.ravel()[1:]
    if flat.size < _FEWEST_BITS:
        return np.zeros(0, np.bool_)
    bits: NDArray[np.bool_] = flat > np.median(flat)
    return bits


def _means(data: NDArray[np.float64], axis: int, cells: int) -> NDArray[np.float64]:
    edges = np.arange(cells) * data.shape[axis] // cells
    sizes = np.diff(np.append(edges, data.shape[axis]))
    sums: NDArray[np.float64] = np.add.reduceat(data, edges, axis=axis)
    return sums / sizes.reshape([-1 if number == axis else 1 for number in range(data.ndim)])


def _cosines(kept: int, cells: int) -> NDArray[np.float64]:
    """The first rows of the type II cosine transform."""
    matrix: NDArray[np.float64] = np.cos(np.pi * np.outer(np.arange(kept), np.arange(cells) + 0.5) / cells)
    return matrix
