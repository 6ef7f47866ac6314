"""Where the bytes of samples lie in a volume file: at one offset, or in chunks, each with its place and its size."""

import math
from array import array
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from datasets import codecs
from datasets.trust import VolumeFileError, dataset_bytes, plain_offset

_BLOCK = 1 << 20
"""numbers of the chunk table that are held before they are put in order"""


@dataclass(frozen=True)
class Chunks:
    """The chunk table of a dataset; every chunk lies within the file."""

    shape: tuple[int, ...]
    """of one chunk without the sample axis: (C, *box) or, for label maps, box"""
    grid: tuple[int, ...]
    """chunks along each axis of a sample; those at the end are whole chunks, too, and reach over it"""
    offsets: NDArray[np.int64]
    """(N, prod(grid)) in the file"""
    sizes: NDArray[np.int64]
    """(N, prod(grid)) stored bytes"""
    codec: str | None
    """name in datasets.codecs.CODECS; None: plain bytes"""


@dataclass(frozen=True)
class Stored:
    """Where the bytes of one dataset lie in the file."""

    offset: int | None
    """contiguous: file offset of the first sample; None: chunks"""
    chunks: Chunks | None


def chunk_grid(sample: tuple[int, ...], chunk: tuple[int, ...]) -> tuple[int, ...]:
    """Chunks along each axis of a sample."""
    return tuple(-(-size // step) for size, step in zip(sample, chunk, strict=True))


def locate(path: Path, dataset: h5py.Dataset, boxed: int) -> Stored:
    """Where the samples of a dataset (N, ...) lie, which chunks may cut along the last `boxed` axes alone.

    Raises VolumeFileError for what is not read, or not in the file.
    """
    if dataset.chunks is None:
        return Stored(plain_offset(path, dataset), None)
    first = dataset.ndim - boxed
    if dataset.chunks[:first] != (1, *dataset.shape[1:first]) or dataset.ndim <= boxed:
        raise VolumeFileError(
            f"{path}: a chunk of {dataset.name.lstrip('/')} is {dataset.chunks}, not of one sample with all channels, "
            f"or volumes of different shapes are in chunks; pack it again"
        )
    return Stored(None, _read_chunks(path, dataset))


def _read_chunks(path: Path, dataset: h5py.Dataset) -> Chunks:
    name, sample, chunk = dataset.name.lstrip("/"), dataset.shape[1:], dataset.chunks
    if any(step > size for step, size in zip(chunk[1:], sample, strict=True)):
        raise VolumeFileError(f"{path}: a chunk of {name} is {chunk}, not within one sample {sample}; pack it again")
    grid = chunk_grid(sample, chunk[1:])
    count, size = dataset.shape[0] * math.prod(grid), path.stat().st_size
    if count > size or dataset.id.get_num_chunks() != count:
        raise VolumeFileError(f"{path}: {name} has not all of its {count} chunks; copy or pack it again")
    codec, raw = _codec(path, dataset), math.prod(chunk) * dataset.dtype.itemsize
    offsets, sizes = _chunk_table(path, dataset, count)
    wrong = sizes != raw if codec is None else (sizes < 1) | (sizes > codecs.encoded_bound(raw))
    if (offsets < 0).any() or wrong.any():
        raise VolumeFileError(f"{path}: a chunk of {name} is missing or has a wrong size; copy or pack it again")
    table = (dataset.shape[0], math.prod(grid))
    return Chunks(tuple(chunk[1:]), grid, offsets.reshape(table), sizes.reshape(table), codec)


def _chunk_table(path: Path, dataset: h5py.Dataset, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """File offset (-1: none) and stored bytes of all chunks, in the order of their places."""
    offsets, sizes = np.full(count, -1), np.zeros(count, np.int64)
    grid, steps = chunk_grid(dataset.shape, dataset.chunks), np.array(dataset.chunks, np.uint64)
    end, found = path.stat().st_size, array("Q")

    def put_in_order() -> None:
        nonlocal found
        table, found = np.frombuffer(found, np.uint64).reshape(-1, dataset.ndim + 3), array("Q")
        places, (offset, size, mask) = (table[:, :-3] // steps).astype(np.int64), table[:, -3:].T
        if (places >= grid).any() or mask.any() or (offset > end).any() or (size > end - offset).any():
            raise VolumeFileError(
                f"{path} is cut short or damaged: a chunk of {dataset.name.lstrip('/')} lies outside it, or skipped "
                f"its filter; copy or pack it again"
            )
        rows = np.ravel_multi_index(tuple(places.T), grid)
        offsets[rows], sizes[rows] = offset, size

    def note(info: h5py.h5d.StoreInfo) -> None:
        found.extend((*info.chunk_offset, info.byte_offset, info.size, info.filter_mask))
        if len(found) > _BLOCK:
            put_in_order()

    dataset.id.chunk_iter(note)
    put_in_order()
    return offsets, sizes


def _codec(path: Path, dataset: h5py.Dataset) -> str | None:
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(number) for number in range(plist.get_nfilters())]
    if not filters:
        return None
    codec = codecs.by_filter(filters[0][0], filters[0][2]) if len(filters) == 1 else None
    if codec is None:
        named = ", ".join(f"{number} {text.decode(errors='replace')[:20]}" for number, _, _, text in filters)
        raise VolumeFileError(
            f"{path}: {dataset.name.lstrip('/')} is stored with HDF5 filter {named}, which is not read; use "
            f"{', '.join(codecs.CODECS)}, or none"
        )
    return codec


def claimed_bytes(datasets: list[h5py.Dataset]) -> int:
    """Bytes of all samples once decoded."""
    return sum(map(dataset_bytes, datasets))
