"""Volumes that are there twice: equal ones by a digest, alike ones (noise, another scale, a shift) by a hash.

The perceptual hash is pHash's (Zauner, Implementation and benchmarking of perceptual image hash functions, 2010) on
three axes: the signs of the low frequencies of the cosine transform, about their median. Of T1 templates of different
people 17 % of the bits differ or more, of one with noise, gamma, another scale or a shift 6 % or less.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

ACTIONS = ("keep", "drop", "error")
_CELLS, _FREQUENCIES = 32, {1: 64, 2: 16, 3: 8}
"""Means per axis that are transformed; frequencies per axis that are kept, by the number of axes."""
_ALIKE = 0.08
"""Share of bits that may differ between two of a kind."""
_FEWEST_BITS = 200
"""With fewer (volumes of less than 6 voxels an axis) chance would make some alike."""


@dataclass(frozen=True)
class Print:
    """What tells a volume from others."""

    digest: str
    """SHA-256 of shape and voxels."""
    bits: NDArray[np.uint64]
    """The perceptual hash, packed; empty where the volume is too small for one."""
    num_bits: int


class Volume(Protocol):
    """What is known of a volume before it is packed."""

    @property
    def id(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def split(self) -> int: ...
    @property
    def fold(self) -> int: ...
    @property
    def print(self) -> Print: ...


V = TypeVar("V", bound=Volume)


@dataclass(frozen=True)
class Twins(Generic[V]):
    """Two volumes, the earlier first, that are equal or (`alike`) nearly so."""

    first: V
    second: V
    alike: bool

    def __str__(self) -> str:
        named = [", ".join(volume.labels) or "nothing" for volume in (self.first, self.second)]
        apart = f", labelled {' and '.join(sorted(named))}" if named[0] != named[1] else ""
        same = "nearly the same as" if self.alike else "the same volume as"
        return f"{self.second.path} is {same} {self.first.path}{apart}"


def fingerprint(data: NDArray[Any]) -> Print:
    """Of a volume or an image, whatever dtype its intensities are stored in."""
    digest = hashlib.sha256(repr(data.shape).encode())
    large = data.dtype.kind in "iu" and data.dtype.itemsize == 8 and bool((np.abs(data) >= 2**53).any())
    for plane in data:
        exact = plane.astype("<i8") if large else plane.astype("<f8") + 0.0  # -0 is 0
        digest.update(np.ascontiguousarray(exact).tobytes())
    bits = _perceptual(data)
    words = np.packbits(np.pad(bits, (0, -bits.size % 64))).view(np.uint64)
    return Print(digest.hexdigest(), words, bits.size)


def find_twins(volumes: Sequence[V]) -> list[Twins[V]]:
    """Each volume with the first one that it equals, and all pairs of different ones that are alike."""
    seen = dict[str, int]()
    twins = []
    for number, volume in enumerate(volumes):
        if (first := seen.setdefault(volume.print.digest, number)) != number:
            twins.append((first, number, False))
    unique = sorted(seen.values())
    for bits in {volumes[number].print.num_bits for number in unique} - {0}:
        twins += _alike(volumes, [number for number in unique if volumes[number].print.num_bits == bits], bits)
    return [Twins(volumes[first], volumes[second], alike) for first, second, alike in sorted(twins, key=_by_second)]


def _by_second(pair: tuple[int, int, bool]) -> tuple[int, int]:
    return pair[1], pair[0]


def told(twins: Sequence[Twins[V]], dropped: bool) -> list[str]:
    """A sentence for each volume that has a twin. `dropped`: equal ones were left out."""
    first: dict[str, str] = {}
    for pair in twins:
        first.setdefault(pair.second.id, f"{pair}{', and left out' if dropped and not pair.alike else ''}")
    return list(first.values())


def without_equals(volumes: Sequence[V], twins: Sequence[Twins[V]]) -> list[V]:
    """Of equal ones the first. Refused (ValueError) where that would decide between two labels, splits or folds."""
    for pair in twins:
        differ = [key for key in ("labels", "split", "fold") if getattr(pair.first, key) != getattr(pair.second, key)]
        if differ and not pair.alike:
            raise ValueError(
                f"{pair}: their {' and '.join(differ)} differ, so neither is dropped; leave out one by hand"
            )
    gone = {pair.second.id for pair in twins if not pair.alike}
    return [volume for volume in volumes if volume.id not in gone]


def refuse_any(twins: Sequence[Twins[V]]) -> None:
    """Raises ValueError where there are some."""
    if twins:
        raise ValueError(f"{twins[0]}{_more(twins)}; leave out one, or use --duplicates drop or keep")


def refuse_leaks(homes: Mapping[str, tuple[str, int | None]], twins: Sequence[Twins[V]]) -> None:
    """Refuse (ValueError) two of a kind in different splits or folds: one would be trained on, and the other scored.

    homes: split and fold of each id that is packed.
    """
    packed = [pair for pair in twins if pair.first.id in homes and pair.second.id in homes]
    leaks = [pair for pair in packed if homes[pair.first.id] != homes[pair.second.id]]
    if leaks:
        pair = leaks[0]
        where = " and ".join(
            name if fold is None else f"fold {fold}" for name, fold in (homes[pair.first.id], homes[pair.second.id])
        )
        ways = "--duplicates keep" if pair.alike else "--duplicates drop or keep"
        raise ValueError(f"{pair}, and they are in {where}{_more(leaks)}: give both one group, or use {ways}")


def _more(twins: Sequence[Twins[V]]) -> str:
    return f" ({len(twins) - 1} more such)" if len(twins) > 1 else ""


def _alike(volumes: Sequence[V], numbers: list[int], bits: int) -> list[tuple[int, int, bool]]:
    table = np.stack([volumes[number].print.bits for number in numbers])
    found = []
    for row in range(1, len(numbers)):
        near = np.bitwise_count(table[:row] ^ table[row]).sum(axis=1, dtype=np.int64) <= _ALIKE * bits
        found += [(numbers[other], numbers[row], True) for other in np.flatnonzero(near).tolist()]
    return found


def _perceptual(data: NDArray[Any]) -> NDArray[np.bool_]:
    """The low frequencies of the means of up to 32 cells an axis, without the mean, each against their median."""
    kept = _FREQUENCIES.get(data.ndim, 4)
    low: NDArray[Any] = data
    for axis in range(data.ndim):
        low = _means(low, axis, min(_CELLS, data.shape[axis]))
    for axis, cells in enumerate(low.shape):
        low = np.moveaxis(_cosines(min(kept, cells), cells) @ np.moveaxis(low, axis, -2), -2, axis)
    flat = low.ravel()[1:]
    if flat.size < _FEWEST_BITS:
        return np.zeros(0, np.bool_)
    bits: NDArray[np.bool_] = flat > np.median(flat)
    return bits


def _means(data: NDArray[Any], axis: int, cells: int) -> NDArray[np.float64]:
    edges = np.arange(cells) * data.shape[axis] // cells
    sizes = np.diff(np.append(edges, data.shape[axis]))
    sums: NDArray[np.float64] = np.add.reduceat(data, edges, axis=axis, dtype=np.float64)
    return sums / sizes.reshape([-1 if number == axis else 1 for number in range(data.ndim)])


def _cosines(kept: int, cells: int) -> NDArray[np.float64]:
    """The first rows of the type II cosine transform."""
    matrix: NDArray[np.float64] = np.cos(np.pi * np.outer(np.arange(kept), np.arange(cells) + 0.5) / cells)
    return matrix
