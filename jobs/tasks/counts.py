"""Sums over samples, the same whoever adds them up, and the rows that are kept of evaluated samples."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jobs.pictured import Gallery
from jobs.tasks.contract import Task


class Counts:
    """Loss sums and a task's counts of the samples seen so far, on one device.

    Loss sums are kept apart for `parts` (virtual ranks): who adds them up must not matter.
    """

    def __init__(self, cells: int, device: torch.device, parts: int = 1) -> None:
        self.cells = torch.zeros(cells, dtype=torch.int64, device=device)
        self.loss = torch.zeros(parts, dtype=torch.float64, device=device)
        self.samples = 0

    def total_loss(self) -> float:
        """Over all parts, in an order that cannot matter."""
        return total(self.loss)

    def add(self, task: Task, outputs: Tensor, targets: Tensor, mean_loss: Tensor, part: int = 0) -> None:
        """One batch of B samples and the mean of its losses."""
        self.cells += task.count(outputs.detach(), targets)
        self.loss[part] += mean_loss.detach().double() * len(targets)
        self.samples += len(targets)

    def state(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint; the loss comes back bit by bit."""
        return {"cells": self.cells.tolist(), "loss": self.total_loss().hex(), "samples": self.samples}

    def load(self, state: dict[str, Any]) -> None:
        """Add what `state()` gave."""
        self.cells += torch.tensor(state["cells"], dtype=torch.int64, device=self.cells.device)
        self.loss[0] += float.fromhex(state["loss"])
        self.samples += state["samples"]


def total(losses: Tensor) -> float:
    """(parts,) -> the exact sum, rounded once; not a number where one of them is none."""
    values = losses.tolist()
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


class Kept:
    """What is kept of the samples that this rank has evaluated."""

    def __init__(self, task: Task) -> None:
        self._task = task
        targets, rows = task.nothing()
        empty = (torch.empty(0, dtype=torch.int64), targets, rows, torch.empty(0))
        self._columns = [[column] for column in empty]
        self.gallery = Gallery()

    def add(
        self, samples: Tensor, outputs: Tensor, targets: Tensor, losses: Tensor, inputs: Tensor | None = None
    ) -> None:
        """A batch: (B,) sample numbers, and losses (B,); with inputs label maps are kept for pictures, too."""
        if inputs is not None and self._task.name == "segmentation":
            task: Any = self._task
            self.gallery.add(samples, inputs, outputs, task.drawn(targets), losses)
        some = targets if self._columns[1][0].shape[1:] == targets.shape[1:] else targets.new_empty(len(targets), 0)
        new = (samples, some, self._task.rows(outputs, targets), losses)
        for column, tensor in zip(self._columns, new, strict=True):
            column.append(tensor.to(column[0].dtype))

    def columns(self) -> list[Tensor]:
        """Samples (n,), targets, rows (n, R) and losses (n,) on the CPU, in the order of adding."""
        return [torch.cat([tensor.cpu() for tensor in column]) for column in self._columns]
