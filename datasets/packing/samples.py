"""What a packing process does with one source: read, prepare, write the samples' bytes, say where they lie."""

import contextlib
import hashlib
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets import drafts, sources
from datasets.checksum import crc32
from datasets.duplicates import Print, fingerprint
from datasets.masks import Classes, foreground, read_mask
from datasets.order import philox_source
from datasets.packing.geometry import centre_fit, cut, move_origin, resample
from datasets.packing.journal import NOW, Entry, Finished, Piece
from datasets.packing.making import TooWide, make_sample
from datasets.packing.recipe import Recipe, expand
from datasets.sources import Header, Source, UnusableSource, Volume
from datasets.sources.contract import NotFinite

_BLOCK = 1 << 16
"""voxels among which places are drawn at once"""
FOREGROUND = 256
"""voxels that are noted for each class of a label map"""


class WorkFailed(OSError):
    """The work folder cannot be written, which is no source's fault."""


@dataclass(frozen=True)
class Row:
    """Where a whole volume belongs: a data file with room for all, and offsets in it."""

    file: str
    inputs: int
    maps: int | None


@dataclass(frozen=True)
class Task:
    source: Source
    label: int | None = None
    """of the patches that are cut from it"""
    mask: Source | None = None
    row: Row | None = None
    """None: appended to a data file of the process"""


@dataclass(frozen=True)
class Bench:
    """What all tasks of a pack share; sent to each process once."""

    folder: Path
    recipe: Recipe
    dtype: str
    shape: tuple[int, ...] | None
    """of a sample (C, *spatial); None: each its own"""
    form: drafts.Plan | None = None
    """of a file of samples of that shape: how they are cut into chunks, if they are"""
    atlas: Any = None
    classes: Classes | None = None
    """of the label maps"""
    channels: int | None = None
    """of all samples; None: those of the source"""


