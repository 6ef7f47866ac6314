"""Feeds batches of a volume file to training: order by arithmetic, bytes by threads, a position is two numbers.

    loader = Loader(open_volumes("scans.h5"), split="train", batch_size=8, dtype=torch.float32)
    loader.seek(epoch=3, step=17)
    for batch in loader: ...            # the rest of epoch 3; the next loop is epoch 4

Which samples make up global batch (epoch, step), and each of their voxels, depends on neither threads nor ranks.
"""

import math
import os
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from datasets.augment import Augment
from datasets.census import sample_shapes
from datasets.layout import VolumeFile
from datasets.order import num_steps
from datasets.partition import SPLITS
from datasets.patches import Patches
from datasets.prefetch import Prefetch, Reading, Work
from datasets.reading import Reader
from datasets.ring import Ring
from datasets.sampling import Numbers, Sampler, Uniform, Weighted, draw_epoch, make_sampler

COPIED_AHEAD = 2
"""Batches that are on their way to a GPU, or there, before they are asked for."""

FEWEST_SLOTS = 3
"""Batches in memory at once: one that is used, two that are read."""

OVERHANG = 4
"""A patch is at most so many times as long as the largest volume; what lies outside repeats its edge."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of a global batch, on the device.

    inputs (B, C, *spatial); targets (B,) int64 class numbers, (B, K) uint8 multi-hot or (B, *spatial) uint8 maps;
    samples (B,) int64 sample numbers in the volume file. B is 0 for a rank that got nothing of a short last batch.
    """

    inputs: Tensor
    targets: Tensor
    samples: Tensor


@dataclass(frozen=True)
class _Stored:
    """A batch as stored, on its way to normalisation."""

    inputs: Tensor
    targets: Tensor
    samples: Tensor
    numbers: Numbers
    keys: Numbers
    """(B,) sample + view * N: what the draws of augmentation depend on"""
    copied: Any = None
    """torch.cuda.Event of the copy to the device"""


