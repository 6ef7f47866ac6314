"""Volumes that are there twice: equal ones by a digest, alike ones (noise, another scale, a shift) by a hash.

The perceptual hash is pHash's (Zauner, Implementation and benchmarking of perceptual image hash functions, 2010) on
three axes: the signs of the low frequencies of the cosine transform, about their median. Of T1 templates of different
people 10 % of the bits differ or more, of one with noise, gamma, another scale or a shift 4 % or less. Structures cut
out of volumes (1 % of the voxels) agree in their low frequencies as soon as they lie at one place: what is nearly empty
is compared by the digest alone.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from datasets.checksum import crc32

ACTIONS = ("keep", "drop", "error")
_CELLS, _FREQUENCIES = 32, {1: 64, 2: 16, 3: 8}
"""Means per axis that are transformed; frequencies per axis that are kept, by the number of axes."""
_OFF_CENTRE = 0.02
"""Part of an axis: what is symmetric has no odd frequencies about its centre, and noise would be their sign."""
_LINES = {2: 256, 3: 64}
"""Places per axis, all but the last, of the lines that are looked at."""
_CHANNELS = 8
"""Channels that are looked at."""
_BRIGHTNESS = np.array([0.299, 0.587, 0.114])
"""Of red, green and blue (ITU-R BT.601)."""
_PIECE = 2**17
"""Bytes."""
_INTEGERS = ("|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8")
_ALIKE = 0.07
"""Share of bits that may differ between two of a kind."""
_ROWS = 2048
"""Volumes that are compared with as many others at a time."""
_FEWEST_BITS = 200
"""With fewer (volumes of less than 6 voxels an axis) chance would make some alike."""
_LOOKED = 4096
"""Voxels by whose median the background is found."""
_EMPTY = 0.05
"""Share of voxels that differ from the most frequent value, below which a volume is nearly empty."""


@dataclass(frozen=True)
class Print:
    """What tells a volume from others."""

    digest: str
    """SHA-256 of shape and voxels, of large ones by way of sums of their pieces."""
    bits: NDArray[np.uint64]
    """The perceptual hash, packed; empty where the volume is too small for one, or nearly empty."""
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
    """Of a volume or an image (C, *spatial), whatever dtype its intensities are stored in."""
    bits = _perceptual(data)
    words = np.packbits(np.pad(bits, (0, -bits.size % 64))).view(np.uint64)
    return Print(_digest(data), words, bits.size)


def find_twins(volumes: Sequence[V]) -> list[Twins[V]]:
    """Each volume with the first one that it equals, and of those that are alike enough pairs to join them all.

    So whatever parts them into splits or drops equal ones finds a pair in two of them, if there is one.
    """
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


class TwinsRefused(ValueError):
    """Two of a kind where there may be none; `all` has a sentence for each pair."""

    def __init__(self, message: str, twins: Sequence[Twins[Any]]) -> None:
        super().__init__(message)
        self.all = [str(pair) for pair in twins]


def refuse_any(twins: Sequence[Twins[V]]) -> None:
    """Raises TwinsRefused where there are some."""
    if twins:
        raise TwinsRefused(f"{twins[0]}{_more(twins)}; leave out one, or use --duplicates drop or keep", twins)


def refuse_leaks(homes: Mapping[str, tuple[str, int | None]], twins: Sequence[Twins[V]]) -> None:
    """Refuse (TwinsRefused) two of a kind in different splits or folds: one would be trained on, and the other scored.

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
        message = f"{pair}, and they are in {where}{_more(leaks)}: give both one group, or use {ways}"
        raise TwinsRefused(message, leaks)


def _more(twins: Sequence[Twins[V]]) -> str:
    return f" ({len(twins) - 1} more such)" if len(twins) > 1 else ""


def _digest(data: NDArray[Any]) -> str:
    """Of the values, not their dtype. A whole piece counts by its CRC-32 and the sum of its words: SHA is slower."""
    dtype = _smallest_dtype(data)
    digest = hashlib.sha256(f"{data.shape} {dtype}".encode())
    flat = np.ascontiguousarray(data).reshape(-1)
    step = _PIECE // np.dtype(dtype).itemsize
    for first in range(0, flat.size, step):
        part = flat[first : first + step].astype(dtype, copy=False)
        if dtype[1] == "f":
            part = part + part.dtype.type(0)  # -0 is 0
        if part.nbytes == _PIECE:
            digest.update(b"%d %d" % (crc32(part), np.add.reduce(part.view(np.uint64))))
        else:
            digest.update(part.tobytes())
    return digest.hexdigest()


def _smallest_dtype(data: NDArray[Any]) -> str:
    """That holds all values exactly: of integers, where all are whole, else of real numbers."""
    low, high = (data.min().item(), data.max().item()) if data.size else (0, 0)
    if data.dtype.kind != "f" or (np.isfinite([low, high]).all() and _each(data, lambda part: np.rint(part) == part)):
        for dtype in _INTEGERS:
            limits = np.iinfo(dtype)
            if limits.min <= low and high <= limits.max:
                return dtype
    single = data.dtype.itemsize <= 4 or _each(data, lambda part: part.astype(np.float32) == part)
    return "<f4" if single else "<f8"


