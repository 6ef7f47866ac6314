"""Reads samples as bytes, whole or boxes of their voxels, by several threads at once and without HDF5.

A reader fills buffers that the caller owns, with `target` None unless the file holds label maps. Every failure is an
OSError that names the file and the sample; `BadSample` when only this one cannot be had.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from datasets.chunks import Stored
from datasets.layout import OFFSETS, SHAPES, Shard, VolumeFile, sample_checksum
from datasets.stored import Array, Chunked, CutShort, OpenFile, Plain, Scratch, bytes_of


class BadSample(OSError):
    """One sample cannot be read; the others may be good."""


class DamagedSample(BadSample):
    """The bytes of a sample are not those that were packed."""


class Reader:
    """All samples of a volume file. OSError when a file is gone or was exchanged since it was opened."""

    def __init__(self, volumes: VolumeFile) -> None:
        self._volumes, self._scratch = volumes, Scratch()
        self._files: list[OpenFile] = []
        self._arrays: list[tuple[Array, Array | None]] = []
        try:
            for shard in volumes.shards:
                self._files.append(OpenFile(shard))
                self._arrays.append(_arrays(shard, self._files[-1], self._scratch))
        except BaseException:
            self.close()
            raise

    def read(self, sample: int, inputs: memoryview, target: memoryview | None) -> None:
        """Fill `inputs` and `target` (bytes, whole sample) with sample number `sample`."""
        number, row = self._volumes.locate(sample)

        def fill() -> None:
            images, maps = self._arrays[number]
            images.read(row, inputs)
            if target is not None and maps is not None:
                maps.read(row, target)

        self._named(sample, fill)

    def read_map(self, sample: int, target: memoryview) -> None:
        """Fill `target` with the label map of a sample, of which nothing else is read."""
        number, row = self._volumes.locate(sample)
        maps = self._arrays[number][1]
        if maps is None:
            raise ValueError(f"{self._volumes.paths[number]} holds no label maps")
        self._named(sample, lambda: maps.read(row, target))

    def check(self) -> None:
        """Raises OSError where a file is gone, or was exchanged since it was opened."""
        for file in self._files:
            file.check()

    def read_patch(
        self, sample: int, start: Sequence[int], size: tuple[int, ...], inputs: memoryview, target: memoryview | None
    ) -> None:
        """Fill `inputs` (C, *size) and `target` (*size) with the box of all channels whose first voxel is `start`.

        Voxels outside of the volume repeat the nearest edge voxel, in inputs and label maps alike.
        """
        number, row = self._volumes.locate(sample)

        def fill() -> None:
            images, maps = self._arrays[number]
            images.read_box(row, start, size, inputs)
            if target is not None and maps is not None:
                maps.read_box(row, start, size, target)

        self._named(sample, fill)

    def foreground(self, sample: int) -> NDArray[np.int32]:
        """(K, M) flat voxel indices of each class drawn at random, -1 where there are no more."""
        number, row = self._volumes.locate(sample)
        place = self._volumes.shards[number].foreground
        if place is None:
            raise ValueError(f"{self._volumes.paths[number]} has no foreground table")
        table = np.empty((len(self._volumes.class_names), place[1]), np.int32)
        self._named(sample, lambda: self._files[number].fill(bytes_of(table), place[0] + row * table.nbytes))
        if table.max() >= math.prod(self._volumes.sample_shape(sample)[1:]):
            self._raise(sample, ValueError("a foreground place lies outside of it"))
        return table

    def _named(self, sample: int, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, ValueError) as error:
            self._raise(sample, error)

    def _raise(self, sample: int, error: OSError | ValueError) -> None:
        path = self._volumes.paths[self._volumes.locate(sample)[0]]
        name = f"sample {self._volumes.ids[sample]!r} (number {sample})"
        if isinstance(error, CutShort):
            raise OSError(f"{path} was cut short while it was read: {error}, within {name}") from error
        if isinstance(error, OSError):
            raise BadSample(error.errno, f"{path}: {name} cannot be read: {error.strerror}") from error
        raise DamagedSample(
            f"{path}: {name} is damaged, it does not decode ({error}); list all with 'hpc inspect {path} --verify'"
        ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        while self._files:
            self._files.pop().close()
        self._arrays.clear()


def _arrays(shard: Shard, file: OpenFile, scratch: Scratch) -> tuple[Array, Array | None]:
    inputs = _array(shard, shard.inputs, file, scratch, shard.dtype, maps=False)
    if shard.targets is None:
        return inputs, None
    return inputs, _array(shard, shard.targets, file, scratch, np.dtype(np.uint8), maps=True)


def _array(shard: Shard, stored: Stored, file: OpenFile, scratch: Scratch, dtype: np.dtype[Any], maps: bool) -> Array:
    if stored.offset is not None and shard.shape is None:
        shapes, starts = shard.tables[SHAPES], shard.tables[OFFSETS]
        if maps:
            shapes, starts = np.concatenate([np.ones_like(shapes[:, :1]), shapes[:, 1:]], 1), starts // shapes[:, 0]
        return Plain(file, stored.offset + starts * dtype.itemsize, shapes, dtype)
    assert shard.shape is not None
    shape = (1, *shard.shape[1:]) if maps else shard.shape
    shapes = np.broadcast_to(np.array(shape, np.int64), (shard.num_samples, len(shape)))
    if stored.offset is not None:
        step = int(np.prod(shape)) * dtype.itemsize
        return Plain(file, stored.offset + step * np.arange(shard.num_samples), shapes, dtype)
    assert stored.chunks is not None
    if stored.chunks.codec is None and stored.chunks.offsets.shape[1] == 1:
        return Plain(file, stored.chunks.offsets[:, 0], shapes, dtype)
    return Chunked(file, stored.chunks, shape, dtype, scratch)


def check_sample(volumes: VolumeFile, sample: int, inputs: Any, target: Any | None) -> None:
    """Compare the bytes of a sample with its CRC-32; raises DamagedSample. `target` None: taken from the table."""
    tail = volumes.targets[sample].tobytes() if target is None else target
    if sample_checksum(inputs, tail) != volumes.checksums[sample]:
        path = volumes.paths[volumes.locate(sample)[0]]
        raise DamagedSample(
            f"{path}: sample {volumes.ids[sample]!r} (number {sample}) is damaged, its checksum differs; "
            f"list all with 'hpc inspect {path} --verify'"
        )


def find_damaged(volumes: VolumeFile, indices: Iterable[int]) -> Iterator[int]:
    """Sample numbers among `indices` whose bytes differ from their checksum, as they are found."""
    with Reader(volumes) as reader:
        for sample in map(int, indices):
            try:
                check_whole(volumes, reader, sample)
            except DamagedSample:
                yield sample


def check_whole(volumes: VolumeFile, reader: Reader, sample: int) -> None:
    """Read a sample and compare it with its CRC-32. Raises DamagedSample, OSError."""
    inputs, target = _read(volumes, reader, sample)
    check_sample(volumes, sample, bytes_of(inputs), None if target is None else bytes_of(target))


def read_sample(volumes: VolumeFile, sample: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """One sample as stored: inputs (C, *spatial) and its target."""
    with Reader(volumes) as reader:
        inputs, target = _read(volumes, reader, sample)
    return inputs, np.asarray(volumes.targets[sample]) if target is None else target


def _read(volumes: VolumeFile, reader: Reader, sample: int) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
    shape = volumes.sample_shape(sample)
    inputs = np.empty(shape, volumes.dtype)
    target = np.empty(shape[1:], np.uint8) if volumes.task == "segmentation" else None
    reader.read(sample, bytes_of(inputs), None if target is None else bytes_of(target))
    return inputs, target
