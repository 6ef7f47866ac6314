"""What packing does to one volume: stored numbers, normalisation, centre crop or pad, patches. Replayed by predict.

`stored * scale + offset` is the normalised intensity, so that integers stay integers on disk.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = ("keep", "uint8", "int16", "float32")
NORMALISATIONS = ("zscore", "none")
KEPT = ("uint8", "int16", "float16", "float32")


@dataclass(frozen=True)
class Intensities:
    """What must be known of a whole volume before it is stored: range, kind of numbers, statistics of the foreground.

    The foreground is every voxel above 0, or all voxels when none is 0. mean and std are in the units of the source.
    """

    dtype: str
    integers: bool
    low: float
    high: float
    mean: float
    std: float


@dataclass(frozen=True)
class Storage:
    """How a volume's intensities are stored: value = (stored - first) * step + low, in units of the source."""

    dtype: str
    step: float
    low: float
    first: float


def measure(data: NDArray[Any]) -> Intensities:
    foreground = data[data > 0] if (data == 0).any() else data.ravel()
    if foreground.size == 0:
        foreground = data.ravel()
    integers = data.dtype.kind in "iu" or bool((data == np.rint(data)).all())
    mean, std = float(foreground.mean(dtype=np.float64)), float(foreground.std(dtype=np.float64))
    return Intensities(data.dtype.name, integers, float(data.min()), float(data.max()), mean, std)


def resolve_dtype(wanted: str, volumes: list[Intensities]) -> str:
    """The dtype of the file. keep: the sources' own if they agree, else int16 if it holds them all, else float32."""
    if wanted != "keep":
        return wanted
    names = {volume.dtype for volume in volumes}
    if len(names) == 1 and names <= set(KEPT):
        return names.pop()
    return "int16" if all(_fits(volume, "int16") for volume in volumes) else "float32"


def choose_storage(volume: Intensities, dtype: str) -> Storage:
    """As they are where the dtype holds them; otherwise the volume's range is spread over that of the integer dtype."""
    if np.dtype(dtype).kind == "f" or _fits(volume, dtype):
        return Storage(dtype, 1.0, 0.0, 0.0)
    limits = np.iinfo(dtype)
    step = (volume.high - volume.low) / (limits.max - limits.min) or 1.0
    return Storage(dtype, step, volume.low, float(limits.min))


def store(data: NDArray[Any], storage: Storage) -> NDArray[Any]:
    """Source intensities to stored numbers."""
    if (storage.step, storage.low, storage.first) == (1.0, 0.0, 0.0):
        return data.astype(storage.dtype)
    return np.rint((data.astype(np.float64) - storage.low) / storage.step + storage.first).astype(storage.dtype)


def normalisation(volume: Intensities, storage: Storage, kind: str) -> tuple[float, float]:
    """(scale, offset) from stored numbers to z-scores of the foreground, or ('none') to the source's own units."""
    mean, std = (volume.mean, volume.std or 1.0) if kind == "zscore" else (0.0, 1.0)
    return storage.step / std, (storage.low - storage.first * storage.step - mean) / std


def centre_fit(data: NDArray[Any], affine: NDArray[Any], size: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Crop or pad each axis about its centre to `size`, pad with the minimum; returns the data and the moved affine."""
    starts = [(have - want) // 2 for have, want in zip(data.shape, size, strict=True)]
    fitted = np.full(size, data.min(), data.dtype)
    here = tuple(slice(max(-s, 0), max(-s, 0) + min(h, w)) for s, h, w in zip(starts, data.shape, size, strict=True))
    there = tuple(slice(max(s, 0), max(s, 0) + min(h, w)) for s, h, w in zip(starts, data.shape, size, strict=True))
    fitted[here] = data[there]
    return fitted, move_origin(affine, starts)


def cut_patch(data: NDArray[Any], start: tuple[int, ...], size: tuple[int, ...]) -> NDArray[Any]:
    return np.ascontiguousarray(data[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))])


def move_origin(affine: NDArray[Any], start: Any) -> NDArray[Any]:
    """The affine of a part whose first voxel is voxel `start` of the whole."""
    moved = np.array(affine, dtype=np.float64)
    moved[:3, 3] += affine[:3, :3] @ np.asarray(start, dtype=np.float64)
    return moved


def _fits(volume: Intensities, dtype: str) -> bool:
    limits = np.iinfo(dtype)
    return volume.integers and limits.min <= volume.low and volume.high <= limits.max
