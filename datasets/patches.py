"""Where the patch of a sample begins: drawn by (seed, epoch, sample, view), or the centre of the volume."""

from dataclasses import dataclass

import numpy as np

from datasets.layout import VolumeFile
from datasets.order import Stream, uniforms
from datasets.reading import Reader

MAX_AXES = 3


@dataclass(frozen=True)
class Patches:
    """Boxes of `size` voxels; where an axis of the volume is no longer than the box, it is centred."""

    volumes: VolumeFile
    size: tuple[int, ...]
    seed: int
    drawn: bool
    """False: the centre of the volume, whatever the epoch."""

    def start(self, reader: Reader, epoch: int, sample: int, key: int, foreground: bool) -> tuple[int, ...]:
        """First voxel of the patch. `key` stands for (sample, view).

        With `foreground`, the patch holds a stored location of a class other than 0, drawn uniformly among those that
        the sample has; the location lies anywhere in the patch. A sample without one gives any patch.
        """
        extent = self.volumes.sample_shape(sample)[1:]
        room = [axis - size for axis, size in zip(extent, self.size, strict=True)]
        if not self.drawn:
            return tuple(free // 2 for free in room)
        draws = uniforms(self.seed, epoch, Stream.PATCH, MAX_AXES + 2, key).tolist()
        low, high = [0] * len(room), room
        if foreground and (voxel := self._location(reader, sample, *draws[MAX_AXES:])) is not None:
            place = [int(axis) for axis in np.unravel_index(voxel, extent)]
            low = [max(0, axis - size + 1) for axis, size in zip(place, self.size, strict=True)]
            high = [min(axis, free) for axis, free in zip(place, room, strict=True)]
        spans = zip(low, high, room, draws, strict=False)
        return tuple(free // 2 if free <= 0 else a + int(draw * (b - a + 1)) for a, b, free, draw in spans)

    @staticmethod
    def _location(reader: Reader, sample: int, first: float, second: float) -> int | None:
        table = reader.foreground(sample)
        counts = (table >= 0).sum(axis=1)
        present = 1 + np.flatnonzero(counts[1:])
        if not len(present):
            return None
        label = present[int(first * len(present))]
        places = table[label][table[label] >= 0]
        return int(places[int(second * len(places))])
