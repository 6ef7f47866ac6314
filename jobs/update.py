"""One optimizer step over one rank's share of a batch: forward, backward, the weights' change or none."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from datasets.loader import Batch
from hpc.experiment import Train
from jobs.engine import Engine
from jobs.tasks.classification import Classification, Counts


class Updater:
    """The step of a run; what it does is a function of the weights, the batch and the step's number."""

    def __init__(
        self,
        settings: Train,
        engine: Engine,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        task: Classification,
        num_classes: int,
        rate: Callable[[int], float],
    ) -> None:
        self._settings, self._engine, self._model, self._optimizer = settings, engine, model, optimizer
        self._task, self._num_classes, self._rate = task, num_classes, rate
        self._parallel = engine.wrap(model)
        self._buffers = list(model.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]

    def gradients(self, batch: Batch, step: int) -> tuple[Counts, bool]:
        """The gradients of the step after `step` others, and whether a loss or they are not finite on this rank."""
        self._parallel.train()
        self._keep_buffers()
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(step)
        parts = self._settings.accumulate
        counts = Counts(self._num_classes, self._engine.device)
        for part, (x, y) in enumerate(zip(batch.inputs.chunk(parts), batch.targets.chunk(parts), strict=True)):
            torch.manual_seed(self._dropout_seed(step, part))
            if part < parts - 1:
                with self._engine.without_sync(self._parallel):
                    self._backward(x, y, parts, counts)
            else:
                self._backward(x, y, parts, counts)
        return counts, not (math.isfinite(float(counts.loss)) and math.isfinite(self._norm()))

    def apply(self) -> None:
        """Change the weights."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def drop(self) -> None:
        """Leave the weights as they were before the step, and running statistics too."""
        self._optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._engine.device.type, torch.bfloat16, enabled=self._settings.precision == "bf16")

    def _keep_buffers(self) -> None:
        for buffer, before in zip(self._buffers, self._before, strict=True):
            before.copy_(buffer)

    def _backward(self, x: Tensor, y: Tensor, parts: int, counts: Counts) -> None:
        with self.autocast():
            outputs = self._parallel(x)
        loss = self._task.loss(outputs, y)
        torch.autograd.backward(loss / parts)
        counts.add(outputs, y, loss)

    def _norm(self) -> float:
        """The norm of all gradients, before they are clipped to clip_norm; they are averaged: the same on all ranks."""
        limit = self._settings.clip_norm
        if limit is not None:
            return float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), limit))
        return float(torch.nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None]))

    def _dropout_seed(self, step: int, part: int) -> int:
        """Dropout is a function of (seed, step, part, rank): no generator state is stored."""
        key = np.random.SeedSequence([self._settings.seed, step, part, self._engine.rank])
        return int(key.generate_state(1, np.uint64)[0] >> 1)
