"""The same label-map samples in every layout of a volume file, for the tests of reading and of the loader.

path = write(folder / "v.h5", "ragged")
volume(3, "ragged"), label_map(3, "ragged")     # what sample 3 holds
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.writer import VolumeWriter

SHAPE = (2, 9, 10, 11)
NAMES = ["nothing", "liver", "lesion", "absent"]
TRAIN, VALIDATION = 13, 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "whole chunks": {"chunk": SHAPE[1:]},
    "blosc2-lz4": {"codec": "blosc2-lz4"},
    "bitshuffle-lz4": {"codec": "bitshuffle-lz4"},
    "patch chunks": {"chunk": (4, 5, 6)},
    "patch chunks, zstd": {"chunk": (4, 5, 6), "codec": "zstd"},
    "patch chunks, blosc2": {"chunk": (4, 5, 6), "codec": "blosc2-zstd"},
    "ragged": {},
}


def shape_of(number: int, layout: str = "contiguous") -> tuple[int, ...]:
    return (2, 7 + number % 4, 12 - number % 3, 5 + number) if layout == "ragged" else SHAPE


def volume(number: int, layout: str = "contiguous") -> NDArray[np.int16]:
    return np.random.default_rng(number).integers(-900, 900, shape_of(number, layout)).astype(np.int16)


def label_map(number: int, layout: str = "contiguous") -> NDArray[np.uint8]:
    """A few voxels of class 1 and, in every other sample, of class 2."""
    draw = np.random.default_rng([number, 1]).random(shape_of(number, layout)[1:])
    return np.where(draw < 0.02, 1, np.where((draw > 0.99) & (number % 2 == 0), 2, 0)).astype(np.uint8)


def foreground(layout: str, kept: int = 6) -> NDArray[np.int32]:
    """(N, K, kept) places of each class."""
    table = np.full((TRAIN + VALIDATION, len(NAMES), kept), -1, np.int32)
    for number in range(len(table)):
        for label in range(len(NAMES)):
            places = np.flatnonzero(label_map(number, layout) == label)[:kept]
            table[number, label, : len(places)] = places
    return table


def write(path: Path, layout: str, task: str = "segmentation") -> Path:
    maps = task == "segmentation"
    options: dict[str, Any] = {"dtype": "int16", "num_samples": TRAIN + VALIDATION, "class_names": NAMES}
    options |= {"shape": None if layout == "ragged" else SHAPE, **LAYOUTS[layout]}
    with VolumeWriter(path, task=task, foreground=foreground(layout) if maps else None, **options) as writer:
        for number in range(TRAIN + VALIDATION):
            target = label_map(number, layout) if maps else number % 3
            split = "train" if number < TRAIN else "validation"
            writer.add(volume(number, layout), target, id=f"s{number}", split=split, scale=0.01, offset=0.5)
    return path
