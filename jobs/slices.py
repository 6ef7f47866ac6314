"""A sample's arrays to pixels: which slice, which way up, at which size, in which greys.

Volumes lie as in nibabel and nnU-Net's viewers: the patient's left is on the left, the front on top (RAS, slices along
the last axis). Images are drawn as they are, row 0 on top.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAN_COLOUR, OPACITY = (255, 0, 255), 0.5
"""of voxels that are not a number; of colours over a picture"""

Slice = NDArray[np.uint8]
"""(height, width, 3), row 0 on top"""


def face(plane: NDArray[Any]) -> NDArray[Any]:
    """(..., x, y) in RAS to (..., row, column): x to the right, y upwards."""
    return plane[..., ::-1].swapaxes(-2, -1)


def fit(sides: Sequence[int], spacing: Sequence[float], cell: int) -> tuple[int, int]:
    """(height, width) in pixels of true proportions, the longer one the cell's."""
    true = np.array(sides) * np.where(np.isfinite(spacing) & (np.asarray(spacing) > 0), spacing, 1.0)
    height, width = np.maximum((true * (cell / true.max())).round(), 1).astype(int).tolist()
    return height, width


def resize(pixels: NDArray[np.uint8], size: tuple[int, int], nearest: bool = False) -> NDArray[np.uint8]:
    """size: (height, width). Larger pixels as squares, smaller ones as means unless `nearest`."""
    from PIL import Image

    means = not nearest and (size[0] < pixels.shape[0] or size[1] < pixels.shape[1])
    how = Image.Resampling.BOX if means else Image.Resampling.NEAREST
    resized: NDArray[np.uint8] = np.asarray(Image.fromarray(pixels).resize(size[::-1], how))
    return resized


def is_colour(channels: int, spatial_axes: int, dtype: np.dtype[Any]) -> bool:
    """Three channels are a colour in images, and where they are bytes."""
    return channels == 3 and (spatial_axes == 2 or dtype == np.uint8)


def level(labels: NDArray[Any] | None, num: int) -> int:
    """The slice along the last axis with most label voxels, else the middle one."""
    if labels is not None and labels.any():
        return int((labels != 0).sum(axis=(0, 1)).argmax())
    return num // 2


def to_bytes(shown: NDArray[Any]) -> Slice:
    """(1 or 3, height, width) of any dtype to colours; one range for all three, bytes of a colour as they are."""
    missing = np.isnan(shown).any(axis=0)
    if shown.dtype != np.uint8 or len(shown) == 1:
        numbers = shown.astype(np.float64)
        finite = numbers[np.isfinite(numbers)]
        low, high = np.percentile(finite, (1, 99)) if finite.size else (0.0, 0.0)
        if low == high and finite.size:  # few voxels differ
            low, high = float(finite.min()), float(finite.max())
        share = (numbers - low) / (high - low) if high > low else np.full(shown.shape, 0.5)
        shown = (np.nan_to_num(share, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1) * 255).round().astype(np.uint8)
    colours = np.moveaxis(np.broadcast_to(shown, (3, *shown.shape[1:])), 0, -1).copy()
    colours[missing] = NAN_COLOUR
    return colours


def blend(plain: Slice, here: NDArray[np.bool_], colour: Sequence[int], opacity: float = OPACITY) -> None:
    """Lay the colour over the pixels of `plain` that are `here` (height, width), in place."""
    mixed = plain[here] * (1 - opacity) + np.array(colour) * opacity
    plain[here] = mixed.round().astype(np.uint8)
