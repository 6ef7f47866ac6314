"""What `hpc pack` is asked for: the recipe of a sample's bytes, which predict replays, and all that is around it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datasets.codecs import CODECS
from datasets.duplicates import ACTIONS
from datasets.packing.prepare import DTYPES, NORMALISATIONS

FOLDERS = "folders"
"""in place of a table of labels: the class is the name of the folder that holds the file"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What becomes of one volume's voxels, in this order. Axes are x, y, z (RAS), of images rows, columns.

    A length of 1 stands for all axes. ValueError for options that contradict each other.
    """

    nan: float | None = None
    """in place of voxels that are NaN, as around a head; None: a source that has some is refused"""
    window: tuple[float, float] | None = None
    """intensities are clipped to it, in units of the source (CT: Hounsfield units)"""
    spacing: tuple[float, ...] | None = None
    """mm of a voxel after resampling (cubic spline; label maps by nearest neighbour)"""
    resize: tuple[int, ...] | None = None
    """voxels after resampling; a single number is the length of the shorter side, the others follow"""
    size: tuple[int, ...] | None = None
    """voxels that are cropped or padded to, about the centre"""
    patch: tuple[int, ...] | None = None
    """voxels of patches that are cut out in place of whole volumes"""
    per_class: int | None = None
    """patches drawn of each class in each volume"""
    seed: int = 0
    """of the patches, and of the voxels that are noted for each class of a label map"""
    dtype: str = "keep"
    normalise: str = "zscore"

    def __post_init__(self) -> None:
        for name in ("spacing", "resize", "size", "patch"):
            value = getattr(self, name)
            if value is not None and (len(value) not in (1, 2, 3) or not min(value) > 0):
                raise ValueError(f"--{name} {_spell(value)} is not one, two or three numbers above 0")
        if self.spacing is not None and not all(math.isfinite(length) for length in self.spacing):
            raise ValueError(f"--spacing {_spell(self.spacing)} is not one, two or three numbers above 0")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed} is out of range; use 0 to 2**63 - 1")
        if self.spacing is not None and self.resize is not None:
            raise ValueError("--spacing and --resize both resample; give one of the two")
        if self.patch is not None and self.size is not None:
            raise ValueError("--size is for whole volumes and --patch for parts of them; give one of the two")
        if self.per_class is not None and (self.patch is None or self.per_class < 1):
            raise ValueError(f"--per-class {self.per_class} counts patches, from 1 on; it needs --patch")
        if self.patch is not None and self.per_class is None:
            raise ValueError("how many patches of each class in each volume? add --per-class, for example 100")
        if self.nan is not None and not abs(self.nan) <= float(np.finfo(np.float32).max):
            raise ValueError(f"--nan {self.nan:g} is no number that float32 holds; write for example 0")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError(f"--window {_spell(self.window)} is not LOW,HIGH; write for example -160,240")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype!r} is unknown; use {', '.join(DTYPES)}")
        if self.normalise not in NORMALISATIONS:
            raise ValueError(f"--normalise {self.normalise!r} is unknown; use {', '.join(NORMALISATIONS)}")


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """All of `hpc pack`. ValueError for options that contradict each other."""

    sources: tuple[Path, ...]
    """files, or folders that are searched for them"""
    output: Path
    recipe: Recipe = field(default_factory=Recipe)
    channels: tuple[str, ...] = ()
    """endings of the file names that are channels of one sample: t1, t2 for a_t1.nii.gz and a_t2.nii.gz"""
    labels: Path | None = None
    """table with columns id, label[, group][, split][, fold][, mask], or `folders`"""
    id: str = "id"
    """column of the source's name"""
    label: tuple[str, ...] = ("label",)
    """column of the class; several of 0 and 1 are a multi-label task"""
    separator: str | None = None
    """between several classes in one cell: a multi-label task"""
    no_label: str | None = None
    """the name in such a cell that stands for no class"""
    group: str | None = None
    """column of the table that names the group; default: 'group' if there is one"""
    masks: Path | None = None
    """folder of label maps, one for each source: a segmentation task"""
    by_mask: bool = False
    """the table's column `mask` names them: a segmentation task"""
    classes: str | None = None
    """names of a label map's classes from 0 on, or a file of them; None: the values that are found"""
    atlas: Path | None = None
    regions: Path | None = None
    """table with columns value, label: the classes of the atlas"""
    split: tuple[float, float, float] = (0.7, 0.15, 0.15)
    split_list: Path | None = None
    """JSON with the ids of each split, or of each fold"""
    folds: int | None = None
    """of cross-validation: all samples that are not of the test split are in one; then the validation share is 0"""
    duplicates: str | None = None
    """keep, drop or error; None: kept and told, but an error where two splits have them"""
    compress: str | None = None
    """a name of datasets.codecs.CODECS: samples become chunks"""
    chunk: tuple[int, ...] | None = None
    """voxels of a chunk, for readers of patches; None: one chunk a sample"""
    ragged: bool = False
    """samples keep their different shapes"""
    shard_bytes: int | None = None
    """at most as many bytes of voxels in a file; then several are written"""
    skip_bad: bool = False
    workers: int | None = None
    """processes; None: one for each core that may be used"""

    def __post_init__(self) -> None:
        self._check_labels()
        self._check_layout()
        if self.duplicates is not None and self.duplicates not in ACTIONS:
            raise ValueError(f"--duplicates {self.duplicates!r} is unknown; use {', '.join(ACTIONS)}")
        if self.folds is not None and self.split[1] > 0:
            train, validation, test = (round(100 * share, 9) for share in self.split)
            raise ValueError(
                f"with --folds each fold is the validation once; write --split {train + validation:g}/0/{test:g}, "
                f"not {train:g}/{validation:g}/{test:g}"
            )
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers {self.workers} must be 1 or more")

    def _check_labels(self) -> None:
        if (self.atlas is None) != (self.regions is None):
            raise ValueError("an atlas and its regions go together: give both --atlas A.nii.gz and --regions R.csv")
        if self.by_mask and (self.labels is None or self.masks is not None):
            raise ValueError("--by-mask takes the column 'mask' of --labels TABLE, in place of --masks FOLDER")
        if self.classes is not None and self.masks is None and not self.by_mask:
            raise ValueError("--classes names the values of label maps: give --masks FOLDER, or --by-mask")
        if self.labels is None and self.atlas is None and self.masks is None:
            raise ValueError(
                "no labels: give --labels TABLE (columns id,label), --labels folders, --masks FOLDER, "
                "or --atlas A.nii.gz --regions R.csv"
            )
        if self.group is not None and self.labels is None:
            raise ValueError(f"--group {self.group} is a column of a table; add --labels TABLE")
        if self.atlas is not None and self.recipe.patch is None:
            raise ValueError("an atlas gives the class of a place, not of a whole volume: add --patch, for example 24")
        if self.atlas is not None and (self.masks is not None or self.by_mask):
            raise ValueError("--atlas gives patches a class and --masks voxels theirs; give one of the two")
        if self.recipe.patch is not None and (
            self.masks is not None or self.by_mask or len(self.label) > 1 or self.separator is not None
        ):
            raise ValueError(
                "--patch cuts patches of one class each; pack whole volumes, and let data.patch cut them in training"
            )

    def _check_layout(self) -> None:
        if self.compress is not None and self.compress not in CODECS:
            raise ValueError(f"--compress {self.compress!r} is unknown; use {', '.join(CODECS)}")
        if self.ragged and (self.compress is not None or self.chunk is not None):
            raise ValueError("--ragged files are neither chunked nor compressed; use --size for these")
        if self.ragged and (self.recipe.size is not None or self.recipe.patch is not None):
            raise ValueError("--ragged keeps each volume's own shape; leave out --size and --patch")
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise ValueError("--shard-size must be above 0; write for example 2GiB")


def stored(options: PackOptions, dtype: str) -> dict[str, Any]:
    """The options as the file keeps them, with what `keep` came to and the rules that predict has to replay."""
    plain: dict[str, Any] = {
        name: [str(part) for part in value] if isinstance(value, tuple) and name in ("channels", "label") else value
        for name, value in asdict(options).items()
        if name not in ("sources", "output", "recipe", "workers", "skip_bad")
    }
    plain |= asdict(options.recipe) | {"dtype": dtype}
    named = {name: value.name for name, value in plain.items() if isinstance(value, Path)}
    rules = {"orientation": "RAS", "foreground": "above 0, or all voxels when none is 0", "pad": "minimum"}
    return plain | named | rules


def expand(values: Sequence[Any], axes: int, option: str) -> tuple[Any, ...]:
    """One value for each axis. ValueError where neither one nor `axes` were given."""
    if len(values) not in (1, axes):
        raise ValueError(f"{option} {_spell(values)} has {len(values)} numbers, but the data have {axes} axes")
    return tuple(values) * (axes if len(values) == 1 else 1)


def _spell(values: Sequence[Any]) -> str:
    return ",".join(f"{value:g}" for value in values)
