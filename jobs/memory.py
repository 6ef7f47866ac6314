"""Memory of a training step, from shapes alone: it runs on fake tensors, and every storage is counted while it lives.

Counted, in bytes: parameters, buffers and gradients; the optimizer's state; the average of the weights; the batch; what
autograd keeps for the backward pass; the temporary tensors of forward, backward and optimizer step: all that torch's
allocator is asked for, so the peak is its peak (tests/test_memory.py compares with the profiler's allocation events).
Of several processes: DDP's buckets, and what each keeps where state, gradients or weights are in shards; of DeepSpeed
its bucket and flat copies. Of kernels: torch's own convolutions (jobs/kernel_memory.py). Not counted: cuDNN's and
oneDNN's workspace, CUDA's context (0.3 to 0.5 GB), the allocator's fragments, the loader's batches ahead, libraries.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jobs import acceleration
from jobs.cuda_casts import with_cuda_casts
from jobs.kernel_memory import columns

__all__ = ["Estimate", "Shards", "Step", "estimate", "largest_batch", "parts_of"]

_CUDA_BLOCK = 512  # bytes: the CUDA allocator rounds each storage up to a multiple of it


@dataclass(frozen=True)
class Shards:
    """What each of several processes keeps a share of: ZeRO (Rajbhandari et al., arXiv 1910.02054) or fully_shard."""

    processes: int
    stage: int
    """1: the optimizer's state; 2: gradients too, each as soon as it is made; 3: weights too (fully_shard)."""
    offload: bool = False
    """The optimizer's state, and from stage 2 on the gradients, are in the node's memory."""
    by_block: bool = False
    """As jobs/strategies/fsdp.py does it: what is in no repeated block stays gathered for the whole pass, its gradients
    whole until the end of the backward pass, and of several passes all gradients until the last one."""
    bucket: int = 0
    """As DeepSpeed does it: gradients are gathered in a buffer of so many bytes at most, and the optimizer works on a
    flat copy of this process's share of the weights, and of their gradients."""

    @property
    def gradients(self) -> float:
        """Share of the gradients that stays on the device."""
        if self.stage < 2:
            return 1.0
        return 0.0 if self.offload else 1 / self.processes

    @property
    def optimizer(self) -> float:
        """Share of the optimizer's state, and of what its step takes."""
        if self.offload:
            return 0.0
        return 1.0 if self.bucket else 1 / self.processes  # the flat copy is that share

    @property
    def reduced(self) -> float:
        """Share of the gradients that is left for the optimizer's step."""
        return min(self.gradients, 0.0 if self.offload else 1 / self.processes) if self.bucket else self.gradients


@dataclass(frozen=True)
class Step:
    """How a step is done: what an experiment says beside model and batch."""

    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    """Makes the optimizer, and may freeze parameters; None: none, the step ends with the gradients."""
    precision: str = "fp32"
    """bf16, fp16: autocast of the forward pass."""
    device: str = "cpu"
    """cuda: optimizers go over all tensors at once, autocast has its list, storages are rounded up to 512 bytes."""
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """Of outputs and targets; None: cross entropy with a class for each sample, or for each voxel that is scored."""
    targets: Callable[[int], torch.Tensor] | None = None
    """Makes those of so many samples, for `loss`."""
    passes: int = 1
    """In which the gradients of a step are summed up; the batch of all is there from the start."""
    validation: int | None = None
    """Samples of one forward pass of the validation; None: no look at it."""
    ema: bool = False
    """A second copy of weights and buffers, their average; it is what is validated."""
    gradient_copies: int = 0
    """Beside the gradients: 1 for DDP's buckets."""
    shards: Shards | None = None
    like: Estimate | None = None
    """Of the same parameters, optimizer and shards: what its optimizer took is taken over, for half of the time."""
    watched: AbstractContextManager[object] | None = None
    """Entered around the step, for example to count what its operators do."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one step of one process; `peak` is the most that lives at a time, in its step or validation."""

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    inputs: int
    activations: int
    """What lives after the forward pass beside the above: kept for the backward pass, and the outputs."""
    peak: int
    ema: int = 0
    copies: int = 0
    """Of gradients, and of the weights that are gathered of shards."""
    validation: int = 0
    """Peak of a validation's batch; 0 where it was not asked for."""
    training: int = 0
    """Peak of the step alone."""
    update: int = 0
    """Temporary tensors of the optimizer's step."""
    groups: dict[str, int] = field(default_factory=dict)
    """Of the activations, those made in each of the parts that were asked for."""

    @property
    def fixed(self) -> int:
        """What does not grow with the batch."""
        return self.parameters + self.buffers + self.gradients + self.optimizer + self.ema + self.copies


