"""Writes a volume file sample by sample under a temporary name; the real name appears only when it is complete."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from datasets import layout
from datasets.names import encode_names
from datasets.partition import HELD_OUT, SPLITS, check_groups, fold_names

PAGE = 4096
SIGNATURE = b"\x89HDF\r\n\x1a\n"
"""first bytes of an HDF5 file"""


class VolumeWriter:
    """A context manager: `add` each sample in order, leave the block, and the file is there; or, on an error, nothing.

        with VolumeWriter(path, shape=(1, 64, 64, 64), dtype="int16", num_samples=2, class_names=["a", "b"]) as writer:
            writer.add(volume, 0, id="case1", group="patient1", split="train")

    shape: (C, *spatial). task: classification (class number), multilabel ((K,) of 0 and 1) or segmentation (uint8 map
    of the spatial shape). folds: for cross-validation, `add` is told the fold of each sample. Data are contiguous and
    begin at a page. ValueError when samples do not fit or are missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        shape: Sequence[int],
        dtype: str | np.dtype[Any],
        num_samples: int,
        class_names: Sequence[str],
        task: str = "classification",
        packing: dict[str, Any] | None = None,
        source: Sequence[dict[str, Any]] = (),
        orientation: str = "RAS",
        folds: bool = False,
    ) -> None:
        self.path = Path(path)
        self.shape, self.dtype, self.num_samples = tuple(shape), np.dtype(dtype), num_samples
        self.task, self.class_names = task, tuple(class_names)
        self._attributes = {
            layout.TASK_ATTR: task,
            layout.CLASSES_ATTR: list(self.class_names),
            layout.ORIENTATION_ATTR: orientation,
            layout.SOURCE_ATTR: json.dumps(list(source)),
            layout.PACKING_ATTR: json.dumps(packing or {}),
        }
        self._folds = folds
        self._check()
        self._target_shape = layout.target_shape(task, self.shape, len(self.class_names))
        self._ids: list[str] = []
        self._groups: list[str] = []
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Self:
        try:
            # format 1.10 of HDF5: attributes may be larger than 64 KiB
            self._file = h5py.File(
                self._temporary, "w-", libver=("v110", "v110"), alignment_threshold=PAGE, alignment_interval=PAGE
            )
        except FileExistsError as error:
            raise ValueError(f"{self._temporary} is being written by another process; wait or remove it") from error
        try:
            self._create()
        except BaseException:
            self._discard()
            raise
        return self

    def add(
        self,
        inputs: ArrayLike,
        target: ArrayLike,
        *,
        id: str,
        group: str | None = None,
        split: str = "train",
        fold: int | None = None,
        affine: ArrayLike | None = None,
        scale: ArrayLike = 1.0,
        offset: ArrayLike = 0.0,
        source_shape: Sequence[int] | None = None,
    ) -> None:
        """Append a sample: inputs (C, *spatial) in the file's dtype, target in the task's form. group: default id.

        fold: of a file with `folds`, for each sample that is not of the test split.
        """
        row = len(self._ids)
        stored = self._check_sample(np.asarray(inputs), id, row)
        label = self._check_target(np.asarray(target), id)
        self._file[layout.INPUTS][row] = stored
        self._rows[layout.TARGETS][row] = label
        self._rows[layout.SPLIT][row] = SPLITS.index(split)
        if self._folds:
            self._rows[layout.FOLDS][row] = HELD_OUT if fold is None else fold
        self._rows[layout.AFFINE][row] = np.eye(4) if affine is None else affine
        self._rows[layout.SOURCE_SHAPE][row] = self.shape[1:] if source_shape is None else source_shape
        self._rows[layout.SCALE][row] = scale
        self._rows[layout.OFFSET][row] = offset
        self._rows[layout.CHECKSUMS][row] = layout.sample_checksum(stored, label)
        self._ids.append(id)
        self._groups.append(id if group is None else group)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _check(self) -> None:
        if self.task not in layout.TASKS:
            raise ValueError(f"task {self.task!r} is unknown; use {', '.join(layout.TASKS)}")
        if self.dtype.name not in layout.INPUT_DTYPES:
            raise ValueError(f"dtype {self.dtype} cannot be stored; use {', '.join(layout.INPUT_DTYPES)}")
        if len(self.shape) < 3 or min(self.shape) < 1 or self.num_samples < 1:
            raise ValueError(f"{self.num_samples} samples of shape {self.shape} cannot be stored; need (C, *spatial)")
        require_replaceable(self.path)

    def _create(self) -> None:
        num, channels = self.num_samples, self.shape[0]
        self._file.create_dataset(layout.INPUTS, (num, *self.shape), self.dtype)
        targets = (num, *self._target_shape), np.dtype(layout.TARGET_DTYPES[self.task])
        tables: dict[str, Any] = {
            layout.SPLIT: np.zeros(num, np.uint8),
            layout.AFFINE: np.zeros((num, 4, 4)),
            layout.SOURCE_SHAPE: np.zeros((num, len(self.shape) - 1), np.int64),
            layout.SCALE: np.zeros((num, channels), np.float32),
            layout.OFFSET: np.zeros((num, channels), np.float32),
            layout.CHECKSUMS: np.zeros(num, np.uint32),
        }
        if self._folds:
            tables[layout.FOLDS] = np.zeros(num, np.uint8)
        # label maps go straight to the file, everything else fits in memory until the end
        maps = self.task == "segmentation"
        tables[layout.TARGETS] = self._file.create_dataset(layout.TARGETS, *targets) if maps else np.zeros(*targets)
        self._rows = tables

    def _check_sample(self, inputs: NDArray[Any], id: str, row: int) -> NDArray[Any]:
        if row >= self.num_samples:
            raise ValueError(f"sample {id!r} is one more than the {self.num_samples} that were announced")
        if inputs.shape != self.shape or inputs.dtype != self.dtype:
            raise ValueError(
                f"sample {id!r} is {inputs.shape} {inputs.dtype}; the file holds {self.shape} {self.dtype}"
            )
        return np.ascontiguousarray(inputs)

    def _check_target(self, target: NDArray[Any], id: str) -> NDArray[Any]:
        if target.shape != self._target_shape or not np.can_cast(target.dtype, np.int64):
            raise ValueError(f"sample {id!r} has a target {target.shape} {target.dtype}; need {self._target_shape}")
        limit = 2 if self.task == "multilabel" else len(self.class_names)
        if target.size and (target.min() < 0 or target.max() >= limit):
            raise ValueError(f"sample {id!r} has target values {target.min()} to {target.max()}; need 0 to {limit - 1}")
        return np.ascontiguousarray(target, np.dtype(layout.TARGET_DTYPES[self.task])).reshape(self._target_shape)

    def _finish(self) -> None:
        if len(self._ids) != self.num_samples:
            raise ValueError(f"{self.path}: {len(self._ids)} of {self.num_samples} announced samples were added")
        check_groups(self._groups, self._rows[layout.SPLIT])
        if self._folds:
            check_groups(self._groups, self._rows[layout.FOLDS], fold_names())
        self._rows |= {layout.IDS: encode_names(self._ids), layout.GROUPS: encode_names(self._groups)}
        for name, table in self._rows.items():
            if name not in self._file:
                self._file.create_dataset(name, data=table)
        targets = None if self.task == "segmentation" else self._rows[layout.TARGETS]
        self._attributes[layout.FINGERPRINT_ATTR] = layout.compute_fingerprint(
            *(self._ids, targets, self._rows[layout.SPLIT], self._rows[layout.CHECKSUMS]),
            self._rows.get(layout.FOLDS),
        )
        for name, value in self._attributes.items():
            self._file.attrs[name] = value
        self._file.attrs[layout.FORMAT_ATTR] = layout.FORMAT
        self._file.close()
        _sync(self._temporary)
        self._temporary.replace(self.path)
        _sync(self.path.parent)

    def _discard(self) -> None:
        """Close, and remove what has not been renamed."""
        try:
            self._file.close()
        finally:
            self._temporary.unlink(missing_ok=True)


def require_replaceable(path: Path) -> None:
    """Refuse (ValueError) a name that cannot be written, or that would destroy something else than an HDF5 file."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "cannot be written: its folder does not exist"
        raise ValueError(f"{path} {what}; give the name of a file in an existing folder")
    if path.exists() and not _is_hdf5(path):
        raise ValueError(
            f"{path} exists and is not an HDF5 file, so it is not replaced; give another name or remove it"
        )


def _is_hdf5(path: Path) -> bool:
    if not path.is_file():  # a device or a pipe: reading could wait for ever
        return False
    with path.open("rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
