"""Numbers of many voxels in one streaming pass: histograms, quantiles and moments that several threads add to.

Integers of 8 and 16 bits and float16 are counted value by value. float32 falls into bins by its sign, exponent and
first 10 bits of mantissa (their order is that of the numbers), so a quantile is right to 0.1 % whatever the range.
"""

from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.005, 0.05, 0.25, 0.5, 0.75, 0.95, 0.995)
BLOCK = 1 << 20
"""voxels worked on at a time, so that a large volume needs little memory besides itself"""
_SHIFT, _FIRST, _LAST = 13, -261120, 261119
"""of a float32's 32 bits the last 13 are dropped; first and last bin of finite numbers"""


def float_bins(data: NDArray[np.float32]) -> NDArray[np.int32]:
    """Bin of each number, rising with it; below _FIRST or above _LAST for what is infinite or no number."""
    bits: NDArray[np.int32] = data.view(np.int32)
    return (bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))) >> _SHIFT


@cache
def _bin_values(exact: bool) -> NDArray[np.float64]:
    """What stands for each finite bin: the number with the dropped bits 0, or the middle between it and the next."""
    key = np.arange(_FIRST, _LAST + 1, dtype=np.int32)
    magnitude = np.where(key < 0, ~key, key) << _SHIFT
    size = magnitude.view(np.float32).astype(np.float64)
    if not exact:
        last = (magnitude | ((1 << _SHIFT) - 1)).view(np.float32).astype(np.float64)
        size = np.where(magnitude == 0, 0.0, (size + last) / 2)
    return np.where(key < 0, -size, size) + 0.0


