"""Loader against h5py, torch's DataLoader and memcpy, in one run: `make bench-loader`. Prints ratios, asserts nothing.

Volumes of 128^3 int16 (4 MiB), page cache warm, each way in turn, several rounds; the medians count.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datasets import Loader, open_volumes
from datasets.layout import INPUTS
from datasets.writer import VolumeWriter

SIZE, BATCH = 128, 4


class H5Dataset(Dataset[torch.Tensor]):
    """The usual way: the file opened in each worker, one sample an item."""

    def __init__(self, path: Path, samples: int) -> None:
        self.path, self.samples, self.file = path, samples, None

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.file is None:
            self.file = h5py.File(self.path, "r", locking=False)
        return torch.from_numpy(self.file[INPUTS][index])


def make(path: Path, samples: int) -> None:
    draw = np.random.default_rng(0)
    shape = (1, SIZE, SIZE, SIZE)
    with VolumeWriter(path, shape=shape, dtype="int16", num_samples=samples, class_names=["a", "b"]) as writer:
        for number in range(samples):
            volume = draw.integers(0, 2000, shape, dtype=np.int16)
            writer.add(volume, number % 2, id=f"s{number}", group=f"s{number}", split="train")


def direct(path: Path, samples: int) -> None:
    """h5py's read_direct into one buffer: no allocation, the fastest plain h5py reads."""
    buffer = np.empty((1, SIZE, SIZE, SIZE), np.int16)
    with h5py.File(path, "r", locking=False) as file:
        for index in range(samples):
            file[INPUTS].read_direct(buffer, np.s_[index])


def memcpy(samples: int) -> Callable[[], None]:
    source = np.ones((samples, SIZE**3), np.int16)
    target = np.empty((BATCH, SIZE**3), np.int16)

    def copy() -> None:
        for index in range(samples):
            target[index % BATCH] = source[index]

    return copy


def loader(path: Path, threads: int) -> Callable[[], None]:
    ours = Loader(open_volumes(path), batch_size=BATCH, threads=threads)

    def run() -> None:
        for _ in ours:
            pass

    return run


def torch_loader(path: Path, samples: int, workers: int) -> Callable[[], None]:
    theirs = DataLoader(H5Dataset(path, samples), batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)

    def run() -> None:
        for _ in theirs:
            pass

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.h5"
        make(path, options.samples)
        ways = {
            "h5py read_direct": lambda: direct(path, options.samples),
            "torch DataLoader, 0 workers": torch_loader(path, options.samples, 0),
            "torch DataLoader, 2 workers": torch_loader(path, options.samples, 2),
            "Loader, 1 thread": loader(path, 1),
            "Loader, 2 threads": loader(path, 2),
            "memcpy, 1 thread": memcpy(options.samples),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():  # warms the page cache and starts the workers
            way()
        for _ in range(options.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
    base = statistics.median(seconds["h5py read_direct"])
    gigabytes = options.samples * SIZE**3 * 2 / 1e9
    print(f"{'way':<30}{'GB/s':>8}{'x read_direct':>15}{'min':>8}{'max':>8}")
    for name, taken in seconds.items():
        rates = sorted(gigabytes / value for value in taken)
        middle = statistics.median(taken)
        print(f"{name:<30}{gigabytes / middle:>8.2f}{base / middle:>15.2f}{rates[0]:>8.2f}{rates[-1]:>8.2f}")


if __name__ == "__main__":
    main()
