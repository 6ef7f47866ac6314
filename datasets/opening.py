"""Opens a volume file and checks it against its layout; what is broken, foreign or half written is refused."""

import zlib
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from datasets.chunks import claimed_bytes, locate
from datasets.layout import (
    ATTRIBUTES,
    CLASSES_ATTR,
    DATASETS,
    FINGERPRINT_ATTR,
    FINGERPRINTED,
    FOLDS,
    FOREGROUND,
    FORMAT,
    FORMAT_ATTR,
    GROUPS,
    IDS,
    INPUT_DTYPES,
    INPUTS,
    OFFSET,
    OFFSETS,
    ON_DEMAND,
    ORIENTATION_ATTR,
    PACKING_ATTR,
    SCALE,
    SHAPES,
    SPLIT,
    TABLES_ATTR,
    TARGET_DTYPES,
    TARGETS,
    TASK_ATTR,
    TASKS,
    TEXTS,
    Shard,
    check_classes,
    compute_fingerprint,
    table_specs,
    tables_checksum,
)
from datasets.names import MAX_LENGTH, Names, decodes
from datasets.partition import HELD_OUT, SPLITS
from datasets.trust import (
    VolumeFileError,
    dataset_bytes,
    file_checksum,
    file_identity,
    opened,
    own_dataset,
    plain_offset,
    read_attribute,
    read_bytes,
    read_json,
    read_text,
)

_MAX_RATIO = 1000
"""decoded bytes to bytes of the file: more is a bomb"""


def read_shard(path: Path) -> Shard:
    """The facts and small tables of one file. Raises VolumeFileError."""
    with opened(path) as file:
        identity = file_identity(path.stat())
        _check_names(path, file)
        shard = _read_facts(path, file, identity)
        _check_values(shard)
        _check_sums(path, file, shard)
    return shard


def _check_sums(path: Path, file: h5py.File, shard: Shard) -> None:
    tables, stored = shard.tables, read_text(path, file, FINGERPRINT_ATTR)
    if stored != compute_fingerprint(Names(tables[IDS]), tables):
        raise VolumeFileError(
            f"{path}: ids, {', '.join(FINGERPRINTED[:-1])} or {FINGERPRINTED[-1]} are not those it was packed with "
            f"(fingerprint {stored[:12]}); pack it again"
        )
    sums = {name: zlib.crc32(table.data) for name, table in tables.items()}
    for name, offset in shard.on_demand.items():
        sums[name] = file_checksum(path, offset, dataset_bytes(file[name]))
    if shard.foreground is not None:
        sums[FOREGROUND] = file_checksum(path, shard.foreground[0], dataset_bytes(file[FOREGROUND]))
    texts = {name: read_attribute(path, file, name) for name in TEXTS}
    if read_attribute(path, file, TABLES_ATTR) != tables_checksum(texts, sums):
        raise VolumeFileError(f"{path}: its tables are not those it was packed with; copy or pack it again")


def _check_names(path: Path, file: h5py.File) -> None:
    if FORMAT_ATTR not in file.attrs:
        raise VolumeFileError(f"{path} has no attribute {FORMAT_ATTR!r}: half written, or not made by 'hpc pack'")
    number = read_attribute(path, file, FORMAT_ATTR)
    if number != FORMAT:
        raise VolumeFileError(f"{path} has format {number}, this version reads format {FORMAT}; pack it again")
    needed = (*DATASETS, *(name for name in (SHAPES, OFFSETS) if SHAPES in file or OFFSETS in file))
    missing = [name for name in needed if name not in file] + [
        f"attribute {name}" for name in ATTRIBUTES if name not in file.attrs
    ]
    if missing:
        raise VolumeFileError(f"{path} is half written or damaged: no {', '.join(missing)}; pack it again")


