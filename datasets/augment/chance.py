"""The random numbers of augmentation: for each sample a fixed place for every option, from raw Philox bits."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datasets.augment.options import MAX_AXES, Options, per_axis
from datasets.order import Stream, uniform_table

Floats = NDArray[np.float64]
# one number at a time: NumPy's own may differ in the last bit with the length of the array, so with the batch
sine, cosine, tangent = (np.vectorize(one, otypes=[float]) for one in (math.sin, math.cos, math.tan))
power = np.vectorize(math.pow, otypes=[float])

COUNTS = {
    "rotate": 3,
    "zoom": 1,
    "shear": 3,
    "translate": 3,
    "elastic": 0,
    "crop": 4,
    "blur": 1,
    "low_resolution": 1,
    "gamma": 1,
    "contrast": 1,
    "brightness": 1,
    "saturation": 1,
    "hue": 1,
    "cutout": 0,
    "scale": 0,
    "shift": 0,
    "noise": 0,
}
"""numbers that an option takes after the one that decides whether it happens; new ones are added at the end, for the
places are part of what makes two runs alike"""


@dataclass(frozen=True)
class Chance:
    """The draws of a batch, or of some of its rows; row i belongs to samples[i], whatever stands beside it."""

    options: Options
    samples: NDArray[np.int64]
    seed: int
    epoch: int
    happens: dict[str, NDArray[np.bool_]]
    """(B,) of each option of COUNTS: whether it is on for this sample"""
    uniform: dict[str, Floats]
    """(B, count) in [0, 1) of each option of COUNTS"""
    flips: NDArray[np.bool_]
    """(B, 3)"""
    levels: Floats
    """(B, 3) in [0, 1): of scale, shift and noise"""

    def rows(self, rows: slice | NDArray[np.intp]) -> "Chance":
        happens = {name: values[rows] for name, values in self.happens.items()}
        uniform = {name: values[rows] for name, values in self.uniform.items()}
        samples, flips, levels = self.samples[rows], self.flips[rows], self.levels[rows]
        return Chance(self.options, samples, self.seed, self.epoch, happens, uniform, flips, levels)

    def any(self, *names: str) -> NDArray[np.bool_]:
        """(B,) whether one of these options is on for this sample."""
        either: NDArray[np.bool_] = np.logical_or.reduce([self.happens[name] for name in names])
        return either

    def within(self, name: str, neutral: float, log: bool = False) -> Floats:
        """(B,) a number from the option's range, evenly or evenly in its logarithm; neutral where it is not on."""
        if not getattr(self.options, name):
            return np.full(len(self.samples), neutral)
        low, high = getattr(self.options, name)
        share = self.uniform[name][:, 0]
        drawn = low * power(high / low, share) if log else low + (high - low) * share
        return np.where(self.happens[name], drawn, neutral)

    def amount(self, name: str, count: int) -> Floats:
        """(B, count) drawn from +- the option's amounts; 0 where it is not on."""
        amounts = np.array(per_axis(getattr(self.options, name), count) or [0.0] * count)
        drawn: Floats = (2 * self.uniform[name][:, :count] - 1) * amounts * self.happens[name][:, None]
        return drawn

    def stream(self, stream: Stream, count: int) -> Floats:
        """(B, count) further numbers in [0, 1)."""
        return uniform_table(self.seed, self.epoch, stream, count, self.samples)


def draw(options: Options, samples: NDArray[np.int64], seed: int, epoch: int) -> Chance:
    """The draws of these samples, one or more."""
    table = uniform_table(seed, epoch, Stream.TRANSFORMS, sum(COUNTS.values()) + len(COUNTS), samples)
    basic = uniform_table(seed, epoch, Stream.AUGMENT, MAX_AXES + 3, samples)
    happens, uniform, first = {}, {}, 0
    for name, count in COUNTS.items():
        chance = options.p.get(name, 1.0) if getattr(options, name) else 0.0
        happens[name], uniform[name] = table[:, first] < chance, table[:, first + 1 : first + 1 + count]
        first += 1 + count
    flips = basic[:, :MAX_AXES] < options.p.get("flip", 0.5)
    return Chance(options, samples, seed, epoch, happens, uniform, flips, basic[:, MAX_AXES:])
