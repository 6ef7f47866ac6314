"""The arithmetic of order and chance: pure functions of (seed, epoch, step, sample), so that no state is ever saved.

Only raw Philox bits are used: they are fixed by the algorithm (Salmon et al., Parallel random numbers: as easy as
1, 2, 3, SC 2011), where NumPy promises no stable stream for the methods of Generator.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
    # as lists, numbers from 2**63 on would pass through float64
    philox: Any = np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64))
    bits: NDArray[np.uint64] = philox.random_raw(count)
    return bits


def uniforms(seed: int, epoch: int, stream: Stream, count: int, sample: int = 0) -> NDArray[np.float64]:
    """(count,) numbers in [0, 1)."""
    high = random_bits(seed, epoch, stream, count, sample) >> np.uint64(11)
    return high.astype(np.float64) * 2.0**-53


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """Positions 0..num_samples-1 in the order of this epoch."""
    if not shuffle:
        return np.arange(num_samples)
    return np.argsort(random_bits(seed, epoch, Stream.ORDER, num_samples), kind="stable")


def num_steps(num_samples: int, batch_size: int, shuffle: bool) -> int:
    """Steps of an epoch: the remainder is dropped when shuffled, and is a short last batch when not."""
    return num_samples // batch_size if shuffle else -(-num_samples // batch_size)
