"""Voxels as packing wants them: claims checked before memory is taken, dtypes, values, RAS order, one fast copy."""

from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from datasets.sources.contract import NotFinite, UnusableSource

orientations: Any = nibabel.orientations  # untyped

LARGEST = float(np.finfo(np.float32).max)
SURE_BYTES, TIMES = 512 * 2**20, 200
"""compressed voxels above SURE_BYTES are refused beyond TIMES the file's size"""
TILE = 16
"""voxels of the last axis that a transposed copy takes at once: read lines are still in the cache when used again"""
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def check_shape(shape: tuple[int, ...]) -> None:
    """UnusableSource for negative or empty axes."""
    if any(axis < 0 for axis in shape):
        raise UnusableSource(f"its shape {shape} is not one: an axis is negative")
    if 0 in shape:
        raise UnusableSource(f"it is empty: {shape}")


def check_claim(claimed: int, stored: int, compressed: bool) -> None:
    """UnusableSource where a header claims more bytes than the file can hold: nothing is allocated for them.

    claimed: bytes of voxels, with what stands before them in the same stream; stored: bytes of the file.
    """
    if not compressed and claimed > stored:
        raise UnusableSource(f"its header claims {claimed:,} bytes, but the file has {stored:,}: cut off or forged")
    if compressed and claimed > max(SURE_BYTES, TIMES * stored):
        raise UnusableSource(
            f"its header claims {claimed:,} bytes, {claimed // max(stored, 1):,} times the file's own; "
            f"above {SURE_BYTES // 2**20} MiB at most {TIMES} times are read"
        )


def packable(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The native dtype that voxels are read as: bool becomes uint8, float16 float32. UnusableSource for others."""
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        name = f"records ({', '.join(dtype.names)})" if dtype.names else dtype.name
        raise UnusableSource(f"its voxels are {name}; only integers and real numbers up to 64 bits can be packed")
    return np.dtype(np.float32) if dtype == np.float16 else dtype.newbyteorder("=")


def fill_missing(data: NDArray[Any], value: float) -> tuple[NDArray[Any], int]:
    """(C, *spatial) with `value` in place of NaN, in the array given if it may be written, and how many were NaN.

    UnusableSource where all are.
    """
    if data.dtype.kind != "f":
        return data, 0
    out = data if data.flags.writeable else data.copy()
    count = 0
    for channel in out:
        missing = np.isnan(channel)
        count += int(np.count_nonzero(missing))
        channel[missing] = value
    if count == out.size:
        raise UnusableSource("all its voxels are NaN")
    return out, count


def check_values(data: NDArray[Any]) -> None:
    """UnusableSource for voxels that are NaN or infinite, or beyond float32's range."""
    if data.dtype.kind != "f":
        return
    if not np.isfinite((data.min(), data.max())).all():  # a NaN is both; no second array is made
        raise NotFinite(f"{np.count_nonzero(~np.isfinite(data))} voxels are NaN or infinite; repair or mask them")
    check_range(data)


def check_range(data: NDArray[Any], slope: float = 1.0, intercept: float = 0.0) -> None:
    """UnusableSource for finite values that are beyond float32's range once scaled."""
    ends = float(np.fmin.reduce(data, axis=None)), float(np.fmax.reduce(data, axis=None))
    extreme = max((end * slope + intercept for end in ends if np.isfinite(end)), key=abs, default=0.0)
    if abs(extreme) > LARGEST:
        raise UnusableSource(f"its value {extreme:g} is beyond float32's range of +-{LARGEST:.3g}; rescale or mask it")


@dataclass(frozen=True)
class Turn:
    """How a stored grid becomes RAS: for each RAS axis the stored one and whether it is reversed."""

    axes: tuple[int, ...]
    reversed: tuple[bool, ...]
    shape: tuple[int, ...]
    affine: NDArray[np.float64]

    def view(self, data: NDArray[Any]) -> NDArray[Any]:
        """(C, i, j, k) as stored -> (C, x, y, z), nothing copied."""
        turned = data.transpose(0, *(axis + 1 for axis in self.axes))
        return turned[(slice(None), *(slice(None, None, -1 if back else 1) for back in self.reversed))]

    def undo(self, data: NDArray[Any]) -> NDArray[Any]:
        """(C, x, y, z) -> (C, i, j, k) as stored, nothing copied."""
        turned = data[(slice(None), *(slice(None, None, -1 if back else 1) for back in self.reversed))]
        return turned.transpose(0, *(int(axis) + 1 for axis in np.argsort(self.axes)))


def turn_to_ras(affine: NDArray[np.float64], shape: tuple[int, ...]) -> Turn:
    """The flips and swaps of axes that bring a grid of `shape` (i, j, k) next to RAS. UnusableSource: no such."""
    if not np.isfinite(affine).all():
        raise UnusableSource("its affine holds NaN or infinity: no place in space; repair the header")
    found = orientations.io_orientation(affine)
    if np.isnan(found).any():
        raise UnusableSource("its affine is singular: no direction in space; repair the header")
    axes = tuple(int(axis) for axis in np.argsort(found[:, 0]))
    back = tuple(bool(found[axis, 1] < 0) for axis in axes)
    turned = affine @ orientations.inv_ornt_aff(found, shape)
    return Turn(axes, back, tuple(shape[axis] for axis in axes), turned)


def compact(view: NDArray[Any], dtype: np.dtype[Any], slope: float = 1.0, intercept: float = 0.0) -> NDArray[Any]:
    """(C, *spatial) in C order as `dtype`, times slope plus intercept (in double precision); a copy if need be.

    A transposed 3D view is copied in tiles: three times as fast as numpy's own way through a Fortran-order volume.
    """
    if (slope, intercept) == (1.0, 0.0) and view.dtype == dtype and view.flags.carray:
        return view
    out = np.empty(view.shape, dtype)
    for number, channel in enumerate(view):
        for place in _tiles(channel):
            part = channel[place]
            out[number][place] = part if (slope, intercept) == (1.0, 0.0) else part * np.float64(slope) + intercept
    return out


def _tiles(channel: NDArray[Any]) -> list[tuple[slice | int, ...]]:
    """Parts to copy one by one: one index of the axis that is neither read nor written in order, TILE of the last."""
    strides = [abs(stride) for stride in channel.strides]
    fastest = int(np.argmin(strides))
    if channel.ndim < 3:
        return [()]
    if fastest == 2:
        return [(index,) for index in range(len(channel))]
    slow = 1 - fastest
    tiles = [slice(start, start + TILE) for start in range(0, channel.shape[2], TILE)]
    whole = slice(None)
    return [(whole, i, tile) if slow else (i, whole, tile) for i in range(channel.shape[slow]) for tile in tiles]
