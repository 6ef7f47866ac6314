"""Where the patch of a sample begins: drawn by (seed, epoch, sample, view), or the centre of the volume."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.layout import VolumeFile
from datasets.order import Stream, uniform_table
from datasets.reading import Reader
from datasets.sampling import Share

MAX_AXES = 3
AHEAD = 512
"""patches whose places are drawn in one go: a few at a time would cost more than to read them"""


@dataclass(frozen=True)
class Places:
    """Where the patches of a batch begin, those about a foreground voxel aside."""

    starts: list[list[int]]
    """(B, axes)"""
    draws: NDArray[np.float64]
    """(B, MAX_AXES + 2) in [0, 1)"""


@dataclass(frozen=True)
class Patches:
    """Boxes of `size` voxels; where an axis of the volume is no longer than the box, it is centred."""

    volumes: VolumeFile
    size: tuple[int, ...]
    seed: int
    drawn: bool
    """False: the centre of the volume, whatever the epoch."""

    def planned(self, epoch: int, shares: Iterator[Share]) -> Iterator[tuple[Share, Places]]:
        """Each batch of the epoch with the places of its patches; some of them ahead of their time."""
        while first := next(shares, None):
            coming = [first, *islice(shares, AHEAD // max(1, len(first.samples)))]
            samples = np.concatenate([share.samples for share in coming])
            draws = self._draws(epoch, samples + np.concatenate([share.views for share in coming]) * len(self.volumes))
            starts, done = self._starts(samples, draws).tolist(), 0
            for share in coming:
                rows = slice(done, done := done + len(share.samples))
                yield share, Places(starts[rows], draws[rows])

    def start(self, reader: Reader, epoch: int, sample: int, key: int, foreground: bool) -> tuple[int, ...]:
        """First voxel of the patch. `key` stands for (sample, view): sample + view * N."""
        draws = self._draws(epoch, np.array([key]))
        if foreground:
            return self.about_foreground(reader, sample, draws[0])
        return tuple(self._starts(np.array([sample]), draws)[0].tolist())

    def about_foreground(self, reader: Reader, sample: int, draws: NDArray[np.float64]) -> tuple[int, ...]:
        """First voxel of a patch that holds a stored location of a class other than 0.

        The location is drawn uniformly among those of a class, and the class among those that the sample has; it lies
        anywhere in the patch. A sample without one gives any patch.
        """
        if not self.drawn or (voxel := _location(reader, sample, *draws[MAX_AXES:].tolist())) is None:
            return tuple(self._starts(np.array([sample]), draws[None])[0].tolist())
        extent = self.volumes.sample_shape(sample)[1:]
        room = [axis - size for axis, size in zip(extent, self.size, strict=True)]
        place = [int(axis) for axis in np.unravel_index(voxel, extent)]
        low = [max(0, axis - size + 1) for axis, size in zip(place, self.size, strict=True)]
        high = [min(axis, free) for axis, free in zip(place, room, strict=True)]
        spans = zip(low, high, room, draws.tolist(), strict=False)
        return tuple(free // 2 if free <= 0 else a + int(draw * (b - a + 1)) for a, b, free, draw in spans)

    def _draws(self, epoch: int, keys: NDArray[np.int64]) -> NDArray[np.float64]:
        if not self.drawn:
            return np.zeros((len(keys), MAX_AXES + 2))
        return uniform_table(self.seed, epoch, Stream.PATCH, MAX_AXES + 2, keys)

    def _starts(self, samples: NDArray[np.int64], draws: NDArray[np.float64]) -> NDArray[np.int64]:
        """(n, axes) anywhere in the volumes; the centre where nothing is drawn, or there is no room."""
        room: NDArray[Any] = self.volumes.extents(samples) - np.array(self.size)
        if not self.drawn:
            return room // 2
        return np.where(room <= 0, room // 2, (draws[:, : room.shape[1]] * (room + 1)).astype(np.int64))


def _location(reader: Reader, sample: int, first: float, second: float) -> int | None:
    table = reader.foreground(sample)
    counts = (table >= 0).sum(axis=1)
    present = 1 + np.flatnonzero(counts[1:])
    if not len(present):
        return None
    label = present[int(first * len(present))]
    places = table[label][table[label] >= 0]
    return int(places[int(second * len(places))])
