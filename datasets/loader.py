"""Feeds batches of a volume file to training: order by arithmetic, bytes by threads, a position is two numbers.

    loader = Loader(open_volumes("scans.h5"), split="train", batch_size=8, dtype=torch.float32)
    loader.seek(epoch=3, step=17)
    for batch in loader: ...            # the rest of epoch 3; the next loop is epoch 4

Which samples make up global batch (epoch, step) depends on neither threads nor ranks.
"""

import time
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets.augment import Augment
from datasets.layout import VolumeFile
from datasets.order import Stream, epoch_order, num_steps, rank_share, uniforms
from datasets.partition import SPLITS
from datasets.reading import Reader, check_sample, open_reader
from datasets.ring import Ring, Slot

PIECE_BYTES = 1 << 20
"""a batch is cut into parts of at least this size, which threads read at the same time"""


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of a global batch, on the device.

    inputs (B, C, *spatial); targets (B,) int64 class numbers, (B, K) uint8 multi-hot or (B, *spatial) uint8 maps;
    samples (B,) int64 sample numbers in the volume file. B is 0 for a rank that got nothing of a short last batch.
    """

    inputs: Tensor
    targets: Tensor
    samples: Tensor


class Loader:
    """Iterating yields the rest of the current epoch and then moves to the next one.

    - `batch_size` is global: rank r of world_size gets positions r, r + world_size, ... of each batch.
    - Shuffled (default for 'train'): a permutation by (seed, epoch), the remainder of an epoch is dropped. Otherwise
      file order, each sample once, the last batch short.
    - `dtype` None gives the numbers as stored; torch.float32, bfloat16 or float16 gives stored * scale + offset, the
      normalised intensities. `augment` (Augment or a mapping of its options) needs such a dtype.
    - `verify` is the share of samples whose checksum is compared as they are read.
    - A batch stays valid as long as it, or a view of it, is held. One iteration at a time: a new one ends the last.
    - Threads live only while an iteration does. Kept by tests/test_loader.py.

    Raises ValueError for settings that cannot work, OSError (naming the file) when data are gone, cut short or damaged.
    """

    def __init__(
        self,
        volumes: VolumeFile,
        split: str = "train",
        batch_size: int = 8,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 2,
        device: str | torch.device = "cpu",
        augment: Augment | Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        shuffle: bool | None = None,
        verify: float = 0.0,
    ) -> None:
        self.volumes, self.split, self.batch_size, self.seed = volumes, split, batch_size, seed
        self.rank, self.world_size, self.threads, self.verify = rank, world_size, threads, verify
        self.device, self.dtype = torch.device(device), dtype
        self.shuffle = split == SPLITS[0] if shuffle is None else shuffle
        self.augment = Augment.from_mapping(augment) if isinstance(augment, Mapping) else augment
        self.samples = volumes.indices(split)
        """(n,) numbers of the split's samples in the volume file"""
        self.epoch = 0
        self.step = 0
        """step of the next batch; it equals len(self) between the last batch and the end of the loop"""
        self.waited = 0.0
        """seconds that iteration has waited for data since the loader was made"""
        self._check()
        maps = volumes.target_shape if volumes.task == "segmentation" else None
        self.rows = -(-min(batch_size, len(self.samples)) // world_size)
        """samples of this rank in a full batch, at most"""
        self._ring = Ring(volumes.shape, volumes.dtype, maps, self.rows, pinned=self.device.type == "cuda")
        self._floats = Ring(volumes.shape, np.dtype(np.float32), None, self.rows, pinned=False)
        self._running: weakref.ref[Generator[Batch, None, None]] | None = None

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return num_steps(len(self.samples), self.batch_size, self.shuffle)

    def seek(self, epoch: int, step: int = 0) -> None:
        """Make batch (epoch, step) the next one; step may be len(self), the end of that epoch. Ends any iteration."""
        if epoch < 0 or not 0 <= step <= len(self):
            raise ValueError(f"position (epoch {epoch}, step {step}) is outside: an epoch has steps 0 to {len(self)}")
        self.close()
        self.epoch, self.step = epoch, step

    def __iter__(self) -> Generator[Batch, None, None]:
        self.close()
        batches = self._iterate()
        self._running = weakref.ref(batches)
        return batches

    def close(self) -> None:
        """End a running iteration and join its threads. The loader can be used again."""
        running = self._running() if self._running is not None else None
        if running is not None:
            running.close()
        self._running = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self) -> None:
        size, name = len(self.samples), self.volumes.name
        for option, value, low in (("batch_size", self.batch_size, 1), ("world_size", self.world_size, 1)):
            if value < low:
                raise ValueError(f"{option} {value} must be {low} or more")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank {self.rank} is outside: with world_size {self.world_size} it is 0 to world_size - 1"
            )
        if self.threads < 1:
            raise ValueError(f"threads {self.threads} must be 1 or more: something has to read")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed} is out of range; use 0 to 2**64 - 1")
        if not 0 <= self.verify <= 1:
            raise ValueError(f"verify {self.verify} is a share of the samples: use 0 (none) to 1 (all)")
        if size == 0:
            counts = ", ".join(f"{other} {len(self.volumes.indices(other))}" for other in SPLITS)
            raise ValueError(f"{name} has no sample in split {self.split!r} ({counts}); pack it with another --split")
        if self.shuffle and size < self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is over the {size} samples of split {self.split!r} of {name}"
            )
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise ValueError(f"dtype {self.dtype} is no float; use torch.float32 or torch.bfloat16, or None: as stored")
        if self.augment is not None:
            if self.dtype is None:
                raise ValueError("augment changes normalised intensities: give dtype, for example torch.float32")
            beyond = [axis for axis in self.augment.flip if axis >= len(self.volumes.shape) - 1]
            if beyond:
                raise ValueError(f"augment: flip axis {beyond[0]} is over the spatial axes of {self.volumes.shape}")

    def _iterate(self) -> Generator[Batch, None, None]:
        epoch = self.epoch
        order = self.samples[epoch_order(len(self.samples), self.seed, epoch, self.shuffle)]
        steps = range(self.step, len(self))
        shares = (rank_share(order, step, self.batch_size, self.rank, self.world_size) for step in steps)
        with _Prefetch(self, shares, self._chosen_for_check(epoch)) as prefetch:
            for _ in steps:
                batch = self._deliver(*prefetch.next(), epoch)
                self.step += 1
                yield batch
                del batch  # or this frame would keep the slot from being used again
        self.epoch, self.step = epoch + 1, 0

    def _chosen_for_check(self, epoch: int) -> NDArray[np.bool_]:
        """(N,) which samples of the file are checked in this epoch."""
        if self.verify == 0:
            return np.zeros(len(self.volumes), bool)
        return uniforms(self.seed, epoch, Stream.VERIFY, len(self.volumes)) < self.verify

    def _deliver(self, slot: Slot, samples: NDArray[np.int64], epoch: int) -> Batch:
        maps = self.volumes.task == "segmentation"
        inputs = torch.from_numpy(slot.inputs(len(samples)))
        targets = torch.from_numpy(slot.maps(len(samples)) if maps else self.volumes.targets[samples])
        numbers = torch.from_numpy(samples.copy())
        if self.device.type != "cpu":
            inputs, targets, numbers = (
                tensor.to(self.device, non_blocking=True) for tensor in (inputs, targets, numbers)
            )
        if self.device.type == "cuda":
            slot.mark_copied(self.device)
        slot.busy = False
        if self.dtype is not None:
            inputs = self._normalise(inputs, samples)
            if self.augment is not None:
                inputs, flipped = self.augment(inputs, samples, self.seed, epoch, targets if maps else None)
                targets = targets if flipped is None else flipped
            inputs = inputs.to(self.dtype)
        return Batch(inputs, targets, numbers)

    def _normalise(self, inputs: Tensor, samples: NDArray[np.int64]) -> Tensor:
        """float32, whatever the dtype asked for: augmentation is computed before rounding."""
        shape = (len(samples), -1, *[1] * (inputs.ndim - 2)) if len(samples) else (0, *[1] * (inputs.ndim - 1))
        scale, offset = (
            torch.from_numpy(table[samples]).to(self.device).reshape(shape)
            for table in (self.volumes.scale, self.volumes.offset)
        )
        if self.device.type != "cpu":
            return torch.mul(inputs, scale).add_(offset)
        slot = self._floats.acquire(spare=1)
        out = torch.from_numpy(slot.inputs(len(samples)))
        slot.busy = False
        return out.copy_(inputs).mul_(scale).add_(offset)


