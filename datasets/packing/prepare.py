"""Intensities of one volume: window, stored numbers, normalisation; `stored * scale + offset` is the normalised one.

So integers stay integers on disk. Everything is a function of one volume and the recipe, and predict replays it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = ("keep", "uint8", "int16", "float32")
NORMALISATIONS = ("zscore", "unit", "imagenet", "none")
KEPT = ("uint8", "int16", "float32")
IMAGENET = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))
"""mean and standard deviation of red, green, blue in 0 to 1 (torchvision's weights)"""
_BLOCK = 1 << 15
"""voxels that are summed at once: they stay in the processor's cache"""


@dataclass(frozen=True)
class Intensities:
    """One channel of a volume: range, kind of numbers, mean and standard deviation of the foreground, in its own units.

    The foreground is every voxel above 0, or all voxels when none is 0; with a window, every voxel above its lower end.
    """

    integers: bool
    low: float
    high: float
    mean: float
    std: float


@dataclass(frozen=True)
class Storage:
    """How a channel's intensities are stored: value = (stored - first) * step + low, in units of the source."""

    dtype: str
    step: float = 1.0
    low: float = 0.0
    first: float = 0.0


def clip(data: NDArray[Any], window: tuple[float, float]) -> NDArray[Any]:
    """Intensities limited to the window, in the same dtype."""
    low, high = ends(window, data.dtype)
    clipped: NDArray[Any] = np.clip(data, data.dtype.type(low), data.dtype.type(high))
    return clipped


def ends(window: tuple[float, float], dtype: np.dtype[Any]) -> tuple[float, float]:
    """The lowest and the highest value of a dtype within a window. ValueError where there is none."""
    low, high = window
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        low, high = max(int(np.ceil(low)), limits.min), min(int(np.floor(high)), limits.max)
    if low > high:
        raise ValueError(f"--window {window[0]:g},{window[1]:g} holds no value of {dtype}")
    return float(dtype.type(low)), float(dtype.type(high))


def measure(data: NDArray[Any], window: tuple[float, float] | None = None) -> Intensities:
    """Of one channel, clipped to the window if there is one."""
    flat = np.ascontiguousarray(data).reshape(-1)
    low, high = float(flat.min()), float(flat.max())
    floor = None
    if window is not None:
        floor = ends(window, flat.dtype)[0]
    elif low == 0 or (low < 0 and bool((flat == 0).any())):
        floor = 0.0
    count, total, squares = _sums(flat, low if floor is None else floor, floor is None)
    if count == 0:  # nothing lies above the floor
        floor, (count, total, squares) = None, _sums(flat, low, True)
    mean = total / count
    deviation = max(squares / count - mean * mean, 0.0) ** 0.5
    return Intensities(_integers(flat), low, high, mean + (low if floor is None else floor), deviation)


def _sums(flat: NDArray[Any], pivot: float, everything: bool) -> tuple[int, float, float]:
    """Count, sum and sum of squares of the voxels above the pivot, or of all, as differences from it.

    So nothing is copied but a block at a time, and numbers far from 0 do not lose their deviation.
    """
    count, total, squares = 0, 0.0, 0.0
    room = np.empty(_BLOCK)
    below = not everything and bool(flat.min() < pivot)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        part = np.subtract(block, pivot, out=room[: block.size])
        if below:
            np.maximum(part, 0.0, out=part)
        count += part.size if everything else int(np.count_nonzero(block > pivot))
        total += float(part.sum())
        squares += float(np.einsum("i,i", part, part))  # a dot product would start threads
    return count, total, squares


def _integers(flat: NDArray[Any]) -> bool:
    if flat.dtype.kind in "iu":
        return True
    parts = (flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK))
    return all(bool((part == np.rint(part)).all()) for part in parts)


def resolve_dtype(wanted: str, sources: Iterable[np.dtype[Any]], wide: bool = False) -> str:
    """The dtype of the file. keep: the sources' own if they agree; int16 for other integers; else float32.

    wide: the integers of some volume span more than 16 bits. float32 is exact for integers up to 2**24.
    """
    if wanted != "keep":
        return wanted
    kinds = set(sources)
    if len(kinds) == 1 and (name := next(iter(kinds)).name) in KEPT:
        return name
    return "int16" if all(kind.kind in "iu" for kind in kinds) and not wide else "float32"


def too_wide(channel: Intensities, dtype: str) -> bool:
    """Integers that an integer dtype does not hold, even moved by a constant."""
    limits = np.iinfo(dtype)
    return channel.integers and channel.high - channel.low > limits.max - limits.min


def choose_storage(channel: Intensities, dtype: str, window: tuple[float, float] | None = None) -> Storage:
    """As they are where the dtype holds them, or moved by a constant; else the range is spread over the integers.

    The range is the window's if there is one, and then the same in each volume.
    """
    if np.dtype(dtype).kind == "f":
        return Storage(dtype)
    limits = np.iinfo(dtype)
    if channel.integers and limits.min <= channel.low and channel.high <= limits.max:
        return Storage(dtype)
    if channel.integers and channel.low >= 0 and channel.high <= limits.max - limits.min:
        return Storage(dtype, 1.0, 0.0, float(limits.min))
    if channel.integers and not too_wide(channel, dtype):
        return Storage(dtype, 1.0, channel.low, float(limits.min))
    low, high = window or (channel.low, channel.high)
    return Storage(dtype, (high - low) / (limits.max - limits.min) or 1.0, low, float(limits.min))


def store(data: NDArray[Any], storage: Storage) -> NDArray[Any]:
    """Source intensities to stored numbers."""
    if (storage.step, storage.low, storage.first) == (1.0, 0.0, 0.0):
        return data.astype(storage.dtype, copy=False)
    limits = np.iinfo(storage.dtype)
    numbers = (data.astype(np.float64) - storage.low) / storage.step + storage.first
    return np.clip(np.rint(numbers, out=numbers), limits.min, limits.max, out=numbers).astype(storage.dtype)


def normalisation(
    channel: Intensities, storage: Storage, kind: str, number: int = 0, window: tuple[float, float] | None = None
) -> tuple[float, float]:
    """(scale, offset) from stored numbers to normalised ones; `number` is the channel's.

    zscore: of the foreground; unit: window, or the volume's own range, to 0 to 1; imagenet: 0 to 255 as torchvision's
    weights expect it; none: the source's own units.
    """
    shift, width = 0.0, 1.0
    if kind == "zscore":
        shift, width = channel.mean, channel.std or 1.0
    elif kind == "unit":
        low, high = window or (channel.low, channel.high)
        shift, width = low, (high - low) or 1.0
    elif kind == "imagenet":
        mean, deviation = IMAGENET[number]
        shift, width = 255 * mean, 255 * deviation
    return storage.step / width, (storage.low - storage.first * storage.step - shift) / width
