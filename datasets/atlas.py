"""Labels from an atlas that names the region at each place in the body."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.partition import UNSET
from datasets.sources import UnusableSource, find, read
from datasets.tables import read_values, sort_names


@dataclass(frozen=True)
class Atlas:
    """The class number, or -1, at each voxel (x, y, z) of a label volume, and the affine from its indices to mm."""

    numbers: NDArray[np.int16]
    affine: NDArray[np.float64]
    class_names: list[str]

    def classes(self, shape: tuple[int, ...], affine: NDArray[Any]) -> NDArray[np.int16]:
        """Class number at each voxel of a grid, -1 where there is none: the atlas voxel nearest in world position."""
        grid = np.linalg.inv(self.affine) @ affine
        out = np.empty(shape, np.int16)
        y, z = np.ogrid[: shape[1], : shape[2]]
        for x in range(shape[0]):  # one plane at a time: memory stays small
            # half-way positions go up, also when rounding left them a hair below
            index = [np.floor(g[0] * x + g[1] * y + g[2] * z + g[3] + 0.5 + 1e-6).astype(np.int64) for g in grid[:3]]
            inside = np.ones(shape[1:], bool)
            for axis, size in enumerate(self.numbers.shape):
                inside &= (index[axis] >= 0) & (index[axis] < size)
            clipped = tuple(
                np.clip(places, 0, size - 1) for places, size in zip(index, self.numbers.shape, strict=True)
            )
            out[x] = np.where(inside, self.numbers[clipped], UNSET)
        return out


def read_atlas(path: Path, regions: Path) -> Atlas:
    """Atlas (a label volume of any format that is read) and regions (a table with the columns value, label).

    Several values may share a label. ValueError for a file that cannot serve.
    """
    labels = read_values(regions)
    names = sort_names(set(labels.values()))
    try:
        volume = read(next(iter(find([path]).values())))
    except UnusableSource as error:
        raise ValueError(f"{path} cannot serve as an atlas: {error}") from error
    if volume.data.ndim != 4 or len(volume.data) != 1:
        raise ValueError(f"{path} cannot serve as an atlas: its shape is {volume.data.shape}; give a volume of labels")
    values, places = np.unique(volume.data[0], return_inverse=True)
    numbers = np.array(
        [names.index(labels[value]) if value in labels else UNSET for value in values.tolist()], np.int16
    )
    return Atlas(numbers[places].reshape(volume.data.shape[1:]), volume.affine, names)
