"""Labels from an atlas that names the region at each place in the body."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.nifti import NotNifti, UnusableVolume, Volume, read_volume
from datasets.partition import UNSET
from datasets.tables import read_values, sort_names


@dataclass(frozen=True)
class Atlas:
    """A label volume in world space and the class of each of its values."""

    volume: Volume
    class_names: list[str]
    class_of: dict[int, int]

    def classes(self, shape: tuple[int, ...], affine: NDArray[Any]) -> NDArray[np.int16]:
        """Class number at each voxel of a grid, -1 where there is none: the atlas voxel nearest in world position."""
        grid = np.linalg.inv(self.volume.affine) @ affine
        lookup = self._lookup()
        out = np.empty(shape, np.int16)
        y, z = np.ogrid[: shape[1], : shape[2]]
        for x in range(shape[0]):  # one plane at a time: memory stays small
            # half-way positions go up, also when rounding left them a hair below
            index = [np.floor(g[0] * x + g[1] * y + g[2] * z + g[3] + 0.5 + 1e-6).astype(np.int64) for g in grid[:3]]
            inside = np.ones(shape[1:], bool)
            for axis, size in enumerate(self.volume.data.shape):
                inside &= (index[axis] >= 0) & (index[axis] < size)
            clipped = tuple(
                np.clip(places, 0, size - 1) for places, size in zip(index, self.volume.data.shape, strict=True)
            )
            out[x] = np.where(inside, lookup[clipped], UNSET)
        return out

    def _lookup(self) -> NDArray[np.int16]:
        values, places = np.unique(self.volume.data, return_inverse=True)
        numbers = np.array([self.class_of.get(int(value), UNSET) for value in values], np.int16)
        return numbers[places].reshape(self.volume.data.shape)


def read_atlas(path: Path, regions: Path) -> Atlas:
    """Atlas (NIfTI label volume) and regions (table with columns value, label; several values may share a label)."""
    labels = read_values(regions)
    names = sort_names(set(labels.values()))
    try:
        volume = read_volume(path)
    except UnusableVolume as error:
        raise NotNifti(f"{path} cannot serve as an atlas: {error}") from error
    return Atlas(volume, names, {value: names.index(label) for value, label in labels.items()})
