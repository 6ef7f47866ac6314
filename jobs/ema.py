"""The exponential moving average of a model's weights: what is evaluated in place of the last ones.

After the t-th step that counts (t from 1): average += (1 - d) * (weights - average), d = min(decay, (1 + t)/(10 + t)),
the warm-up of TensorFlow's ExponentialMovingAverage(num_updates), so that the first weights are soon forgotten.
Buffers of floating point (running statistics of BatchNorm) are averaged with the weights, as timm's ModelEmaV3 does:
they belong to the weights of their steps; the other ones (counters) are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from hpc.errors import UserError
from hpc.optimisation import Ema as Settings


class Ema:
    """The averages as a second model beside the one that is trained."""

    def __init__(self, settings: Settings, model: nn.Module) -> None:
        """Raises UserError for a model that cannot be copied."""
        self._decay, self._source = settings.decay, model
        try:
            self.model = deepcopy(model).eval().requires_grad_(False)
        except (TypeError, RuntimeError) as error:
            raise UserError(f"train.ema needs a copy of the model, which it refuses ({error}): leave it out") from None
        self.updates = 0
        """Steps that count so far."""

    def restart(self) -> None:
        """The average is the weights as they are now."""
        with torch.no_grad():
            for mine, theirs in zip(_tensors(self.model), _tensors(self._source), strict=True):
                mine.copy_(theirs)
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """After a step that counts."""
        self.updates += 1
        share = 1 - min(self._decay, (1 + self.updates) / (10 + self.updates))
        averaged: list[tuple[Tensor, Tensor]] = []
        for mine, theirs in zip(_tensors(self.model), _tensors(self._source), strict=True):
            if mine.is_floating_point():
                averaged.append((mine, theirs))
            else:
                mine.copy_(theirs)
        kept, new = (list(column) for column in zip(*averaged, strict=True))
        torch._foreach_lerp_(kept, new, share)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
