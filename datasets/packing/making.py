"""One volume's voxels and a recipe make one sample: the stored numbers, their normalisation, their place in space.

Packing and predicting both come through here, so that a network meets in a new file what it was trained on.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.packing.geometry import centre_fit, resample
from datasets.packing.prepare import choose_storage, clip, measure, normalisation, store, too_wide
from datasets.packing.recipe import Recipe, expand
from datasets.sources import UnusableSource, Volume

EXACT = 2**24
"""float32 holds all whole numbers up to it"""


class TooWide(Exception):
    """Integers of more than 16 bits, where the headers let hope for fewer."""


@dataclass(frozen=True)
class Made:
    """A sample before patches are cut: `data * scale + offset` is what a network gets."""

    data: NDArray[Any]
    """(C, *spatial), stored numbers"""
    raw: NDArray[Any]
    """the same voxels in units of the source"""
    affine: NDArray[np.float64]
    """(4, 4) from its voxels to mm"""
    scale: tuple[float, ...]
    """of each channel"""
    offset: tuple[float, ...]
    too_wide: bool
    """its integers span more than int16 holds, and were rounded to fit"""


def make_sample(recipe: Recipe, dtype: str, volume: Volume) -> Made:
    """Window, resampling, crop or pad, stored numbers, normalisation, in this order. Raises UnusableSource."""
    data = volume.data if recipe.window is None else clip(volume.data, recipe.window)
    data, affine = resample(data, volume.affine, recipe)
    channels = [measure(channel, recipe.window) for channel in data]
    if recipe.size is not None:
        size = expand(recipe.size, data.ndim - 1, "--size")
        data, affine = centre_fit(data, affine, size, [channel.low for channel in channels])
    if dtype == "float32" and any(c.integers and max(-c.low, c.high) > EXACT for c in channels):
        raise UnusableSource("its whole numbers go beyond 2**24, which float32 does not hold exactly; rescale them")
    storages = [choose_storage(channel, dtype, recipe.window) for channel in channels]
    pairs = enumerate(zip(channels, storages, strict=True))
    scales = [normalisation(channel, way, recipe.normalise, number, recipe.window) for number, (channel, way) in pairs]
    parts = [store(channel, way) for channel, way in zip(data, storages, strict=True)]
    stored = parts[0][None] if len(parts) == 1 else np.stack(parts)
    return Made(
        data=np.ascontiguousarray(stored),
        raw=data,
        affine=affine,
        scale=tuple(scale for scale, _ in scales),
        offset=tuple(offset for _, offset in scales),
        too_wide=dtype == "int16" and any(too_wide(channel, dtype) for channel in channels),
    )
