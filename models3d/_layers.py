"""Layers that the families share: deterministic pooling, drop path, and checkpointing that counts a batch once."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["DropPath", "adaptive_avg_pool", "max_pool_2", "recompute"]


def max_pool_2(x: torch.Tensor) -> torch.Tensor:
    """`F.max_pool3d(x, 2, stride=1, padding=1)` with a backward that is deterministic on CUDA too.

    (B, C, D, H, W) -> (B, C, D + 1, H + 1, W + 1). Among equal values the first in memory order takes the gradient
    and a NaN wins, both as in the library; torch.maximum would share the gradient among equals.
    """
    x = F.pad(x, (1,) * 6, value=-torch.inf)
    for axis in (-1, -2, -3):
        length = x.shape[axis] - 1
        first, second = x.narrow(axis, 0, length), x.narrow(axis, 1, length)
        x = torch.where((second > first) | second.isnan(), second, first)
    return x


def adaptive_avg_pool(x: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """`F.adaptive_avg_pool3d(x, size)` with a backward that is deterministic on CUDA too.

    (B, C, D, H, W) -> (B, C, *size). The window of an output is a box, so its mean is the mean along one axis after
    the other; summed in float32, as the library does for half types.
    """
    with torch.autocast(x.device.type, enabled=False):
        y = x if x.dtype == torch.float64 else x.float()
        for axis, n in enumerate(size, start=2):
            y = _average_axis(y, axis, n)
        return y.to(x.dtype)


def _average_axis(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    length = x.shape[axis]
    if length % size == 0:
        return x.reshape(*x.shape[:axis], size, length // size, *x.shape[axis + 1 :]).mean(axis + 1)
    windows = _windows(length, size, x)
    return (x.transpose(axis, -1) @ windows).transpose(axis, -1)


def _windows(length: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """(length, size): column i averages floor(i n / s) up to ceil((i + 1) n / s), torch's adaptive windows."""
    position = torch.arange(length, device=like.device)[:, None]
    i = torch.arange(size, device=like.device)
    start, end = i * length // size, -(-(i + 1) * length // size)
    return ((position >= start) & (position < end)).to(like.dtype) / (end - start)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): in training a sample loses its branch with chance `rate`.

    What is kept is scaled by 1 / (1 - rate). Draws from torch's own generator, so a seed or a checkpoint replays it.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask / keep

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def recompute(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`module(x)`, its activations computed anew in the backward pass instead of kept.

    BatchNorm would count the batch a second time in the recomputation and leave other running statistics than a run
    without checkpointing; here they are put back.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(module)

    result: torch.Tensor = checkpoint(module, x, use_reentrant=False, context_fn=contexts)
    return result


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let every BatchNorm below `module` update a copy of its statistics, and drop the copy afterwards."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    kept = [dict(m._buffers) for m in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        norm._buffers.update({k: b if b is None else b.clone() for k, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
