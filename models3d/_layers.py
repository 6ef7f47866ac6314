"""Layers that the families share: deterministic pooling, norms, drop path, checkpointing that counts a batch once."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["NORMS", "DropPath", "adaptive_avg_pool", "max_pool", "norm_layer", "recompute"]


def max_pool(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """`F.max_pool3d(x, kernel, stride, padding)` with a backward that is deterministic on CUDA too.

    (B, C, D, H, W) -> (B, C, D', H', W'). Among equal values the first in memory order takes the gradient
    and a NaN wins, both as in the library; torch.maximum would share the gradient among equals.
    """
    x = F.pad(x, (padding,) * 6, value=-torch.inf)
    for axis in (-1, -2, -3):
        length = x.shape[axis] - kernel + 1
        first, *others = (
            x.narrow(axis, shift, length).transpose(axis, 0)[::stride].transpose(axis, 0) for shift in range(kernel)
        )
        for other in others:
            first = torch.where((other > first) | other.isnan(), other, first)
        x = first
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


class _OneVoxelLeft:
    """What torch says of one voxel per channel, in words that help."""

    def _check_input_dim(self, x: torch.Tensor) -> None:
        super()._check_input_dim(x)  # type: ignore[misc]
        if math.prod(x.shape[2:]) == 1:
            raise ValueError(
                "norm: instance has one voxel left of a sample, which has no spread: give larger inputs, fewer "
                "strides, or norm: batch or group"
            )


class InstanceNorm2d(_OneVoxelLeft, nn.InstanceNorm2d):
    """torch's, with an error that helps."""


class InstanceNorm3d(_OneVoxelLeft, nn.InstanceNorm3d):
    """torch's, with an error that helps."""


NORMS = ("batch", "instance", "group")
_CHANNELS_PER_GROUP = 16  # Wu & He 2018 (arXiv 1803.08494), table 3: as good as 32 groups


def norm_layer(kind: str, width: int, axes: int = 3) -> nn.Module:
    """One of NORMS over (B, width, *spatial); group: of 16 channels, or the largest share of 16 that divides width."""
    if kind == "batch":
        return nn.BatchNorm3d(width) if axes == 3 else nn.BatchNorm2d(width)
    if kind == "instance":
        return InstanceNorm3d(width, affine=True) if axes == 3 else InstanceNorm2d(width, affine=True)
    return nn.GroupNorm(width // math.gcd(width, _CHANNELS_PER_GROUP), width)


def recompute(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """`module(*inputs)`, its activations computed anew in the backward pass instead of kept.

    BatchNorm would count the batch a second time in the recomputation and leave other running statistics than a run
    without checkpointing; here they are put back.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(module)

    result: torch.Tensor = checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)
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
