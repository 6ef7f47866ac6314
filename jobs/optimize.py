"""Optimizers, and the learning rate as a function of the step alone: a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim import Optimizer as TorchOptimizer

from hpc.training import Optimizer, Scheduler

# one_cycle of Smith & Topin (arXiv 1708.07120): 30 % of the steps rise from 1/25 of the highest rate.
_RISE, _START = 0.3, 1 / 25


def build_optimizer(settings: Optimizer, model: nn.Module) -> TorchOptimizer:
    """Biases and normalisation weights (one dimension) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.name == "sgd":
        nesterov = settings.momentum > 0
        return SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov)
    kind = AdamW if settings.name == "adamw" else Adam
    return kind(groups, lr=settings.lr, betas=settings.betas)


def learning_rate(
    settings: Scheduler, highest: float, total_steps: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """The rate of step 0, 1, ... total_steps - 1."""
    warmup = round(settings.warmup_epochs * steps_per_epoch)

    def shape(step: int) -> float:
        if settings.name == "one_cycle":
            return _one_cycle(step / max(total_steps - 1, 1), settings.final)
        if step < warmup:
            return (step + 1) / warmup
        if settings.name == "cosine":
            return _cosine((step - warmup) / max(total_steps - 1 - warmup, 1), 1.0, settings.final)
        if settings.name == "exponential":
            return float(settings.gamma ** ((step - warmup) // steps_per_epoch))
        return 1.0

    return lambda step: highest * shape(step)


def _one_cycle(done: float, final: float) -> float:
    if done < _RISE:
        return _cosine(done / _RISE, _START, 1.0)
    return _cosine((done - _RISE) / (1 - _RISE), 1.0, final)


def _cosine(done: float, start: float, end: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
