"""The last step of a pack: the bytes in the work folder become volume files."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets import drafts, layout
from datasets.chunks import chunk_grid
from datasets.drafts import EncodedChunk
from datasets.packing.journal import Entry, Finished
from datasets.packing.labelling import Labelling
from datasets.packing.parts import TEST, Packed
from datasets.packing.plan import Plan, file_names, into_files
from datasets.packing.recipe import PackOptions, stored
from datasets.packing.samples import FOREGROUND, Row
from datasets.partition import HELD_OUT
from datasets.writer import require_replaceable

_COPIED = 1 << 24
"""bytes that are copied at once"""


def reserve(plan: Plan, labelling: Labelling, options: PackOptions, folder: Path) -> dict[str, Row]:
    """Room for all whole volumes in drafts of the files to be, and the place of each. ValueError: the disk is full."""
    ids = list(plan.shapes)
    parts, forms, rows = [], dict[Path, drafts.Plan](), {}
    for part in into_files([plan.bytes_of(plan.shapes[id]) for id in ids], options.shard_bytes):
        shapes = [plan.shapes[ids[number]] for number in part]
        parts.append(part)
        forms[folder / plan.draft_name([ids[number] for number in part], shapes)] = plan.form(labelling.task, shapes)
    drafts.require_room(folder, forms)
    for part, (path, form) in zip(parts, forms.items(), strict=True):
        places = drafts.allocate(path, form)
        assert places.inputs is not None
        for row, number in enumerate(part):
            rows[ids[number]] = Row(path.name, *_offsets(form, places, row))
    return rows


def publish(
    options: PackOptions,
    plan: Plan,
    labelling: Labelling,
    packed: Packed,
    folder: Path,
    report: Callable[[int], None],
) -> list[Path]:
    """Complete and rename the files; each is there whole or not at all. `report` is told samples written, file by file.

    Samples that were not written in place are copied, which takes as long as the disk does.
    """
    sizes = [plan.bytes_of(entry.shape) for _, entry in packed.samples]
    parts = into_files(sizes, options.shard_bytes)
    paths = file_names(options.output, len(parts), options.shard_bytes is not None)
    for path in paths:
        require_replaceable(path)
    about = stored(options, plan.dtype) | {layout.PACK: _pack_id(packed)}
    drafted = []
    for number, part in enumerate(parts):
        drafted.append(folder / f"ready-{number}.h5")
        _complete(drafted[-1], plan, labelling, packed, part, folder, about, report)
        report(part[-1] + 1)
    for draft, path in zip(drafted, paths, strict=True):
        draft.replace(path)
    if options.shard_bytes is not None:
        for path in set(options.output.parent.glob(f"{options.output.stem}-*{options.output.suffix}")) - set(paths):
            if layout.SHARD_NAME.search(path.stem):  # of an earlier pack of this name, in another number of files
                path.unlink()
    drafts.sync(options.output.parent)
    return paths


def _complete(
    path: Path,
    plan: Plan,
    labelling: Labelling,
    packed: Packed,
    part: Sequence[int],
    folder: Path,
    about: dict[str, Any],
    report: Callable[[int], None],
) -> None:
    """One file, of the samples in `part`, in the work folder."""
    entries = [packed.samples[number][1] for number in part]
    form = plan.form(labelling.task, [entry.shape for entry in entries])
    ids = [packed.samples[number][0].id for number in part]
    draft = _in_place(plan, form, ids, entries, folder) or _copied(form, entries, folder)
    chunked = form.box is not None
    drafts.complete(
        draft,
        path,
        form,
        _columns(labelling, packed, part, folder),
        class_names=packed.class_names,
        packing=about,
        source=_manifest(packed, part),
        chunks=_chunks(form, entries, folder, lambda row: report(part[0] + row)) if chunked else (),
    )


def _pack_id(packed: Packed) -> str:
    """The same in all files of a pack, and in no other pack."""
    told = [packed.ids, packed.groups, packed.class_names, packed.split.tolist(), packed.classes.tolist()]
    told += [None if packed.fold is None else packed.fold.tolist(), [entry.checksum for _, entry in packed.samples]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _offsets(form: drafts.Plan, places: drafts.Places, row: int) -> tuple[int, int | None]:
    """File offsets of a sample's inputs and label map."""
    first = int(form.offsets[row])
    assert places.inputs is not None
    maps = None if places.targets is None else places.targets + first // form.channels
    return places.inputs + first * np.dtype(form.dtype).itemsize, maps


