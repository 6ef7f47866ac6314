"""Writes a volume file sample by sample under a temporary name; the real name appears only when it is complete."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from datasets import layout
from datasets.drafts import Plan, allocate, complete, encode_sample, write_chunk, write_sample
from datasets.partition import HELD_OUT, SPLITS
from datasets.trust import is_hdf5


class VolumeWriter:
    """A context manager: `add` each sample in order, leave the block, and the file is there; or, on an error, nothing.

        with VolumeWriter(path, shape=(1, 64, 64, 64), dtype="int16", num_samples=2, class_names=["a", "b"]) as writer:
            writer.add(volume, 0, id="case1", group="patient1", split="train")

    shape: (C, *spatial), or None where each sample has its own (ragged). task: classification (class number),
    multilabel ((K,) of 0 and 1) or segmentation (uint8 map of the spatial shape). folds: for cross-validation, `add`
    is told the fold of each sample. Data are contiguous and begin at a page, unless there is a chunk (a box of voxels)
    or a codec (one of datasets.codecs; alone: of whole samples). foreground: (N, K, M), see datasets.layout.
    ValueError when samples do not fit or are missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        shape: Sequence[int] | None,
        dtype: str | np.dtype[Any],
        num_samples: int,
        class_names: Sequence[str],
        task: str = "classification",
        packing: dict[str, Any] | None = None,
        source: Sequence[dict[str, Any]] = (),
        orientation: str = "RAS",
        folds: bool = False,
        chunk: Sequence[int] | None = None,
        codec: str | None = None,
        foreground: ArrayLike | None = None,
    ) -> None:
        _check_arguments(shape, dtype, num_samples, class_names)
        self.path, self.class_names = Path(path), tuple(class_names)
        layout.check_classes(task, self.class_names)
        self._facts: dict[str, Any] = {"packing": packing, "source": source, "orientation": orientation}
        self._folds, self._foreground = folds, foreground
        self._settings: dict[str, Any] = {"dtype": np.dtype(dtype).name, "task": task, "num_samples": num_samples}
        self._storage: dict[str, Any] = {"chunk": chunk and tuple(chunk), "codec": codec}
        self._plan = None if shape is None else Plan(shape=tuple(shape), **self._settings, **self._storage)
        if shape is None:  # what else is wrong is found now, not after the last sample
            Plan(shapes=np.ones((num_samples, 4), np.int64), **self._settings, **self._storage)
        require_replaceable(self.path)
        self._rows: list[dict[str, Any]] = []
        self._draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Self:
        try:
            self._draft.touch(exist_ok=False)
        except FileExistsError as error:
            raise ValueError(f"{self._draft} is being written by another process; wait or remove it") from error
        try:
            self._sink: _Spool | _Writes | _ChunkWrites
            if self._plan is None:
                self._sink = _Spool(self._draft)
            else:
                self._sink = (_ChunkWrites if self._plan.box else _Writes)(self._draft, self._plan)
        except BaseException:
            self._draft.unlink(missing_ok=True)
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
        stored = self._check_sample(np.asarray(inputs), id)
        label = self._check_target(np.asarray(target), stored.shape, id)
        maps = self._settings["task"] == "segmentation"
        self._sink.put(len(self._rows), stored, label if maps else None)
        row = {
            layout.IDS: id,
            layout.GROUPS: id if group is None else group,
            layout.SPLIT: _split_number(split, id),
            layout.AFFINE: np.eye(4) if affine is None else affine,
            layout.SOURCE_SHAPE: stored.shape[1:] if source_shape is None else source_shape,
            layout.SCALE: np.broadcast_to(scale, len(stored)),
            layout.OFFSET: np.broadcast_to(offset, len(stored)),
            layout.CHECKSUMS: layout.sample_checksum(stored, label),
            layout.SHAPES: stored.shape,
        }
        if not maps:
            row[layout.TARGETS] = label
        if self._folds:
            row[layout.FOLDS] = HELD_OUT if fold is None else fold
        self._rows.append(row)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._sink.close()
            self._draft.unlink(missing_ok=True)

    def _check_sample(self, inputs: NDArray[Any], id: str) -> NDArray[Any]:
        row, num = len(self._rows), self._settings["num_samples"]
        if row >= num:
            raise ValueError(f"sample {id!r} is one more than the {num} that were announced")
        shape = inputs.shape if self._plan is None else self._plan.shape
        if inputs.shape != shape or inputs.dtype != self._settings["dtype"]:
            wanted = f"{'volumes of' if shape is None else shape} {self._settings['dtype']}"
            raise ValueError(f"sample {id!r} is {inputs.shape} {inputs.dtype}; the file holds {wanted}")
        return np.ascontiguousarray(inputs)

    def _check_target(self, target: NDArray[Any], shape: tuple[int, ...], id: str) -> NDArray[Any]:
        task, classes = self._settings["task"], len(self.class_names)
        wanted = layout.target_shape(task, shape, classes)
        if target.shape != wanted or not np.can_cast(target.dtype, np.int64):
            raise ValueError(f"sample {id!r} has a target {target.shape} {target.dtype}; need {wanted}")
        limit = 2 if task == "multilabel" else classes
        wrong = (target < 0) | (target >= limit)
        if task == "segmentation":
            wrong &= target != layout.UNLABELLED
        if wrong.any():
            raise ValueError(f"sample {id!r} has target values {target.min()} to {target.max()}; need 0 to {limit - 1}")
        return np.ascontiguousarray(target, np.dtype(layout.TARGET_DTYPES[task])).reshape(wanted)

    def _finish(self) -> None:
        if len(self._rows) != self._settings["num_samples"]:
            announced = self._settings["num_samples"]
            raise ValueError(f"{self.path}: {len(self._rows)} of {announced} announced samples were added")
        columns: dict[str, Any] = {
            name: [row[name] for row in self._rows] for name in self._rows[0] if name != layout.SHAPES
        }
        if self._foreground is not None:
            columns[layout.FOREGROUND] = np.asarray(self._foreground)
        plan = self._plan
        if isinstance(self._sink, _Spool):
            plan = Plan(shapes=np.array([row[layout.SHAPES] for row in self._rows]), **self._settings)
            self._sink.pour(plan)
        self._sink.close()
        assert plan is not None
        complete(self._draft, self.path, plan, columns, class_names=self.class_names, **self._facts)