class Histogram:
    """Counts of the finite numbers of one dtype (uint8, int16, float16, float32). Threads may add at the same time."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._float = dtype.kind == "f"
        if self._float:
            self.first = _FIRST
            self.values = _bin_values(exact=dtype.itemsize == 2)
        else:
            self.first = int(np.iinfo(dtype).min)
            self.values = np.arange(self.first, np.iinfo(dtype).max + 1, dtype=np.float64)
        self.counts = np.zeros(len(self.values), np.int64)
        self._lock = Lock()

    def bins(self, data: NDArray[Any]) -> tuple[int, NDArray[np.int64]]:
        """(place, counts) of 1-D data: counts of the bins from `place` on; infinite ones and NaN are left out."""
        keys = float_bins(data.astype(np.float32, copy=False)) if self._float else data
        keys = keys.astype(np.int64) - self.first
        if self._float:
            keys = keys[(keys >= 0) & (keys < len(self.counts))]
        low = int(keys.min()) if keys.size else 0
        return low, np.bincount(keys - low)

    def add(self, place: int, counts: NDArray[np.int64]) -> None:
        with self._lock:
            self.counts[place : place + len(counts)] += counts

    def add_weighted(self, data: NDArray[np.float64], weights: NDArray[np.int64]) -> None:
        """Count each number of `data` several times; of a histogram of float32."""
        with np.errstate(over="ignore"):
            keys = float_bins(data.astype(np.float32)).astype(np.int64) - self.first
        inside = (keys >= 0) & (keys < len(self.counts))
        keys, weights = keys[inside], weights[inside]
        if keys.size:
            low = int(keys.min())
            # sums of integers below 2**53 are exact in float64
            self.add(low, np.bincount(keys - low, weights).astype(np.int64))

    def quantiles(self, shares: tuple[float, ...] = QUANTILES) -> list[float | None]:
        """The least number with at least this share of all at or below it; None of an empty histogram."""
        total = np.cumsum(self.counts)
        if not total[-1]:
            return [None] * len(shares)
        wanted = np.maximum(np.ceil(np.array(shares) * total[-1] - 1e-9), 1)
        return [float(value) for value in self.values[np.searchsorted(total, wanted)]]


@dataclass
class Moments:
    """Of the numbers seen so far; blocks are joined by the pairwise update of Chan, Golub and LeVeque (1983)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """sum of the squared distances to the mean"""
    low: float = np.inf
    high: float = -np.inf
    at_low: int = 0
    nan: int = 0
    infinite: int = 0

    def add_counts(self, values: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """values: rising; counts: how often each occurs, at least once."""
        total = int(counts.sum())
        mean = float(values @ counts) / total
        self._join(total, mean, float(counts @ (values - mean) ** 2))
        self._stretch(float(values[0]), float(values[-1]), int(counts[0]))

    def add_floats(self, block: NDArray[Any]) -> None:
        numbers = block.astype(np.float64)
        finite = np.isfinite(numbers)
        if not finite.all():
            nan = int(np.isnan(numbers).sum())
            self.nan, self.infinite = self.nan + nan, self.infinite + numbers.size - int(finite.sum()) - nan
            numbers = numbers[finite]
        if numbers.size:
            mean = float(numbers.mean())
            low = float(numbers.min())
            self._stretch(low, float(numbers.max()), int((numbers == low).sum()))
            numbers -= mean
            self._join(numbers.size, mean, float(numbers @ numbers))

    def _join(self, count: int, mean: float, squares: float) -> None:
        total, gap = self.count + count, mean - self.mean
        self.squares += squares + gap**2 * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    def _stretch(self, low: float, high: float, at_low: int) -> None:
        if low < self.low:
            self.low, self.at_low = low, 0
        if low == self.low:
            self.at_low += at_low
        self.high = max(self.high, high)


class Intensities:
    """Statistics of `num_samples` samples of C channels, as stored and as normalised; each is added once.

    Threads may add at the same time, and the order does not matter: all sums over samples are of integers, or are taken
    in sample order at the end.
    """

    def __init__(self, num_samples: int, num_channels: int, dtype: np.dtype[Any]) -> None:
        self._float = dtype.kind == "f"
        self.stored = [Histogram(dtype) for _ in range(num_channels)]
        self.normalised = [Histogram(np.dtype(np.float32)) for _ in range(num_channels)]
        shape = (num_samples, num_channels)
        self.count, self.nan, self.infinite, self.foreground = (np.zeros(shape, np.int64) for _ in range(4))
        self.low, self.high, self._mean, self._squares = (np.full(shape, np.nan) for _ in range(4))

    def add(self, place: int, data: NDArray[Any], scale: NDArray[Any], offset: NDArray[Any]) -> None:
        """data (C, voxels) as stored is sample number `place` of those looked at; scale and offset (C,)."""
        for channel, voxels in enumerate(data):
            seen, factor, shift = Moments(), float(scale[channel]), float(offset[channel])
            for start in range(0, voxels.size, BLOCK):
                self._add_block(channel, voxels[start : start + BLOCK], seen, factor, shift)
            here = place, channel
            self.count[here], self.nan[here], self.infinite[here] = seen.count, seen.nan, seen.infinite
            if seen.count:
                self.low[here], self.high[here] = seen.low, seen.high
                self.foreground[here] = seen.count - seen.at_low
                self._mean[here] = seen.mean * factor + shift
                self._squares[here] = seen.squares * factor**2

    def _add_block(self, channel: int, block: NDArray[Any], seen: Moments, scale: float, offset: float) -> None:
        histogram = self.stored[channel]
        place, counts = histogram.bins(block)
        histogram.add(place, counts)
        there = np.flatnonzero(counts)
        values, weights = histogram.values[place + there], counts[there]
        self.normalised[channel].add_weighted(values * scale + offset, weights)
        if self._float:
            seen.add_floats(block)
        elif weights.size:
            seen.add_counts(values, weights)

    def moments(self, channel: int) -> tuple[float | None, float | None]:
        """Mean and standard deviation of all voxels as normalised."""
        there = self.count[:, channel] > 0
        counts, means = self.count[there, channel], self._mean[there, channel]
        total = int(counts.sum())
        if not total:
            return None, None
        mean = float(counts @ means) / total
        squares = float(self._squares[there, channel].sum() + counts @ (means - mean) ** 2)
        return mean, (squares / total) ** 0.5

    def extremes(self, channel: int) -> tuple[float | None, float | None]:
        """Least and greatest voxel as stored."""
        there = self.count[:, channel] > 0
        if not there.any():
            return None, None
        return float(self.low[there, channel].min()), float(self.high[there, channel].max())

    def varies(self, place: int | slice = slice(None)) -> NDArray[np.bool_]:
        """Whether a channel of a sample has two different finite voxels."""
        differ: NDArray[np.bool_] = np.less(self.low[place], self.high[place]).any(axis=-1)
        return differ

    def constant(self) -> NDArray[np.bool_]:
        """(samples,): there are finite voxels, but no channel has two different ones."""
        same: NDArray[np.bool_] = np.logical_and((self.count > 0).any(axis=1), ~self.varies())
        return same

    def is_finite(self, place: int) -> bool:
        return not (self.nan[place].any() or self.infinite[place].any())

    def foreground_share(self) -> float | None:
        """Of all finite voxels, those above the lowest of their sample and channel."""
        total = int(self.count.sum())
        return int(self.foreground.sum()) / total if total else None
