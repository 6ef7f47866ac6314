"""Loading against what others do on the same volumes and cores: `make bench-data`. Prints ratios, asserts nothing.

Peers that are not installed are named; `pip install -e .[bench]` gets them. Warm page cache unless said otherwise.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datasets import Loader, codecs, open_volumes
from datasets.layout import INPUTS, VolumeFile
from datasets.writer import VolumeWriter
from tests.bench import memory
from tests.bench.compare import Comparison

BATCH, THREADS = 4, 2
VIEWS = 64


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    rounds: int
    size: int = 128
    samples: int = 64
    large: int = 256
    large_samples: int = 8
    patch: int = 64
    index: int = 1_000_000


def smooth(generator: np.random.Generator, size: int) -> np.ndarray[Any, Any]:
    """An int16 volume that compresses about as a scan does: slow intensities, noise in the lower bits."""
    axis = np.linspace(0, 3, size, dtype=np.float32)
    waves = np.sin(axis[:, None, None] * generator.uniform(1, 3)) * np.cos(axis[:, None] * 2) + np.sin(axis * 3)
    noise = generator.integers(0, 24, (size, size, size), dtype=np.int16)
    return ((waves * 400).astype(np.int16) + noise)[None]


def make(path: Path, size: int, samples: int, codec: str | None = None) -> VolumeFile:
    generator = np.random.default_rng(0)
    shape = (1, size, size, size)
    options: dict[str, Any] = {"dtype": "int16", "num_samples": samples, "class_names": ["a", "b"], "codec": codec}
    with VolumeWriter(path, shape=shape, **options) as writer:
        for number in range(samples):
            writer.add(smooth(generator, size), number % 2, id=f"s{number}", split="train")
    return open_volumes(path)


def all_of(batches: Any) -> Callable[[], None]:
    """An epoch, each batch let go before the next."""

    def run() -> None:
        for _ in batches:
            pass

    return run


def ours(volumes: VolumeFile, threads: int = THREADS, **options: Any) -> Callable[[], None]:
    return all_of(Loader(volumes, **{"batch_size": BATCH, "threads": threads, **options}))


class _Slices(Dataset[torch.Tensor]):
    """The usual way: the file opened in each worker, a sample or a random patch an item."""

    def __init__(self, path: Path, items: int, samples: int, patch: int | None = None) -> None:
        self.path, self.items, self.samples, self.patch = path, items, samples, patch
        self.file: h5py.File | None = None

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.file is None:
            self.file = h5py.File(self.path, "r", locking=False)
        volumes = self.file[INPUTS]
        if self.patch is None:
            return torch.from_numpy(volumes[index])
        x, y, z = (int(start) for start in torch.randint(volumes.shape[-1] - self.patch, (3,)))
        spans = (slice(start, start + self.patch) for start in (x, y, z))
        return torch.from_numpy(volumes[(index % self.samples, slice(None), *spans)])


def torch_loader(data: _Slices, workers: int) -> Callable[[], None]:
    return all_of(DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0))


class BareRing:
    """What reading costs at least: `work(sample, buffer)` in threads, into batches of memory that is used again."""

    def __init__(
        self, samples: int, sample_bytes: int, threads: int, work: Callable[[int, memoryview], object]
    ) -> None:
        self.threads, self.work, self.samples = threads, work, samples
        self.slots = [np.zeros((BATCH, sample_bytes), np.uint8) for _ in range(4)]

    def __call__(self) -> None:
        order = np.random.default_rng(0).permutation(self.samples)
        with ThreadPoolExecutor(self.threads) as pool:
            coming: list[list[Future[None]]] = []
            for number, batch in enumerate(order.reshape(-1, BATCH).tolist()):
                edges = [BATCH * part // self.threads for part in range(self.threads + 1)]
                slot = self.slots[number % len(self.slots)]
                coming.append([pool.submit(self._part, slot, batch, *edge) for edge in pairwise(edges)])
                if len(coming) > 2:
                    for future in coming.pop(0):
                        future.result()

    def _part(self, slot: Any, batch: list[int], first: int, last: int) -> None:
        for row in range(first, last):
            self.work(batch[row], memoryview(slot[row]))


def bare_preadv(volumes: VolumeFile, threads: int) -> BareRing:
    offset, size = volumes.shards[0].inputs.offset, int(np.prod(volumes.shape)) * 2
    assert offset is not None
    descriptor = os.open(volumes.paths[0], os.O_RDONLY)
    return BareRing(
        len(volumes), size, threads, lambda sample, buffer: os.preadv(descriptor, [buffer], offset + sample * size)
    )


def bare_boxes(volumes: VolumeFile, threads: int, size: int) -> BareRing:
    """Boxes anywhere, copied by NumPy from one memory map."""
    offset, sides = volumes.shards[0].inputs.offset, volumes.shape[1:]
    mapped = np.memmap(volumes.paths[0], np.int16, "r", offset or 0, (len(volumes), *sides))
    starts = np.random.default_rng(0).integers(0, sides[0] - size + 1, (len(volumes) * VIEWS, 3)).tolist()

    def copy(number: int, buffer: memoryview) -> None:
        spans = (slice(start, start + size) for start in starts[number])
        out = np.frombuffer(buffer, np.int16).reshape(size, size, size)
        np.copyto(out, mapped[(number % len(volumes), *spans)])

    return BareRing(len(starts), size**3 * 2, threads, copy)


def bare_decode(volumes: VolumeFile, threads: int, codec: str) -> BareRing:
    """Of stored bytes that are in memory already."""
    chunks, size = volumes.shards[0].inputs.chunks, int(np.prod(volumes.shape)) * 2
    assert chunks is not None
    whole = volumes.paths[0].read_bytes()
    stored = [memoryview(whole)[a : a + n] for a, n in zip(chunks.offsets[:, 0], chunks.sizes[:, 0], strict=True)]
    return BareRing(len(volumes), size, threads, lambda sample, buffer: codecs.decode(codec, stored[sample], buffer, 2))


def read_direct(path: Path, shape: tuple[int, ...], samples: int) -> Callable[[], None]:
    buffer = np.empty(shape, np.int16)

    def run() -> None:
        with h5py.File(path, "r", locking=False) as file:
            for sample in range(samples):
                file[INPUTS].read_direct(buffer, np.s_[sample])

    return run


def monai_cache(path: Path, samples: int) -> dict[str, Callable[[], None]]:
    """CacheDataset, everything in memory before it starts; {} where MONAI is not installed."""
    if find_spec("monai") is None:
        return {}
    from monai.data import CacheDataset
    from monai.data import DataLoader as MonaiLoader

    def load(sample: int) -> torch.Tensor:
        with h5py.File(path, "r", locking=False) as file:
            return torch.from_numpy(file[INPUTS][sample])

    cached = CacheDataset(list(range(samples)), load, progress=False, num_workers=0)
    return {"MONAI CacheDataset": all_of(MonaiLoader(cached, batch_size=BATCH, shuffle=True, num_workers=0))}


def contiguous(folder: Path, scale: Scale) -> None:
    path = folder / "contiguous.h5"
    volumes = make(path, scale.size, scale.samples)
    table = Comparison(f"whole volumes of {scale.size}^3 int16, contiguous", scale.samples * scale.size**3 * 2 / 1e9)
    ways: dict[str, Callable[[], object]] = {
        f"{name}, {threads} thread{'s' * (threads > 1)}": way(volumes, threads)
        for threads in (1, THREADS)
        for name, way in (("Loader", ours), ("bare preadv", bare_preadv))
    }
    data = _Slices(path, scale.samples, scale.samples)
    ways |= {f"torch DataLoader, h5py, {workers} workers": torch_loader(data, workers) for workers in (0, 2)}
    table.run(ways | monai_cache(path, scale.samples), scale.rounds)
    table.print()
    table.ratio("Loader, 1 thread", "bare preadv, 1 thread", 0.8)
    table.ratio("Loader, 2 threads", "bare preadv, 2 threads", 0.8)
    for peer, goal in (("torch DataLoader, h5py, 2 workers", 8), ("MONAI CacheDataset", 5)):
        table.ratio("Loader, 2 threads", peer, goal)
        table.ceiling("bare preadv, 2 threads", peer)
    cold = Comparison(f"the same, cold, {THREADS} threads", table.amount)
    ways = {"Loader": ours(volumes), "bare preadv": bare_preadv(volumes, THREADS)}
    cold.run(ways, scale.rounds, before=lambda: forget(path))
    cold.print()
    cold.ratio("Loader", "bare preadv", 0.9)
    path.unlink()


def forget(path: Path) -> None:
    """Out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def compressed(folder: Path, scale: Scale, codec: str = "blosc2-lz4") -> None:
    if find_spec("hdf5plugin") is None:
        print(f"\ncompressed: {'hdf5plugin is not installed: pip install -e .[compress]'}")
        return
    import hdf5plugin  # noqa: F401  # h5py's filters

    path = folder / "compressed.h5"
    samples = scale.samples // 2
    volumes = make(path, scale.size, samples, codec)
    share = path.stat().st_size / (samples * scale.size**3 * 2)
    title = f"whole volumes of {scale.size}^3 int16, {codec}, {share:.2f} of the size"
    table = Comparison(title, samples * scale.size**3 * 2 / 1e9)
    ways: dict[str, Callable[[], object]] = {
        "Loader, 2 threads": ours(volumes),
        "bare decoding, 2 threads": bare_decode(volumes, THREADS, codec),
        "h5py read_direct, hdf5plugin": read_direct(path, volumes.shape, len(volumes)),
    }
    table.run(ways, scale.rounds)
    table.print()
    table.ratio("Loader, 2 threads", "bare decoding, 2 threads", 0.8)
    table.ratio("Loader, 2 threads", "h5py read_direct, hdf5plugin", 2)
    path.unlink()