def _each(data: NDArray[Any], holds: Callable[[NDArray[Any]], NDArray[np.bool_]]) -> bool:
    """Whether it holds for all voxels; most often the first plane tells."""
    return all(bool(holds(plane).all()) for channel in data for plane in channel)


def _alike(volumes: Sequence[V], numbers: list[int], bits: int) -> list[tuple[int, int, bool]]:
    """Enough pairs to join all that are alike: what each is alike to is in its group, and a pair leads there.

    The bits as signs, their products of blocks with blocks give all distances at once.
    """
    table = np.stack([volumes[number].print.bits for number in numbers])
    joined = np.arange(len(numbers))
    found: list[tuple[int, int, bool]] = []
    for first in range(0, len(numbers), _ROWS):
        rows = _signs(table[first : first + _ROWS], bits)
        for other in range(0, first + 1, _ROWS):
            columns = rows if other == first else _signs(table[other : other + _ROWS], bits)
            near = rows @ columns.T >= (1 - 2 * _ALIKE) * bits
            if not near.any():
                continue
            near &= joined[first : first + _ROWS, None] != joined[other : other + _ROWS]
            for row in np.flatnonzero(near.any(axis=1)).tolist():
                own, hits = first + row, other + np.flatnonzero(near[row])
                while (hits := hits[joined[hits] != joined[own]]).size:
                    low, high = sorted((own, int(hits[0])))
                    found.append((numbers[low], numbers[high], True))
                    joined[joined == joined[high]] = joined[low]
    return found


def _signs(table: NDArray[np.uint64], bits: int) -> NDArray[np.float32]:
    """(rows, bits) 1 or -1."""
    return np.unpackbits(table.view(np.uint8), axis=1, count=bits).astype(np.float32) * 2 - 1


def _perceptual(data: NDArray[Any]) -> NDArray[np.bool_]:
    """The low frequencies of the means of up to 32 cells an axis, without the mean, each against their median."""
    low = _sample(data)
    if _is_nearly_empty(low):
        return np.zeros(0, np.bool_)
    for size in reversed(low.shape):  # the last axis goes to the front
        # matrices of a few rows: BLAS would give large ones to threads, and packing has a process on each core
        rows = low if low.ndim > 2 else low[..., None, :]
        found = (rows @ _basis(data.ndim - 1, size).T).reshape(*low.shape[:-1], -1)
        low = np.moveaxis(found, -1, 0)
    flat = low.ravel()[1:]
    if flat.size < _FEWEST_BITS:
        return np.zeros(0, np.bool_)
    bits: NDArray[np.bool_] = flat > np.median(flat)
    return bits


def _sample(data: NDArray[Any]) -> NDArray[np.float32]:
    """Of some lines along the last axis, evenly spread, the channels' mean, of colours their brightness, from 0 on."""
    low = data[:: -(-len(data) // _CHANNELS)]
    sizes, most = data.shape[1:-1], _LINES.get(data.ndim - 1, 16)
    if any(size > most for size in sizes):
        few = [min(size, most) for size in sizes]
        places = [(2 * np.arange(some) + 1) * size // (2 * some) for some, size in zip(few, sizes, strict=True)]
        low = low[(slice(None), *np.ix_(*places))]
    weights = _BRIGHTNESS if low.ndim == 3 and len(low) == 3 else np.full(len(low), 1 / len(low))
    with np.errstate(over="ignore", invalid="ignore"):
        mixed: NDArray[np.float32] = np.subtract(low[0], low[0].flat[0], dtype=np.float32)
        if len(low) > 1:
            mixed *= np.float32(weights[0])
        for channel, weight in zip(low[1:], weights[1:], strict=True):
            mixed += np.subtract(channel, channel.flat[0], dtype=np.float32) * np.float32(weight)
    return mixed


def _is_nearly_empty(low: NDArray[np.float32]) -> bool:
    """Whether nearly all voxels have one value, which then is their median."""
    flat = low.reshape(-1)
    background = np.median(flat[:: max(1, flat.size // _LOOKED)])
    return bool(np.count_nonzero(low != background) < _EMPTY * low.size)


@cache
def _basis(axes: int, size: int) -> NDArray[np.float32]:
    """(frequencies, size): what the means of the cells of an axis are multiplied by, in one."""
    cells = min(_CELLS, size)
    basis = _cosines(min(_FREQUENCIES.get(axes, 4), cells), cells) @ _means(cells, size)
    return basis.astype(np.float32)


def _means(cells: int, size: int) -> NDArray[np.float64]:
    """(cells, size) the mean of each cell."""
    edges = np.arange(cells + 1) * size // cells
    inside = (np.arange(size) >= edges[:-1, None]) & (np.arange(size) < edges[1:, None])
    means: NDArray[np.float64] = inside / inside.sum(axis=1, keepdims=True)
    return means


def _cosines(kept: int, cells: int) -> NDArray[np.float64]:
    """The first rows of the type II cosine transform, moved off the centre; all but the first have the mean 0."""
    places = (np.arange(cells) + 0.5) / cells + _OFF_CENTRE
    matrix: NDArray[np.float64] = np.cos(np.pi * np.outer(np.arange(kept), places))
    matrix[1:] -= matrix[1:].mean(axis=1, keepdims=True)
    return matrix