def estimate(model: nn.Module, shape: Sequence[int], step: Step | None = None, groups: Iterable[str] = ()) -> Estimate:
    """Memory of the training step of a batch.

    model: on any device, meta for one that takes no memory; it is left as it is.
    shape: (B, C, *spatial) of what one process gets at a time (its share of the batch, divided by train.accumulate).
    groups: names of submodules whose activations are told apart.
    Raises ValueError where the model does not take the input, or computes with values.
    """
    step = step or Step()
    with FakeTensorMode(allow_non_fake_inputs=True):
        run = _Run(_faked(model), shape, step)
        try:
            run.step(tuple(groups))
            validation = run.validate() if step.validation else 0
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"no step with an input of {tuple(shape)}: {_first_line(error)}") from error
    return replace(run.found, peak=max(run.found.peak, validation), validation=validation)


def parts_of(model: nn.Module) -> list[tuple[str, nn.Module | nn.Parameter]]:
    """Parameters that the model itself holds, then its children, with lists of layers opened once."""
    parts: list[tuple[str, nn.Module | nn.Parameter]] = list(model.named_parameters(recurse=False))
    for name, child in model.named_children():
        listed = isinstance(child, nn.Sequential | nn.ModuleList)
        parts += [(f"{name}.{n}", c) for n, c in child.named_children()] if listed else [(name, child)]
    return parts


