"""The HDF5 volume file, format 1: where everything lies in it, and how it is opened and checked.

    volumes = open_volumes("scans.h5")              # or a list of shards, which behave as one file
    volumes.shape, volumes.indices("train"), volumes.read(0)

Opening reads the small tables and closes the file again, so that a VolumeFile survives fork and holds no lock.
"""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from datasets.checksum import crc32
from datasets.chunks import Stored
from datasets.names import Names, first_divided, first_repeated, json_blocks
from datasets.partition import HELD_OUT, SPLITS, check_groups, fold_names
from datasets.trust import VolumeFileError, file_identity, opened, read_bytes, read_json

FORMAT = 2
INPUTS, TARGETS, IDS, GROUPS, SPLIT = "inputs", "targets", "ids", "groups", "split"
AFFINE, SOURCE_SHAPE, SCALE, OFFSET, CHECKSUMS = "affine", "source_shape", "scale", "offset", "checksums"
FOLDS = "folds"
"""Only in a file packed for cross-validation."""
FOREGROUND = "foreground"
"""Only with label maps: (N, K, M) flat voxel indices of each class, drawn at random, -1 fills up."""
SHAPES, OFFSETS = "shapes", "offsets"
"""Only in a ragged file, whose volumes have different shapes: (C, *spatial) and first element of each."""
DATASETS = (INPUTS, TARGETS, IDS, GROUPS, SPLIT, AFFINE, SOURCE_SHAPE, SCALE, OFFSET, CHECKSUMS)
FORMAT_ATTR, TASK_ATTR, CLASSES_ATTR, ORIENTATION_ATTR = "format", "task", "class_names", "orientation"
SOURCE_ATTR, FINGERPRINT_ATTR, PACKING_ATTR = "source", "fingerprint", "packing"
TABLES_ATTR = "tables"
"""CRC-32 of all tables, and of the texts that say what they mean."""
TEXTS = (TASK_ATTR, CLASSES_ATTR, ORIENTATION_ATTR, PACKING_ATTR)
ATTRIBUTES = (FORMAT_ATTR, *TEXTS, SOURCE_ATTR, FINGERPRINT_ATTR, TABLES_ATTR)
TASKS = ("classification", "multilabel", "segmentation")
INPUT_DTYPES = ("uint8", "int16", "float16", "float32")
TARGET_DTYPES = {"classification": "int64", "multilabel": "uint8", "segmentation": "uint8"}
ON_DEMAND = (AFFINE, SOURCE_SHAPE)
"""tables that training does not need: read from the file each time"""

PACK = "pack"
"""in the packing options of a shard: which pack it is of"""
SHARD_NAME = re.compile(r"-\d+-of-(\d+)$")

MAX_MAP_CLASSES = 255
UNLABELLED = 255
"""The value of a label map that stands for no class: neither losses nor metrics look at such a voxel."""

Tables = dict[str, NDArray[Any]]


def target_shape(task: str, shape: tuple[int, ...], num_classes: int) -> tuple[int, ...]:
    """Shape of one sample's target: () class number, (K,) multi-hot, or the spatial shape of `shape` (C, *spatial)."""
    return {"classification": (), "multilabel": (num_classes,), "segmentation": shape[1:]}[task]


def check_classes(task: str, names: Sequence[str]) -> None:
    """ValueError for a name that stands twice, and for more classes than a label map's bytes can tell apart."""
    if len(set(names)) < len(names):
        raise ValueError(f"two classes have the name {next(name for name in names if list(names).count(name) > 1)!r}")
    if task == "segmentation" and len(names) > MAX_MAP_CLASSES:
        raise ValueError(f"label maps are bytes: {len(names)} classes are more than {MAX_MAP_CLASSES}")


def sample_checksum(inputs: Any, target: Any) -> int:
    """CRC-32 (zlib) of a sample's input bytes, then its target bytes; both are buffers in C order."""
    return crc32(target, crc32(inputs))


