"""Losses of single samples and voxels, in float32; a mean over them is the task's to take.

Tests compare each with a reference: torch, torchvision, MONAI, or the formula in NumPy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float = 0.0) -> Tensor:
    """(N,) of (N, K) and class numbers (N,); that of an ignored one (a number outside of the K classes) is 0."""
    known, safe = _known(logits, targets)
    losses = functional.cross_entropy(logits.float(), safe, weight=weights, label_smoothing=smoothing, reduction="none")
    return losses * known


def focal(logits: Tensor, targets: Tensor, weights: Tensor | None, gamma: float) -> Tensor:
    """(N,) as `cross_entropy`: w_t (1 - p_t)^gamma (-log p_t), Lin et al., arXiv 1708.02002, equation 5."""
    known, safe = _known(logits, targets)
    surprise = functional.cross_entropy(logits.float(), safe, reduction="none")  # deterministic on CUDA; gather is not
    losses = _modulation(-surprise, gamma) * surprise
    return losses * known if weights is None else losses * known * weights[safe]


def _known(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) which targets are classes, and the targets with class 0 in place of the others."""
    known = (targets >= 0) & (targets < logits.shape[1])
    return known, torch.where(known, targets, 0).long()


def _modulation(log_p: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma of log p <= 0; with a finite gradient at p = 1."""
    return (-torch.expm1(log_p)).clamp_min(1e-12) ** gamma if gamma else torch.ones_like(log_p)


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, positive: Tensor | None = None, negative: Tensor | None = None
) -> Tensor:
    """(B, K) of logits and labels of 0 and 1; `positive` and `negative` (K,) weigh the two terms (default 1)."""
    x, y = logits.float(), targets.float()
    losses = functional.binary_cross_entropy_with_logits(x, y, reduction="none")
    if positive is None and negative is None:
        return losses
    ones = x.new_ones(x.shape[1])
    return losses * torch.where(y > 0, ones if positive is None else positive, ones if negative is None else negative)


def binary_focal(logits: Tensor, targets: Tensor, gamma: float, alpha: float | None) -> Tensor:
    """(B, K) alpha_t (1 - p_t)^gamma (-log p_t), Lin et al., arXiv 1708.02002; alpha None: no alpha_t."""
    x, y = logits.float(), targets.float()
    log_p = functional.logsigmoid(torch.where(y > 0, x, -x))
    losses = _modulation(log_p, gamma) * -log_p
    return losses if alpha is None else losses * torch.where(y > 0, alpha, 1 - alpha)


def soft_dice(probabilities: Tensor, targets: Tensor, known: Tensor, classes: Tensor) -> Tensor:
    """(B,) 1 - the mean of each sample's soft Dice over `classes`, as nnU-Net has it (batch_dice off, smooth 1e-5).

    probabilities (B, K, *spatial), targets (B, *spatial) class numbers, known (B, *spatial) whether a voxel counts,
    classes (K,) whether a class counts. Milletari et al., arXiv 1606.04797, without the squares; Isensee et al., 2021.
    """
    numbers = torch.arange(len(classes), device=targets.device).view(1, -1, *[1] * (targets.ndim - 1))
    p = (probabilities * known[:, None]).flatten(2)
    truth = ((targets[:, None] == numbers) & known[:, None]).flatten(2)
    intersection, predicted, true = (p * truth).sum(2), p.sum(2), truth.sum(2)
    dice = (2 * intersection + _SMOOTH) / (predicted + true + _SMOOTH)
    return 1 - (dice * classes).sum(1) / classes.sum()


_SMOOTH = 1e-5
"""A class that is neither there nor predicted is right: 1."""