def largest_batch(peak: Callable[[int], int], memory: int, first: int = 1, most: int | None = None) -> int:
    """The most samples whose peak is within `memory` bytes; 0 where one does not fit.

    peak: of a batch of so many. It grows nearly in proportion, so a line through two points is all but right.
    first: where to look first; most: no larger batch is of use.
    """
    low, high = 0, first  # fits, does not fit; at first only a guess
    known = {0: 0}

    def fits(batch: int) -> bool:
        if batch not in known:
            known[batch] = peak(batch)
        return known[batch] <= memory

    while fits(high):
        if high == most:
            return high
        slope = max((known[high] - known[low]) / (high - low), 1)
        low, high = high, max(high + int((memory - known[high]) / slope), high + 1)
        high = high if most is None else min(high, most)
    while high - low > 1:
        line = low + int((memory - known[low]) / max((known[high] - known[low]) / (high - low), 1))
        middle = min(max(line, low + 1), high - 1)
        if fits(middle):
            low = middle
            if not fits(middle + 1):
                return middle
            low = middle + 1
        else:
            high = middle
    return low


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that operators return, from then until they are freed."""

    def __init__(self, cuda: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._block, self._on_cpu = _CUDA_BLOCK if cuda else 1, not cuda
        self._seen: weakref.WeakKeyDictionary[Any, tuple[int, str]] = weakref.WeakKeyDictionary()
        self._shrunk: weakref.WeakSet[Any] = weakref.WeakSet()
        self.bytes = self.peak = 0
        self.share = 1.0
        """Of what is new from now on, so much is counted."""
        self.group = ""
        self.kept: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(item for item in tree_leaves(result) if isinstance(item, torch.Tensor))
        if self._on_cpu and (unfolded := columns(func, args)):
            self.add(unfolded)
            self.add(-unfolded)
        return result

    def size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._block) * self._block

    def count(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._seen:
                size = int(self.size(storage) * self.share)
                self._seen[storage] = (size, self.group)
                self.add(size)
                weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.bytes -= size

    def add(self, size: int) -> None:
        """So many bytes more, or less."""
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def shrink(self, tensor: torch.Tensor, share: float) -> None:
        """From now on as long as it lives only this share of a tensor is here."""
        storage = tensor.untyped_storage()
        if share < 1 and storage in self._seen and storage not in self._shrunk:
            away = self._seen[storage][0] - int(self._seen[storage][0] * share)
            self._shrunk.add(storage)
            self._free(away)
            weakref.finalize(storage, self._free, -away)

    def settle(self) -> None:
        """The forward pass is over: what each group has made and is still there."""
        kept: dict[str, int] = defaultdict(int)
        for size, group in self._seen.values():
            kept[group] += size
        kept.pop("", None)
        self.kept = dict(kept)

    @contextmanager
    def watching(self, model: nn.Module, groups: Sequence[str]) -> Iterator[None]:
        """Know in which of the groups an operator runs; a group's children count for it, called by it or not."""
        handles: list[Any] = []
        before: list[str] = []

        def enter(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                before.append(self.group)
                self.group = name

            return hook

        def leave(*_: Any) -> None:
            self.group = before.pop()

        for name in groups:
            for module in model.get_submodule(name).modules():
                handles.append(module.register_forward_pre_hook(enter(name)))
                handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.group = ""


class _Numbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """An optimizer asks its counter for a number, which a fake tensor has not: it gets 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        return func(*args, **(kwargs or {}))


def _faked(model: nn.Module) -> nn.Module:
    """A copy in training mode whose parameters and buffers are fake tensors on the CPU; shared ones stay shared."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        fake = torch.empty(parameter.shape, dtype=parameter.dtype)
        memo[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return copy.deepcopy(model, memo).train()


def _optimizer(model: nn.Module, step: Step) -> torch.optim.Optimizer | None:
    """The optimizer with its state as after the first step, and no gradients; None: not needed."""
    optimizer = step.optimizer(model) if step.optimizer else None  # which may freeze parameters
    if optimizer is None or step.like:
        return None
    if step.shards and step.shards.bucket:
        _flatten(optimizer, step.shards.processes)
    for group in optimizer.param_groups:
        if step.device == "cuda" and "foreach" in group:
            group["foreach"] = True
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    with _Numbers():  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _flatten(optimizer: torch.optim.Optimizer, processes: int) -> None:
    """One tensor for each group, of this process's share."""
    for group in optimizer.param_groups:
        numbers = sum(parameter.numel() for parameter in group["params"])
        group["params"] = [nn.Parameter(torch.empty(-(-numbers // processes)))]


def _state(optimizer: torch.optim.Optimizer | None) -> Iterator[torch.Tensor]:
    for values in optimizer.state.values() if optimizer else ():
        yield from (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))


class _Run:
    """One step on fake tensors, and what was found."""

    def __init__(self, model: nn.Module, shape: Sequence[int], step: Step) -> None:
        """All that lives before the step is counted."""
        self._model, self._step, self._batch = model, step, shape[0]
        self._live = live = _Live(cuda=step.device == "cuda")
        shards = step.shards or Shards(1, 0)
        live.share = 1 / shards.processes if shards.stage == 3 else 1.0
        parameters = self._counted(model.parameters())
        gathered = 0
        if shards.stage == 3:
            gathered = _gathered(model, live) if shards.by_block else _largest_two(model, live)
        live.share = 1.0
        buffers = self._counted(model.buffers())
        self._optimizer = _optimizer(model, step)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        gradients = sum(live.size(p.untyped_storage()) for p in self._trained)
        live.share = shards.optimizer
        optimizer = self._counted(_state(self._optimizer))
        if step.like:
            live.add(optimizer := step.like.optimizer)
        self._flat = (
            [p for g in self._optimizer.param_groups for p in g["params"]] if self._optimizer and shards.bucket else []
        )
        self._master = self._counted(self._flat)
        live.share = 1.0
        self._bucket = min(shards.bucket, gradients)
        ema, copies = (parameters + buffers) * step.ema, gradients * step.gradient_copies + gathered + self._bucket
        blocks = _blocks(model) if shards.by_block else [list(model.parameters())]
        self._at_once = {id(parameter) for block in blocks for parameter in block}
        live.add(ema + copies)
        self._inputs = torch.empty(shape[0] * step.passes, *shape[1:])
        self._targets = step.targets(len(self._inputs)) if step.targets else torch.empty(0)
        inputs = self._counted([self._inputs, self._targets])
        self._fixed = live.peak = live.bytes
        self._shards = shards
        own, copies = int(gradients * shards.gradients), copies + self._master
        self.found = Estimate(parameters, buffers, own, optimizer, inputs, 0, 0, ema, copies)

    def _counted(self, tensors: Iterable[torch.Tensor]) -> int:
        before = self._live.bytes
        self._live.count(tensors)
        return self._live.bytes - before

    def step(self, groups: Sequence[str]) -> None:
        """Forward, backward and the optimizer's step: the last pass of several, beside the gradients of the others."""
        live, step = self._live, self._step
        for parameter in self._trained:
            if step.passes > 1:
                parameter.grad = torch.empty_like(parameter)
                live.count([parameter.grad])
                if not self._shards.by_block:
                    self._reduced(parameter)
            if id(parameter) not in self._at_once:
                continue
            parameter.register_post_accumulate_grad_hook(self._reduced)  # type: ignore[no-untyped-call]
        before = live.bytes
        self._cast(self._model)
        with live, step.watched or nullcontext():
            with live.watching(self._model, groups):
                outputs = self._forward(self._model, self._inputs[: self._batch])
            live.settle()
            activations = live.bytes - before
            torch.autograd.backward(self._loss(outputs, self._batch))
            for parameter in self._trained:
                self._reduced(parameter)
            before, most, live.peak = live.bytes, live.peak, live.bytes
            self._update()
            update, live.peak = live.peak - before, max(most, live.peak)
        del outputs
        found = replace(self.found, activations=activations, peak=live.peak, groups=dict(live.kept))
        self.found = replace(found, training=live.peak, update=update)

    def _reduced(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._live.shrink(parameter.grad, self._shards.gradients)

    def _update(self) -> None:
        if like := self._step.like:
            self._live.add(like.update)
            self._live.add(-like.update)
        elif self._optimizer:
            self._live.share = self._shards.optimizer
            self._flatten_gradients()
            with _Numbers():  # type: ignore[no-untyped-call]
                self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._live.share = 1.0
            self._live.add(-self._master * (self._shards.stage == 3))

    def _flatten_gradients(self) -> None:
        """As DeepSpeed has them in the optimizer's step; of stage 3 once more, and its bucket stays."""
        if not self._flat:
            return
        for parameter in self._trained:
            if parameter.grad is not None:
                self._live.shrink(parameter.grad, self._shards.reduced)
        for flat in self._flat:
            flat.grad = torch.empty_like(flat)
            self._live.count([flat.grad])
        self._live.add(self._master if self._shards.stage == 3 else -self._bucket)

    def validate(self) -> int:
        """The peak of a forward pass without gradients, as validation does it."""
        model, live, batch = self._model.eval(), self._live, self._step.validation or 0
        for parameter in self._trained:
            parameter.grad = None
        live.add(-self.found.inputs)
        inputs = torch.empty(batch, *self._inputs.shape[1:])
        targets = self._step.targets(batch) if self._step.targets else torch.empty(0)
        live.count([inputs, targets])
        live.peak = live.bytes
        with torch.no_grad(), live:
            self._loss(self._forward(model, inputs), batch, targets)
        return live.peak

    def _cast(self, model: nn.Module) -> None:
        if self._half and self._step.device == "cuda":
            for module in model.modules():  # not once around all: what is checkpointed is computed anew in backward
                module.forward = with_cuda_casts(module.forward)

    @property
    def _half(self) -> bool:
        return self._step.precision in ("bf16", "fp16")

    def _forward(self, model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
            outputs = model(inputs)
        if not isinstance(outputs, torch.Tensor):
            raise ValueError(f"the model gives a {type(outputs).__name__}; it must give one tensor of logits")
        return outputs

    def _loss(self, outputs: torch.Tensor, batch: int, targets: torch.Tensor | None = None) -> torch.Tensor:
        if self._step.loss is None:
            return _cross_entropy(outputs)
        return self._step.loss(outputs, (self._targets if targets is None else targets)[:batch])


def _gathered(model: nn.Module, live: _Live) -> int:
    """Bytes of what is in no block, and of two of the largest block: one computes and the next is fetched."""
    sizes = [sum(live.size(p.untyped_storage()) for p in block) for block in _blocks(model)]
    whole = sum(live.size(p.untyped_storage()) for p in model.parameters())
    return whole - sum(sizes) + 2 * max(sizes, default=0)


def _blocks(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each repeated block."""
    blocks, taken = [], set[int]()
    for block in acceleration.blocks(model):
        blocks.append([p for p in block.parameters() if id(p) not in taken])
        taken |= {id(p) for p in blocks[-1]}
    return blocks


def _largest_two(model: nn.Module, live: _Live) -> int:
    """Bytes of two parts after each other: the weights that are gathered while one computes and the next is fetched."""
    tensors = [[part] if isinstance(part, nn.Parameter) else list(part.parameters()) for _, part in parts_of(model)]
    sizes = [sum(live.size(tensor.untyped_storage()) for tensor in several) for several in tensors]
    return max(sum(pair) for pair in zip([0, *sizes], [*sizes, 0], strict=True))


def _cross_entropy(outputs: torch.Tensor) -> torch.Tensor:
    shape = (outputs.shape[0], *outputs.shape[2:])
    return F.cross_entropy(outputs.float(), torch.zeros(shape, dtype=torch.long))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
