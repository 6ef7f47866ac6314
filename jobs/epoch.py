"""The sums of an epoch's training steps: each rank counts its own, and now and then all ranks add them up."""

from __future__ import annotations

import time
from typing import Any

import torch

from jobs.engine import Engine
from jobs.tasks.contract import Scores, Task
from jobs.tasks.counts import Counts, total

_FLUSH_STEPS = 10


class EpochSums:
    """Of the steps of one epoch so far, over all ranks on rank 0."""

    def __init__(self, engine: Engine, task: Task, saved: dict[str, Any] | None) -> None:
        """`saved`: what `state()` gave in an earlier attempt."""
        self._engine, self._task = engine, task
        self.counts = Counts(task.cells, engine.device)
        self._pending: list[tuple[int, Counts]] = []
        if saved and engine.is_main:
            self.counts.load(saved)

    def add(self, step: int, counts: Counts) -> None:
        """This rank's share of a step; empty counts where the step was skipped."""
        self._pending.append((step, counts))

    @property
    def full(self) -> bool:
        """Whether it is time to flush."""
        return len(self._pending) >= _FLUSH_STEPS

    def flush(self) -> list[tuple[int, Scores]]:
        """Sum what was added over the ranks. On rank 0: each step that was not skipped, and its scores."""
        if not self._pending:
            return []
        pending, self._pending, device = self._pending, [], self._engine.device
        cells = self._engine.sum(torch.stack([counts.cells for _, counts in pending]))
        losses = self._engine.sum(torch.stack([counts.loss for _, counts in pending]))
        samples = self._engine.sum(torch.tensor([counts.samples for _, counts in pending])).tolist()
        found = []
        for (step, _), own, loss, number in zip(pending, cells, losses, samples, strict=True):
            if not number or not self._engine.is_main:
                continue
            found.append((step, self._task.scores(own.numpy(), total(loss) / number, number, None)))
            self.counts.cells += own.to(device)
            self.counts.loss += total(loss)
            self.counts.samples += number
        return found

    def scores(self) -> Scores:
        """Of all steps that were flushed."""
        counts = self.counts
        mean = counts.total_loss() / counts.samples if counts.samples else float("nan")
        return self._task.scores(counts.cells.cpu().numpy(), mean, counts.samples, None)

    def state(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint."""
        return self.counts.state()


class Pace:
    """How fast the steps of an epoch go in this attempt, what is done beside them left out."""

    def __init__(self, step: int, waited: float) -> None:
        """`step`: done before; `waited`: seconds that the loader has waited before."""
        self._started, self._step, self._waited = time.monotonic(), step, waited
        self.aside = 0.0
        """seconds spent beside the training"""

    def stop(self, step: int, waited: float) -> None:
        """The steps of the epoch are done."""
        seconds = time.monotonic() - self._started - self.aside
        self.steps = step - self._step
        self.steps_per_second = self.steps / seconds if self.steps else 0.0
        self.waiting_share = (waited - self._waited) / seconds if self.steps else 0.0
