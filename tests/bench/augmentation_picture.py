"""Draws what each option does to a slice: `python -m tests.bench.augmentation_picture T1.nii.gz WM.nii.gz OUT.png`.

docs/images/augment.png was made so from the ICBM 152 template and its white matter map as they ship with nilearn.
"""

import sys
from typing import Any

import matplotlib
import nibabel
import numpy as np
import torch

from datasets.augment import Augment

matplotlib.use("Agg")
SLICE, SAMPLE = 95, 3
TILES: dict[str, dict[str, Any]] = {
    "as stored": {},
    "flip: [0]": {"flip": [0], "p": {"flip": 1}},
    "rotate: 20": {"rotate": 20},
    "zoom: [1.25, 1.25]": {"zoom": [1.25, 1.25]},
    "shear: 20": {"shear": 20},
    "elastic: {spacing: 40, magnitude: 12}": {"elastic": {"spacing": 40, "magnitude": 12}},
    "blur: [1.5, 1.5]": {"blur": [1.5, 1.5]},
    "low_resolution: [4, 4]": {"low_resolution": [4, 4]},
    "gamma: [0.6, 0.6]": {"gamma": [0.6, 0.6]},
    "gamma: [1.8, 1.8]": {"gamma": [1.8, 1.8]},
    "noise: 0.5": {"noise": 0.5},
    "cutout: {holes: 2, size: 0.3}": {"cutout": {"holes": 2, "size": 0.3}},
}


def main(volume: str, mask: str, out: str) -> None:
    from matplotlib import pyplot

    stored, labels = (
        np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj).astype(np.float32)
        for path in (volume, mask)
    )
    inputs = torch.from_numpy((stored - stored.mean()) / stored.std())[None, None]
    maps = torch.from_numpy((labels > labels.max() / 2).astype(np.uint8))[None]
    figure, axes = pyplot.subplots(2, 6, figsize=(13.2, 5.6), facecolor="black")
    for axis, (name, options) in zip(axes.flat, TILES.items(), strict=True):
        image, moved = Augment(**options)(inputs.clone(), np.array([SAMPLE]), 0, 0, maps.clone())
        assert moved is not None
        axis.imshow(image[0, 0, :, :, SLICE].T, origin="lower", cmap="gray", vmin=inputs.min(), vmax=inputs.max())
        axis.contour(moved[0, :, :, SLICE].T, levels=[0.5], colors="orange", linewidths=0.4)
        axis.set_title(name, color="white", fontsize=8)
        axis.axis("off")
    figure.tight_layout(pad=0.4)
    figure.savefig(out, dpi=72)


if __name__ == "__main__":
    main(*sys.argv[1:])
