"""One optimizer step: the rate, the gradients, whether they are finite, and the weights' change or none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from datasets.loader import Batch
from jobs.passes import Passes
from jobs.tasks.counts import Counts


class Updater:
    """The step of a run; what it does is a function of the weights, the batch and the step's number."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        passes: Passes,
        rates: Callable[[int], Sequence[float]],
        clip_norm: float | None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`rates`: of each of the optimizer's groups; `changed` is called when the weights are those after a step."""
        self._model, self._optimizer, self._passes = model, optimizer, passes
        self._rates, self._clip_norm, self._changed = rates, clip_norm, changed

    def gradients(self, batch: Batch, step: int) -> tuple[Counts, bool]:
        """The gradients of the step after `step` others, and whether a loss or they are not finite on this rank."""
        for group, rate in zip(self._optimizer.param_groups, self._rates(step), strict=True):
            group["lr"] = rate
        counts = self._passes.backward(batch, step)
        if not math.isfinite(counts.total_loss()):
            return counts, True
        with self._passes.clock.phase("optimizer"):
            return counts, not math.isfinite(self._norm())

    def apply(self) -> None:
        """Change the weights."""
        with self._passes.clock.phase("optimizer"):
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._passes.commit()
            self._changed()

    def drop(self) -> None:
        """Leave the weights as they were before the step, and running statistics too."""
        self._optimizer.zero_grad(set_to_none=True)
        self._passes.drop()

    def _norm(self) -> float:
        """The norm of all gradients, before they are clipped to clip_norm; they are averaged: the same on all ranks."""
        if self._clip_norm is not None:
            return float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm))
        return float(torch.nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None]))
