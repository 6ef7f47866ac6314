"""Reads samples as bytes: positioned reads at the offsets of contiguous data, HDF5 for chunked data.

A reader fills buffers that the caller owns: `read(sample, inputs, target)`, with `target` None unless the file holds
label maps. Every failure is an OSError that names the file; damage is `DamagedSample`.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from datasets.layout import INPUTS, TARGETS, Shard, VolumeFile, sample_checksum


class DamagedSample(OSError):
    """The bytes of a sample are not those that were packed."""


class Reader(Protocol):
    parallel: bool
    """whether several threads may call `read` at once"""

    def read(self, sample: int, inputs: memoryview, target: memoryview | None) -> None:
        """Fill `inputs` and `target` (bytes, whole sample) with sample number `sample`."""

    def close(self) -> None: ...


def open_reader(volumes: VolumeFile) -> Reader:
    """The fastest reader that serves all shards. OSError when a file is gone or was exchanged since it was opened."""
    contiguous = all(
        stored.offset is not None for shard in volumes.shards for stored in (shard.inputs, shard.targets) if stored
    )
    return PositionedReader(volumes) if contiguous else ChunkedReader(volumes)


class PositionedReader:
    """os.preadv straight into the caller's buffers, without HDF5 and its lock."""

    parallel = True

    def __init__(self, volumes: VolumeFile) -> None:
        self._volumes = volumes
        self._descriptors: list[int] = []
        try:
            for shard in volumes.shards:
                self._descriptors.append(os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC))
                _require_unchanged(shard, os.fstat(self._descriptors[-1]))
        except BaseException:
            self.close()
            raise

    def read(self, sample: int, inputs: memoryview, target: memoryview | None) -> None:
        number, row = self._volumes.locate(sample)
        shard, descriptor = self._volumes.shards[number], self._descriptors[number]
        assert shard.inputs.offset is not None
        _fill(descriptor, inputs, shard.inputs.offset + row * inputs.nbytes, shard)
        if target is not None:
            assert shard.targets is not None and shard.targets.offset is not None
            _fill(descriptor, target, shard.targets.offset + row * target.nbytes, shard)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


class ChunkedReader:
    """HDF5's own reads, for chunked or compressed files: one thread at a time."""

    parallel = False

    def __init__(self, volumes: VolumeFile) -> None:
        self._volumes = volumes
        self._stack = ExitStack()
        self._files: list[h5py.File] = []
        with ExitStack() as stack:
            for shard in volumes.shards:
                _require_unchanged(shard, shard.path.stat())
                self._files.append(stack.enter_context(h5py.File(shard.path, "r", locking=False)))
            self._stack = stack.pop_all()

    def read(self, sample: int, inputs: memoryview, target: memoryview | None) -> None:
        number, row = self._volumes.locate(sample)
        file = self._files[number]
        try:
            _read_row(file[INPUTS], row, inputs)
            if target is not None:
                _read_row(file[TARGETS], row, target)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise OSError(f"{self._volumes.shards[number].path}: sample {sample} cannot be read ({reason})") from error

    def close(self) -> None:
        self._stack.close()
        self._files.clear()


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
    reader = open_reader(volumes)
    inputs, target = _buffers(volumes)
    try:
        for sample in map(int, indices):
            try:
                reader.read(sample, _bytes(inputs), None if target is None else _bytes(target))
                check_sample(volumes, sample, _bytes(inputs), None if target is None else _bytes(target))
            except DamagedSample:
                yield sample
    finally:
        reader.close()


def read_sample(volumes: VolumeFile, sample: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """One sample as stored: inputs (C, *spatial) and its target."""
    reader = open_reader(volumes)
    inputs, target = _buffers(volumes)
    try:
        reader.read(sample, _bytes(inputs), None if target is None else _bytes(target))
    finally:
        reader.close()
    return inputs, np.asarray(volumes.targets[sample]) if target is None else target


def _buffers(volumes: VolumeFile) -> tuple[NDArray[Any], NDArray[Any] | None]:
    maps = volumes.task == "segmentation"
    target = np.empty(volumes.target_shape, volumes.target_dtype) if maps else None
    return np.empty(volumes.shape, volumes.dtype), target


def _bytes(array: NDArray[Any]) -> memoryview:
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat)


def _fill(descriptor: int, buffer: memoryview, offset: int, shard: Shard) -> None:
    done = 0
    while done < buffer.nbytes:
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise OSError(error.errno, f"{shard.path} cannot be read: {error.strerror}") from error
        if count == 0:
            raise OSError(f"{shard.path} was cut short while it was read: it ends at byte {offset + done}")
        done += count


def _read_row(dataset: h5py.Dataset, row: int, buffer: memoryview) -> None:
    dataset.read_direct(np.frombuffer(buffer, dataset.dtype).reshape(dataset.shape[1:]), np.s_[row])


def _require_unchanged(shard: Shard, status: os.stat_result) -> None:
    if (status.st_ino, status.st_size, status.st_mtime_ns) != shard.identity:
        raise OSError(f"{shard.path} was exchanged since it was opened ({status.st_size} bytes now); start again")
