"""torch's fully_shard (FSDP2, Zhao et al., arXiv 2304.11277): weights, gradients and optimizer state in shards.

A group of weights is gathered for its forward and again for its backward pass. Groups are the repeated blocks of a
model (`acceleration.blocks`), and one of all that is left. Weights stay fp32: autocast is what makes a pass 16-bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from jobs import acceleration
from jobs.strategies.whole import Strategy, share_contiguous


class Fsdp(Strategy):
    """A shard of each weight, gradient and moment on each rank."""

    joint = True

    def shard(self, *models: nn.Module) -> None:
        mesh = init_device_mesh(self._engine.device.type, (self._engine.world_size,))
        share_contiguous(self._engine, models)
        for model in models:
            # else the first group stays gathered after a pass without a backward one, and its shards are out of sight
            for module in (*acceleration.blocks(model), model):
                fully_shard(module, mesh=mesh, reshard_after_forward=True)

    def part(self, last: bool) -> AbstractContextManager[None]:
        assert isinstance(self._model, FSDPModule)
        self._model.set_requires_gradient_sync(last)
        return nullcontext()

    def gradients(self) -> list[Tensor]:
        return [_local(gradient) for gradient in super().gradients()]

    def norm(self) -> float:
        own = torch.nn.utils.get_total_norm(self.gradients()).double()
        return float(self._engine.sum(own.square()).sqrt())

    def weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        return self._full(model.state_dict())

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        own = model.state_dict()
        model.load_state_dict({name: _like(own[name], value) for name, value in weights.items()})

    def optimizer_state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        return {**state, "state": {number: self._full(entry) for number, entry in state["state"].items()}}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        entries = {
            number: {key: _like(parameters[number], v) if v.ndim else v for key, v in entry.items()}
            for number, entry in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": entries})

    def _full(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Whole tensors in the memory of rank 0's node, gathered one by one; on other ranks none."""
        found = {}
        for key, value in values.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if self._engine.is_main:
                found[key] = whole.detach().to("cpu", copy=True)
        return found


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def _like(own: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that all have, where its own is such a part."""
    if not isinstance(own, DTensor):
        return whole
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
