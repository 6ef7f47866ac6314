"""Random changes of a batch, on its device: a function of (seed, epoch, sample), in whatever batch or rank it is."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from datasets.augment.chance import Chance, draw
from datasets.augment.geometry import OPTIONS as GEOMETRY
from datasets.augment.geometry import Moves, draw_moves
from datasets.augment.intensity import add_noise, apply_colour, apply_gamma, apply_levels, cut_out, filtered
from datasets.augment.options import Options
from datasets.augment.resampling import warp

__all__ = ["Augment"]
Bools = NDArray[np.bool_]
SHADES: tuple[tuple[tuple[str, ...], Callable[[Tensor, Chance], Tensor]], ...] = (
    (("blur", "low_resolution"), filtered),
    (("gamma",), apply_gamma),
    (("saturation", "hue"), apply_colour),
    (("brightness", "contrast", "scale", "shift"), apply_levels),
)
"""changes of intensity in their order, each with the options that call for it"""
PART_BYTES = 256 << 20
"""on a GPU, so many bytes of the batch at a time"""


class Augment(Options):
    """Options of `data.augment`, and the call that applies them to volumes (B, C, x, y, z) and images (B, C, H, W).

    Geometry, in one resampling: linear for inputs, nearest neighbour for label maps; outside, the nearest edge voxel.

    - flip: list of spatial axes, each mirrored with probability 1/2. Volumes: 0 = x (left-right in RAS), 1 = y, 2 = z.
      Images: 0 = top-bottom, 1 = left-right. Flips alone move voxels and interpolate nothing.
    - rotate: degrees, +-, about the centre; volumes: about each axis, a list gives each its own. In voxels, which is a
      wrong turn where voxels are not cubes: say `spacing`.
    - zoom: [low, high] factor of size (over 1: larger), evenly in its logarithm.
    - shear: degrees, +-; images one, volumes one or three (y into x, z into x, z into y).
    - translate: share of each axis' length, +-; a list gives each its own.
    - spacing: size of a voxel along each axis, mm, for rotate and shear.
    - elastic: {spacing, magnitude}, both in voxels, lists allowed: a cubic B-spline through control points `spacing`
      apart, each shifted by up to +-magnitude along each axis. What could fold is refused.
    - crop (images): [low, high] share of the area, sides within 3:4, brought back to full size.

    Intensity, in this order. A number s means [1 - s, 1 + s] for factors, [0, s] for blur, [1, s] for low_resolution:

    - blur: [low, high] sigma of a Gaussian, voxels. low_resolution: [low, high] factor by which voxels are made
      larger: nearest neighbour down, linear up.
    - gamma: [low, high] exponent, evenly in its logarithm; the sample's least and greatest intensity stay.
    - saturation, hue (images of 3 channels): factor; +- turns (0.5: all the way round).
    - brightness: factor of the distance from the sample's least intensity; contrast: from its mean.
    - scale, shift: inputs * (1 + a) + b, a in +-scale, b in +-shift; noise: Gaussian, its standard deviation drawn from
      0 to noise. In units of the normalised intensity.
    - cutout: {holes, size, fill}: boxes with sides of `size` (a number or [low, high]) of each axis, set to `fill`
      (0: the mean of z-scored data). Label maps keep what lies under them.

    p: {option: probability for each sample}, 1 where not given, 1/2 for each axis of flip. preset: options.PRESETS.
    ValueError for bad values. Kept by tests/test_augment.py.
    """

    def __call__(
        self, inputs: Tensor, samples: NDArray[Any], seed: int, epoch: int, maps: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """inputs (B, C, *spatial) and uint8 maps (B, *spatial), changed in place; numbers (B,) of the samples.

        float32 inputs; others are computed in float32 and come back as a new tensor of their dtype, so round last. On
        the CPU a sample is changed at a time: beside the batch that takes two of a sample and up to 32 MB of grid.
        """
        self.check(inputs.ndim - 2, inputs.shape[1])
        if len(samples) == 0:
            return inputs, maps
        dtype, inputs = inputs.dtype, inputs.float()
        chance = draw(self, samples, seed, epoch)
        moves = draw_moves(chance, tuple(inputs.shape[2:])) if any(getattr(self, name) for name in GEOMETRY) else None
        for rows in _parts(inputs):
            self._change(inputs, maps, chance, moves, rows)
        if self.noise:
            add_noise(inputs, chance)
        if self.cutout:
            cut_out(inputs, chance)
        return inputs.to(dtype), maps

    def _change(self, inputs: Tensor, maps: Tensor | None, chance: Chance, moves: Moves | None, rows: slice) -> None:
        """Geometry and intensity, up to noise, of these rows of a batch."""
        inputs, maps, chance = inputs[rows], None if maps is None else maps[rows], chance.rows(rows)
        warped = chance.any(*GEOMETRY)
        self._flip(inputs, maps, chance.flips & ~warped[:, None])
        if moves is not None:
            _warp(inputs, maps, moves.rows(rows), warped)
        for names, change in SHADES:
            _apply(change, inputs, chance, chance.any(*names))

    def _flip(self, inputs: Tensor, maps: Tensor | None, flips: Bools) -> None:
        for axis in self.flip:
            for row in np.flatnonzero(flips[:, axis]).tolist():
                inputs[row] = inputs[row].flip(axis + 1)
                if maps is not None:
                    maps[row] = maps[row].flip(axis)


def _warp(inputs: Tensor, maps: Tensor | None, moves: Moves, chosen: Bools) -> None:
    """Resample the chosen rows, in place."""
    rows = _selected(chosen)
    if rows is not None:
        labels = None if maps is None else maps[rows]
        inputs[rows], moved = warp(inputs[rows], labels, moves.rows(rows))
        if maps is not None and moved is not None:
            maps[rows] = moved


def _apply(change: Callable[[Tensor, Chance], Tensor], inputs: Tensor, chance: Chance, chosen: Bools) -> None:
    """Change the chosen rows, in place."""
    rows = _selected(chosen)
    if rows is not None:
        part = inputs[rows]
        changed = change(part, chance.rows(rows))
        if changed is not part or not isinstance(rows, slice):
            inputs[rows] = changed


def _selected(chosen: Bools) -> slice | NDArray[np.intp] | None:
    """All rows as a slice, which copies nothing; some by number; None for none."""
    if chosen.all():
        return slice(None)
    return np.flatnonzero(chosen) if chosen.any() else None


def _parts(inputs: Tensor) -> Iterator[slice]:
    """Rows of the batch to change together: one on the CPU, where bits must not depend on its neighbours."""
    size = 1 if inputs.device.type == "cpu" else max(1, PART_BYTES // (4 * int(np.prod(inputs.shape[1:]))))
    for first in range(0, len(inputs), size):
        yield slice(first, min(first + size, len(inputs)))
