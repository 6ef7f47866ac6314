"""What a loader keeps in memory: one ring of batches, and an index that stays small for a million samples."""

import os
import resource
from pathlib import Path
from typing import Any

import numpy as np

from datasets import Loader, layout, open_volumes
from datasets.drafts import Plan, allocate, complete
from datasets.layout import VolumeFile

SHAPE = (1, 4, 4, 4)
MILLION = 1_000_000
STEPS = 2000


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


def section(folder: Path, rounds: int) -> None:
    print(f"\nmemory, a file of {MILLION:,} samples")
    volumes = make(folder / "many.h5", MILLION)
    before = resident()
    volumes = open_volumes(folder / "many.h5")
    print(f"  index: {resident() - before:.0f} MB, {(resident() - before):.0f} bytes a sample")
    for sampler in ("uniform", "balanced"):
        loader = Loader(volumes, batch_size=64, sampler=sampler)
        sizes = []
        for step, _ in enumerate(loader):
            if step in (STEPS // 20, STEPS):
                sizes.append(resident())
            if step == STEPS:
                break
        slots = len(loader._ring.slots)
        print(f"  {sampler}: {slots} slots; from step {STEPS // 20} to {STEPS}: {sizes[1] - sizes[0]:+.1f} MB")
    print(f"  highest of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")
    (folder / "many.h5").unlink()
