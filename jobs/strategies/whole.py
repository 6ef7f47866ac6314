"""The contract of all strategies, and those that hold the whole model on each rank: one process, and torch's DDP."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hpc.training import Train
from jobs.engine import Engine


class Strategy:
    """One process, or ranks whose gradients are added up elsewhere.

        strategy.shard(model, average)         # once, when they have their first weights
        strategy.begin(build)                  # each stage
        with strategy.part(last=True):         # each part of a step
            loss = f(strategy.forward(x))
            strategy.backward(loss)
        norm = strategy.norm()
        strategy.scale_gradients(factor)
        strategy.step()                        # or strategy.drop()

    Every call is one of all ranks together. Gradients are averaged over the ranks once the last part is done.
    """

    joint = False
    """A forward pass is one of all ranks together: a rank without samples takes part in it, too."""

    def __init__(self, settings: Train, engine: Engine, model: nn.Module) -> None:
        self._settings, self._engine, self._model = settings, engine, model
        self._parallel: nn.Module = model
        self.optimizer: Optimizer
        """torch's own: its groups have the rates."""

    def shard(self, *models: nn.Module) -> None:
        """Keep of these, which are equal on all ranks, what this rank holds; the modules stay the same objects."""

    def begin(self, build: Callable[[], Optimizer]) -> None:
        """A stage: `build` says what is trained from now on, and gives a new optimizer for it."""
        self.optimizer = build()

    # A step.

    def part(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward pass of a part of a step; gradients are exchanged in the last one."""
        return nullcontext()

    def forward(self, x: Tensor) -> Tensor:
        """The model's outputs, in training."""
        outputs: Tensor = self._parallel(x)
        return outputs

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar to what the parts before have left."""
        torch.autograd.backward(loss)

    def gradients(self) -> list[Tensor]:
        """What this rank holds of them: changed in place, the step is another."""
        return [p.grad for p in self._model.parameters() if p.grad is not None]

    def norm(self) -> float:
        """The Euclidean norm of all gradients, the same on all ranks."""
        return float(torch.nn.utils.get_total_norm(self.gradients()))

    def scale_gradients(self, factor: float) -> None:
        """Multiply all of them."""
        if gradients := self.gradients():
            torch._foreach_mul_(gradients, factor)

    def step(self) -> None:
        """Change the weights; no gradients are left."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def drop(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    # The full state: that of torch, fp32, as one process has it.

    def weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The state_dict of one of the models; it may be empty on other ranks than 0. Valid until the next step."""
        return dict(model.state_dict())

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """As `weights` gave them, the same on every rank."""
        model.load_state_dict(weights)

    def optimizer_state(self) -> dict[str, Any]:
        """The state_dict of the optimizer; its state may be empty on other ranks than 0. Valid until the next step."""
        return dict(self.optimizer.state_dict())

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """As `optimizer_state` gave it, the same on every rank."""
        self.optimizer.load_state_dict(dict(state))


def share_contiguous(engine: Engine, models: Sequence[nn.Module]) -> None:
    """Rank 0's weights on every rank, in the order of their numbers: shards are cut from nothing else.

    Weights that are channels last become plain; inputs that are make a convolution compute so all the same.
    """
    for model in models:
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()
        engine.share([*model.parameters(), *model.buffers()])


class Ddp(Strategy):
    """torch's DistributedDataParallel (Li et al., arXiv 2006.15704): gradients are averaged over the ranks."""

    def begin(self, build: Callable[[], Optimizer]) -> None:
        """With a wrapper of its own for each stage.

        Under `deterministic: run` DDP must not rebuild its buckets after the first step: a resumed run would sum in
        another order than the undisturbed one at 3 or more ranks. find_unused_parameters keeps the first buckets.
        """
        self._parallel = self._model
        gc.collect()  # DDP's hooks on the parameters go with it
        super().begin(build)
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        devices = [self._engine.device] if self._engine.device.type == "cuda" else None
        keeps = self._engine.deterministic
        self._parallel = DistributedDataParallel(self._model, device_ids=devices, find_unused_parameters=keeps)

    def part(self, last: bool) -> AbstractContextManager[None]:
        parallel = self._parallel
        return parallel.no_sync() if not last and isinstance(parallel, DistributedDataParallel) else nullcontext()