class _Prefetch:
    """Reads the coming batches of an iteration in threads; a context manager that joins them."""

    def __init__(self, loader: Loader, shares: Iterator[NDArray[np.int64]], checked: NDArray[np.bool_]) -> None:
        self._volumes, self._ring, self._checked = loader.volumes, loader._ring, checked
        self._loader = loader
        self._coming = shares
        self._pending: deque[tuple[Slot, NDArray[np.int64], list[Future[None]]]] = deque()
        self._reader: Reader = open_reader(loader.volumes)
        threads = loader.threads if self._reader.parallel else 1
        sample_bytes = int(np.prod(self._volumes.shape)) * self._volumes.dtype.itemsize
        rows = loader.rows
        self._pieces = max(1, min(threads, rows, rows * sample_bytes // PIECE_BYTES))
        self._depth = 1 + -(-threads // self._pieces)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()
        for slot, _, _ in self._pending:
            slot.busy = False

    def next(self) -> tuple[Slot, NDArray[np.int64]]:
        """The next slot, filled, and its sample numbers; the time spent waiting for it counts."""
        while len(self._pending) < self._depth and (share := next(self._coming, None)) is not None:
            self._pending.append(self._start(share))
        slot, share, futures = self._pending[0]
        started = time.monotonic()
        try:
            for future in futures:
                future.result()
        finally:
            self._loader.waited += time.monotonic() - started
        self._pending.popleft()
        return slot, share

    def _start(self, share: NDArray[np.int64]) -> tuple[Slot, NDArray[np.int64], list[Future[None]]]:
        slot = self._ring.acquire(spare=self._depth)
        edges = [len(share) * piece // self._pieces for piece in range(self._pieces + 1)]
        futures = [
            self._pool.submit(self._read, slot, share, first, last) for first, last in pairwise(edges) if last > first
        ]
        return slot, share, futures

    def _read(self, slot: Slot, share: NDArray[np.int64], first: int, last: int) -> None:
        for row in range(first, last):
            sample = int(share[row])
            inputs, target = slot.input_buffer(row), slot.map_buffer(row)
            self._reader.read(sample, inputs, target)
            if self._checked[sample]:
                check_sample(self._volumes, sample, inputs, target)
