"""Residual networks with 18, 34 and 50 layers in 3D, and a strided stem: the usual ones, beside the seed's flat one.

Sources: He et al. 2015 (arXiv 1512.03385); in 3D: Hara et al. 2018 (arXiv 1711.09577), torchvision's r3d_18.

    stem       conv 7x7x7 of stride 2, norm, ReLU, max-pool 3 of stride 2
    stages     four, of 64, 128, 256 and 512 filters; the last three begin with stride 2
    block      18, 34: two convs 3x3x3; 50: 1x1x1, 3x3x3, 1x1x1 to four times the filters, the stride in the second
               (torchvision's "1.5"); norm after each conv, ReLU after all but the last, the sum, ReLU;
               where shape or stride change, the shortcut is a conv 1x1x1 and a norm (He's option B)
    head       mean over the volume, dropout, linear

What differs: volumes have no axis of time, so the stem strides all three axes alike; Hara's has (1, 2, 2),
torchvision's has a kernel of (3, 7, 7) too, and no max-pool: `stem_kernel`, `stem_stride`, `stem_pool`.
Convs have no bias.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from models3d._layers import NORMS, DropPath, max_pool, norm_layer, recompute
from models3d._options import Triple, check_input, fraction, one_of, per_axis, whole, wholes
from models3d._registry import register_model

__all__ = [
    "HeResNet3d",
    "resnet3d_18",
    "resnet3d_18_tiny",
    "resnet3d_34",
    "resnet3d_50",
    "resnet3d_50_tiny",
]


class Stem(nn.Module):
    """(B, in_channels, D, H, W) -> (B, width, D / 4, H / 4, W / 4), rounded up, with both strides."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int],
        norm: str,
        pool: bool,
        deterministic_pooling: bool,
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(in_channels, width, kernel, stride, padding, bias=False)
        self.norm = norm_layer(norm, width)
        self.pool, self.deterministic_pooling = pool, deterministic_pooling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x)))
        if not self.pool:
            return x
        return max_pool(x, 3, 2, 1) if self.deterministic_pooling else F.max_pool3d(x, 3, 2, 1)


