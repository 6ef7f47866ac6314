"""The HDF5 volume file, format 1: where everything lies in it, and how it is opened and checked.

    volumes = open_volumes("scans.h5")              # or a list of shards, which behave as one file
    volumes.shape, volumes.indices("train"), volumes.read(0)

Opening reads the small tables and closes the file again, so that a VolumeFile survives fork and holds no lock.
"""

import hashlib
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from datasets.partition import HELD_OUT, SPLITS, check_groups, fold_names

FORMAT = 1
INPUTS, TARGETS, IDS, GROUPS, SPLIT = "inputs", "targets", "ids", "groups", "split"
AFFINE, SOURCE_SHAPE, SCALE, OFFSET, CHECKSUMS = "affine", "source_shape", "scale", "offset", "checksums"
FOLDS = "folds"
"""Only in a file packed for cross-validation."""
DATASETS = (INPUTS, TARGETS, IDS, GROUPS, SPLIT, AFFINE, SOURCE_SHAPE, SCALE, OFFSET, CHECKSUMS)
RAGGED_SHAPES = "shapes"
FORMAT_ATTR, TASK_ATTR, CLASSES_ATTR, ORIENTATION_ATTR = "format", "task", "class_names", "orientation"
SOURCE_ATTR, FINGERPRINT_ATTR, PACKING_ATTR = "source", "fingerprint", "packing"
ATTRIBUTES = (FORMAT_ATTR, TASK_ATTR, CLASSES_ATTR, ORIENTATION_ATTR, SOURCE_ATTR, FINGERPRINT_ATTR, PACKING_ATTR)
TASKS = ("classification", "multilabel", "segmentation")
INPUT_DTYPES = ("uint8", "int16", "float16", "float32")
TARGET_DTYPES = {"classification": "int64", "multilabel": "uint8", "segmentation": "uint8"}

Tables = dict[str, NDArray[Any]]


class VolumeFileError(ValueError):
    """A file that cannot be used as a volume file; the message is one line with the reason and the remedy."""


def target_shape(task: str, shape: tuple[int, ...], num_classes: int) -> tuple[int, ...]:
    """Shape of one sample's target: () class number, (K,) multi-hot, or the spatial shape of `shape` (C, *spatial)."""
    return {"classification": (), "multilabel": (num_classes,), "segmentation": shape[1:]}[task]


def sample_checksum(inputs: Any, target: Any) -> int:
    """CRC-32 (zlib) of a sample's input bytes, then its target bytes; both are buffers in C order."""
    return zlib.crc32(target, zlib.crc32(inputs))


