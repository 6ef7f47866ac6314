"""DeepSpeed's ZeRO 1, 2 and 3 (Rajbhandari et al., arXiv 1910.02054), for torch.optim's optimizers, in fp32.

DeepSpeed is imported when the strategy asks for it, and told to be silent below errors. Its own checkpoints, which it
loads with pickle, are not used: each rank's part of a weight or moment is found by DeepSpeed's own maps (`_Place`).
Autocast is what makes a pass 16-bit; norm, clipping and loss scale are those of all strategies.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from hpc.training import Train
from hpc.training import Zero as Settings
from jobs.engine import Engine
from jobs.strategies.whole import Strategy, share_contiguous

BUCKET = 50_000_000
"""Numbers that are exchanged at once, at most: two buffers of 200 MB."""
_KEPT_WHOLE = 1_000
"""ZeRO 3: smaller weights (biases, norms) are on each rank."""


@dataclass(frozen=True)
class _Place:
    """Where this rank holds a part of a parameter: `count` numbers, from `start` of the parameter on."""

    flat: Tensor
    """What the optimizer updates, fp32."""
    offset: int
    start: int
    count: int

    def of(self, flat: Tensor) -> Tensor:
        """The part in a tensor like `flat`."""
        return flat.narrow(0, self.offset, self.count)


class Zero(Strategy):
    """DeepSpeed's engine; stage 1 shards the optimizer's state, 2 gradients too, 3 weights too."""

    def __init__(self, settings: Train, engine: Engine, model: nn.Module) -> None:
        super().__init__(settings, engine, model)
        self._zero_settings = settings.zero or Settings()
        self._stage = self._zero_settings.stage
        self.joint = self._stage == 3
        self._deepspeed = _import(engine)
        self._wrapped: Any = None

    def shard(self, *models: nn.Module) -> None:
        share_contiguous(self._engine, models)

    def begin(self, build: Callable[[], Optimizer]) -> None:
        self._release()
        optimizer = build()
        self._groups = [dict(group) for group in optimizer.param_groups]
        """As torch has them: DeepSpeed puts its own flat tensors into the optimizer's."""
        count = sum(p.numel() for group in self._groups for p in group["params"])
        self._wrapped, self._zero, *_ = self._deepspeed.initialize(
            model=self._model, optimizer=optimizer, config=self._config(count), dist_init_required=False
        )
        self._zero_norm: float | None = None
        self.optimizer = self._zero.optimizer
        self._parallel = self._wrapped

    def _config(self, count: int) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self._stage, "reduce_bucket_size": min(BUCKET, max(count, 1))}
        if self._stage == 3:
            zero["stage3_param_persistence_threshold"] = _KEPT_WHOLE
        if self._zero_settings.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self._engine.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": 1,  # all that it is used for is figures in DeepSpeed's log
            "gradient_accumulation_steps": 1,
            "steps_per_print": 10**12,
            "gradient_clipping": 0.0,  # it would be 1
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's own optimizers: nothing is compiled
        }

    def _release(self) -> None:
        """Make the model one of plain parameters again."""
        if self._wrapped is None:
            return
        whole: dict[int, nn.Parameter] = {}
        for parameter in list(self._model.parameters()):
            with self._gathered(parameter):
                whole[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        self._wrapped.destroy()
        for module in self._model.modules():
            module._parameters = {k: p if p is None else whole[id(p)] for k, p in module._parameters.items()}
        self._parallel, self._wrapped, self._zero, self.optimizer = self._model, None, None, None  # type: ignore[assignment]

    def _gathered(self, parameter: nn.Parameter, changes: bool = False) -> AbstractContextManager[None]:
        """Within, the parameter is whole; with `changes`, rank 0's is what counts afterwards."""
        if self._stage < 3:
            return nullcontext()
        context: AbstractContextManager[None] = self._deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0 if changes else None
        )
        return context

    # A step.

    def part(self, last: bool) -> AbstractContextManager[None]:
        self._wrapped.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._wrapped.backward(loss, scale_wrt_gas=False)

    def gradients(self) -> list[Tensor]:
        if self._zero_settings.offload:
            return [flat.grad for flat in self._flats() if flat.grad is not None]
        averaged = self._zero.averaged_gradients
        return [gradient for group in averaged.values() if group is not None for gradient in group]

    def norm(self) -> float:
        own = torch.nn.utils.get_total_norm(self.gradients()).double()
        return float(self._engine.sum(own.square()).sqrt())

    def step(self) -> None:
        self._wrapped.step()

    def drop(self) -> None:
        """As DeepSpeed itself skips a step whose norm is no number."""
        invalid = torch.tensor(float("nan"), device=self._engine.device)
        name, value = ("_get_norm_groups", [invalid]) if self._stage == 3 else ("scaled_global_norm", invalid)
        setattr(self._zero, name, lambda *_: value)
        try:
            self._wrapped.step()
        finally:
            delattr(self._zero, name)

    # The full state.

    def weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        if self._stage < 3:
            return dict(model.state_dict())
        parameters, found = dict(model.named_parameters(remove_duplicate=False)), dict[str, Tensor]()
        for name, value in model.state_dict().items():
            with self._gathered(parameters[name]) if name in parameters else nullcontext():
                if self._engine.is_main:
                    found[name] = parameters.get(name, value).detach().to("cpu", copy=True)
        return found

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        if self._stage < 3:
            model.load_state_dict(weights)
        else:
            with torch.no_grad():
                for name, parameter in model.named_parameters(remove_duplicate=False):
                    with self._gathered(parameter, changes=True):
                        parameter.copy_(weights[name])
                for name, buffer in model.named_buffers(remove_duplicate=False):
                    if name in weights:
                        buffer.copy_(weights[name])
        if model is self._model:
            self._zero.refresh_fp32_params()

    def optimizer_state(self) -> dict[str, Any]:
        held = [self.optimizer.state[flat] for flat in self._flats() if self.optimizer.state.get(flat)]
        state: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(self._parameters() if held else ()):
            entry = {}
            for key, value in held[0].items():
                whole = self._full(parameter, key) if value.ndim else value.detach().to("cpu", copy=True)
                if self._engine.is_main:
                    entry[key] = whole
            if entry:
                state[number] = entry
        return {"state": state, "param_groups": self._told_groups()}

    def _told_groups(self) -> list[dict[str, Any]]:
        """As torch's state_dict tells them: parameters by number."""
        told, first = [], 0
        for group, now in zip(self._groups, self.optimizer.param_groups, strict=True):
            numbers = list(range(first, first + len(group["params"])))
            first += len(numbers)
            told.append({**{key: now[key] for key in group}, "params": numbers})
        return told

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Where some parameters have had more steps than others, those of the most count for all."""
        self._zero._hp_optimizer_states_linked = False
        entries, base = state["state"], self.optimizer.state
        base.clear()
        if not entries:
            return
        first = next(iter(entries.values()))
        for flat in self._flats():
            base[flat] = {key: torch.zeros_like(flat) for key, value in first.items() if value.ndim}
            scalars = {key: max(entry[key] for entry in entries.values()) for key in first if not first[key].ndim}
            base[flat] |= {key: value.clone() for key, value in scalars.items()}
        for number, parameter in enumerate(self._parameters()):
            if (place := self._place(parameter)) is None or number not in entries:
                continue
            for key, value in entries[number].items():
                if value.ndim:
                    place.of(base[place.flat][key]).copy_(value.flatten().narrow(0, place.start, place.count))

    def _full(self, parameter: nn.Parameter, key: str) -> Tensor:
        """A moment of a parameter on rank 0, in the node's memory."""
        shape = getattr(parameter, "ds_shape", parameter.shape)
        whole = torch.zeros(shape.numel(), device=self._engine.device)
        if place := self._place(parameter):
            whole.narrow(0, place.start, place.count).copy_(place.of(self.optimizer.state[place.flat][key]))
        dist.reduce(whole, 0)
        return whole.view(shape).to("cpu", copy=True)

    def _parameters(self) -> Iterator[nn.Parameter]:
        """As the checkpoint numbers them."""
        for group in self._groups:
            yield from group["params"]

    def _flats(self) -> list[Tensor]:
        zero = self._zero
        flats: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        )
        return flats

    def _place(self, parameter: Any) -> _Place | None:
        """None where this rank holds nothing of it."""
        if self._stage == 3:  # of equal parts, the last one padded
            group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = size * self._engine.rank
            count = min(size, parameter.ds_numel - start)
            return _Place(self._flats()[group], int(offset), start, count) if count > 0 else None
        held = parameter._hp_mapping
        if held is None:
            return None
        whole, part = held.lp_fragment_address, held.hp_fragment_address
        return _Place(self._flats()[held.param_group_index], part.start, whole.start, part.numel)


def _import(engine: Engine) -> Any:
    """DeepSpeed for this rank. It logs to stdout, at import and at each engine: only errors are let through."""
    os.environ["LOCAL_RANK"] = str(engine.allocation.local_rank)  # it will have it, whoever has chosen the device
    if engine.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of names it still uses
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # sums between CPUs of a node: needs a compiler
    return deepspeed


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
