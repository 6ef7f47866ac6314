"""One dataset of a shard read without HDF5: contiguous or ragged by offset, in chunks by the chunk table.

Whole samples come by preadv, straight into the caller's buffer; boxes of voxels from a memory map, or from the chunks
that they touch. Large chunks that the page cache holds are decoded from there, without the copy that preadv makes (an
eighth of the time). All of it may be called by several threads at once. Label maps have a channel axis of 1 here.
"""

import math
import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from operator import sub
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from datasets import codecs
from datasets.chunks import Chunks
from datasets.layout import Shard
from datasets.trust import file_identity

DECODED_SAMPLES = 2
"""Decoded samples that each thread keeps, where a patch can only be had by decoding the whole sample."""

IN_PLACE_BYTES, PROBE_STEP = 1 << 18, 1 << 18
"""Chunks from this size on are decoded where they lie; one byte in so many is asked for to see whether they do."""
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)
"""preadv's flag to fail rather than wait for the disk; 0: this system has none"""


class CutShort(OSError):
    """The file ends before the bytes that it should hold."""


class Box:
    """A box of `size` voxels from `start` on; outside of a volume the nearest voxel of its edge is repeated."""

    def __init__(self, start: Sequence[int], size: tuple[int, ...], extent: Sequence[int]) -> None:
        parts = [_inside(*axis) for axis in zip(start, size, extent, strict=True)]
        self.low, self.high, self._before = (tuple(part[k] for part in parts) for k in range(3))
        """The voxels low..high of the volume are the box's own."""
        self._size = size

    def inner(self, out: NDArray[Any]) -> NDArray[Any]:
        """The part of `out` (C, *size) that the volume fills."""
        spans = zip(self._before, self.low, self.high, strict=True)
        return out[(slice(None), *(slice(before, before + high - low) for before, low, high in spans))]

    def repeat_edges(self, out: NDArray[Any]) -> None:
        """Fill the rest of `out` (C, *size) from its inner part."""
        if tuple(map(sub, self.high, self.low)) == self._size:
            return
        for axis, (before, size) in enumerate(zip(self._before, self._size, strict=True)):
            end = before + self.high[axis] - self.low[axis]
            lines = np.moveaxis(out, axis + 1, 0)
            if before:
                lines[:before] = lines[before]
            if end < size:
                lines[end:] = lines[end - 1]


def _inside(start: int, size: int, extent: int) -> tuple[int, int, int]:
    """(low, high, before): voxels low..high of an axis are in the box, from its own voxel `before` on."""
    low = min(max(start, 0), extent - 1)
    return low, max(min(start + size, extent), low + 1), min(max(low - start, 0), size - 1)


class OpenFile:
    """The descriptor of one shard, and its memory map from the first box on."""

    def __init__(self, shard: Shard) -> None:
        self.path = shard.path
        self._descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        self._closing = weakref.finalize(self, os.close, self._descriptor)
        self._map: mmap.mmap | None = None
        self._bytes: NDArray[np.uint8] | None = None
        self._identity = shard.identity
        self._compare(os.fstat(self._descriptor))

    def check(self) -> None:
        """Raises OSError where the path is gone, or is another file by now."""
        self._compare(self.path.stat())

    def _compare(self, status: os.stat_result) -> None:
        if file_identity(status) != self._identity:
            self.close()
            raise OSError(f"{self.path} was exchanged since it was opened ({status.st_size} bytes now); start again")

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Read the bytes from `offset` on. Raises CutShort, OSError."""
        done = os.preadv(self._descriptor, [buffer], offset)
        while done < buffer.nbytes:
            count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise CutShort(f"it ends at byte {offset + done}")
            done += count

    def mapped(self) -> NDArray[np.uint8]:
        """All bytes of the file, as a memory map.

        A page that is gone from the file ends the process (SIGBUS), so its size is looked at each time; what is cut
        off between this look and the copy, or cannot be read (EIO), is not caught.
        """
        size = os.fstat(self._descriptor).st_size
        if size < self._identity[1]:
            raise CutShort(f"it ends at byte {size}")
        if self._bytes is None:
            self._map = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)
            self._bytes = np.frombuffer(self._map, np.uint8)
        return self._bytes

    def in_memory(self, offset: int, size: int) -> memoryview | None:
        """The bytes where the page cache holds them, to be given back by `forget`; None where some seem to be on disk.

        Waiting for a disk or a network is better done by preadv, in large requests. mincore(2) would tell residency of
        one's own files only.
        """
        if not _NOWAIT or size < IN_PLACE_BYTES:
            return None
        byte = [bytearray(1)]
        try:
            for place in (*range(offset, offset + size, PROBE_STEP), offset + size - 1):
                if not os.preadv(self._descriptor, byte, place, _NOWAIT):
                    return None  # past the end: `fill` says so
        except OSError:  # not there yet, or not for this file system to say
            return None
        return bytes_of(self.mapped()[offset : offset + size])

    def forget(self, offset: int, size: int) -> None:
        """Take pages out of the memory map: they count as this process' memory, and a limit may be set on that."""
        if self._map is not None:
            start = offset - offset % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, offset + size - start)

    def close(self) -> None:
        self._bytes = self._map = None
        self._closing()
        self._descriptor = -1