class Loader:
    """Iterating yields the rest of the current epoch and then moves to the next one.

    - `batch_size` is global: rank r of world_size gets positions r, r + world_size, ... of each batch.
    - Shuffled (default for 'train'): the order of `sampler` by (seed, epoch), the remainder of an epoch is dropped:
      'uniform' (a permutation), 'balanced' (all classes equally often) or 'weighted' (by `weights`, one for each sample
      of the file), see datasets/sampling.py. Otherwise file order, each sample once, the last batch short.
    - `views`: an epoch has each sample so many times; augmentation and patches differ between them.
    - `patch` (voxels along each axis): boxes of that size in place of whole volumes, drawn by (seed, epoch, sample,
      view), or the centre of the volume where nothing is shuffled. `foreground` is the share of them that holds a
      voxel of a class other than 0. Volumes of different shapes need it, or one sample for each rank.
    - `dtype` None gives the numbers as stored; torch.float32, bfloat16 or float16 gives stored * scale + offset, the
      normalised intensities. `augment` (Augment or a mapping of its options) needs such a dtype.
    - `verify` is the share of samples whose checksum is compared as they are read (for patches: is read whole).
    - `on_bad_sample`: 'skip' takes another of the same class in place of one that cannot be read, or whose checksum was
      compared and differs, and adds (sample, reason) to `skipped`. A file that is gone, exchanged or cut short ends the
      iteration in any case.
    - `threads` read; with 0 the thread that iterates. They live only while an iteration does.
    - A batch stays valid as long as it, or a view of it, is held. One iteration at a time: a new one ends the last.

    Raises ValueError for settings that cannot work, OSError (naming file and sample) when data are gone, cut short or
    damaged. Kept by tests/test_loader.py, test_sampling.py and test_patches.py.
    """

    _reader: Reader | None = None
    _sought = False
    """the next iteration begins where `seek` has said"""

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
        sampler: str = "uniform",
        weights: Any = None,
        views: int = 1,
        patch: Sequence[int] | None = None,
        foreground: float = 0.0,
        on_bad_sample: Literal["stop", "skip"] = "stop",
    ) -> None:
        self.volumes, self.split, self.batch_size, self.seed = volumes, split, batch_size, seed
        self.rank, self.world_size, self.threads, self.verify = rank, world_size, threads, verify
        self.device, self.dtype = torch.device(device), dtype
        self.shuffle = split == SPLITS[0] if shuffle is None else shuffle
        self.augment = Augment.from_mapping(augment) if isinstance(augment, Mapping) else augment
        self.sampler, self.views, self.foreground, self.on_bad_sample = sampler, views, foreground, on_bad_sample
        self.patch = None if patch is None else _sizes(patch)
        self.samples = volumes.indices(split)
        """(n,) numbers of the split's samples in the volume file"""
        self.epoch, self.step = 0, 0
        """position of the next batch; step equals len(self) between the last batch and the end of the loop"""
        self.waited = 0.0
        """seconds that iteration has waited for data since the loader was made"""
        self.skipped: list[tuple[int, str]] = []
        """(sample, reason) of the bad samples that others were taken for"""
        self._check()
        self._sampler = self._make_sampler(weights)
        self._make_room()
        self._running: weakref.ref[Generator[Batch, None, None]] | None = None

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return num_steps(len(self.samples) * self.views, self.batch_size, self.shuffle)

    def seek(self, epoch: int, step: int = 0) -> None:
        """Make batch (epoch, step) the next one; step may be len(self), the end of that epoch. Ends any iteration."""
        if epoch < 0 or not 0 <= step <= len(self):
            raise ValueError(f"position (epoch {epoch}, step {step}) is outside: an epoch has steps 0 to {len(self)}")
        self._stop()
        self.epoch, self.step, self._sought = epoch, step, True

    def __iter__(self) -> Generator[Batch, None, None]:
        self._stop()
        if not (self.shuffle or self._sought):
            self.step = 0  # what a loop left by break has seen is to be scored again
        self._sought = False
        batches = self._iterate()
        self._running = weakref.ref(batches)
        return batches

    def close(self) -> None:
        """End a running iteration, join its threads and close the files. The loader can be used again."""
        self._stop()
        self._close_files()

    def _close_files(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _stop(self) -> None:
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

    def _make_sampler(self, weights: Any) -> Sampler:
        if not self.shuffle:
            return Uniform(self.seed, len(self.samples), 1, shuffle=False)
        total = len(self) * self.batch_size
        return make_sampler(self.sampler, self.volumes, self.samples, self.seed, total, self.views, weights)

    def _make_room(self) -> None:
        self.rows = -(-min(self.batch_size, len(self.samples) * self.views) // self.world_size)
        """samples of this rank in a full batch, at most"""
        shape, dtype = self._sample_shape(), self.volumes.dtype
        _require_memory(self.rows * math.prod(shape) * dtype.itemsize, self.rows, shape)
        maps = shape[1:] if self.volumes.task == "segmentation" else None
        self._ring = Ring(shape, dtype, maps, self.rows, pinned=self.device.type == "cuda")
        self._floats = Ring(shape, np.dtype(np.float32), None, self.rows, pinned=False)
        self._stream: Any = None
        """torch.cuda.Stream of the copies"""

    def _sample_shape(self) -> tuple[int, ...]:
        """(C, *spatial) of a sample of a batch; of volumes of different shapes, of as many voxels as the largest."""
        if self.patch is not None:
            return (self.volumes.channels, *self.patch)
        if not self.volumes.ragged:
            return self.volumes.shape
        shapes = (self.volumes.sample_shape(int(sample)) for sample in self.samples)
        return max(shapes, key=math.prod)

    def _iterate(self) -> Generator[Batch, None, None]:
        epoch = self.epoch
        order = draw_epoch(self._sampler, self.samples, epoch)
        steps = range(self.step, len(self))
        shares = (order.share(step, self.batch_size, self.rank, self.world_size) for step in steps)
        with Prefetch(self._reading(epoch), self._files(), self._ring, shares, self.threads, self.rows) as prefetch:
            for stored in self._on_device(prefetch):
                self._account(prefetch)
                batch = self._finish(stored, epoch)
                del stored  # or this frame would keep the slot from being used again
                self.step += 1
                yield batch
                del batch
        self.epoch, self.step = epoch + 1, 0

    def _files(self) -> Reader:
        """Open from the first iteration on: to map a file anew costs as much as to read a hundred patches."""
        if self._reader is None:
            self._reader = Reader(self.volumes)
        try:
            self._reader.check()
        except OSError:
            self._close_files()
            raise
        return self._reader

    def _reading(self, epoch: int) -> Reading:
        patches = None if self.patch is None else Patches(self.volumes, self.patch, self.seed, self.shuffle)
        candidates = self.samples if self.on_bad_sample == "skip" else None
        if candidates is not None and isinstance(self._sampler, Weighted):
            candidates = candidates[self._sampler.weights > 0]
        return Reading(
            self.volumes, self.seed, epoch, self.verify, patches, self.foreground, self.batch_size, candidates
        )

    def _account(self, prefetch: Prefetch) -> None:
        self.waited += prefetch.waited
        self.skipped += prefetch.skipped
        prefetch.waited, prefetch.skipped = 0.0, []

    def _on_device(self, prefetch: Prefetch) -> Iterator[_Stored]:
        """The batches as stored; on a GPU, the next ones are copied as soon as they are read."""
        ahead = COPIED_AHEAD if self.device.type == "cuda" else 1
        queue: deque[_Stored] = deque()
        while True:
            while len(queue) < ahead and (not queue or prefetch.ready):
                if (work := prefetch.next()) is None:
                    break
                queue.append(self._copy(work))
            if not queue:
                return
            yield queue.popleft()

    def _copy(self, work: Work) -> _Stored:
        volumes, slot, count = self.volumes, work.slot, len(work.samples)
        shape = volumes.sample_shape(int(work.samples[0])) if volumes.ragged and self.patch is None and count else None
        maps = volumes.task == "segmentation"
        targets = slot.maps(count, shape and shape[1:]) if maps else volumes.targets[work.samples]
        host = [torch.from_numpy(array) for array in (slot.inputs(count, shape), targets, work.samples.copy())]
        keys = work.samples if self.augment is None else work.samples + work.share.views * len(volumes)
        stored = _Stored(host[0], host[1], host[2], work.samples, keys)
        if self.device.type != "cpu":
            stored = self._copy_over(stored)
            slot.copied = stored.copied
        slot.busy = False
        return stored

    def _copy_over(self, stored: _Stored) -> _Stored:
        """The copies on the device; to a CUDA one, queued on the loader's own stream."""
        if self.device.type != "cuda":
            return self._moved(stored)
        self._stream = self._stream or torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            moved = self._moved(stored)
            done.record(self._stream)
        return replace(moved, copied=done)

    def _moved(self, stored: _Stored) -> _Stored:
        tensors = (stored.inputs, stored.targets, stored.samples)
        inputs, targets, samples = (tensor.to(self.device, non_blocking=True) for tensor in tensors)
        return replace(stored, inputs=inputs, targets=targets, samples=samples)

    def _finish(self, stored: _Stored, epoch: int) -> Batch:
        """Normalised and augmented, on the current stream of the device."""
        inputs, targets = stored.inputs, stored.targets
        if stored.copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(stored.copied)
            for tensor in (inputs, targets, stored.samples):
                tensor.record_stream(current)  # made on the loader's stream: not to be given back before it is used
        if self.dtype is not None:
            inputs = self._normalise(inputs, stored.numbers)
            if self.augment is not None:
                maps = targets if self.volumes.task == "segmentation" else None
                inputs, changed = self.augment(inputs, stored.keys, self.seed, epoch, maps)
                targets = targets if changed is None else changed
            inputs = inputs.to(self.dtype)
        return Batch(inputs, targets, stored.samples)

    def _normalise(self, inputs: Tensor, samples: Numbers) -> Tensor:
        """float32, whatever the dtype asked for: augmentation is computed before rounding."""
        shape = (len(samples), -1, *[1] * (inputs.ndim - 2)) if len(samples) else (0, *[1] * (inputs.ndim - 1))
        scale, offset = (
            torch.from_numpy(table[samples]).to(self.device, non_blocking=True).reshape(shape)
            for table in (self.volumes.scale, self.volumes.offset)
        )
        if self.device.type != "cpu":
            return torch.mul(inputs, scale).add_(offset)
        slot = self._floats.acquire(spare=1)
        out = torch.from_numpy(slot.inputs(len(samples), tuple(inputs.shape[1:])))
        slot.busy = False
        return out.copy_(inputs).mul_(scale).add_(offset)

    # What cannot work is refused when the loader is made.

    def _check(self) -> None:
        self._check_numbers()
        self._check_samples()
        if self.patch is not None or self.volumes.ragged or self.foreground:
            self._check_patch()
        if self.on_bad_sample not in ("stop", "skip"):
            raise ValueError(f"on_bad_sample {self.on_bad_sample!r} is unknown; use stop or skip")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise ValueError(
                f"dtype {self.dtype!r} is no float; use torch.float32 or torch.bfloat16, or None: as stored"
            )
        if self.augment is not None:
            if self.dtype is None:
                raise ValueError("augment changes normalised intensities: give dtype, for example torch.float32")
            self.augment.check(self.volumes.spatial_axes, self.volumes.channels)

    def _check_numbers(self) -> None:
        lowest = {"batch_size": 1, "world_size": 1, "views": 1, "threads": 0, "rank": 0, "seed": 0}
        for option, low in lowest.items():
            if not _is_whole(getattr(self, option)):
                raise ValueError(f"{option} {getattr(self, option)!r} is no whole number; use {low} or more")
            if option not in ("rank", "seed") and getattr(self, option) < low:
                raise ValueError(f"{option} {getattr(self, option)} must be {low} or more")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank {self.rank} is outside: with world_size {self.world_size} it is 0 to world_size - 1"
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed} is out of range; use 0 to 2**64 - 1")
        for option in ("verify", "foreground"):
            if not isinstance(getattr(self, option), (int, float)) or not 0 <= getattr(self, option) <= 1:
                raise ValueError(f"{option} {getattr(self, option)!r} is a share: use 0 (none) to 1 (all)")

    def _check_samples(self) -> None:
        size, name = len(self.samples), self.volumes.name
        if size == 0:
            counts = ", ".join(f"{other} {len(self.volumes.indices(other))}" for other in SPLITS)
            raise ValueError(f"{name} has no sample in split {self.split!r} ({counts}); pack it with another --split")
        if self.shuffle and size * self.views < self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is over the {size} samples of split {self.split!r} of {name}"
            )
        if not self.shuffle and self.on_bad_sample == "skip":
            raise ValueError("on_bad_sample 'skip' would score another sample in place of a bad one: mend the file")
        for option, default in (("sampler", "uniform"), ("views", 1), ("foreground", 0.0)):
            if not self.shuffle and getattr(self, option) != default:
                raise ValueError(f"{option} {getattr(self, option)!r} has no effect where nothing is shuffled")

    def _check_patch(self) -> None:
        volumes, axes = self.volumes, self.volumes.spatial_axes
        if self.patch is None and self.foreground:
            raise ValueError("foreground has no effect without patch: whole volumes hold all of it")
        if self.patch is None:
            if self.batch_size > self.world_size:
                raise ValueError(
                    f"{volumes.name} holds volumes of different shapes: give patch, or batch_size {self.world_size}"
                )
            return
        if len(self.patch) != axes or not all(_is_whole(size) and size >= 1 for size in self.patch):
            raise ValueError(f"patch {list(self.patch)} must be {axes} sizes of 1 or more, one for each spatial axis")
        largest = sample_shapes(volumes)[:, 1:].max(axis=0).tolist()
        if any(size > OVERHANG * most for size, most in zip(self.patch, largest, strict=True)):
            raise ValueError(
                f"patch {list(self.patch)} is over {OVERHANG} times as long as the largest volume of {volumes.name} "
                f"({'x'.join(map(str, largest))} voxels): nearly all would be a repeated edge; give {largest} or less"
            )
        if self.foreground and any(shard.foreground is None for shard in volumes.shards):
            raise ValueError(
                f"foreground {self.foreground} needs stored voxels of each class, but {volumes.name} has none: "
                f"they are kept where label maps are packed"
            )


def _is_whole(number: object) -> bool:
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def _require_memory(batch: int, rows: int, shape: tuple[int, ...]) -> None:
    """Refuse (ValueError) batches of which a ring cannot be held; `batch` in bytes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = FEWEST_SLOTS * batch
    if needed > memory:
        raise ValueError(
            f"{FEWEST_SLOTS} batches of {rows} x {'x'.join(map(str, shape))} voxels are {needed / 1e9:.1f} GB, and "
            f"this machine has {memory / 1e9:.1f}: give a smaller batch_size or patch"
        )


def _sizes(patch: Any) -> tuple[int, ...]:
    if not isinstance(patch, Sequence) or isinstance(patch, str):
        raise ValueError(f"patch {patch!r} is no list of sizes; give one for each spatial axis, as [64, 64, 64]")
    return tuple(patch)