class _Writes:
    """Samples of one shape, each at its offset."""

    def __init__(self, draft: Path, plan: Plan) -> None:
        self._plan, self._places = plan, allocate(draft, plan)
        self._file = draft.open("r+b")

    def put(self, row: int, inputs: NDArray[Any], target: NDArray[Any] | None) -> None:
        write_sample(self._file.fileno(), self._plan, self._places, row, inputs, target)

    def close(self) -> None:
        self._file.close()


class _ChunkWrites:
    """Chunks, through HDF5."""

    def __init__(self, draft: Path, plan: Plan) -> None:
        self._plan = plan
        allocate(draft, plan)
        self._file = h5py.File(draft, "r+", locking=False)

    def put(self, row: int, inputs: NDArray[Any], target: NDArray[Any] | None) -> None:
        for chunk in encode_sample(self._plan, inputs, target):
            write_chunk(self._file, row, *chunk)

    def close(self) -> None:
        self._file.close()


class _Spool:
    """Samples of different shapes, one after the other in a file of their own until the last is known."""

    def __init__(self, draft: Path) -> None:
        self._draft = draft
        self._file = TemporaryFile(dir=draft.parent)  # noqa: SIM115

    def put(self, row: int, inputs: NDArray[Any], target: NDArray[Any] | None) -> None:
        self._file.write(inputs.tobytes())
        if target is not None:
            self._file.write(target.tobytes())

    def pour(self, plan: Plan) -> None:
        """Now that all shapes are known: each sample to its place in the draft."""
        places = allocate(self._draft, plan)
        self._file.seek(0)
        with self._draft.open("r+b") as draft:
            for row in range(plan.num_samples):
                shape = plan.sample_shape(row)
                inputs = self._take(shape, plan.dtype)
                target = self._take(shape[1:], "uint8") if plan.maps else None
                write_sample(draft.fileno(), plan, places, row, inputs, target)

    def _take(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        data = self._file.read(math.prod(shape) * np.dtype(dtype).itemsize)
        return np.frombuffer(data, dtype).reshape(shape)

    def close(self) -> None:
        self._file.close()


def require_replaceable(path: Path) -> None:
    """Refuse (ValueError) a name that cannot be written, or that would destroy something else than an HDF5 file."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "cannot be written: its folder does not exist"
        raise ValueError(f"{path} {what}; give the name of a file in an existing folder")
    if path.exists() and not is_hdf5(path):
        raise ValueError(
            f"{path} exists and is not an HDF5 file, so it is not replaced; give another name or remove it"
        )


def _split_number(split: str, id: str) -> int:
    if split not in SPLITS:
        raise ValueError(f"sample {id!r}: split {split!r} is unknown; use {', '.join(SPLITS)}")
    return SPLITS.index(split)


def _check_arguments(shape: Any, dtype: Any, num_samples: Any, class_names: Any) -> None:
    """ValueError for what is not of the right kind at all."""
    sizes = shape if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    if shape is not None and not (sizes and all(isinstance(size, (int, np.integer)) for size in sizes)):
        raise ValueError(f"shape {shape!r} is no list of whole numbers; give (channels, *spatial), or None: ragged")
    if not isinstance(num_samples, (int, np.integer)) or num_samples < 1:
        raise ValueError(f"num_samples {num_samples!r} must be a whole number of 1 or more")
    if not isinstance(class_names, Sequence) or not all(isinstance(name, str) for name in class_names):
        raise ValueError(f"class_names {class_names!r} is no list of names; give for example ['benign', 'malignant']")
    try:
        np.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype {dtype!r} is unknown; use {', '.join(layout.INPUT_DTYPES)}") from None
