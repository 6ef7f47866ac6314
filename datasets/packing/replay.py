"""New files become samples as packing would have made them, and what is predicted for one goes back to its own grid.

    replay = Replay.of(volumes.packing, channels=1, axes=3)
    sample = replay.read(source)                    # a datasets.sources.Source; bit by bit what `hpc pack` stores
    labels, outside = sample.place.labels(probabilities)

Everything here is of one source alone: no file of training data is needed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from datasets import sources
from datasets.packing.geometry import Affine, Grid, make_grid
from datasets.packing.making import make_sample
from datasets.packing.plan import LARGEST
from datasets.packing.recipe import Recipe, expand
from datasets.sources import Source, UnusableSource


@dataclass(frozen=True)
class Place:
    """How a sample's voxels lie in its source: resampled by `grid`, then cropped or padded about the centre."""

    grid: Grid
    shape: tuple[int, ...]
    """spatial, of the sample"""

    @property
    def source_shape(self) -> tuple[int, ...]:
        return self.grid.old

    def undo(self, values: NDArray[Any], outside: float) -> NDArray[np.float32]:
        """Values on the sample's grid as they are on the source's: linear, `outside` where the sample does not reach.

        values: (*sample's spatial shape); beyond the outermost centres of voxels the nearest is repeated.
        """
        whole = self._uncropped(np.asarray(values, np.float32), outside)
        if self.grid.same:
            return whole
        from scipy import ndimage

        steps, start = np.array(self.grid.steps), np.array(self.grid.start)
        out: NDArray[np.float32] = ndimage.affine_transform(
            whole, 1 / steps, -start / steps, output_shape=self.grid.old, output=np.float32, order=1, mode="nearest"
        )
        return out

    def labels(self, probabilities: NDArray[Any]) -> tuple[NDArray[np.uint8], int]:
        """(K, *sample) -> the likeliest class of each voxel of the source, and how many lie outside of the sample.

        Those get class 0. Classes are brought back one after the other: two volumes of the source's size are held.
        """
        if self.grid.same:
            classes = np.argmax(probabilities, axis=0).astype(np.uint8)
            labels = self._uncropped(classes, 0)
        else:
            labels = np.zeros(self.grid.old, np.uint8)
            best = np.full(self.grid.old, -np.inf, np.float32)
            for number, values in enumerate(probabilities):
                here = self.undo(values, float(number == 0))
                better = here > best
                labels[better], best[better] = number, here[better]
        return labels, math.prod(self.grid.old) - self.covered()

    def covered(self) -> int:
        """Voxels of the source whose centre lies in the sample."""
        spans = zip(self.grid.old, self.grid.new, self.shape, self.grid.steps, self.grid.start, strict=True)
        count = 1
        for old, new, size, step, start in spans:
            first = (new - size) // 2 if size < new else 0
            last = first + size - 1 if size < new else new - 1
            if size >= new:  # the outermost voxels reach to the source's edge
                count *= old
                continue
            centres = (np.arange(old) - start) / step
            count *= int(np.count_nonzero((centres >= first - 0.5) & (centres <= last + 0.5)))
        return count

    def _uncropped(self, values: NDArray[Any], outside: float) -> NDArray[Any]:
        """The inverse of `geometry.centre_fit`."""
        if values.shape != self.shape:
            raise ValueError(f"values of {values.shape} do not lie on the sample's grid {self.shape}")
        if self.shape == self.grid.new:
            return values
        starts = [(have - want) // 2 for have, want in zip(self.grid.new, self.shape, strict=True)]
        lengths = [min(have, want) for have, want in zip(self.grid.new, self.shape, strict=True)]
        whole = np.full(self.grid.new, outside, values.dtype)
        here = tuple(slice(max(-s, 0), max(-s, 0) + n) for s, n in zip(starts, lengths, strict=True))
        there = tuple(slice(max(s, 0), max(s, 0) + n) for s, n in zip(starts, lengths, strict=True))
        whole[there] = values[here]
        return whole


@dataclass(frozen=True)
class Sample:
    """One new file as a network meets it: `data * scale + offset`, in float32, as datasets.Loader computes it."""

    data: NDArray[Any]
    """(C, *spatial), stored numbers"""
    scale: NDArray[np.float32]
    """(C,)"""
    offset: NDArray[np.float32]
    affine: Affine
    """(4, 4) from voxels of the sample to mm (RAS)"""
    source_affine: Affine
    """(4, 4) of the source, in RAS order"""
    place: Place

    def normalised(self) -> NDArray[np.float32]:
        """(C, *spatial) float32."""
        shape = (-1, *[1] * (self.data.ndim - 1))
        numbers = self.data.astype(np.float32)
        numbers *= self.scale.reshape(shape)
        numbers += self.offset.reshape(shape)
        return numbers


@dataclass(frozen=True)
class Replay:
    """The options of a pack that decide a sample's bytes, and what its samples are like."""

    recipe: Recipe
    """without its patches, which are parts of what is read here"""
    dtype: str
    channels: int
    axes: int
    endings: tuple[str, ...] = ()
    """of the file names that are channels of one sample"""
    patch: tuple[int, ...] | None = None
    """voxels of the patches that were packed in place of whole volumes"""

    @classmethod
    def of(cls, packing: Mapping[str, Any], channels: int, axes: int) -> Self:
        """From the attribute `packing` of a volume file. ValueError where there are no such options, or odd ones."""
        packing = {"nan": None, **packing}  # files from before that option have none filled
        names = [field.name for field in fields(Recipe)]
        if missing := [name for name in names if name not in packing]:
            raise ValueError(
                f"the data file says nothing of {', '.join(missing)}, so it was not made by 'hpc pack', and new files "
                f"cannot be prepared as its samples were: pack the data again, or pack the new files and evaluate them"
            )
        given: dict[str, Any] = {
            name: tuple(packing[name]) if isinstance(packing[name], list) else packing[name] for name in names
        }
        recipe = Recipe(**given)
        patch = None if recipe.patch is None else expand(recipe.patch, axes, "--patch")
        whole = replace(recipe, patch=None, per_class=None)
        return cls(whole, recipe.dtype, channels, axes, tuple(packing.get("channels") or ()), patch)

    def find(self, entries: Sequence[Path]) -> dict[str, Source]:
        """Id -> source, as packing finds them; files of other names than the channels' are left out. ValueError.

        Those of one name in several folders keep their folders: A/scan, B/scan.
        """
        return sources.find(entries, self.endings, apart=True)

    def read(self, source: Source) -> Sample:
        """A source as a sample. UnusableSource with the reason, NotASource where its reader is not installed."""
        try:
            header = sources.header(source)
            grey = self.channels == 3 and header.shape[0] == 1 and source.kind == "image" and header.dtype == np.uint8
            self._check((3, *header.shape[1:]) if grey else header.shape, header.affine)
            volume = sources.read(source, self.recipe.nan)
            if grey:  # as packing does among colour
                volume = replace(volume, data=np.repeat(volume.data, 3, axis=0))
            made = make_sample(self.recipe, self.dtype, volume)
        except (UnusableSource, sources.NotASource):
            raise
        except OSError as error:
            raise UnusableSource(f"it cannot be read ({error.strerror or error})") from error
        except MemoryError:
            raise UnusableSource("there is not enough memory for it") from None
        except ValueError as error:  # of an option that does not suit this file
            raise UnusableSource(str(error)) from error
        return Sample(
            data=made.data,
            scale=np.array(made.scale, np.float32),
            offset=np.array(made.offset, np.float32),
            affine=made.affine,
            source_affine=volume.affine,
            place=Place(make_grid(volume.data.shape[1:], volume.affine, self.recipe), made.data.shape[1:]),
        )

    def _check(self, shape: tuple[int, ...], affine: Affine) -> None:
        channels, *spatial = shape
        if (channels, len(spatial)) != (self.channels, self.axes):
            told = "{} channel(s) and {} axes"
            raise UnusableSource(
                f"it has {told.format(channels, len(spatial))}, and the training data "
                f"{told.format(self.channels, self.axes)}"
            )
        voxels = math.prod(make_grid(tuple(spatial), affine, self.recipe).new)
        if voxels > LARGEST:
            raise UnusableSource(
                f"resampled it would have {voxels:,} voxels; is its spacing right? {LARGEST:,} at most"
            )
