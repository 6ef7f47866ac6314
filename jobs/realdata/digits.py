"""Handwritten digits of scikit-learn (UCI's optical recognition set): 1,797 images of 8 x 8 in folders by class."""

from __future__ import annotations

import gzip
import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.realdata import wheels

SCIKIT_LEARN = "scikit-learn==1.9.1"


def fetch(folder: Path) -> None:
    packed = wheels.read(SCIKIT_LEARN, "sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(io.StringIO(gzip.decompress(packed).decode()), delimiter=",")
    for number, row in enumerate(rows):
        target = folder / f"{int(row[-1])}"
        target.mkdir(exist_ok=True)
        image = Image.fromarray(np.minimum(row[:-1].reshape(8, 8) * 16, 255).astype(np.uint8))
        image.save(target / f"digit-{number:04d}.png")


def fetch_twice(folder: Path) -> None:
    """The same, every fourth image there a second time under another name, as in a folder that was never cleaned."""
    fetch(folder)
    for path in sorted(folder.glob("*/*.png"))[::4]:
        shutil.copyfile(path, path.with_name(f"{path.stem}-copy.png"))


def pack(folder: Path, duplicates: str = "keep") -> list[str]:
    return [str(folder), "--labels", "folders", "--normalise", "unit", "--duplicates", duplicates]