def compute_fingerprint(
    ids: Sequence[str], targets: NDArray[Any] | None, split: Any, checksums: Any, folds: Any = None
) -> str:
    """SHA-256 over ids, targets, split, checksums, folds. Label maps (`targets` None) count through the checksums."""
    digest = hashlib.sha256()
    digest.update(json.dumps(list(ids), ensure_ascii=False).encode())
    for table in (targets, split, checksums, folds):
        if table is not None:
            digest.update(f"{table.dtype.str}{table.shape}".encode())
            digest.update(np.ascontiguousarray(table).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Shard:
    """One file on disk: its facts, its small tables, and where the samples begin (None: chunked, read by HDF5)."""

    path: Path
    identity: tuple[int, int, int]
    """inode, size and modification time in ns: a reader refuses a file that was exchanged since it was opened"""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    task: str
    class_names: tuple[str, ...]
    orientation: str
    source: list[dict[str, Any]]
    packing: dict[str, Any]
    tables: Tables
    inputs_offset: int | None
    targets_offset: int | None

    @property
    def num_samples(self) -> int:
        return len(self.tables[SPLIT])


class VolumeFile:
    """Samples of one shape and dtype from one file or several shards. Arrays are in sample order and read-only.

    Raises VolumeFileError when the shards do not fit together, an id occurs twice, or a group lies in two splits.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        if not shards:
            raise VolumeFileError("no volume file was given; make one with 'hpc pack SRC... -o FILE.h5'")
        self.shards = tuple(shards)
        first = self.shards[0]
        for other in self.shards[1:]:
            _require_same(first, other)
        self.paths = tuple(shard.path for shard in self.shards)
        self.shape, self.dtype = first.shape, first.dtype
        self.task, self.class_names, self.orientation = first.task, first.class_names, first.orientation
        self.packing = first.packing
        self._starts = [0, *accumulate(shard.num_samples for shard in self.shards)]
        self.num_samples = self._starts[-1]
        self.target_shape = target_shape(self.task, self.shape, len(self.class_names))
        self.target_dtype = np.dtype(TARGET_DTYPES[self.task])
        self._refuse_repeated_ids()
        check_groups(self.groups, self.split)
        if self.folds is not None:
            check_groups(self.groups, self.folds, fold_names())

    def __len__(self) -> int:
        return self.num_samples

    def __repr__(self) -> str:
        return f"VolumeFile({', '.join(map(str, self.paths))}: {self.num_samples} x {self.shape} {self.dtype})"

    @property
    def name(self) -> str:
        """The file for messages and commands: its path, or all shards separated by spaces."""
        return " ".join(map(str, self.paths))

    @property
    def source(self) -> list[dict[str, Any]]:
        """Manifest of the packed files: name, size in bytes, sha256."""
        return [entry for shard in self.shards for entry in shard.source]

    @property
    def targets(self) -> NDArray[Any]:
        """(N,) int64 class numbers or (N, K) uint8 multi-hot. Label maps are read per sample: ValueError here."""
        if self.task == "segmentation":
            raise ValueError(f"{self.name} holds label maps, which are read per sample: use read(sample)")
        return self._table(TARGETS)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._table(IDS))

    @cached_property
    def groups(self) -> tuple[str, ...]:
        return tuple(self._table(GROUPS))

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
        """(N, 4, 4) from voxel indices of the stored sample to mm (RAS)."""
        return self._table(AFFINE)

    @property
    def source_shape(self) -> NDArray[np.int64]:
        """(N, spatial axes) voxels of the source volume, after reorientation."""
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
        """SHA-256 of ids, targets, split and checksums as they are now; the same samples in shards have the same."""
        targets = None if self.task == "segmentation" else self.targets
        return compute_fingerprint(self.ids, targets, self.split, self.checksums, self.folds)

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
        if name not in self._tables:
            self._tables[name] = np.concatenate([shard.tables[name] for shard in self.shards])
            self._tables[name].flags.writeable = False
        return self._tables[name]

    @cached_property
    def _tables(self) -> Tables:
        return dict(self.shards[0].tables) if len(self.shards) == 1 else {}

    def _refuse_repeated_ids(self) -> None:
        if len(set(self.ids)) < self.num_samples:
            seen: set[str] = set()
            twice = next(name for name in self.ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise VolumeFileError(f"{self.name}: sample id {twice!r} occurs twice; pack again with unique ids")


def open_volumes(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> VolumeFile:
    """Open one volume file, or several shards as one, and check them; raises VolumeFileError with one line.

    Refused: a missing file, one that is not HDF5, cut short or half written, of another format number, with a missing
    or ill-shaped dataset, with tables changed since packing, with external data, or with ragged samples.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    return VolumeFile([read_shard(Path(item)) for item in paths])


def read_shard(path: Path) -> Shard:
    """The facts and small tables of one file. Raises VolumeFileError."""
    if not path.is_file():
        what = "is a folder, not an HDF5 file" if path.is_dir() else "does not exist"
        raise VolumeFileError(f"{path} {what}; make one with 'hpc pack SRC... -o {path.with_suffix('.h5')}'")
    try:
        status = path.stat()
        if not h5py.is_hdf5(path):
            raise VolumeFileError(f"{path} is not an HDF5 file; make one with 'hpc pack SRC... -o FILE.h5'")
        with h5py.File(path, "r", locking=False) as file:
            shard = _read_tables(path, file, (status.st_ino, status.st_size, status.st_mtime_ns))
    except VolumeFileError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise VolumeFileError(f"{path} is cut short or damaged: copy or pack it again (HDF5: {reason})") from error
    _check_values(shard)
    return shard


def _read_tables(path: Path, file: h5py.File, identity: tuple[int, int, int]) -> Shard:
    _check_names(path, file)
    inputs, targets = file[INPUTS], file[TARGETS]
    task, classes = str(file.attrs[TASK_ATTR]), tuple(str(name) for name in file.attrs[CLASSES_ATTR])
    shape = tuple(int(size) for size in inputs.shape[1:])
    _check_arrays(path, file, task, classes)
    tables = {name: file[name][()] for name in (SPLIT, AFFINE, SOURCE_SHAPE, SCALE, OFFSET, CHECKSUMS)}
    if FOLDS in file:
        tables[FOLDS] = file[FOLDS][()]
    for name in (IDS, GROUPS):
        tables[name] = file[name].asstr()[()]
    if task != "segmentation":
        tables[TARGETS] = targets[()]
    for table in tables.values():
        table.flags.writeable = False
    shard = Shard(
        path=path,
        identity=identity,
        shape=shape,
        dtype=inputs.dtype,
        task=task,
        class_names=classes,
        orientation=str(file.attrs[ORIENTATION_ATTR]),
        source=json.loads(file.attrs[SOURCE_ATTR]),
        packing=json.loads(file.attrs[PACKING_ATTR]),
        tables=tables,
        inputs_offset=inputs.id.get_offset(),
        targets_offset=targets.id.get_offset() if task == "segmentation" else None,
    )
    stored = str(file.attrs[FINGERPRINT_ATTR])
    if stored != compute_fingerprint(
        tables[IDS], tables.get(TARGETS), tables[SPLIT], tables[CHECKSUMS], tables.get(FOLDS)
    ):
        raise VolumeFileError(
            f"{path}: ids, targets, split, checksums or folds are not those it was packed with (fingerprint "
            f"{stored[:12]}); pack it again"
        )
    return shard


def _check_names(path: Path, file: h5py.File) -> None:
    if FORMAT_ATTR not in file.attrs:
        raise VolumeFileError(f"{path} has no attribute {FORMAT_ATTR!r}: half written, or not made by 'hpc pack'")
    number = file.attrs[FORMAT_ATTR]
    if number != FORMAT:
        raise VolumeFileError(f"{path} has format {number}, this version reads format {FORMAT}; pack it again")
    if RAGGED_SHAPES in file:
        raise VolumeFileError(f"{path} holds volumes of different shapes, which cannot be read yet; pack with --size")
    missing = [name for name in DATASETS if name not in file] + [
        f"attribute {name}" for name in ATTRIBUTES if name not in file.attrs
    ]
    if missing:
        raise VolumeFileError(f"{path} is half written or damaged: no {', '.join(missing)}; pack it again")
    for name in (*DATASETS, FOLDS):
        if name in file:
            _refuse_foreign(path, file, name)


def _refuse_foreign(path: Path, file: h5py.File, name: str) -> None:
    """Everything must lie in this file: no links, no external storage, no virtual dataset."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise VolumeFileError(f"{path}: {name} is a link to elsewhere; pack all samples into one file, or give shards")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise VolumeFileError(f"{path}: {name} is not a dataset; pack it again")
    if dataset.external is not None or dataset.is_virtual:
        raise VolumeFileError(f"{path}: the data of {name} lie outside the file; pack all samples into one file")


def _check_arrays(path: Path, file: h5py.File, task: str, classes: tuple[str, ...]) -> None:
    inputs = file[INPUTS]
    if task not in TASKS:
        raise VolumeFileError(f"{path}: task {task!r} is unknown; this version reads {', '.join(TASKS)}")
    if inputs.ndim < 4 or inputs.dtype.name not in INPUT_DTYPES or not inputs.dtype.isnative or 0 in inputs.shape:
        raise VolumeFileError(
            f"{path}: inputs are {inputs.shape} {inputs.dtype}; they must be (N, C, *spatial) with two or three "
            f"spatial axes, none empty, and {', '.join(INPUT_DTYPES)}"
        )
    num, shape = int(inputs.shape[0]), tuple(int(size) for size in inputs.shape[1:])
    expected = dict.fromkeys((IDS, GROUPS, SPLIT, CHECKSUMS), (num,)) | {
        TARGETS: (num, *target_shape(task, shape, len(classes))),
        AFFINE: (num, 4, 4),
        SOURCE_SHAPE: (num, len(shape) - 1),
        SCALE: (num, shape[0]),
        OFFSET: (num, shape[0]),
    }
    if FOLDS in file:
        expected[FOLDS] = (num,)
    for name, wanted in expected.items():
        if file[name].shape != wanted:
            raise VolumeFileError(f"{path}: {name} has shape {file[name].shape}, not {wanted}; pack it again")
    kinds = {TARGETS: TARGET_DTYPES[task], SPLIT: "uint8", CHECKSUMS: "uint32", FOLDS: "uint8"}
    for name, kind in kinds.items():
        if name in file and file[name].dtype != np.dtype(kind):
            raise VolumeFileError(f"{path}: {name} has dtype {file[name].dtype}, not {kind}; pack it again")
    for name in (INPUTS, TARGETS):
        offset, size = file[name].id.get_offset(), path.stat().st_size
        if offset is not None and offset + file[name].nbytes > size:
            raise VolumeFileError(f"{path} is cut short: {name} ends past its {size} bytes; copy or pack it again")


def _check_values(shard: Shard) -> None:
    if shard.tables[SPLIT].max() >= len(SPLITS):
        raise VolumeFileError(f"{shard.path}: split holds {shard.tables[SPLIT].max()}; only 0, 1 and 2 are known")
    if (
        FOLDS in shard.tables
        and ((shard.tables[FOLDS] == HELD_OUT) != (shard.tables[SPLIT] == SPLITS.index("test"))).any()
    ):
        raise VolumeFileError(f"{shard.path}: test samples are in a fold, or others in none; pack it again")
    if shard.task == "classification":
        low, high = int(shard.tables[TARGETS].min()), int(shard.tables[TARGETS].max())
        if low < 0 or high >= len(shard.class_names):
            raise VolumeFileError(
                f"{shard.path}: class numbers run from {low} to {high}, but {len(shard.class_names)} classes are named"
            )


def _require_same(first: Shard, other: Shard) -> None:
    if (FOLDS in first.tables) != (FOLDS in other.tables):
        raise VolumeFileError(f"one of {first.path} and {other.path} has folds, the other not; pack both alike")
    for name in ("shape", "dtype", "task", "class_names", "orientation"):
        mine, theirs = getattr(first, name), getattr(other, name)
        if mine != theirs:
            raise VolumeFileError(f"{other.path} has {name} {theirs}, but {first.path} has {mine}; shards must agree")
