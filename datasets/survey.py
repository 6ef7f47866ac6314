"""One pass over samples by several threads: checksums, intensities, label maps, and what tells twins apart.

survey = Survey(volumes, choose_samples(volumes, LOOK_BYTES), digested=[3, 5])
survey.run(range(len(volumes)))             # every sample is read once, and its checksum compared
survey.faults, survey.intensities.stored[0].quantiles()
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event, Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.census import mean_bytes
from datasets.duplicates import Print, fingerprint
from datasets.layout import VolumeFile, sample_checksum
from datasets.order import philox_bits
from datasets.partition import SPLITS
from datasets.reading import DamagedSample, Reader
from datasets.statistics import BLOCK, Intensities
from datasets.stored import bytes_of

LOOK_BYTES, MOST_LOOKED, FEWEST_LOOKED = 1 << 28, 2000, 4
"""bounds of the samples whose voxels are looked at unless all are asked for"""
MOST_PRINTS = 20_000
"""samples that are compared for near twins: each with each"""
NUM_LABELS = 256
"""a label map is uint8"""
_MOST_MEMORY = 1 << 32
"""bytes of samples that are held at once, unless a single one has more"""
_POLL_S = 0.1

Report = Callable[[int, int], None]
"""samples begun, samples in all"""


def available_threads() -> int:
    """CPUs this process may use, which inside an allocation are fewer than the machine has."""
    return max(1, len(os.sched_getaffinity(0)))


def choose_samples(volumes: VolumeFile, max_bytes: int = LOOK_BYTES) -> NDArray[np.int64]:
    """Sample numbers, rising: one drawn from each of as many equal parts of the file as `max_bytes` allow.

    The draw is the same each time. Evenly spaced ones would meet only one class of a file that alternates.
    """
    num = len(volumes)
    wanted = min(max(max_bytes // mean_bytes(volumes), FEWEST_LOOKED), MOST_LOOKED, num)
    edges = np.arange(wanted + 1) * num // wanted
    draw = philox_bits((0, 0), (0, 0, 0, 0), wanted) % np.diff(edges).astype(np.uint64)
    return edges[:-1] + draw.astype(np.int64)


class Labels:
    """Voxels and samples of each value of the label maps looked at, per split: (3, 256) each."""

    def __init__(self) -> None:
        self.voxels = np.zeros((len(SPLITS), NUM_LABELS), np.int64)
        self.samples = np.zeros((len(SPLITS), NUM_LABELS), np.int64)
        self.bare = 0
        """samples of value 0 alone"""
        self._lock = Lock()

    def add(self, split: int, voxels: NDArray[np.uint8]) -> None:
        counts = np.zeros(NUM_LABELS, np.int64)
        for start in range(0, voxels.size, BLOCK):
            counts += np.bincount(voxels[start : start + BLOCK], minlength=NUM_LABELS)
        with self._lock:
            self.voxels[split] += counts
            self.samples[split] += counts > 0
            self.bare += not counts[1:].any()


class Survey:
    """What a pass over samples finds.

    looked: numbers of the samples whose voxels are counted; of up to 20,000 of them a perceptual hash is kept.
    digested: numbers of those whose input bytes are hashed, to compare them. `faults` are sample numbers with the
    reason: bytes that differ from the checksum, or that cannot be read at all; those are counted nowhere else.
    """

    def __init__(self, volumes: VolumeFile, looked: Sequence[int] | NDArray[Any], digested: Iterable[int] = ()) -> None:
        self.volumes = volumes
        self.looked = np.asarray(looked)
        self.intensities = Intensities(len(looked), volumes.channels, volumes.dtype)
        self.labels = Labels()
        self.faults: dict[int, str] = {}
        self.digests: dict[int, bytes] = {}
        self.prints: dict[int, Print] = {}
        self.bytes_looked = 0
        self._place = {sample: place for place, sample in enumerate(self.looked.tolist())}
        self._digested = set(map(int, digested))
        self._printed = set(self.looked[:: -(-len(looked) // MOST_PRINTS) or 1].tolist())
        self._lock = Lock()

    def run(self, samples: Iterable[int], report: Report | None = None, threads: int | None = None) -> None:
        """Read these samples, each once. `report` is called from the caller's thread.

        Raises OSError when a file cannot be opened at all. An interrupt ends it after the samples under way.
        """
        numbers = [int(sample) for sample in samples]
        most = max(1, _MOST_MEMORY // mean_bytes(self.volumes))
        threads = max(1, min(threads or available_threads(), most, len(numbers)))
        with Reader(self.volumes) as reader:
            _share_out(numbers, lambda: _Desk(self, reader).take, threads, report)

    def take(self, sample: int, inputs: NDArray[Any], target: NDArray[np.uint8] | None) -> None:
        """Count one sample: inputs (C, *spatial) and its label map, if any, as stored. Threads may call at once."""
        known = self.volumes.targets[sample].tobytes() if target is None else target
        if sample_checksum(inputs, known) != self.volumes.checksums[sample]:
            self.faults[sample] = "its bytes are not those that were packed (the checksum differs)"
            return
        if sample in self._digested:
            self.digests[sample] = _digest(inputs)
        if sample in self._place:
            self._look(sample, inputs, target)

    def _look(self, sample: int, inputs: NDArray[Any], target: NDArray[np.uint8] | None) -> None:
        flat = inputs.reshape(len(inputs), -1)
        place = self._place[sample]
        self.intensities.add(place, flat, self.volumes.scale[sample], self.volumes.offset[sample])
        if target is not None:
            self.labels.add(int(self.volumes.split[sample]), target.reshape(-1))
        if sample in self._printed and self.intensities.varies(place):  # all constant ones look alike
            whole = self.intensities.is_finite(place)
            self.prints[sample] = fingerprint(inputs if whole else np.nan_to_num(inputs, posinf=0.0, neginf=0.0))
        with self._lock:
            self.bytes_looked += inputs.nbytes + (0 if target is None else target.nbytes)


class _Desk:
    """Where one thread reads samples into."""

    def __init__(self, survey: Survey, reader: Reader) -> None:
        self._survey, self._reader = survey, reader
        self._dtype = survey.volumes.dtype
        self._maps = survey.volumes.task == "segmentation"
        self._inputs, self._target = np.empty(0, self._dtype), np.empty(0, np.uint8)

    def take(self, sample: int) -> None:
        channels, *axes = self._survey.volumes.sample_shape(sample)
        voxels = int(np.prod(axes))
        if self._inputs.size < channels * voxels:
            self._inputs = np.empty(channels * voxels, self._dtype)
            self._target = np.empty(voxels if self._maps else 0, np.uint8)
        inputs, target = self._inputs[: channels * voxels], self._target[:voxels] if self._maps else None
        try:
            self._reader.read(sample, bytes_of(inputs), None if target is None else bytes_of(target))
        except (OSError, ValueError) as error:
            self._survey.faults[sample] = _reason(error)
        else:
            self._survey.take(sample, inputs.reshape(channels, *axes), None if target is None else target.reshape(axes))


def _reason(error: OSError | ValueError) -> str:
    """What is wrong with one sample, without the names of file and sample."""
    cause = error.__cause__ or error
    words = cause.strerror if isinstance(cause, OSError) and cause.strerror else " ".join(str(cause).split())
    return f"its bytes do not decode ({words})" if isinstance(error, DamagedSample) else f"it cannot be read: {words}"


def _digest(inputs: NDArray[Any]) -> bytes:
    digest = hashlib.sha256(repr(inputs.shape).encode())
    digest.update(bytes_of(inputs))
    return digest.digest()


def _share_out(
    numbers: Sequence[int], make: Callable[[], Callable[[int], None]], threads: int, report: Report | None
) -> None:
    """Each thread makes a function and calls it with one number after the other, until none is left or one fails."""
    position, lock, stop = 0, Lock(), Event()

    def work() -> None:
        nonlocal position
        take = make()
        while not stop.is_set():
            with lock:
                if position == len(numbers):
                    return
                number, position = numbers[position], position + 1
            take(number)

    with ThreadPoolExecutor(threads, "survey") as pool:
        pending = {pool.submit(work) for _ in range(threads)}
        try:
            while pending:
                finished, pending = wait(pending, _POLL_S, FIRST_EXCEPTION)
                for one in finished:
                    one.result()
                if report:
                    report(position, len(numbers))
        finally:
            stop.set()
