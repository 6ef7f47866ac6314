"""The space of one volume: resampling, crop or pad about the centre, patches; the affine follows. Axes as in the data.

Arrays are (C, *spatial) with two or three spatial axes, affines (4, 4) from voxel indices to mm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.packing.recipe import Recipe, expand

Affine = NDArray[np.float64]
_MARGIN = 12
"""voxels that repeat the edge for the spline's filter, as in scipy"""


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a resampled volume lie in its source: voxel j at start + step * j along each axis."""

    old: tuple[int, ...]
    """spatial shape of the source"""
    new: tuple[int, ...]
    steps: tuple[float, ...]
    """voxels of the source from one new voxel to the next"""

    @property
    def start(self) -> tuple[float, ...]:
        """Both grids have one centre."""
        return tuple(
            (n - 1) / 2 - step * (m - 1) / 2 for n, m, step in zip(self.old, self.new, self.steps, strict=True)
        )

    @property
    def same(self) -> bool:
        return self.new == self.old and np.allclose(self.steps, 1)


def make_grid(shape: tuple[int, ...], affine: Affine, recipe: Recipe) -> Grid:
    """The grid that the recipe resamples a source of spatial `shape` to."""
    new = resampled_shape(shape, affine, recipe)
    return Grid(shape, new, tuple(_steps(shape, new, affine, recipe)))


def spacing_of(affine: Affine, axes: int) -> tuple[float, ...]:
    """mm from voxel to voxel along each axis."""
    return tuple(float(length) for length in np.linalg.norm(affine[:3, :axes], axis=0))


def resampled_shape(shape: tuple[int, ...], affine: Affine, recipe: Recipe) -> tuple[int, ...]:
    """Spatial shape after resampling of a volume of spatial `shape`; the same without."""
    if recipe.spacing is not None:
        wanted = expand(recipe.spacing, len(shape), "--spacing")
        have = spacing_of(affine, len(shape))
        return tuple(max(1, round(n * old / new)) for n, old, new in zip(shape, have, wanted, strict=True))
    if recipe.resize is None:
        return shape
    if len(recipe.resize) == 1:
        return tuple(max(1, round(n * recipe.resize[0] / min(shape))) for n in shape)
    return expand(recipe.resize, len(shape), "--resize")


def final_shape(shape: tuple[int, ...], affine: Affine, recipe: Recipe) -> tuple[int, ...]:
    """Spatial shape of a sample."""
    if recipe.patch is not None:
        return expand(recipe.patch, len(shape), "--patch")
    if recipe.size is not None:
        return expand(recipe.size, len(shape), "--size")
    return resampled_shape(shape, affine, recipe)


def resample(data: NDArray[Any], affine: Affine, recipe: Recipe, labels: bool = False) -> tuple[NDArray[Any], Affine]:
    """Onto the recipe's grid, which has the same centre: cubic splines, limited to the source's range.

    Axes that are made coarser are smoothed before, with sigma (factor - 1) / 2, as in scikit-image. Label maps take the
    nearest voxel. Integers are rounded. Data as they are where the grid is the same.
    """
    grid = make_grid(data.shape[1:], affine, recipe)
    if grid.same:
        return data, affine
    moved = np.eye(4)
    axes = len(grid.old)
    moved[range(axes), range(axes)], moved[:axes, 3] = grid.steps, grid.start
    out = np.empty((data.shape[0], *grid.new), data.dtype)
    for source, target in zip(data, out, strict=True):
        target[...] = _interpolate(source, grid.steps, grid.start, grid.new, labels)
    return out, affine @ moved


def _steps(old: tuple[int, ...], new: tuple[int, ...], affine: Affine, recipe: Recipe) -> list[float]:
    """Old voxels from one new voxel to the next."""
    if recipe.spacing is not None:
        wanted = expand(recipe.spacing, len(old), "--spacing")
        return [size / have for size, have in zip(wanted, spacing_of(affine, len(old)), strict=True)]
    return [n / m for n, m in zip(old, new, strict=True)]


def _interpolate(
    data: NDArray[Any], steps: Sequence[float], start: Sequence[float], shape: tuple[int, ...], labels: bool
) -> NDArray[Any]:
    from scipy import ndimage

    if labels:
        found = [
            np.clip(np.floor(first + step * np.arange(size) + 0.5).astype(int), 0, length - 1)
            for first, step, size, length in zip(start, steps, shape, data.shape, strict=True)
        ]
        nearest: NDArray[Any] = data[np.ix_(*found)]
        return nearest
    numbers = data.astype(np.float32)
    if max(steps) > 1:
        ndimage.gaussian_filter(numbers, [max(0.0, (step - 1) / 2) for step in steps], mode="nearest", output=numbers)
    padded = _padded(numbers)
    del numbers
    ndimage.spline_filter(padded, order=3, output=padded, mode="nearest")  # in place: scipy itself would hold three
    out: NDArray[np.float32] = ndimage.affine_transform(
        padded,
        np.array(steps),
        np.array(start) + _MARGIN,
        output_shape=shape,
        output=np.float32,
        order=3,
        mode="nearest",
        prefilter=False,
    )
    del padded
    np.clip(out, float(data.min()), float(data.max()), out=out)
    if data.dtype.kind in "iu":
        np.rint(out, out=out)
    return out


def _padded(numbers: NDArray[Any]) -> NDArray[np.float64]:
    """The edge repeated on all sides; np.pad would hold what it pads twice."""
    padded = np.empty([n + 2 * _MARGIN for n in numbers.shape])
    padded[(slice(_MARGIN, -_MARGIN),) * numbers.ndim] = numbers
    for axis in range(numbers.ndim):
        lines = np.moveaxis(padded, axis, 0)
        lines[:_MARGIN], lines[-_MARGIN:] = lines[_MARGIN], lines[-_MARGIN - 1]
    return padded


def centre_fit(
    data: NDArray[Any], affine: Affine, size: tuple[int, ...], pad: Sequence[float]
) -> tuple[NDArray[Any], Affine]:
    """Crop or pad each axis about its centre to `size`; `pad` is each channel's value outside; the affine moves."""
    if data.shape[1:] == size:
        return data, affine
    starts = [(have - want) // 2 for have, want in zip(data.shape[1:], size, strict=True)]
    lengths = [min(have, want) for have, want in zip(data.shape[1:], size, strict=True)]
    fitted = np.empty((data.shape[0], *size), data.dtype)
    for channel, value in zip(fitted, pad, strict=True):
        channel[...] = value
    here = tuple(slice(max(-s, 0), max(-s, 0) + n) for s, n in zip(starts, lengths, strict=True))
    there = tuple(slice(max(s, 0), max(s, 0) + n) for s, n in zip(starts, lengths, strict=True))
    fitted[(slice(None), *here)] = data[(slice(None), *there)]
    return fitted, move_origin(affine, starts)


def cut(data: NDArray[Any], start: Sequence[int], size: Sequence[int]) -> NDArray[Any]:
    """The box of all channels that begins at voxel `start`."""
    box = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
    return np.ascontiguousarray(data[(slice(None), *box)])


def move_origin(affine: Affine, start: Sequence[int]) -> Affine:
    """The affine of a part whose first voxel is voxel `start` of the whole."""
    moved = np.array(affine, dtype=np.float64)
    moved[:3, 3] += affine[:3, : len(start)] @ np.asarray(start, dtype=np.float64)
    return moved
