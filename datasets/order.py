"""The arithmetic of order and chance: pure functions of (seed, epoch, step, sample), so that no state is ever saved.

Only raw Philox bits are used: they are fixed by the algorithm (Salmon et al., Parallel random numbers: as easy as
1, 2, 3, SC 2011), where NumPy promises no stable stream for the methods of Generator.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
"""of Philox-4x64, from the paper's table 2 and section 4.3"""
_MANY = 24
"""samples from which on a table of all is drawn faster than row by row"""


class Stream(IntEnum):
    """What a draw is for; the streams never share bits. The numbers are part of the loader's contract."""

    ORDER = 0
    VERIFY = 1
    AUGMENT = 2
    NOISE = 3
    PATCH = 4
    SAMPLER = 5
    REPLACE = 6
    FOREGROUND = 7
    TRANSFORMS = 16
    ELASTIC = 17
    CUTOUT = 18


def random_bits(seed: int, epoch: int, stream: Stream, count: int, sample: int = 0) -> NDArray[np.uint64]:
    """(count,) uint64 of the counter-based generator with key (seed, epoch), at the place of (stream, sample)."""
    return philox_bits((seed, epoch), (0, 0, sample, int(stream)), count)


def philox_bits(key: tuple[int, int], counter: tuple[int, int, int, int], count: int) -> NDArray[np.uint64]:
    """(count,) raw outputs of Philox-4x64 from this counter on; each number is below 2**64."""
    return philox_source(key, counter)(count)


def philox_source(key: tuple[int, int], counter: tuple[int, int, int, int]) -> Callable[[int], NDArray[np.uint64]]:
    """The same in pieces: each call gives the next so many outputs."""
    # as lists, numbers from 2**63 on would pass through float64
    philox: Any = np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64))
    draw: Callable[[int], NDArray[np.uint64]] = philox.random_raw
    return draw


def uniforms(seed: int, epoch: int, stream: Stream, count: int, sample: int = 0) -> NDArray[np.float64]:
    """(count,) numbers in [0, 1)."""
    high = random_bits(seed, epoch, stream, count, sample) >> np.uint64(11)
    return high.astype(np.float64) * 2.0**-53


def uniform_table(seed: int, epoch: int, stream: Stream, count: int, samples: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n, count): of each sample what `uniforms` gives, all at once."""
    if len(samples) < _MANY:
        rows = [uniforms(seed, epoch, stream, count, sample) for sample in samples.tolist()]
        return np.stack(rows) if rows else np.empty((0, count))
    return (philox_table((seed, epoch), stream, samples, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def philox_table(key: tuple[int, int], stream: Stream, samples: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """(n, count): of each sample what `philox_bits` gives from counter (0, 0, sample, stream) on, all at once."""
    blocks = -(-count // 4)
    words = np.empty((4, len(samples), blocks), np.uint64)
    words[0], words[1] = np.arange(1, blocks + 1), 0
    words[2], words[3] = samples[:, None], int(stream)
    a, b, c, d = words
    first, second = key
    for _ in range(_ROUNDS):
        (high, low), (other_high, other_low) = _product(a, _MULTIPLIERS[0]), _product(c, _MULTIPLIERS[1])
        a, b, c, d = other_high ^ b ^ np.uint64(first), other_low, high ^ d ^ np.uint64(second), low
        first, second = ((word + step) % 2**64 for word, step in zip((first, second), _WEYL, strict=True))
    return np.stack([a, b, c, d], axis=-1).reshape(len(samples), 4 * blocks)[:, :count]


def _product(words: NDArray[np.uint64], factor: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """High and low 64 bits of words * factor."""
    half, mask = np.uint64(32), np.uint64(2**32 - 1)
    bottom, top = np.uint64(factor % 2**32), np.uint64(factor >> 32)
    low, high = words & mask, words >> half
    crossed, other = low * top, high * bottom
    carried = ((low * bottom) >> half) + (crossed & mask) + (other & mask)
    return high * top + (crossed >> half) + (other >> half) + (carried >> half), words * np.uint64(factor)


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """Positions 0..num_samples-1 in the order of this epoch."""
    if not shuffle:
        return np.arange(num_samples)
    return np.argsort(random_bits(seed, epoch, Stream.ORDER, num_samples), kind="stable")


def num_steps(num_samples: int, batch_size: int, shuffle: bool) -> int:
    """Steps of an epoch: the remainder is dropped when shuffled, and is a short last batch when not."""
    return num_samples // batch_size if shuffle else -(-num_samples // batch_size)
