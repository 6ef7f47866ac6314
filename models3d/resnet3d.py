"""The seed's 3D ResNet: a flat one, 32 filters from end to end, with most of its weights in the classifier.

Source: experiment journal 004 (3D transformer and 3D ResNet on an A100 of 40 GB), "Modelo basado en convolucion".
Its layers, and the numbers it gives them, are kept:

    layer 1        conv 3x3x3, max-pool 2 (stride 1, padding 1), BatchNorm, ReLU
    layers 2-11    two ResBlocks each; 4, 7 and 10 begin with a Downsample block
                   (its shortcut: conv 1x1x1 of stride 2, BatchNorm)
    layer 12       average pooling
    layers 13-15   linear 55,296 -> 256 -> 256 -> classes, ReLU between

One input channel and three classes: 15,335,267 parameters.

What differs from the usual ResNet (He et al. 2015, arXiv 1512.03385), on purpose, because the seed says so: both convs
of a block are followed by BatchNorm *and* ReLU, then comes the sum, then a ReLU. So a last BatchNorm must not start at
zero: its branch would sit where ReLU has no gradient, for ever.
What the seed leaves open: its average pooling of 2 makes 12^3 of cubes of 184 to 199 voxels only. Adaptive pooling to
12^3 equals it for 184 to 191 and serves every size. Convs followed by BatchNorm have no bias.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from models3d._layers import DropPath, adaptive_avg_pool, max_pool, recompute
from models3d._options import Triple, check_input, fraction, per_axis, whole, wholes
from models3d._registry import register_model

__all__ = ["ResBlock", "ResNet3d", "Stem", "resnet3d", "resnet3d_tiny"]


class Stem(nn.Module):
    """Layer 1: (B, in_channels, D, H, W) -> (B, width, D + 1, H + 1, W + 1) at stride 1."""

    def __init__(self, in_channels: int, width: int, stride: tuple[int, int, int], deterministic_pooling: bool) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm3d(width)
        self.deterministic_pooling = deterministic_pooling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = (
            max_pool(x, 2, stride=1, padding=1)
            if self.deterministic_pooling
            else F.max_pool3d(x, 2, stride=1, padding=1)
        )
        return F.relu(self.bn(x), inplace=True)


class ResBlock(nn.Module):
    """relu(shortcut(x) + relu(bn(conv(relu(bn(conv(x))))))); stride 2 makes it the seed's Downsample block."""

    def __init__(self, in_width: int, width: int, stride: int = 1, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.drop_path = DropPath(drop_path)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv3d(in_width, width, 1, stride, bias=False),
                nn.BatchNorm3d(width),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.drop_path(y) + self.shortcut(x), inplace=True)


class ResNet3d(nn.Module):
    """(B, in_channels, D, H, W) -> logits (B, num_classes), any D, H, W.

    width: filters, one number or one per stage; a stage begins at layer 1 and at each layer of `downsample`.
    layers: layers of two blocks; they are numbered 2 to layers + 1, as in the seed.
    downsample: the layers that begin with stride 2; None: 4, 7, 10 and so on in threes.
    stem_stride: stride of the first conv, one number or three.
    pool_size: size of the volume that enters the classifier, one number or three.
    hidden: widths of the classifier's hidden layers; an empty list makes it one linear layer.
    dropout: after each hidden layer.
    drop_path: chance to skip the last block's branch, rising linearly from 0 at the first block.
    checkpoint: keep only the inputs of stem and blocks, and compute the rest again in the backward pass.
    deterministic_pooling: give the two poolings a deterministic backward on CUDA, where the library's have none.

    Raises ValueError for an option out of its range, and for an input of another shape.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        width: int | Sequence[int] = 32,
        layers: int = 10,
        downsample: Sequence[int] | None = None,
        stem_stride: Triple = 1,
        pool_size: Triple = 12,
        hidden: Sequence[int] = (256, 256),
        dropout: float = 0.0,
        drop_path: float = 0.0,
        checkpoint: bool = False,
        deterministic_pooling: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.pool_size = per_axis("pool_size", pool_size)
        self.checkpoint = checkpoint
        self.deterministic_pooling = deterministic_pooling
        halved = _downsampled(whole("layers", layers), downsample)
        widths = _widths(width, layers, halved)
        stride = per_axis("stem_stride", stem_stride)
        self.stem = Stem(in_channels, widths[0], stride, deterministic_pooling)
        self.layers = _blocks(widths, halved, fraction("drop_path", drop_path))
        self.num_features = widths[-1] * self.pool_size[0] * self.pool_size[1] * self.pool_size[2]
        self.head = _mlp(self.num_features, wholes("hidden", hidden), num_classes, fraction("dropout", dropout))
        self.apply(_initialise)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, D, H, W) -> what enters the classifier, (B, num_features)."""
        check_input("resnet3d", x, self.in_channels)
        for part in (self.stem, *(block for layer in self.layers.children() for block in layer.children())):
            x = recompute(part, x) if self.checkpoint and torch.is_grad_enabled() else part(x)
        pool = adaptive_avg_pool if self.deterministic_pooling else F.adaptive_avg_pool3d
        return pool(x, self.pool_size).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.forward_features(x))
        return result