def _read_task(path: Path, file: h5py.File) -> tuple[str, list[str]]:
    """The task and the names of its classes."""
    task, classes = read_text(path, file, TASK_ATTR), read_attribute(path, file, CLASSES_ATTR)
    if task not in TASKS:
        raise VolumeFileError(f"{path}: task {task!r} is unknown; this version reads {', '.join(TASKS)}")
    if not isinstance(classes, list) or not classes:
        raise VolumeFileError(f"{path}: attribute {CLASSES_ATTR} is not a list of names; pack it again")
    try:
        check_classes(task, classes)
    except ValueError as error:
        raise VolumeFileError(f"{path}: {error}; pack it again") from error
    return task, classes


def _read_facts(path: Path, file: h5py.File, identity: tuple[int, int, int]) -> Shard:
    task, classes = _read_task(path, file)
    inputs, shapes = own_dataset(path, file, INPUTS), _read_shapes(path, file)
    sample = inputs.shape[1:] if shapes is None else tuple(shapes[0].tolist())
    _check_inputs(path, inputs, sample, shapes is not None)
    num = inputs.shape[0] if shapes is None else len(shapes)
    specs = table_specs(num, sample, task, len(classes))
    present = {name: spec for name, spec in specs.items() if name in file or name in DATASETS}
    offsets = {name: _check_table(path, file, name, spec) for name, spec in present.items()}
    tables = {
        name: read_bytes(path, offset, specs[name][0], file[name].dtype)
        for name, offset in offsets.items()
        if name not in ON_DEMAND
    }
    maps = _check_maps(path, file, inputs, sample, shapes is not None) if task == "segmentation" else None
    places = [locate(path, dataset, len(sample) - 1) for dataset in (inputs, maps) if dataset is not None]
    _refuse_bomb(path, [inputs] if maps is None else [inputs, maps])
    if shapes is not None:
        _check_ragged(path, inputs.shape[0], shapes, tables[OFFSETS])
    return Shard(
        path=path,
        identity=identity,
        shape=sample if shapes is None else None,
        channels=sample[0],
        spatial_axes=len(sample) - 1,
        dtype=inputs.dtype,
        task=task,
        class_names=tuple(classes),
        orientation=read_text(path, file, ORIENTATION_ATTR),
        packing=read_json(path, file, PACKING_ATTR, dict),
        tables=tables,
        on_demand={name: offsets[name] for name in ON_DEMAND},
        inputs=places[0],
        targets=None if maps is None else places[1],
        foreground=_find_foreground(path, file, num, len(classes), maps is not None),
    )


def _check_inputs(path: Path, inputs: h5py.Dataset, sample: tuple[int, ...], ragged: bool) -> None:
    dtype = inputs.dtype
    axes = inputs.ndim in (4, 5) or (ragged and inputs.ndim == 1 and len(sample) in (3, 4))
    if not axes or dtype.name not in INPUT_DTYPES or not dtype.isnative or 0 in inputs.shape:
        raise VolumeFileError(
            f"{path}: inputs are {inputs.shape} {dtype}; they must be (N, C, *spatial) with two or three "
            f"spatial axes, none empty, and {', '.join(INPUT_DTYPES)}"
        )


def _check_maps(
    path: Path, file: h5py.File, inputs: h5py.Dataset, sample: tuple[int, ...], ragged: bool
) -> h5py.Dataset:
    maps = own_dataset(path, file, TARGETS)
    wanted = (inputs.shape[0] // sample[0],) if ragged else (inputs.shape[0], *sample[1:])
    if maps.shape != wanted or maps.dtype != np.dtype(TARGET_DTYPES["segmentation"]):
        raise VolumeFileError(
            f"{path}: {TARGETS} are {maps.shape} {maps.dtype}, not {wanted} "
            f"{TARGET_DTYPES['segmentation']}; pack it again"
        )
    return maps


def _check_table(path: Path, file: h5py.File, name: str, spec: tuple[tuple[int, ...], str]) -> int:
    """Where a table begins, once its header is as it must be."""
    dataset, (shape, kind) = own_dataset(path, file, name), spec
    if dataset.shape != shape:
        raise VolumeFileError(f"{path}: {name} has shape {dataset.shape}, not {shape}; pack it again")
    dtype = dataset.dtype
    if dtype.kind != "S" or dtype.itemsize > MAX_LENGTH if kind == "S" else dtype != np.dtype(kind):
        wanted = f"text of up to {MAX_LENGTH} bytes" if kind == "S" else kind
        raise VolumeFileError(f"{path}: {name} has dtype {dtype}, not {wanted}; pack it again")
    return plain_offset(path, dataset)


def _read_shapes(path: Path, file: h5py.File) -> NDArray[np.int64] | None:
    """The table SHAPES of a ragged file: all sizes at least 1, all of the same number of channels."""
    if SHAPES not in file:
        return None
    shape = own_dataset(path, file, SHAPES).shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] not in (3, 4):
        raise VolumeFileError(f"{path}: {SHAPES} has shape {shape}, not (N, 3) or (N, 4); pack it again")
    shapes = read_bytes(path, _check_table(path, file, SHAPES, (shape, "int64")), shape, np.int64)
    if (shapes < 1).any() or (shapes[:, 0] != shapes[0, 0]).any():
        raise VolumeFileError(f"{path}: {SHAPES} holds an empty volume or different numbers of channels; pack it again")
    return shapes


