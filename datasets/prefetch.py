"""Reads the coming batches of one iteration into slots of the ring, by threads that live as long as it does."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from datasets.layout import VolumeFile
from datasets.order import Stream, random_bits, uniforms
from datasets.patches import Patches, Places
from datasets.reading import BadSample, Reader, check_sample, check_whole
from datasets.ring import Ring, Slot
from datasets.sampling import Share
from datasets.threads import Job, Threads

_LOG = logging.getLogger(__name__)
PIECE_BYTES = 1 << 21
"""a batch is cut into parts of at least this size, which threads read at the same time"""
REPLACEMENTS = 16
"""Samples that are tried in place of a bad one before it ends the iteration after all."""


@dataclass(frozen=True)
class Reading:
    """What an iteration reads, and how: the same for all of its samples."""

    volumes: VolumeFile
    seed: int
    epoch: int
    verify: float
    patches: Patches | None
    foreground: float
    """share of the places in the epoch whose patch holds a foreground location"""
    batch_size: int
    """of a global batch"""
    candidates: NDArray[np.int64] | None
    """samples that may stand in for a bad one; None: a bad one ends the iteration"""


@dataclass
class Work:
    """A slot being filled."""

    slot: Slot
    share: Share
    samples: NDArray[np.int64]
    """(B,) sample numbers; those of replacements, where a sample was bad"""
    places: Places | None
    """of the patches of `share`"""
    jobs: Sequence[Job] = ()
    """that fill it"""
    skipped: list[tuple[int, int, str]] = field(default_factory=list)
    """(row, sample, reason)"""


class Prefetch:
    """A context manager that joins its threads; with `threads` 0 the calling thread reads."""

    def __init__(
        self, reading: Reading, reader: Reader, ring: Ring, shares: Iterator[Share], threads: int, rows: int
    ) -> None:
        self._reading, self._reader, self._ring = reading, reader, ring
        self._coming: Iterator[tuple[Share, Places | None]] = ((share, None) for share in shares)
        if reading.patches is not None:
            self._coming = reading.patches.planned(reading.epoch, shares)
        self._pending: deque[Work] = deque()
        self._checked = _chosen_for_check(reading)
        self._pieces = max(1, min(threads, rows, rows * ring.sample_bytes // PIECE_BYTES))
        self._depth = 2 + -(-threads // self._pieces)
        self._threads = Threads(threads, "loader") if threads else None
        self.waited = 0.0
        """seconds spent waiting in `next`"""
        self.skipped: list[tuple[int, str]] = []
        """(sample, reason) of those that were replaced in the batches handed over so far"""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._threads:
            self._threads.join()
        for work in self._pending:
            work.slot.busy = False

    @property
    def ready(self) -> bool:
        """Whether `next` would return at once."""
        return bool(self._pending) and all(job.done for job in self._pending[0].jobs)

    def next(self) -> Work | None:
        """The next slot, filled; None after the last."""
        started = time.monotonic()
        while len(self._pending) < self._depth and (coming := next(self._coming, None)) is not None:
            self._pending.append(self._start(*coming))
        if not self._pending:
            return None
        work = self._pending[0]
        try:
            for job in work.jobs:
                job.wait()
        finally:
            self.waited += time.monotonic() - started
        self._pending.popleft()
        for _, sample, reason in sorted(work.skipped):
            self.skipped.append((sample, reason))
            _LOG.warning("sample skipped: %s", reason)
        return work

    def _is_foreground(self, place: int) -> bool:
        reading = self._reading
        if not reading.foreground:
            return False
        step, row = divmod(place, reading.batch_size)
        return bool(foreground_rows(reading.seed, reading.epoch, step, reading.batch_size, reading.foreground)[row])

    def _start(self, share: Share, places: Places | None) -> Work:
        work = Work(self._ring.acquire(spare=self._depth), share, share.samples.copy(), places)
        if self._threads is None:
            try:
                self._read(work, 0, len(share.samples))
            except BaseException:
                work.slot.busy = False
                raise
            return work
        edges = [len(share.samples) * piece // self._pieces for piece in range(self._pieces + 1)]
        pieces = (partial(self._read, work, *edge) for edge in pairwise(edges) if edge[1] > edge[0])
        work.jobs = [self._threads.submit(piece) for piece in pieces]
        return work

    def _read(self, work: Work, first: int, last: int) -> None:
        for row in range(first, last):
            sample = int(work.samples[row])
            try:
                self._fetch(work, row, sample)
            except BadSample as error:
                self._replace(work, row, sample, error)

    def _replace(self, work: Work, row: int, bad: int, error: BadSample) -> None:
        """Another sample of the same class, drawn by (seed, epoch, sample)."""
        for sample in _replacements(self._reading, bad):
            try:
                self._fetch(work, row, sample)
            except BadSample:
                continue
            work.samples[row] = sample
            work.skipped.append((row, bad, str(error)))
            return
        raise error

    def _fetch(self, work: Work, row: int, sample: int) -> None:
        volumes, patches = self._reading.volumes, self._reading.patches
        inputs, target = work.slot.input_buffer(row), work.slot.map_buffer(row)
        if patches is None:
            if volumes.ragged:
                inputs, target = _own_part(volumes, sample, inputs, target)
            self._reader.read(sample, inputs, target)
            if self._checked[sample]:
                check_sample(volumes, sample, inputs, target)
            return
        view = int(work.share.views[row])
        if self._checked[sample] and view == 0:
            check_whole(volumes, self._reader, sample)
        self._reader.read_patch(sample, self._start_of(patches, work, row, sample), patches.size, inputs, target)

    def _start_of(self, patches: Patches, work: Work, row: int, sample: int) -> Sequence[int]:
        assert work.places is not None
        foreground = self._is_foreground(int(work.share.places[row]))
        if sample != work.share.samples[row]:
            key = sample + int(work.share.views[row]) * len(self._reading.volumes)
            return patches.start(self._reader, self._reading.epoch, sample, key, foreground)
        if foreground:
            return patches.about_foreground(self._reader, sample, work.places.draws[row])
        return work.places.starts[row]


def _own_part(
    volumes: VolumeFile, sample: int, inputs: memoryview, target: memoryview | None
) -> tuple[memoryview, memoryview | None]:
    """Of buffers with room for the largest sample, the part that this one fills."""
    channels, *spatial = volumes.sample_shape(sample)
    voxels = int(np.prod(spatial))
    size = channels * voxels * volumes.dtype.itemsize
    return inputs[:size], None if target is None else target[:voxels]


@lru_cache(maxsize=8)
def foreground_rows(seed: int, epoch: int, step: int, batch_size: int, share: float) -> NDArray[np.bool_]:
    """(batch_size,) the rows of a global batch whose patch holds a foreground location.

    As many as `share` of an epoch comes to, batch by batch; drawn, so that no rank has them all.
    """
    before, after = (int(number * batch_size * share + 1e-6) for number in (step, step + 1))
    rows = np.zeros(batch_size, bool)
    order = np.argsort(random_bits(seed, epoch, Stream.FOREGROUND, batch_size, step), kind="stable")
    rows[order[: after - before]] = True
    return rows


def _chosen_for_check(reading: Reading) -> NDArray[np.bool_]:
    """(N,) which samples of the file are checked in this epoch."""
    count = len(reading.volumes)
    if reading.verify == 0:
        return np.zeros(count, bool)
    return uniforms(reading.seed, reading.epoch, Stream.VERIFY, count) < reading.verify


def _replacements(reading: Reading, bad: int) -> list[int]:
    """In the order in which they are tried."""
    if reading.candidates is None:
        return []
    others: Any = reading.candidates[reading.candidates != bad]
    if reading.volumes.task != "segmentation":
        targets = reading.volumes.targets
        alike = (targets[others] == targets[bad]).reshape(len(others), -1).all(axis=1)
        others = others[alike] if alike.any() else others
    bits = random_bits(reading.seed, reading.epoch, Stream.REPLACE, len(others), bad)
    chosen: list[int] = others[np.argsort(bits, kind="stable")[:REPLACEMENTS]].tolist()
    return chosen
