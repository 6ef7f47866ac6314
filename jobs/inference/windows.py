"""Sliding windows: a volume in overlapping parts of the training's size, blended by a Gaussian.

Positions and weights are those of MONAI's `sliding_window_inference(mode="gaussian", sigma_scale=0.125)`; the idea and
its Gaussian are nnU-Net's (Isensee et al., Nature Methods 18, 2021). What is averaged are class probabilities.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_SIGMA = 0.125
"""of the window's size"""
_LEAST = 1e-3
"""weight of the corners of a window, at least"""

Predict = Callable[[Tensor], Tensor]
"""(B, C, *size) on the network's device -> (B, K, *size) probabilities"""


@dataclass(frozen=True)
class Windows:
    """How a volume is cut. Raises ValueError."""

    size: tuple[int, ...]
    """voxels along each axis"""
    overlap: float = 0.5
    """share of a window that the next one covers too, at least"""
    batch: int = 1
    """windows in one forward pass"""

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"a window of {' x '.join(map(str, self.size))} voxels is none")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap {self.overlap:g} must be 0 or more and below 1; 0.5 is usual")
        if self.batch < 1:
            raise ValueError(f"a batch of {self.batch} windows is none; use 1 or more")

    def starts(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """First voxel of each window in a volume of spatial `shape`, each axis at least as long as the window."""
        axes = []
        for have, size in zip(shape, self.size, strict=True):
            step = size if have == size else max(1, int(size * (1 - self.overlap)))
            count = 1 + max(0, math.ceil((have - size) / step))
            axes.append([min(number * step, have - size) for number in range(count)])
        return list(itertools.product(*axes))


def importance(size: Sequence[int]) -> Tensor:
    """(*size) float32: 1 in the middle of a window, falling as a Gaussian of sigma size / 8, at least 0.001."""
    weights = torch.ones(())
    for length in size:
        places = torch.arange(length, dtype=torch.float32) - (length - 1) / 2
        weights = weights[..., None] * torch.exp(places**2 / (-2 * (_SIGMA * length) ** 2))
    return weights.clamp(min=max(float(weights.min()), _LEAST))


def slide(volume: Tensor, predict: Predict, windows: Windows, device: torch.device) -> Tensor:
    """(K, *spatial) float32 on the CPU: the weighted mean of what `predict` says of all windows that hold a voxel.

    volume: (C, *spatial) on the CPU. Smaller ones are padded as the loader pads: about the centre, edges repeated.
    Memory: (K + 1) float32 numbers for each voxel, and what one batch of windows takes on the device.
    """
    padded, inner = _padded(volume, windows.size)
    starts = windows.starts(padded.shape[1:])
    if len(starts) == 1:
        return predict(padded[None].to(device))[0].float().cpu()[(slice(None), *inner)]
    weights = importance(windows.size)
    total, mass = torch.empty(0), torch.zeros(padded.shape[1:])
    for some in _batches(starts, windows.batch):
        boxes = [_box(start, windows.size) for start in some]
        told = predict(torch.stack([padded[(slice(None), *box)] for box in boxes]).to(device)).float().cpu()
        if not total.numel():
            total = torch.zeros(told.shape[1], *padded.shape[1:])
        for box, values in zip(boxes, told, strict=True):
            total[(slice(None), *box)] += values * weights
            mass[box] += weights
    total /= mass
    return total[(slice(None), *inner)]


def mean_over_windows(volume: Tensor, predict: Predict, windows: Windows, device: torch.device) -> Tensor:
    """(K,): the mean of what `predict`, (B, C, *size) -> (B, K), says of all windows of a volume (C, *spatial)."""
    padded, _ = _padded(volume, windows.size)
    starts = windows.starts(padded.shape[1:])
    told = []
    for some in _batches(starts, windows.batch):
        parts = torch.stack([padded[(slice(None), *_box(start, windows.size))] for start in some])
        told.append(predict(parts.to(device)).float().cpu())
    return torch.cat(told).mean(0)


def centre(volume: Tensor, size: Sequence[int]) -> Tensor:
    """(C, *size): the box about the centre of a volume (C, *spatial), as datasets.patches takes it for validation."""
    padded, _ = _padded(volume, size)
    starts = [(have - want) // 2 for have, want in zip(padded.shape[1:], size, strict=True)]
    return padded[(slice(None), *_box(starts, size))]


def _padded(volume: Tensor, size: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """The volume with each axis as long as the window or longer, and where the volume is in it."""
    lacks = [max(0, want - have) for have, want in zip(volume.shape[1:], size, strict=True)]
    before = [-(-lack // 2) for lack in lacks]  # the loader's corner is (have - want) // 2
    inner = tuple(slice(first, first + have) for first, have in zip(before, volume.shape[1:], strict=True))
    if not any(lacks):
        return volume, inner
    pads = [pad for first, lack in zip(before[::-1], lacks[::-1], strict=True) for pad in (first, lack - first)]
    return functional.pad(volume[None], pads, mode="replicate")[0], inner


def _box(start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))


def _batches(starts: Sequence[tuple[int, ...]], size: int) -> Iterator[Sequence[tuple[int, ...]]]:
    for first in range(0, len(starts), size):
        yield starts[first : first + size]