class Scratch(threading.local):
    """Memory of one thread: buffers that are used again, and the samples decoded last."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}
        self.decoded: OrderedDict[Any, NDArray[np.uint8]] = OrderedDict()

    def buffer(self, name: str, size: int) -> NDArray[np.uint8]:
        """(size,) bytes; what this thread had under the same name is overwritten."""
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = np.empty(size, np.uint8)
        return self._buffers[name][:size]


class Array(Protocol):
    """The inputs or the label maps of one shard."""

    def read(self, row: int, buffer: memoryview) -> None:
        """All bytes of one sample. Raises CutShort, OSError, ValueError (bytes that do not decode)."""

    def read_box(self, row: int, start: Sequence[int], size: tuple[int, ...], buffer: memoryview) -> None:
        """All channels of `size` voxels from `start` on, in or out of the sample: (C, *size). Raises as `read`."""


class Plain:
    """Samples of which each lies in one piece: contiguous, ragged, or in a chunk of its own without a filter."""

    def __init__(
        self, file: OpenFile, starts: NDArray[np.int64], shapes: NDArray[np.int64], dtype: np.dtype[Any]
    ) -> None:
        """`starts` (N,): offsets in the file; `shapes` (N, 1 + spatial axes), a broadcast row where all are alike."""
        self._file, self._starts, self._shapes, self._dtype = file, starts, shapes, dtype
        self._alike = tuple(shapes[0].tolist()) if len(shapes) and not shapes.strides[0] else None

    def read(self, row: int, buffer: memoryview) -> None:
        self._file.fill(buffer, int(self._starts[row]))

    def read_box(self, row: int, start: Sequence[int], size: tuple[int, ...], buffer: memoryview) -> None:
        offset, shape = int(self._starts[row]), self._alike or tuple(self._shapes[row].tolist())
        channels, *extent = shape
        if all(0 <= a <= most - n for a, n, most in zip(start, size, extent, strict=True)):
            self._copy_lines(offset, extent, start, (channels, *size), buffer)
            return
        volume = np.ndarray(shape, self._dtype, self._file.mapped(), offset)
        box, out = Box(start, size, extent), np.frombuffer(buffer, self._dtype).reshape(channels, *size)
        box.inner(out)[...] = volume[(slice(None), *map(slice, box.low, box.high))]
        box.repeat_edges(out)

    def _copy_lines(
        self, offset: int, extent: list[int], start: Sequence[int], size: tuple[int, ...], buffer: memoryview
    ) -> None:
        """A box within a volume, by lines along its last axis: for NumPy, one number each."""
        stride, strides = self._dtype.itemsize, []
        for first, most in zip(reversed(start), reversed(extent), strict=True):
            strides.append(stride)
            offset, stride = offset + first * stride, stride * most
        line, shape = _line(size[-1] * self._dtype.itemsize), size[:-1]
        volume = np.ndarray(shape, line, self._file.mapped(), offset, (stride, *strides[:0:-1]))
        np.copyto(np.ndarray(shape, line, buffer), volume)


class Chunked:
    """Samples in chunks, of which the table says where they lie; decoded outside of HDF5 and its lock."""

    def __init__(
        self, file: OpenFile, chunks: Chunks, shape: tuple[int, ...], dtype: np.dtype[Any], scratch: Scratch
    ) -> None:
        """`shape` (C, *spatial) of a sample; `chunks` of label maps have no channel axis."""
        self._file, self._chunks, self._shape, self._dtype, self._scratch = file, chunks, shape, dtype, scratch
        own = (1,) * (len(shape) - len(chunks.shape))
        self._chunk_shape, self._grid = own + chunks.shape, own + chunks.grid
        self._chunk_bytes = math.prod(chunks.shape) * dtype.itemsize
        self._stored_bytes = int(chunks.sizes.max())

    def read(self, row: int, buffer: memoryview) -> None:
        if self._chunk_shape == self._shape:
            self._decode(row, 0, buffer)
            return
        spatial = self._shape[1:]
        self.read_box(row, (0,) * len(spatial), spatial, buffer)

    def read_box(self, row: int, start: Sequence[int], size: tuple[int, ...], buffer: memoryview) -> None:
        box = Box(start, size, self._shape[1:])
        out = np.frombuffer(buffer, self._dtype).reshape(self._shape[0], *size)
        if self._chunk_shape == self._shape:
            box.inner(out)[...] = self._sample(row)[(slice(None), *map(slice, box.low, box.high))]
        else:
            self._gather(row, box, box.inner(out))
        box.repeat_edges(out)

    def _gather(self, row: int, box: Box, inner: NDArray[Any]) -> None:
        """Fill `inner` from all chunks that the box touches."""
        sizes = self._chunk_shape[1:]
        touched = [
            range(low // size, -(-high // size)) for low, high, size in zip(box.low, box.high, sizes, strict=True)
        ]
        data = self._scratch.buffer("chunk", self._chunk_bytes)
        voxels = data.view(self._dtype).reshape(self._chunk_shape)
        for place in product(*touched):
            self._decode(row, int(np.ravel_multi_index((0, *place), self._grid)), bytes_of(data))
            corner = [number * size for number, size in zip(place, sizes, strict=True)]
            first = [max(low, start) for low, start in zip(box.low, corner, strict=True)]
            last = [min(high, start + size) for high, start, size in zip(box.high, corner, sizes, strict=True)]
            inner[_spans(first, last, box.low)] = voxels[_spans(first, last, corner)]

    def _sample(self, row: int) -> NDArray[Any]:
        """One sample decoded as a whole, (C, *spatial)."""
        kept = self._scratch.decoded
        key = (id(self), row)
        if key not in kept:
            data = kept.popitem(last=False)[1] if len(kept) >= DECODED_SAMPLES else None
            if data is None or len(data) != self._chunk_bytes:
                data = np.empty(self._chunk_bytes, np.uint8)
            self._decode(row, 0, bytes_of(data))
            kept[key] = data
        kept.move_to_end(key)
        return kept[key].view(self._dtype).reshape(self._shape)

    def _decode(self, row: int, number: int, target: memoryview) -> None:
        offset, size = int(self._chunks.offsets[row, number]), int(self._chunks.sizes[row, number])
        if self._chunks.codec is None:
            self._file.fill(target, offset)
            return
        codec, itemsize = self._chunks.codec, self._dtype.itemsize
        if (there := self._file.in_memory(offset, size)) is not None:
            codecs.decode(codec, there, target, itemsize)
            self._file.forget(offset, size)
            return
        source = bytes_of(self._scratch.buffer("stored", self._stored_bytes)[:size])
        self._file.fill(source, offset)
        codecs.decode(codec, source, target, itemsize)


@lru_cache
def _line(size: int) -> np.dtype[np.void]:
    return np.dtype((np.void, size))


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The memory of a contiguous array."""
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat)


def _spans(first: Any, last: Any, origin: Any) -> tuple[slice, ...]:
    spans = (slice(a - o, b - o) for a, b, o in zip(first, last, origin, strict=True))
    return (slice(None), *spans)
