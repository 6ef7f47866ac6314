"""A volume file in the making: its space is allocated first, samples are written by whoever has them, tables come last.

    plan = Plan(dtype="int16", task="classification", num_samples=2, shape=(1, 64, 64, 64))
    places = allocate(draft, plan)                          # a temporary name in the folder of the file
    write_sample(descriptor, plan, places, row, volume)     # from any process, in any order, again after a kill
    complete(draft, path, plan, columns, class_names=["a", "b"])

Contiguous and ragged samples are plain writes at their offsets, without HDF5. The chunks of a chunked file, cut by
`encode_sample` anywhere, are handed to `complete`.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from datasets import codecs, layout
from datasets.chunks import chunk_grid
from datasets.names import Names, encode_names, first_divided, first_repeated
from datasets.partition import SPLITS, check_groups, fold_names

PAGE = 4096
EncodedChunk = tuple[int, tuple[int, ...], bytes, bytes | None]
"""row, place in the grid along the spatial axes, stored bytes of inputs, and of the label map if there is one"""


@dataclass(frozen=True)
class Plan:
    """The samples of a volume file: all that must be known before the first is written. ValueError for what cannot be.

    shape: (C, *spatial), two or three spatial axes; or shapes: (N, 1 + axes) of a ragged file. chunk: box of voxels,
    within the shape, that is stored together; codec: one of datasets.codecs, of whole samples unless there is a chunk.
    """

    dtype: str
    task: str
    num_samples: int
    shape: tuple[int, ...] | None = None
    shapes: NDArray[np.int64] | None = None
    chunk: tuple[int, ...] | None = None
    codec: str | None = None

    def __post_init__(self) -> None:
        if self.task not in layout.TASKS:
            raise ValueError(f"task {self.task!r} is unknown; use {', '.join(layout.TASKS)}")
        if self.dtype not in layout.INPUT_DTYPES:
            raise ValueError(f"dtype {self.dtype} cannot be stored; use {', '.join(layout.INPUT_DTYPES)}")
        shapes = self.all_shapes
        if shapes.ndim != 2 or shapes.shape[1] not in (3, 4) or shapes.min(initial=1) < 1 or self.num_samples < 1:
            raise ValueError(
                f"{self.num_samples} samples of shape {self.shape} cannot be stored; need (C, *spatial) with two or "
                f"three spatial axes"
            )
        if self.shape is None and (len(shapes) != self.num_samples or (shapes[:, 0] != shapes[0, 0]).any()):
            raise ValueError(f"{len(shapes)} shapes for {self.num_samples} samples, or not all of one channel number")
        if self.shape is None and (self.chunk or self.codec):
            raise ValueError("volumes of different shapes are stored contiguous; leave chunk and codec out")
        if self.codec is not None:
            codecs.require_known(self.codec)
        if self.chunk is not None and not (
            self.shape is not None
            and len(self.chunk) == len(self.shape) - 1
            and all(0 < step <= size for step, size in zip(self.chunk, self.shape[1:], strict=True))
        ):
            raise ValueError(f"chunk {self.chunk} is no box within volumes {self.shape and self.shape[1:]}")

    @cached_property
    def all_shapes(self) -> NDArray[np.int64]:
        return np.array([self.shape or ()], np.int64) if self.shapes is None else np.asarray(self.shapes, np.int64)

    @property
    def maps(self) -> bool:
        return self.task == "segmentation"

    @property
    def channels(self) -> int:
        return int(self.all_shapes[0, 0])

    @property
    def box(self) -> tuple[int, ...] | None:
        """Voxels of a chunk; None: contiguous."""
        return self.chunk or (self.shape[1:] if self.codec and self.shape else None)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(N + 1,) first element of each sample in inputs, and the number of all."""
        sizes = np.broadcast_to(self.all_shapes.prod(axis=1), (self.num_samples,))
        return np.concatenate([[0], np.cumsum(sizes)])

    def sample_shape(self, row: int) -> tuple[int, ...]:
        return self.shape or tuple(self.all_shapes[row].tolist())


@dataclass(frozen=True)
class Places:
    """File offsets of the first sample's inputs and label map; None: chunked, or no label maps."""

    inputs: int | None
    targets: int | None


def allocate(draft: Path, plan: Plan) -> Places:
    """Make the HDF5 structure of a draft, or make it anew; samples that a draft of the same plan holds stay.

    So a draft is good for another start, wherever a kill has left it. ValueError when the disk has no room.
    """
    require_room(draft.parent, {draft: plan})
    fresh = draft.with_name(f"{draft.name}.{os.getpid()}")
    try:
        places = _create(fresh, plan)
        if draft.exists() and plan.box is None:
            _copy_structure(fresh, draft, plan, places)
        else:
            fresh.replace(draft)
    finally:
        fresh.unlink(missing_ok=True)
    return places