@dataclass(frozen=True)
class _Prepared:
    data: NDArray[Any]
    """(C, *spatial), stored numbers, before patches are cut"""
    raw: NDArray[Any]
    maps: NDArray[np.uint8] | None
    affine: NDArray[np.float64]
    source_shape: tuple[int, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    print: Print
    filled: int


def files_of(source: Source) -> tuple[Path, ...]:
    """All files of a source; of one whose header is broken or forged, that header alone."""
    try:
        return sources.all_files(source)
    except Exception:  # whatever the library says to a stranger's file: reading the source tells the reason
        return source.files


def identity(task: Task) -> str:
    """Names, sizes and times of a source's files, and its label: another one means that it is to be read again."""
    files = files_of(task.source) + (files_of(task.mask) if task.mask else ())
    status = [(str(path.resolve()), path.stat()) for path in files]
    told = [(name, found.st_size, found.st_mtime_ns) for name, found in status]
    return hashlib.sha256(repr((told, task.label)).encode()).hexdigest()[:16]


def make_samples(bench: Bench, writer: "Appender", task: Task) -> Finished:
    """Raises UnusableSource with the reason, TooWide, and WorkFailed where the bytes cannot be written."""
    seen = identity(task)
    try:
        ready = _prepare(bench, task)
        manifest = [sources.describe(part) for part in (task.source, task.mask) if part is not None]
    except OSError as error:
        raise UnusableSource(f"it cannot be read ({error.strerror or error})") from error
    except MemoryError:
        raise UnusableSource("there is not enough memory for it; try --workers 1") from None
    entries = tuple(writer.write(*part, task.row) for part in _parts(bench, task, ready))
    counts = () if ready.maps is None else tuple(np.bincount(ready.maps.reshape(-1)).tolist())
    return Finished(
        id=task.source.id,
        identity=seen,
        samples=entries,
        scale=ready.scale,
        offset=ready.offset,
        source_shape=ready.source_shape,
        digest=ready.print.digest,
        hash=ready.print.bits.tobytes().hex(),
        num_bits=ready.print.num_bits,
        counts=counts,
        manifest=tuple(manifest),
        filled=ready.filled,
    )


def _prepare(bench: Bench, task: Task) -> _Prepared:
    recipe = bench.recipe
    try:
        volume = sources.read(task.source, recipe.nan)
    except NotFinite as error:
        raise UnusableSource(f"{error}{'' if recipe.nan is not None else ', or fill NaN by --nan 0'}") from error
    if bench.channels == 3 and len(volume.data) == 1 and task.source.kind == "image":
        volume = replace(volume, data=np.repeat(volume.data, 3, axis=0))  # grey among colour
    maps = _map(bench, task, volume)
    told = fingerprint(volume.data)
    if maps is not None:
        maps = resample(maps[None], volume.affine, recipe, labels=True)[0][0]
        if recipe.size is not None:
            size = expand(recipe.size, maps.ndim, "--size")
            maps = centre_fit(maps[None], volume.affine, size, [_background(bench, maps, size)])[0][0]
    made = make_sample(recipe, bench.dtype, volume)
    if made.too_wide and recipe.dtype == "keep":
        raise TooWide(task.source.id)
    return _Prepared(
        data=made.data,
        raw=made.raw,
        maps=None if maps is None else np.ascontiguousarray(maps),
        affine=made.affine,
        source_shape=volume.data.shape[1:],
        scale=made.scale,
        offset=made.offset,
        print=told,
        filled=volume.filled,
    )


def _background(bench: Bench, maps: NDArray[np.uint8], size: tuple[int, ...]) -> int:
    """The class that label maps are padded with, that of the value 0."""
    number = None if bench.classes is None else bench.classes.number_of.get(0)
    if number is None and any(have < want for have, want in zip(maps.shape, size, strict=True)):
        raise UnusableSource(f"its {maps.shape} voxels would be padded to {size}, but no class has the value 0")
    return number or 0


def _map(bench: Bench, task: Task, volume: Volume) -> NDArray[np.uint8] | None:
    if task.mask is None or bench.classes is None:
        return None
    wanted = Header(volume.data.shape, volume.data.dtype, volume.affine)
    return bench.classes.number(read_mask(task.mask, task.source, wanted))


Part = tuple[NDArray[Any], NDArray[np.uint8] | None, NDArray[np.int32] | None, NDArray[np.float64], int | None]
"""inputs, label map, foreground, affine, class number of a patch"""


def _parts(bench: Bench, task: Task, ready: _Prepared) -> Iterator[Part]:
    """The samples of a source: itself, or its patches."""
    if bench.recipe.patch is not None:
        size = expand(bench.recipe.patch, ready.data.ndim - 1, "--patch")
        for label, start in _places(bench, task, ready, size):
            yield cut(ready.data, start, size), None, None, move_origin(ready.affine, start), label
        return
    if bench.shape is not None and ready.data.shape != bench.shape:
        raise UnusableSource(f"it is {ready.data.shape}, not {bench.shape} as its header says")
    drawn = None
    if ready.maps is not None:
        key = (bench.recipe.seed, zlib.crc32(task.source.id.encode()))
        drawn = foreground(ready.maps, len(bench.classes.names) if bench.classes else 0, FOREGROUND, key)
    yield ready.data, ready.maps, drawn, ready.affine, None


def _places(bench: Bench, task: Task, ready: _Prepared, size: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """per_class places of each class, drawn without repeats among the centres whose patch lies inside the volume."""
    shape = ready.data.shape[1:]
    rooms = tuple(have - want + 1 for have, want in zip(shape, size, strict=True))
    if min(rooms) < 1:
        raise UnusableSource(f"its {shape} voxels are smaller than the patch {size}")
    inner = tuple(slice(want // 2, want // 2 + room) for want, room in zip(size, rooms, strict=True))
    if bench.atlas is not None:
        centres = bench.atlas.classes(shape, ready.affine)[inner].ravel()
        candidates = ((number, centres == number) for number in range(len(bench.atlas.class_names)))
    else:
        assert task.label is not None
        above = (ready.raw[0][inner] > 0).ravel()
        candidates = ((task.label, above if above.any() else ~above) for _ in range(1))
    key = (bench.recipe.seed, zlib.crc32(task.source.id.encode()))
    places = [
        (number, start)
        for number, among in candidates
        for start in _draw(among, rooms, bench.recipe.per_class or 0, key, number)
    ]
    if not places:
        raise UnusableSource("no class of the atlas lies inside it; do both share one world space?")
    return places


def _draw(
    among: NDArray[np.bool_], rooms: tuple[int, ...], count: int, key: tuple[int, int], number: int
) -> list[tuple[int, ...]]:
    """`count` of the flat positions `among` (all, if fewer) as corners: least raw Philox bits of (seed, source, class).

    A block of voxels at a time: of a whole volume, positions and bits would be eight times its bytes.
    """
    draw = philox_source(key, (0, 0, number, 0))
    chosen, least = np.empty(0, np.int64), np.empty(0, np.uint64)
    for start in range(0, among.size, _BLOCK):
        here = np.flatnonzero(among[start : start + _BLOCK]) + start
        chosen, least = np.concatenate([chosen, here]), np.concatenate([least, draw(here.size)])
        order = np.argsort(least, kind="stable")[:count]
        chosen, least = chosen[order], least[order]
    return [tuple(int(axis) for axis in corner) for corner in np.stack(np.unravel_index(chosen, rooms), axis=1)]


class Appender:
    """Writes the bytes of samples: whole volumes into their row, all else at the end of a file of this process."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._own = f"p{os.getpid()}-{time.time_ns():x}.dat"
        self._end = 0
        self._open: dict[str, int] = {}
        self._sum = 0
        """CRC-32 of what was written of this sample"""

    def write(
        self,
        inputs: NDArray[Any],
        maps: NDArray[np.uint8] | None,
        drawn: NDArray[np.int32] | None,
        affine: NDArray[np.float64],
        label: int | None,
        row: Row | None,
    ) -> Entry:
        checksum = crc32(_bytes(inputs))
        if maps is not None:
            checksum = crc32(_bytes(maps), checksum)
        self._sum = 0
        places = self._place(inputs, maps, row)
        noted = None if drawn is None else (self._own, *self._append([_bytes(drawn)])[0])
        return Entry(
            file=row.file if row else self._own,
            inputs=places[0],
            maps=places[1],
            drawn=noted,
            checksum=checksum,
            written=self._sum,
            shape=inputs.shape,
            affine=tuple(affine.reshape(-1).tolist()),
            label=label,
        )

    def _place(
        self, inputs: NDArray[Any], maps: NDArray[np.uint8] | None, row: Row | None
    ) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Write a sample's bytes and say where: its inputs', its label map's."""
        if row is not None:
            here = self._put(row.file, row.inputs, [_bytes(inputs)])
            return here, () if maps is None or row.maps is None else self._put(row.file, row.maps, [_bytes(maps)])
        form = self._bench.form
        if form is None or form.box is None:
            return self._append([_bytes(inputs)]), ()
        chunks = [chunk[1:] for chunk in drafts.encode_sample(form, inputs, maps)]
        kept = [stored for _, stored in chunks if stored is not None]
        return self._append([stored for stored, _ in chunks]), self._append(kept)

    def _append(self, pieces: list[Any]) -> tuple[Piece, ...]:
        places = self._put(self._own, self._end, pieces)
        self._end += sum(size for _, size in places)
        return places

    def _put(self, name: str, offset: int, pieces: list[Any]) -> tuple[Piece, ...]:
        places = []
        try:
            if name not in self._open:
                self._open[name] = os.open(self._bench.folder / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            for piece in pieces:
                buffer = memoryview(piece)
                done = 0
                while done < buffer.nbytes:
                    done += os.pwrite(self._open[name], buffer[done:], offset + done)
                self._sum = crc32(buffer, self._sum)
                places.append((offset, buffer.nbytes))
                offset += buffer.nbytes
        except OSError as error:
            raise WorkFailed(error.errno, f"{self._bench.folder / name} cannot be written: {error.strerror}") from error
        return tuple(places)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def _bytes(array: NDArray[Any]) -> memoryview:
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat)


@contextlib.contextmanager
def marked(folder: Path, path: Path) -> Iterator[None]:
    """Says for as long as it lasts what this process reads: what killed it can be named."""
    mark = folder / f"{NOW}{os.getpid()}"
    with contextlib.suppress(OSError):
        mark.write_text(str(path))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            mark.unlink()
