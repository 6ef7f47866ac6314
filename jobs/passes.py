"""Forward and backward passes over one rank's share of a batch: as the ranks are laid out, or in virtual ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from datasets.loader import Batch
from hpc.training import Train
from jobs import acceleration
from jobs.engine import Engine
from jobs.precision import Precision
from jobs.stepclock import StepClock
from jobs.strategies import Strategy
from jobs.tasks.contract import Task
from jobs.tasks.counts import Counts, Kept
from jobs.virtual import BatchNorms, Gradients, VirtualRanks


class Passes(Protocol):
    """What a step and an evaluation are made of."""

    precision: Precision
    clock: StepClock

    def backward(self, batch: Batch, step: int) -> Counts:
        """Fill .grad with the gradient of the global batch's mean loss; counts of this rank's share."""

    def forward(self, batch: Batch, counts: Counts, kept: Kept) -> None:
        """Add what the model makes of this rank's share of a batch; no gradients."""

    def counts(self) -> Counts:
        """Empty ones."""

    def commit(self) -> None:
        """The step counts: running statistics follow."""

    def drop(self) -> None:
        """The step does not count: running statistics are as before it."""


@dataclass(frozen=True)
class _Held:
    """What passes are made with."""

    settings: Train
    engine: Engine
    strategy: Strategy
    precision: Precision
    model: nn.Module
    task: Task
    evaluated: nn.Module
    still: Sequence[nn.Module]


def make_passes(
    settings: Train,
    engine: Engine,
    strategy: Strategy,
    precision: Precision,
    model: nn.Module,
    task: Task,
    evaluated: nn.Module | None = None,
    still: Sequence[nn.Module] = (),
) -> Passes:
    """Those of `train.deterministic`, over the parameters that are trained now. Raises UserError for a model that the
    layout would show in.

    precision: the run's, whose loss scale outlives a stage; evaluated: the model of `forward`, if it is another;
    still: layers of the trained one that stay in eval mode.
    """
    held = _Held(settings, engine, strategy, precision, model, task, evaluated or model, still)
    return VirtualPasses(held) if settings.deterministic == "layout" else RankPasses(held)


class _Common:
    def __init__(self, held: _Held) -> None:
        self._settings, self._engine, self._strategy = held.settings, held.engine, held.strategy
        self.precision, self._model, self._task = held.precision, held.model, held.task
        self._evaluated, self._still = held.evaluated, held.still
        self.clock = held.engine.clock
        self.layout = acceleration.layout(held.settings)
        """of inputs in memory"""

    def _train(self) -> None:
        """Training mode, but for the layers that are still."""
        self._model.train()
        for module in self._still:
            module.eval()

    def _seed(self, *key: int) -> None:
        """Dropout is a function of the seed and this key: no generator state is stored."""
        sequence = np.random.SeedSequence([self._settings.seed, *key])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))

    def _evaluate(self, x: Tensor, y: Tensor, samples: Tensor, counts: Counts, kept: Kept, part: int = 0) -> None:
        with self.precision.autocast(), acceleration.uncompiled(self._settings):
            outputs = self._evaluated(self.layout(x))
        losses = self._task.losses(outputs, y)
        counts.add(self._task, outputs, y, losses.mean(), part)
        kept.add(samples, outputs, y, losses, x)


class RankPasses(_Common):
    """Each rank works off its share in `accumulate` parts; gradients are averaged over the ranks."""

    def __init__(self, held: _Held) -> None:
        super().__init__(held)
        self._buffers = list(held.model.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]

    def counts(self) -> Counts:
        return Counts(self._task.cells, self._engine.device)

    def backward(self, batch: Batch, step: int) -> Counts:
        self._train()
        for buffer, before in zip(self._buffers, self._before, strict=True):
            before.copy_(buffer)
        parts, counts = self._settings.accumulate, self.counts()
        for part, (x, y) in enumerate(zip(batch.inputs.chunk(parts), batch.targets.chunk(parts), strict=True)):
            self._seed(step, part, self._engine.rank)
            with self._strategy.part(last=part == parts - 1):
                self._part(x, y, counts)
        return counts

    def _part(self, x: Tensor, y: Tensor, counts: Counts) -> None:
        with self.clock.phase("forward"):
            with self.precision.autocast():
                outputs = self._strategy.forward(self.layout(x))
            loss = self._task.loss(outputs, y)
        with self.clock.phase("backward"):
            self._strategy.backward(self.precision.scale(loss / self._settings.accumulate))
        counts.add(self._task, outputs, y, loss)

    def forward(self, batch: Batch, counts: Counts, kept: Kept) -> None:
        if len(batch.targets):
            self._evaluate(batch.inputs, batch.targets, batch.samples, counts, kept)
        elif self._strategy.joint:  # the others wait for this rank's shards of the weights
            with self.precision.autocast(), acceleration.uncompiled(self._settings):
                self._evaluated(batch.inputs.new_zeros(1, *batch.inputs.shape[1:]))

    def commit(self) -> None:
        pass  # the layers have kept their own

    def drop(self) -> None:
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)


class VirtualPasses(_Common):
    """Each virtual rank is a pass of its own, whoever works it off, and all sums have one order (jobs/virtual.py)."""

    def __init__(self, held: _Held) -> None:
        super().__init__(held)
        engine, model = held.engine, held.model
        self._ranks = VirtualRanks(held.settings.virtual_ranks, engine.rank, engine.world_size)
        self._norms = BatchNorms(self._ranks, model)
        self._gradients = Gradients(self._ranks, model)
        self._ranks.broadcast(model)

    def counts(self) -> Counts:
        return Counts(self._task.cells, self._engine.device, self._ranks.count)

    def backward(self, batch: Batch, step: int) -> Counts:
        self._train()
        counts = self.counts()
        for v, (x, y) in self._ranks.parts(batch.inputs, batch.targets):
            self._seed(step, v)
            with self.clock.phase("forward"):
                with self._norms.capture(v), self.precision.autocast():
                    outputs = self._model(self.layout(x))
                loss = self._task.loss(outputs, y)
            with self.clock.phase("backward"):
                torch.autograd.backward(self.precision.scale(loss / self._ranks.count))
                self._gradients.add()
            counts.add(self._task, outputs, y, loss, v)
        with self.clock.phase("backward"):
            self._gradients.reduce()
        return counts

    def forward(self, batch: Batch, counts: Counts, kept: Kept) -> None:
        for v, (x, y, samples) in self._ranks.parts(batch.inputs, batch.targets, batch.samples):
            self._evaluate(x, y, samples, counts, kept, v)

    def commit(self) -> None:
        self._norms.commit()

    def drop(self) -> None:
        self._norms.drop()