def write_sample(
    descriptor: int, plan: Plan, places: Places, row: int, inputs: NDArray[Any], target: NDArray[Any] | None = None
) -> None:
    """Write one sample of a contiguous or ragged draft at its place. target: the label map, where there are such."""
    assert places.inputs is not None
    first = int(plan.offsets[row])
    _pwrite(descriptor, inputs, places.inputs + first * inputs.itemsize)
    if places.targets is not None:
        assert target is not None
        _pwrite(descriptor, target, places.targets + first // plan.channels)


def encode_sample(
    plan: Plan, inputs: NDArray[Any], target: NDArray[Any] | None = None
) -> Iterator[tuple[tuple[int, ...], bytes, bytes | None]]:
    """The chunks of one sample: place in the grid, stored bytes of inputs (C, *spatial), and of its label map."""
    assert plan.box is not None
    for place in np.ndindex(*chunk_grid(inputs.shape[1:], plan.box)):
        map_bytes = _encode_box(plan, target, place) if plan.maps and target is not None else None
        yield place, _encode_box(plan, inputs, place), map_bytes


def complete(
    draft: Path,
    path: Path,
    plan: Plan,
    columns: dict[str, Any],
    *,
    class_names: Sequence[str],
    packing: dict[str, Any] | None = None,
    source: Sequence[dict[str, Any]] = (),
    orientation: str = "RAS",
    chunks: Iterable[EncodedChunk] = (),
) -> None:
    """Write what is not samples, and give the draft its name: at once, after all of it has reached the disk.

    columns: by the names of the layout, each in sample order: IDS, GROUPS, SPLIT, AFFINE, SOURCE_SHAPE, SCALE, OFFSET,
    CHECKSUMS; TARGETS unless they are label maps; FOLDS and FOREGROUND where there are such. chunks: all, once, in any
    order, of a chunked draft. ValueError for columns that do not fit, or a group in two splits.
    """
    layout.check_classes(plan.task, class_names)
    tables = _check_columns(plan, columns, len(class_names))
    attributes: dict[str, Any] = {
        layout.TASK_ATTR: plan.task,
        layout.CLASSES_ATTR: list(class_names),
        layout.ORIENTATION_ATTR: orientation,
        layout.SOURCE_ATTR: json.dumps(list(source)),
        layout.PACKING_ATTR: json.dumps(packing or {}),
        layout.FINGERPRINT_ATTR: layout.compute_fingerprint(Names(tables[layout.IDS]), tables),
    }
    sums = {name: zlib.crc32(table.data) for name, table in tables.items()}
    attributes[layout.TABLES_ATTR] = layout.tables_checksum({name: attributes[name] for name in layout.TEXTS}, sums)
    attributes[layout.FORMAT_ATTR] = layout.FORMAT  # the last to be written
    with _open(draft, "r+") as file:
        for chunk in chunks:
            write_chunk(file, *chunk)
        for name, table in tables.items():
            file.create_dataset(name, data=table)
        for name, value in attributes.items():
            file.attrs[name] = value
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def write_chunk(file: h5py.File, row: int, place: tuple[int, ...], inputs: bytes, target: bytes | None) -> None:
    """Put an encoded chunk into an open draft, as it is."""
    parts = ((layout.INPUTS, (0, *place), inputs), (layout.TARGETS, place, target))
    for name, where, content in parts:
        if content is not None:
            dataset = file[name]
            start = tuple(number * step for number, step in zip((row, *where), dataset.chunks, strict=True))
            dataset.id.write_direct_chunk(start, content)


def _open(path: Path, mode: str) -> h5py.File:
    # format 1.10 of HDF5: attributes may be larger than 64 KiB
    return h5py.File(path, mode, libver=("v110", "v110"), alignment_threshold=PAGE, alignment_interval=PAGE)


def _create(path: Path, plan: Plan) -> Places:
    """An HDF5 file with the datasets of the samples alone; nothing is written into them."""
    if plan.shape is None:
        inputs: tuple[int, ...] = (int(plan.offsets[-1]),)
        maps: tuple[int, ...] = (inputs[0] // plan.channels,)
    else:
        inputs, maps = (plan.num_samples, *plan.shape), (plan.num_samples, *plan.shape[1:])
    box = plan.box
    with _open(path, "w") as file:
        place = _create_dataset(file, plan, layout.INPUTS, inputs, plan.dtype, box and (1, plan.channels, *box))
        if not plan.maps:
            return Places(place, None)
        dtype = layout.TARGET_DTYPES[plan.task]
        return Places(place, _create_dataset(file, plan, layout.TARGETS, maps, dtype, box and (1, *box)))


def _create_dataset(
    file: h5py.File, plan: Plan, name: str, shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...] | None
) -> int | None:
    """Its offset in the file, if it is contiguous."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    settings.set_obj_track_times(False)  # the same samples make the same bytes
    if chunk is None:
        settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    else:
        settings.set_chunk(chunk)
        if plan.codec:
            codecs.require_library()
            number, values = codecs.to_filter(plan.codec)
            settings.set_filter(number, h5py.h5z.FLAG_OPTIONAL, values)
    kind, space = h5py.h5t.py_create(np.dtype(dtype)), h5py.h5s.create_simple(shape)
    dataset = h5py.h5d.create(file.id, name.encode(), kind, space, settings)
    return None if chunk else int(dataset.get_offset())


def _copy_structure(fresh: Path, draft: Path, plan: Plan, places: Places) -> None:
    """All bytes of the fresh file that are not samples; the draft then is as long as it."""
    elements, size = int(plan.offsets[-1]), fresh.stat().st_size
    regions = [(places.inputs or 0, elements * np.dtype(plan.dtype).itemsize)]
    if places.targets is not None:
        regions.append((places.targets, elements // plan.channels))
    gaps, at = [], 0
    for start, length in sorted(regions):
        gaps.append((at, start))
        at = start + length
    with fresh.open("rb") as source, draft.open("r+b") as target:
        for start, end in (*gaps, (at, size)):
            source.seek(start)
            target.seek(start)
            target.write(source.read(end - start))
        target.truncate(size)


def require_room(folder: Path, drafts: Mapping[Path, Plan]) -> None:
    """ValueError where the disk has no room for all of these, of which it may hold a part.

    What a contiguous or ragged plan needs is known; of a chunked one HDF5 finds out.
    """
    needed = 0
    for draft, plan in drafts.items():
        elements = 0 if plan.box is not None else int(plan.offsets[-1])
        needed += elements * np.dtype(plan.dtype).itemsize + (elements // plan.channels if plan.maps else 0)
        needed -= draft.stat().st_blocks * 512 if draft.exists() and elements else 0
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = "the file needs" if len(drafts) == 1 else f"{len(drafts)} files need"
        raise ValueError(f"{folder} has {free / 1e6:,.0f} MB free, {what} {needed / 1e6:,.0f} more")


def _pwrite(descriptor: int, data: NDArray[Any], offset: int) -> None:
    flat: Any = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    content, done = memoryview(flat), 0
    while done < content.nbytes:
        done += os.pwrite(descriptor, content[done:], offset + done)


def _encode_box(plan: Plan, data: NDArray[Any], place: tuple[int, ...]) -> bytes:
    """Stored bytes of a box; where it reaches over the end of the volume, it is filled up with zeros."""
    assert plan.box is not None
    lead = data.ndim - len(plan.box)
    box: Any = tuple(slice(at * step, (at + 1) * step) for at, step in zip(place, plan.box, strict=True))
    cut = data[(..., *box)]
    whole = np.zeros((*data.shape[:lead], *plan.box), data.dtype)
    whole[tuple(map(slice, cut.shape))] = cut
    flat: Any = whole.reshape(-1).view(np.uint8)
    return codecs.encode(plan.codec, memoryview(flat), data.itemsize) if plan.codec else flat.tobytes()


def _check_columns(plan: Plan, columns: dict[str, Any], num_classes: int) -> layout.Tables:
    """The tables as the layout wants them, those of a ragged plan among them."""
    specs = layout.table_specs(plan.num_samples, plan.sample_shape(0), plan.task, num_classes)
    given = columns if plan.shape else columns | {layout.SHAPES: plan.all_shapes, layout.OFFSETS: plan.offsets[:-1]}
    if layout.FOREGROUND in given:
        specs[layout.FOREGROUND] = ((plan.num_samples, num_classes, given[layout.FOREGROUND].shape[-1]), "int32")
    optional = {layout.FOLDS, layout.SHAPES, layout.OFFSETS}
    if given.keys() - specs or (missing := specs.keys() - given - optional):
        wrong = given.keys() - specs or missing
        raise ValueError(f"columns {', '.join(sorted(wrong))}: missing, or not those of {plan.task}")
    tables: layout.Tables = {}
    for name in (name for name in specs if name in given):
        shape, kind = specs[name]
        tables[name] = encode_names(given[name]) if kind == "S" else np.ascontiguousarray(given[name], kind)
        if tables[name].shape != shape:
            raise ValueError(f"column {name} has shape {tables[name].shape}, not {shape}")
    _check_names(tables)
    return tables


def _check_names(tables: layout.Tables) -> None:
    ids, groups = Names(tables[layout.IDS]), Names(tables[layout.GROUPS])
    if (twice := first_repeated(ids)) is not None:
        raise ValueError(f"sample id {twice!r} occurs twice; ids must be unique")
    for name, parts in ((layout.SPLIT, list(SPLITS)), (layout.FOLDS, fold_names())):
        if name in tables:
            rows = first_divided(groups, tables[name])
            check_groups([groups[row] for row in rows.tolist()], tables[name][rows], parts)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
