"""`make bench-memory`: activation checkpointing, and what a loader keeps in memory for many samples.

A loader keeps one ring of batches, and an index that stays small for a million samples.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from datasets import Loader, layout, open_volumes
from datasets.drafts import Plan, allocate, complete
from datasets.layout import VolumeFile
from tests.bench import checkpointing

SHAPE = (1, 4, 4, 4)
BATCH, STEPS = 8, 1000


def resident() -> float:
    """MB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def make(path: Path, samples: int) -> VolumeFile:
    """A file of zeros, of any number of samples."""
    plan = Plan(dtype="int16", task="classification", num_samples=samples, shape=SHAPE)
    draft = path.with_suffix(".draft")
    allocate(draft, plan)
    ids = [f"s{number}" for number in range(samples)]
    columns: dict[str, Any] = {
        layout.IDS: ids,
        layout.GROUPS: ids,
        layout.SPLIT: np.zeros(samples),
        layout.AFFINE: np.broadcast_to(np.eye(4), (samples, 4, 4)),
        layout.SOURCE_SHAPE: np.full((samples, 3), 4),
        layout.SCALE: np.ones((samples, 1)),
        layout.OFFSET: np.zeros((samples, 1)),
        layout.CHECKSUMS: np.zeros(samples),
        layout.TARGETS: np.arange(samples) % 3,
    }
    complete(draft, path, plan, columns, class_names=["a", "b", "c"])
    return open_volumes(path)


def section(folder: Path, samples: int) -> None:
    print(f"\nmemory, a file of {samples:,} samples")
    path = folder / "many.h5"
    make(path, samples)
    found = subprocess.run(
        [sys.executable, "-m", "tests.bench.memory", str(path)], capture_output=True, text=True, check=True
    )
    print(found.stdout, end="")
    path.unlink()


def main() -> None:
    """With a file: of it, in a process of its own, where nothing else has made memory and given it back."""
    if len(sys.argv) < 2:
        checkpointing.section(size=48, batch=2, rounds=7)
        with tempfile.TemporaryDirectory() as folder:
            section(Path(folder), 100_000)
        return
    np.argsort(np.zeros(10)), next(iter(Loader(make(Path(sys.argv[1] + ".few"), 100), batch_size=2)))
    before = resident()
    volumes = open_volumes(sys.argv[1])
    print(f"  opened: {resident() - before:.0f} MB, {(resident() - before) / len(volumes) * 1e6:.0f} bytes a sample")
    for sampler in ("uniform", "balanced"):
        loader = Loader(volumes, batch_size=BATCH, sampler=sampler)
        sizes = []
        for step, _ in enumerate(loader):
            if step in (STEPS // 20, STEPS):
                sizes.append(resident())
            if step == STEPS:
                break
        grown = sizes[1] - sizes[0]
        print(f"  {sampler}: {sizes[0] - before:.0f} MB with an epoch's order and {len(loader._ring.slots)} slots")
        verdict = "ok" if grown < 1 else "BELOW"
        print(f"  {verdict:<6}grows by {grown:.1f} MB from step {STEPS // 20} to {STEPS}, goal 0")


if __name__ == "__main__":
    main()