def _in_place(plan: Plan, form: drafts.Plan, ids: Sequence[str], entries: Sequence[Entry], folder: Path) -> Path | None:
    """The draft that has just these samples in just this order; None when there is none."""
    path = folder / plan.draft_name(ids, [entry.shape for entry in entries])
    if not plan.in_place or any(entry.file != path.name for entry in entries):
        return None
    drafts.allocate(path, form)  # as it was before a kill while it was completed
    return path


def _copied(form: drafts.Plan, entries: Sequence[Entry], folder: Path) -> Path:
    """A new draft; contiguous samples are copied into it, chunks come when it is completed."""
    path = folder / "copy.dat"
    path.unlink(missing_ok=True)
    places = drafts.allocate(path, form)
    if form.box is not None:
        return path
    with _Files(folder) as files, path.open("r+b") as target:
        for row, entry in enumerate(entries):
            pieces = zip((*entry.inputs, *entry.maps), _offsets(form, places, row), strict=False)
            for (start, size), to in pieces:
                assert to is not None
                _copy(files[entry.file], start, size, target.fileno(), to)
    return path


def _copy(source: int, start: int, size: int, target: int, to: int) -> None:
    done = 0
    while done < size:
        content = os.pread(source, min(_COPIED, size - done), start + done)
        if not content:
            raise OSError("a data file of the work folder was cut short; give the command again")
        done += os.pwrite(target, content, to + done)


def _chunks(
    form: drafts.Plan, entries: Sequence[Entry], folder: Path, report: Callable[[int], None]
) -> Iterator[EncodedChunk]:
    assert form.box is not None
    with _Files(folder) as files:
        for row, entry in enumerate(entries):
            report(row)
            grid = np.ndindex(*chunk_grid(entry.shape[1:], form.box))
            for number, place in enumerate(grid):
                inputs = _read(files[entry.file], *entry.inputs[number])
                yield row, place, inputs, _read(files[entry.file], *entry.maps[number]) if entry.maps else None


def _read(descriptor: int, start: int, size: int) -> bytes:
    content = os.pread(descriptor, size, start)
    if len(content) != size:
        raise OSError("a data file of the work folder was cut short; give the command again")
    return content


def _columns(labelling: Labelling, packed: Packed, part: Sequence[int], folder: Path) -> dict[str, Any]:
    samples = [packed.samples[number] for number in part]
    columns: dict[str, Any] = {
        layout.IDS: [packed.ids[number] for number in part],
        layout.GROUPS: [packed.groups[number] for number in part],
        layout.SPLIT: packed.split[part],
        layout.AFFINE: np.array([entry.affine for _, entry in samples]).reshape(-1, 4, 4),
        layout.SOURCE_SHAPE: np.array([source.source_shape for source, _ in samples]),
        layout.SCALE: np.array([source.scale for source, _ in samples]),
        layout.OFFSET: np.array([source.offset for source, _ in samples]),
        layout.CHECKSUMS: np.array([entry.checksum for _, entry in samples], np.uint32),
    }
    if packed.fold is not None:
        columns[layout.FOLDS] = np.where(packed.split == TEST, HELD_OUT, packed.fold)[part]
    if labelling.task == "segmentation":
        columns[layout.FOREGROUND] = _foreground(len(packed.class_names), [entry for _, entry in samples], folder)
        return columns
    targets = packed.classes[part].astype(layout.TARGET_DTYPES[labelling.task])
    columns[layout.TARGETS] = targets
    columns[layout.CHECKSUMS] = np.array(
        [zlib.crc32(row.tobytes(), entry.checksum) for (_, entry), row in zip(samples, targets, strict=True)], np.uint32
    )
    return columns


def _foreground(classes: int, entries: Sequence[Entry], folder: Path) -> NDArray[np.int32]:
    """(N, classes, M) places of voxels of each class."""
    drawn = np.empty((len(entries), classes, FOREGROUND), np.int32)
    with _Files(folder) as files:
        for row, entry in zip(drawn, entries, strict=True):
            assert entry.drawn is not None
            name, start, size = entry.drawn
            row[...] = np.frombuffer(_read(files[name], start, size), np.int32).reshape(row.shape)
    return drawn


def _manifest(packed: Packed, part: Sequence[int]) -> list[dict[str, Any]]:
    """The files of the sources that are in a part, once each."""
    sources: Mapping[str, Finished] = {packed.samples[number][0].id: packed.samples[number][0] for number in part}
    return [entry for source in sources.values() for entry in source.manifest]


class _Files:
    """Data files of the work folder, opened when they are needed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._open = folder, dict[str, int]()

    def __getitem__(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[name]

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