def table_specs(
    num: int, shape: tuple[int, ...], task: str, num_classes: int
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every table of `num` samples of (C, *spatial); S: zero-padded UTF-8 of any length.

    Those of SHAPES, OFFSETS and FOLDS hold where there are such tables; TARGETS only where they are no label maps.
    """
    channels, axes = shape[0], len(shape) - 1
    specs: dict[str, tuple[tuple[int, ...], str]] = {
        IDS: ((num,), "S"),
        GROUPS: ((num,), "S"),
        SPLIT: ((num,), "uint8"),
        FOLDS: ((num,), "uint8"),
        AFFINE: ((num, 4, 4), "float64"),
        SOURCE_SHAPE: ((num, axes), "int64"),
        SCALE: ((num, channels), "float32"),
        OFFSET: ((num, channels), "float32"),
        CHECKSUMS: ((num,), "uint32"),
        SHAPES: ((num, 1 + axes), "int64"),
        OFFSETS: ((num,), "int64"),
    }
    if task != "segmentation":
        specs[TARGETS] = ((num, *target_shape(task, shape, num_classes)), TARGET_DTYPES[task])
    return specs


def tables_checksum(texts: dict[str, Any], sums: dict[str, int]) -> int:
    """CRC-32 over the texts as they are in the attributes, and the CRC-32 of the bytes of each table."""
    return crc32(json.dumps([texts, sums], sort_keys=True).encode())


FINGERPRINTED = (TARGETS, SPLIT, CHECKSUMS, SCALE, OFFSET, FOLDS)


def compute_fingerprint(ids: Sequence[str], tables: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over the ids and what a network sees: the tables FINGERPRINTED that are there.

    Label maps, of which there is no table, count through the checksums.
    """
    digest = hashlib.sha256()
    for block in json_blocks(ids):
        digest.update(block)
    for name in FINGERPRINTED:
        if (table := tables.get(name)) is not None:
            digest.update(f"{table.dtype.str}{table.shape}".encode())
            digest.update(np.ascontiguousarray(table).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Shard:
    """One file on disk: its facts, the small tables that training needs, and where the bytes of its samples lie."""

    path: Path
    identity: tuple[int, int, int]
    """inode, size and modification time in ns: a reader refuses a file that was exchanged since it was opened"""
    shape: tuple[int, ...] | None
    """(C, *spatial); None: ragged, see the tables SHAPES (N, 1 + spatial axes) and OFFSETS (N,) in elements"""
    channels: int
    spatial_axes: int
    dtype: np.dtype[Any]
    task: str
    class_names: tuple[str, ...]
    orientation: str
    packing: dict[str, Any]
    tables: Tables
    """in memory; names as bytes"""
    on_demand: dict[str, int]
    """file offsets of the tables that are read from the file each time"""
    inputs: Stored
    targets: Stored | None
    """None unless label maps"""
    foreground: tuple[int, int] | None
    """file offset of row 0, and M, the number of voxel indices kept for each class"""

    @property
    def num_samples(self) -> int:
        return len(self.tables[SPLIT])

    def read_table(self, name: str) -> NDArray[Any]:
        """A table from memory or from the file. VolumeFileError when the file was exchanged."""
        if name in self.tables:
            return self.tables[name]
        self.require_unchanged()
        sample = (self.channels, *[0] * self.spatial_axes)
        shape, dtype = table_specs(self.num_samples, sample, self.task, len(self.class_names))[name]
        return read_bytes(self.path, self.on_demand[name], shape, dtype)

    def read_classes_held(self) -> NDArray[np.bool_]:
        """(n, K) whether each label map has a voxel of the class. VolumeFileError where no places are stored."""
        if self.foreground is None:
            raise VolumeFileError(f"{self.path} has no stored voxels of each class; pack it again with its masks")
        self.require_unchanged()
        with opened(self.path) as file:
            held: NDArray[np.bool_] = file[FOREGROUND][:, :, 0] >= 0
        return held

    def read_source(self) -> list[dict[str, Any]]:
        """Manifest of the packed files: name, size in bytes, sha256."""
        self.require_unchanged()
        with opened(self.path) as file:
            entries: list[dict[str, Any]] = read_json(self.path, file, SOURCE_ATTR, list)
        return entries

    def require_unchanged(self) -> None:
        if not self.path.is_file() or file_identity(self.path.stat()) != self.identity:
            raise VolumeFileError(f"{self.path} was removed or exchanged since it was opened; start again")


class VolumeFile:
    """Samples of one shape and dtype from one file or several shards. Arrays are in sample order and read-only.

    Raises VolumeFileError when the shards do not fit together, an id occurs twice, or a group lies in two splits.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        if not shards:
            raise VolumeFileError("no volume file was given; make one with 'hpc pack SRC... -o FILE.h5'")
        first = shards[0]
        for other in shards[1:]:
            _require_same(first, other)
        self.dtype, self.channels, self.spatial_axes = first.dtype, first.channels, first.spatial_axes
        self.task, self.class_names, self.orientation = first.task, first.class_names, first.orientation
        self.packing, self.ragged = first.packing, first.shape is None
        self.paths = tuple(shard.path for shard in shards)
        self._starts = [0, *accumulate(shard.num_samples for shard in shards)]
        self.num_samples = self._starts[-1]
        self.target_dtype = np.dtype(TARGET_DTYPES[self.task])
        self._tables = _join([shard.tables for shard in shards])
        self.shards = tuple(
            replace(
                shard, tables={name: table[start : start + shard.num_samples] for name, table in self._tables.items()}
            )
            for shard, start in zip(shards, self._starts, strict=False)
        )
        if (twice := first_repeated(self.ids)) is not None:
            raise VolumeFileError(f"{self.name}: sample id {twice!r} occurs twice; pack again with unique ids")
        self._refuse_leaks(self.split, SPLITS)
        if self.folds is not None:
            self._refuse_leaks(self.folds, fold_names())

    def __len__(self) -> int:
        return self.num_samples

    def __repr__(self) -> str:
        shape = "different shapes" if self.ragged else self.shape
        return f"VolumeFile({', '.join(map(str, self.paths))}: {self.num_samples} x {shape} {self.dtype})"

    @property
    def name(self) -> str:
        """The file for messages and commands: its path, or all shards separated by spaces."""
        return " ".join(map(str, self.paths))

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, *spatial) of every sample. VolumeFileError in a ragged file."""
        if self.shards[0].shape is None:
            raise VolumeFileError(f"{self.name} holds volumes of different shapes; train on patches: data.patch")
        return self.shards[0].shape

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of one sample's target. VolumeFileError for the label maps of a ragged file."""
        shape = self.shape if self.task == "segmentation" else (self.channels,)
        return target_shape(self.task, shape, len(self.class_names))

    def sample_shape(self, sample: int) -> tuple[int, ...]:
        """(C, *spatial) of one sample."""
        return tuple(self._tables[SHAPES][sample].tolist()) if self.ragged else self.shape

    def extents(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n, spatial axes) voxels of these samples along each axis."""
        if self.ragged:
            return self._tables[SHAPES][samples, 1:]
        return np.broadcast_to(np.array(self.shape[1:]), (len(samples), self.spatial_axes))

    @property
    def source(self) -> list[dict[str, Any]]:
        """Manifest of the packed files: name, size in bytes, sha256."""
        return [entry for shard in self.shards for entry in shard.read_source()]

    @property
    def targets(self) -> NDArray[Any]:
        """(N,) int64 class numbers or (N, K) uint8 multi-hot. Label maps are read per sample: ValueError here."""
        if self.task == "segmentation":
            raise ValueError(f"{self.name} holds label maps, which are read per sample: use read(sample)")
        return self._table(TARGETS)

    @cached_property
    def labels(self) -> NDArray[Any]:
        """What samples are told apart by: (N,) class numbers, or (N, K) nonzero where a sample has a class."""
        if self.task != "segmentation":
            return self.targets
        return np.concatenate([shard.read_classes_held() for shard in self.shards])

    @property
    def ids(self) -> Names:
        return Names(self._table(IDS))

    @property
    def groups(self) -> Names:
        return Names(self._table(GROUPS))

    @property
    def split(self) -> NDArray[np.uint8]:
        """(N,) 0 train, 1 validation, 2 test."""
        return self._table(SPLIT)

    @property
    def folds(self) -> NDArray[np.uint8] | None:
        """(N,) the fold of each sample, HELD_OUT for those of the test split; None where there are none."""
        return self._table(FOLDS) if FOLDS in self.shards[0].tables else None

    @property
    def num_folds(self) -> int:
        """0 where the file was not packed with --folds."""
        folds = self.folds
        return 0 if folds is None else 1 + max(folds[folds != HELD_OUT].tolist(), default=-1)

    def fold(self, number: int) -> Self:
        """The same samples, fold `number` as validation, the others as training. VolumeFileError for no such fold."""
        if not 0 <= number < self.num_folds:
            what = f"has folds 0 to {self.num_folds - 1}" if self.num_folds else "has no folds: pack it with --folds 5"
            raise VolumeFileError(f"{self.name} {what}; there is no fold {number}")
        chosen = copy(self)
        chosen._tables = dict(self._tables)
        train, validation, test = map(np.uint8, map(SPLITS.index, ("train", "validation", "test")))
        folds = self._table(FOLDS)
        chosen._tables[SPLIT] = np.where(folds == HELD_OUT, test, np.where(folds == number, validation, train))
        chosen._tables[SPLIT].flags.writeable = False
        chosen.__dict__.pop("fingerprint", None)
        return chosen

    @property
    def affine(self) -> NDArray[np.float64]:
        """(N, 4, 4) from voxel indices of the stored sample to mm (RAS). Read from the file each time."""
        return self._table(AFFINE)

    @property
    def source_shape(self) -> NDArray[np.int64]:
        """(N, spatial axes) voxels of the source volume, after reorientation. Read from the file each time."""
        return self._table(SOURCE_SHAPE)

    @property
    def scale(self) -> NDArray[np.float32]:
        """(N, C): stored * scale + offset is the normalised intensity."""
        return self._table(SCALE)

    @property
    def offset(self) -> NDArray[np.float32]:
        return self._table(OFFSET)

    @property
    def checksums(self) -> NDArray[np.uint32]:
        """(N,) CRC-32 of the sample's input bytes, then its target bytes."""
        return self._table(CHECKSUMS)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the ids and tables as they are now; the same samples in shards have the same."""
        tables: Tables = {SPLIT: self.split, CHECKSUMS: self.checksums, SCALE: self.scale, OFFSET: self.offset}
        if self.task != "segmentation":
            tables[TARGETS] = self.targets
        if self.folds is not None:
            tables[FOLDS] = self.folds
        return compute_fingerprint(self.ids, tables)

    def indices(self, split: str) -> NDArray[np.int64]:
        """Sample numbers of 'train', 'validation' or 'test', in file order. ValueError for another name."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; use {', '.join(SPLITS)}")
        return np.flatnonzero(self.split == SPLITS.index(split))

    def locate(self, sample: int) -> tuple[int, int]:
        """Number of the shard, and the row in it, of a sample number. IndexError out of range."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} is out of range: {self.name} holds 0 to {self.num_samples - 1}")
        shard = bisect_right(self._starts, sample) - 1
        return shard, sample - self._starts[shard]

    def read(self, sample: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """One sample as stored: inputs (C, *spatial) and its target (0-d class number, (K,), or spatial map)."""
        from datasets.reading import read_sample

        return read_sample(self, sample)

    def verify(self, indices: Iterable[int] | None = None) -> list[int]:
        """Read the bytes of these samples (default: all) and return the numbers of those whose CRC-32 differs."""
        from datasets.reading import find_damaged

        return list(find_damaged(self, range(self.num_samples) if indices is None else indices))

    def _table(self, name: str) -> NDArray[Any]:
        if name in self._tables:
            return self._tables[name]
        return np.concatenate([shard.read_table(name) for shard in self.shards])

    def _refuse_leaks(self, parts: NDArray[np.uint8], names: Sequence[str]) -> None:
        rows = first_divided(self.groups, parts)
        check_groups([self.groups[row] for row in rows.tolist()], parts[rows], names)


def open_volumes(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> VolumeFile:
    """Open one volume file, or several shards as one, and check them; raises VolumeFileError with one line.

    `scans-*.h5` stands for all shards of a pack, none of which may be missing.

    Refused: a missing file, one that is not HDF5, cut short or half written, of another format number, with a missing
    or ill-shaped dataset, with tables changed since packing, with data that lie elsewhere, were never written, claim
    more than the file can hold, or went through a filter that is not in datasets.codecs.
    """
    from datasets.opening import read_shard

    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    return VolumeFile([read_shard(file) for item in paths for file in _matching(Path(item))])


def _matching(path: Path) -> list[Path]:
    """The files that a pattern names, in order."""
    if path.exists() or not set("*?[") & set(path.name):
        return [path]
    found = sorted(path.parent.glob(path.name))
    if not found:
        raise VolumeFileError(f"no file is named like {path}; make some with 'hpc pack ... --shard-size 2GiB'")
    counts = {int(told[1]) for file in found if (told := SHARD_NAME.search(file.stem))}
    if counts and counts != {len(found)}:
        raise VolumeFileError(f"{path} names {len(found)} files, but there should be {max(counts)}; copy all shards")
    return found


def _require_same(first: Shard, other: Shard) -> None:
    if first.packing.get(PACK) != other.packing.get(PACK):
        raise VolumeFileError(f"{first.path} and {other.path} are of two packs: pack them together, into shards")
    if (FOLDS in first.tables) != (FOLDS in other.tables):
        raise VolumeFileError(f"one of {first.path} and {other.path} has folds, the other not; pack both alike")
    for name in ("shape", "channels", "spatial_axes", "dtype", "task", "class_names", "orientation"):
        mine, theirs = getattr(first, name), getattr(other, name)
        if mine != theirs:
            raise VolumeFileError(f"{other.path} has {name} {theirs}, but {first.path} has {mine}; shards must agree")


def _join(parts: Sequence[Tables]) -> Tables:
    """Tables of all shards one after the other, read-only."""
    if len(parts) == 1:
        return dict(parts[0])
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for table in joined.values():
        table.flags.writeable = False
    return joined