def patches(folder: Path, scale: Scale) -> None:
    path = folder / "large.h5"
    volumes = make(path, scale.large, scale.large_samples)
    count = scale.large_samples * VIEWS
    table = Comparison(f"patches of {scale.patch}^3 from contiguous volumes of {scale.large}^3", count, "patches/s")
    data = _Slices(path, count, scale.large_samples, scale.patch)
    options = {"patch": (scale.patch,) * 3, "views": VIEWS}
    ways: dict[str, Callable[[], object]] = {
        "Loader, 1 thread": ours(volumes, 1, **options),
        "Loader, 2 threads": ours(volumes, **options),
        "bare copies from a memory map, 2 threads": bare_boxes(volumes, THREADS, scale.patch),
        "torch DataLoader, h5py, 0 workers": torch_loader(data, 0),
        "torch DataLoader, h5py, 2 workers": torch_loader(data, 2),
    }
    table.run(ways, scale.rounds)
    table.print()
    for workers in (0, 2):
        table.ratio("Loader, 2 threads", f"torch DataLoader, h5py, {workers} workers", 10)
        table.ceiling("bare copies from a memory map, 2 threads", f"torch DataLoader, h5py, {workers} workers")
    path.unlink()


def million(folder: Path, scale: Scale) -> None:
    memory.section(folder, scale.index)


SECTIONS = {"contiguous": contiguous, "compressed": compressed, "patches": patches, "memory": million}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="few small volumes, to see that it runs")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        sys.exit(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    logging.disable(logging.WARNING)
    small = {"size": 16, "samples": 8, "large": 32, "large_samples": 2, "patch": 8, "index": 10_000}
    scale = Scale(options.rounds, **(small if options.small else {}))
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, h5py {h5py.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sections or SECTIONS:
            SECTIONS[name](Path(folder), scale)


if __name__ == "__main__":
    main()
