"""Memory of a training step, from shapes alone: it runs on fake tensors, and every storage is counted while it lives.

Counted, in bytes: parameters, buffers and gradients; the optimizer's state; the batch; what autograd keeps for the
backward pass; the temporary tensors of forward, backward and optimizer step: all that torch's allocator is asked for,
so the peak is its peak (tests/test_memory.py compares with the profiler's allocation events).
Not counted: what kernels take for themselves (cuDNN's and oneDNN's workspace), CUDA's context (0.3 to 0.5 GB), the
allocator's fragments, a second copy of the gradients in DDP's buckets, the loader's batches ahead, libraries.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Estimate", "Step", "estimate", "largest_batch"]

_CUDA_BLOCK = 512  # bytes: the CUDA allocator rounds each storage up to a multiple of it


@dataclass(frozen=True)
class Step:
    """How a step is done: what an experiment says beside model and batch."""

    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    """Makes the optimizer; None: none, the step ends with the gradients."""
    precision: str = "fp32"
    """bf16: autocast of the forward pass."""
    device: str = "cpu"
    """cuda: optimizers go over all tensors at once, autocast has its list, storages are rounded up to 512 bytes."""
    loss: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Of the outputs; None: cross entropy with a class for each sample, or for each voxel that is scored."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one step of one process; `peak` is the most that lives at a time."""

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    inputs: int
    activations: int
    """What lives after the forward pass beside the above: kept for the backward pass, and the outputs."""
    peak: int
    groups: dict[str, int] = field(default_factory=dict)
    """Of the activations, those made in each of the parts that were asked for."""

    @property
    def fixed(self) -> int:
        """What does not grow with the batch."""
        return self.parameters + self.buffers + self.gradients + self.optimizer


def estimate(model: nn.Module, shape: Sequence[int], step: Step | None = None, groups: Iterable[str] = ()) -> Estimate:
    """Memory of the training step of a batch.

    model: on any device, meta for one that takes no memory; it is left as it is.
    shape: (B, C, *spatial) of what one process gets at a time (its share of the batch, divided by train.accumulate).
    groups: names of submodules whose activations are told apart.
    Raises ValueError where the model does not take the input, or computes with values.
    """
    step = step or Step()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = _faked(model)
        live = _Live(_CUDA_BLOCK if step.device == "cuda" else 1)
        live.count(fake.parameters())
        parameters = live.bytes
        live.count(fake.buffers())
        fixed = live.bytes
        trained = [p for p in fake.parameters() if p.requires_grad]
        gradients = sum(live.size(p.untyped_storage()) for p in trained)
        optimizer = _optimizer(fake, step)
        live.count(_state(optimizer))
        with_state = live.bytes
        live.peak = with_state
        inputs = torch.empty(*shape)
        live.count([inputs])
        before = live.bytes
        try:
            with live:
                activations = _run(fake, inputs, optimizer, step, live, tuple(groups)) - before
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"no step with an input of {tuple(shape)}: {_first_line(error)}") from error
    return Estimate(
        parameters=parameters,
        buffers=fixed - parameters,
        gradients=gradients,
        optimizer=with_state - fixed,
        inputs=before - with_state,
        activations=activations,
        peak=live.peak,
        groups=dict(live.kept),
    )


def largest_batch(peak: Callable[[int], int], memory: int) -> int:
    """The most samples whose peak is within `memory` bytes; 0 where one does not fit.

    peak: of a batch of so many. It grows nearly in proportion, so a line through two points is all but right.
    """
    low, high = 0, 1  # fits, does not fit; at first only a guess
    known = {0: 0}

    def fits(batch: int) -> bool:
        if batch not in known:
            known[batch] = peak(batch)
        return known[batch] <= memory

    while fits(high):
        slope = max((known[high] - known[low]) / (high - low), 1) if low else known[high]
        guess = high + int((memory - known[high]) / slope) if low else 2 * high
        low, high = high, max(guess, high + 1)
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

    def __init__(self, block: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._block = block
        self._seen: weakref.WeakKeyDictionary[Any, tuple[int, str]] = weakref.WeakKeyDictionary()
        self.bytes = self.peak = 0
        self.group = ""
        self.kept: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(item for item in tree_leaves(result) if isinstance(item, torch.Tensor))
        return result

    def size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._block) * self._block

    def count(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._seen:
                size = self.size(storage)
                self._seen[storage] = (size, self.group)
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.bytes -= size

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


class _CudaCasts(TorchFunctionMode):
    """Where autocast does otherwise on CUDA than on a CPU, which is asked here: poolings stay in the type that they
    are given there, and norms, softmax, sums and interpolation compute in float32.
    """

    _kept = re.compile(r"_?(adaptive_)?(max|avg)_pool[123]d")
    _float = frozenset(
        {"group_norm", "interpolate", "layer_norm", "log_softmax", "norm", "pow", "prod", "softmax", "sum"}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            if self._kept.fullmatch(name):
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **kwargs)
            if name in self._float:
                args, kwargs = tree_map(_float32, (args, kwargs))
        return func(*args, **kwargs)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


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
    """The optimizer with its state as after the first step, and no gradients."""
    if step.optimizer is None:
        return None
    optimizer = step.optimizer(model)
    for group in optimizer.param_groups:
        if step.device == "cuda" and "foreach" in group:
            group["foreach"] = True
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    with _Numbers():  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _state(optimizer: torch.optim.Optimizer | None) -> Iterator[torch.Tensor]:
    for values in optimizer.state.values() if optimizer else ():
        yield from (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))


def _run(
    model: nn.Module,
    inputs: torch.Tensor,
    optimizer: torch.optim.Optimizer | None,
    step: Step,
    live: _Live,
    groups: Sequence[str],
) -> int:
    """One step; the bytes that live after its forward pass."""
    half = step.precision == "bf16"
    # in the backward pass too: what is checkpointed is computed anew there, under autocast
    with _CudaCasts() if half and step.device == "cuda" else nullcontext():
        with torch.autocast("cpu", torch.bfloat16, enabled=half), live.watching(model, groups):
            outputs = model(inputs)
        if not isinstance(outputs, torch.Tensor):
            raise ValueError(f"the model gives a {type(outputs).__name__}; it must give one tensor of logits")
        live.settle()
        after = live.bytes
        torch.autograd.backward((step.loss or _cross_entropy)(outputs))
    if optimizer:
        with _Numbers():  # type: ignore[no-untyped-call]
            optimizer.step()
    return after


def _cross_entropy(outputs: torch.Tensor) -> torch.Tensor:
    shape = (outputs.shape[0], *outputs.shape[2:])
    return F.cross_entropy(outputs.float(), torch.zeros(shape, dtype=torch.long))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