def _downsampled(layers: int, downsample: Sequence[int] | None) -> tuple[int, ...]:
    if downsample is None:
        return tuple(range(4, layers + 2, 3))
    numbers = tuple(sorted(set(wholes("downsample", downsample))))
    if numbers and not 2 <= numbers[0] <= numbers[-1] <= layers + 1:
        raise ValueError(f"downsample is {list(downsample)}; with layers={layers} the layers are 2 to {layers + 1}")
    return numbers


def _widths(width: int | Sequence[int], layers: int, halved: tuple[int, ...]) -> list[int]:
    """Filters of layers 1 to layers + 1."""
    numbers = wholes("width", width)
    if len(numbers) == 1:
        numbers *= len(halved) + 1
    if len(numbers) != len(halved) + 1:
        raise ValueError(
            f"width is {list(numbers)}; give one number, or {len(halved) + 1}, for stages that begin at {[1, *halved]}"
        )
    return [numbers[sum(stage <= layer for stage in halved)] for layer in range(1, layers + 2)]


def _blocks(widths: list[int], halved: tuple[int, ...], drop_path: float) -> nn.Sequential:
    layers = nn.Sequential()
    last = max(2 * (len(widths) - 1) - 1, 1)
    for number, (before, width) in enumerate(pairwise(widths), start=2):
        rates = [drop_path * (2 * (number - 2) + i) / last for i in (0, 1)]
        first = ResBlock(before, width, 2 if number in halved else 1, rates[0])
        layers.add_module(f"layer{number}", nn.Sequential(first, ResBlock(width, width, 1, rates[1])))
    return layers


def _mlp(features: int, hidden: tuple[int, ...], num_classes: int, dropout: float) -> nn.Sequential:
    head = nn.Sequential()
    for width in hidden:
        head.extend([nn.Linear(features, width), nn.ReLU(), nn.Dropout(dropout)])
        features = width
    return head.append(nn.Linear(features, num_classes))


def _initialise(module: nn.Module) -> None:
    """He's normal for the convs (the seed names none); the linear layers keep torch's own."""
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@register_model(options=ResNet3d, example=(1, 190, 190, 190))
def resnet3d(**options: Any) -> ResNet3d:
    """The seed's network: 15,335,267 parameters with one channel and three classes."""
    return ResNet3d(**options)


_TINY: dict[str, Any] = {"width": 8, "layers": 3, "pool_size": 2, "hidden": (16,)}


@register_model(options=ResNet3d, example=(1, 24, 24, 24))
def resnet3d_tiny(**options: Any) -> ResNet3d:
    """The same with 8 filters, three layers and a small classifier, for tests."""
    return ResNet3d(**(_TINY | options))