def _check_ragged(path: Path, length: int, shapes: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
    """Samples lie in order, none over another, all within the elements of inputs."""
    claimed = shapes.astype(np.float64).prod(axis=1)  # integers could overflow
    if claimed.max() > length:
        raise VolumeFileError(f"{path}: a volume claims {claimed.max():.0f} elements, inputs have {length}; pack again")
    ends = offsets + shapes.prod(axis=1)
    if offsets[0] < 0 or (offsets > length).any() or (offsets[1:] < ends[:-1]).any() or ends[-1] > length:
        raise VolumeFileError(f"{path}: {OFFSETS} are not in order within the {length} elements of inputs; pack again")
    if (offsets % shapes[0, 0]).any():
        raise VolumeFileError(f"{path}: {OFFSETS} are no multiples of the {shapes[0, 0]} channels; pack it again")


def _find_foreground(path: Path, file: h5py.File, num: int, classes: int, maps: bool) -> tuple[int, int] | None:
    if FOREGROUND not in file:
        return None
    shape = own_dataset(path, file, FOREGROUND).shape
    if not maps or len(shape) != 3 or shape[2] < 1:
        raise VolumeFileError(f"{path}: {FOREGROUND} {shape} belongs to label maps, as (N, K, M); pack it again")
    return _check_table(path, file, FOREGROUND, ((num, classes, shape[2]), "int32")), shape[2]


def _refuse_bomb(path: Path, datasets: list[h5py.Dataset]) -> None:
    claimed, size = claimed_bytes(datasets), path.stat().st_size
    if claimed > _MAX_RATIO * size:
        raise VolumeFileError(
            f"{path} claims {claimed} bytes of samples in a file of {size}: more than {_MAX_RATIO} times its size is "
            f"not decoded; pack it again without --compress"
        )


def _check_values(shard: Shard) -> None:
    path, tables = shard.path, shard.tables
    for name in (IDS, GROUPS):
        if not decodes(tables[name]):
            raise VolumeFileError(f"{path}: {name} are not all UTF-8; pack it again")
    if tables[SPLIT].max() >= len(SPLITS):
        raise VolumeFileError(f"{path}: split holds {tables[SPLIT].max()}; only 0, 1 and 2 are known")
    if not all(np.isfinite(tables[name]).all() for name in (SCALE, OFFSET)):
        raise VolumeFileError(f"{path}: scale or offset is not a finite number; pack it again")
    if FOLDS in tables and ((tables[FOLDS] == HELD_OUT) != (tables[SPLIT] == SPLITS.index("test"))).any():
        raise VolumeFileError(f"{path}: test samples are in a fold, or others in none; pack it again")
    if TARGETS in tables:
        low, high = int(tables[TARGETS].min()), int(tables[TARGETS].max())
        if low < 0 or high >= (2 if shard.task == "multilabel" else len(shard.class_names)):
            raise VolumeFileError(
                f"{path}: class numbers run from {low} to {high}, but {len(shard.class_names)} classes are named"
            )