class Block(nn.Module):
    """relu(shortcut(x) + norm(conv(... relu(norm(conv(x)))))), (B, in_width, ...) -> (B, width * expansion, ...)."""

    def __init__(self, in_width: int, width: int, bottleneck: bool, stride: int, norm: str, drop_path: float) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        # kernel, filters and stride of each conv
        convs = [(1, width, 1), (3, width, stride), (1, out, 1)] if bottleneck else [(3, width, stride), (3, out, 1)]
        self.branch = nn.Sequential()
        before = in_width
        for number, (kernel, after, step) in enumerate(convs, start=1):
            self.branch.add_module(f"conv{number}", nn.Conv3d(before, after, kernel, step, kernel // 2, bias=False))
            self.branch.add_module(f"norm{number}", norm_layer(norm, after))
            if number < len(convs):
                self.branch.add_module(f"relu{number}", nn.ReLU())
            before = after
        self.drop_path = DropPath(drop_path)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_width != out:
            self.shortcut = nn.Sequential(nn.Conv3d(in_width, out, 1, stride, bias=False), norm_layer(norm, out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.drop_path(self.branch(x)) + self.shortcut(x), inplace=True)


class HeResNet3d(nn.Module):
    """(B, in_channels, D, H, W) -> logits (B, num_classes), any D, H, W.

    blocks: blocks of each stage; their number is the number of stages. bottleneck: blocks of three convs.
    width: filters of the first stage, doubled by each further one.
    stem_kernel, stem_stride: of the first conv, one number or three; the kernel is odd.
    stem_pool: a max-pool of stride 2 after it.
    norm: "batch"; "instance"; "group", of 16 channels: for batches of few samples.
    dropout: before the last layer.
    drop_path: chance to skip the last block's branch, rising linearly from 0 at the first block.
    checkpoint: keep only the inputs of stem and blocks, and compute the rest again in the backward pass.
    deterministic_pooling: give the max-pool a deterministic backward on CUDA, where the library's has none.

    Raises ValueError for an option out of its range, and for an input of another shape.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        blocks: Sequence[int] = (2, 2, 2, 2),
        bottleneck: bool = False,
        width: int = 64,
        stem_kernel: Triple = 7,
        stem_stride: Triple = 2,
        stem_pool: bool = True,
        norm: str = "batch",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        checkpoint: bool = False,
        deterministic_pooling: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.checkpoint = in_channels, checkpoint
        kernel, stride = per_axis("stem_kernel", stem_kernel), per_axis("stem_stride", stem_stride)
        if any(k % 2 == 0 for k in kernel):
            raise ValueError(f"stem_kernel is {stem_kernel!r}; give odd numbers, which have a centre")
        one_of("norm", norm, NORMS)
        first = whole("width", width)
        self.stem = Stem(in_channels, first, kernel, stride, norm, stem_pool, deterministic_pooling)
        self.stages, self.num_features = _stages(
            wholes("blocks", blocks), bottleneck, first, norm, fraction("drop_path", drop_path)
        )
        self.dropout = nn.Dropout(fraction("dropout", dropout))
        self.head = nn.Linear(self.num_features, num_classes)
        self.apply(_initialise)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, D, H, W) -> means over the volume, (B, num_features)."""
        check_input("resnet3d", x, self.in_channels)
        for part in (self.stem, *(block for stage in self.stages.children() for block in stage.children())):
            x = recompute(part, x) if self.checkpoint and torch.is_grad_enabled() else part(x)
        return x.mean((2, 3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.dropout(self.forward_features(x)))
        return result


def _stages(
    blocks: tuple[int, ...], bottleneck: bool, width: int, norm: str, drop_path: float
) -> tuple[nn.Sequential, int]:
    """The blocks stage by stage, and the features that the last one gives."""
    stages, before, number = nn.Sequential(), width, 0
    for stage, count in enumerate(blocks):
        layers = nn.Sequential()
        for block in range(count):
            stride = 2 if stage and not block else 1
            rate = drop_path * number / max(sum(blocks) - 1, 1)
            layers.append(Block(before, width << stage, bottleneck, stride, norm, rate))
            before, number = (width << stage) * (4 if bottleneck else 1), number + 1
        stages.add_module(f"stage{stage + 1}", layers)
    return stages, before


def _initialise(module: nn.Module) -> None:
    """He's normal for the convs, as torchvision has it; the linear layer keeps torch's own."""
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


_DEEP: dict[str, Any] = {"blocks": (3, 4, 6, 3)}
_TINY: dict[str, Any] = {"blocks": (1, 1, 1), "width": 8, "stem_kernel": 3, "stem_pool": False}
_SAMPLE, _TINY_SAMPLE = (1, 128, 128, 128), (1, 24, 24, 24)


@register_model(options=HeResNet3d, example=_SAMPLE)
def resnet3d_18(**options: Any) -> HeResNet3d:
    """33.2 M parameters with one channel and three classes."""
    return HeResNet3d(**options)


@register_model(options=HeResNet3d, example=_SAMPLE)
def resnet3d_34(**options: Any) -> HeResNet3d:
    """63.5 M parameters with one channel and three classes."""
    return HeResNet3d(**(_DEEP | options))


@register_model(options=HeResNet3d, example=_SAMPLE)
def resnet3d_50(**options: Any) -> HeResNet3d:
    """46.2 M parameters with one channel and three classes."""
    return HeResNet3d(**(_DEEP | {"bottleneck": True} | options))


@register_model(options=HeResNet3d, example=_TINY_SAMPLE)
def resnet3d_18_tiny(**options: Any) -> HeResNet3d:
    """Three stages of one block from 8 filters on, a stem of 3x3x3 without a max-pool, for tests and patches."""
    return HeResNet3d(**(_TINY | options))


@register_model(options=HeResNet3d, example=_TINY_SAMPLE)
def resnet3d_50_tiny(**options: Any) -> HeResNet3d:
    """The same with blocks of three convs."""
    return HeResNet3d(**(_TINY | {"bottleneck": True} | options))
