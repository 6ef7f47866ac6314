"""U-Nets for segmentation, in 3D and 2D, with nnU-Net's conventions.

Sources: Ronneberger et al. 2015 (arXiv 1505.04597), in 3D Cicek et al. 2016 (arXiv 1606.06650), nnU-Net: Isensee et al.
2021 (doi 10.1038/s41592-020-01008-z), its PlainConvUNet.

    encoder    per resolution two convs of 3, each with InstanceNorm and LeakyReLU (0.01); the first one has the stride;
               filters double from 32 up to 320 (in 2D 512)
    decoder    per resolution a transposed conv with kernel = stride, the encoder's output beside it, two convs as above
    head       conv of 1: a score for every class and voxel

What differs from nnU-Net's: convs that a norm follows have no bias, which the norm would take away; one tensor of
scores comes out, at full resolution: no deep supervision, as a loss and a metric here read one tensor.
Any size goes in and comes out: a stride of s makes n voxels ceil(n / s), the transposed conv makes s times that, and
what is too much at the end of an axis is cut off. So nothing is padded that a norm would count, and sizes that
divide by the strides are as in nnU-Net.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from models3d._layers import NORMS, norm_layer, recompute
from models3d._options import Triple, along_axes, check_input, fraction, one_of, whole
from models3d._registry import register_model

__all__ = ["UNet", "UNet2d", "UNet3d", "unet2d", "unet2d_tiny", "unet3d", "unet3d_tiny"]

_SLOPE = 0.01
Sizes = tuple[int, ...]


class Convs(nn.Sequential):
    """conv (stride), dropout of channels, norm, LeakyReLU; `count` times, the later ones with stride 1."""

    def __init__(
        self, in_width: int, width: int, count: int, kernel: Sizes, stride: Sizes, norm: str, dropout: float
    ) -> None:
        super().__init__()
        axes = len(kernel)
        conv = nn.Conv3d if axes == 3 else nn.Conv2d
        drop = nn.Dropout3d if axes == 3 else nn.Dropout2d
        for number in range(count):
            step: Any = (1,) * axes if number else stride
            size: Any = kernel
            padding: Any = tuple(k // 2 for k in kernel)
            self.append(conv(width if number else in_width, width, size, step, padding, bias=False))
            if dropout:
                self.append(drop(dropout))
            self.extend([norm_layer(norm, width, axes), nn.LeakyReLU(_SLOPE)])


class Up(nn.Module):
    """(B, in_width, *low), (B, width, *high) -> (B, width, *high): one resolution of the decoder."""

    def __init__(self, in_width: int, width: int, stride: Sizes, convs: Convs) -> None:
        super().__init__()
        transposed = nn.ConvTranspose3d if len(stride) == 3 else nn.ConvTranspose2d
        size: Any = stride
        self.up = transposed(in_width, width, size, size)
        self.convs = convs

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        for axis, size in enumerate(skip.shape[2:], start=2):
            x = x.narrow(axis, 0, size)
        result: torch.Tensor = self.convs(torch.cat((x, skip), dim=1))
        return result


class UNet(nn.Module):
    """(B, in_channels, *spatial) -> logits (B, num_classes, *spatial), any size that leaves InstanceNorm two voxels.

    depth: resolutions. width: filters of the highest one, doubled by each lower one up to `widest`.
    strides: of each resolution, the first is 1; each one number or one per axis. None: 1, then 2.
        For anisotropic volumes, e.g. of 1 x 1 x 5 mm: [1, [2, 2, 1], [2, 2, 1], 2, 2].
    kernels: of the convs of each resolution, odd; one number for all, or a list as `strides`, e.g. [[3, 3, 1], 3, ...].
    convs: of each resolution, in the encoder and in the decoder.
    norm: "instance"; "batch"; "group", of 16 channels. dropout: of whole channels, after each conv.
    checkpoint: keep only the inputs of each resolution's convs, and compute the rest again in the backward pass.

    Raises ValueError for an option out of its range, and for an input with another number of axes or channels.
    """

    axes: int
    _widest: int

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        depth: int = 6,
        width: int = 32,
        widest: int | None = None,
        strides: Sequence[Triple] | None = None,
        kernels: int | Sequence[Triple] = 3,
        convs: int = 2,
        norm: str = "instance",
        dropout: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.checkpoint = in_channels, checkpoint
        count = whole("depth", depth)
        most = self._widest if widest is None else whole("widest", widest)
        widths = [min(whole("width", width) << number, most) for number in range(count)]
        steps = self._each("strides", [1] + [2] * (count - 1) if strides is None else strides, count)
        sizes = self._each("kernels", [kernels] * count if isinstance(kernels, int) else kernels, count)
        self._steps, self._instance = steps, norm == "instance"
        if set(steps[0]) != {1}:
            raise ValueError(f"strides begin with {steps[0]}; the first must be 1: scores come out at full resolution")
        if any(k % 2 == 0 for size in sizes for k in size):
            raise ValueError(f"kernels is {kernels!r}; give odd numbers, which have a centre")
        each, rate = whole("convs", convs), fraction("dropout", dropout)
        one_of("norm", norm, NORMS)
        ones = (1,) * self.axes
        self.encoder = nn.ModuleList(
            Convs(before, after, each, size, step, norm, rate)
            for (before, after), size, step in zip(pairwise([in_channels, *widths]), sizes, steps, strict=True)
        )
        self.decoder = nn.ModuleList(
            Up(low, high, step, Convs(2 * high, high, each, size, ones, norm, rate))
            for (low, high), size, step in zip(pairwise(widths[::-1]), sizes[-2::-1], steps[:0:-1], strict=True)
        )
        self.head = (nn.Conv3d if self.axes == 3 else nn.Conv2d)(widths[0], num_classes, 1)
        self.apply(_initialise)

    def _each(self, name: str, values: Sequence[Triple], count: int) -> list[Sizes]:
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
            raise ValueError(f"{name} is {values!r}; give a list of {count}, one for each resolution of depth: {count}")
        return [along_axes(name, value, self.axes) for value in values]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_input(f"unet{self.axes}d", x, self.in_channels, self.axes)
        self._check_size(x.shape[2:])
        skips: list[torch.Tensor] = []
        for part in self.encoder:
            x = self._run(part, x)
            skips.append(x)
        for part, skip in zip(self.decoder, skips[-2::-1], strict=True):
            x = self._run(part, x, skip)
        result: torch.Tensor = self.head(x)
        return result

    def _check_size(self, size: Sequence[int]) -> None:
        """ValueError where InstanceNorm has one voxel, which has no spread."""
        left = tuple(size)
        for number, step in enumerate(self._steps):
            left = tuple(-(-length // along) for length, along in zip(left, step, strict=True))
            if self._instance and math.prod(left) < 2:
                given = " x ".join(map(str, size))
                fewer = f"model.depth={number}, " if number else ""
                where = f"at resolution {number + 1} of {len(self._steps)}"
                raise ValueError(
                    f"unet{self.axes}d: InstanceNorm needs two voxels, but has one voxel left of {given} {where}: "
                    f"use {fewer}model.norm=batch, or larger samples"
                )

    def _run(self, part: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (recompute if self.checkpoint and torch.is_grad_enabled() else _plain)(part, *inputs)
        return result


class UNet3d(UNet):
    """UNet over (B, in_channels, D, H, W)."""

    axes, _widest = 3, 320


class UNet2d(UNet):
    """UNet over (B, in_channels, H, W)."""

    axes, _widest = 2, 512


def _plain(part: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = part(*inputs)
    return result


def _initialise(module: nn.Module) -> None:
    """He's normal for a leaky ReLU with zero biases, as in nnU-Net."""
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_TINY: dict[str, Any] = {"width": 8, "depth": 3}


@register_model(options=UNet3d, example=(1, 128, 128, 128))
def unet3d(**options: Any) -> UNet3d:
    """nnU-Net's usual network for patches of 128^3: six resolutions, 32 to 320 filters."""
    return UNet3d(**options)


@register_model(options=UNet3d, example=(1, 24, 24, 24))
def unet3d_tiny(**options: Any) -> UNet3d:
    """Three resolutions from 8 filters on, for tests and small patches."""
    return UNet3d(**(_TINY | options))


@register_model(options=UNet2d, example=(3, 512, 512))
def unet2d(**options: Any) -> UNet2d:
    """nnU-Net's usual network for images of 512 x 512: eight resolutions, 32 to 512 filters."""
    return UNet2d(**({"depth": 8} | options))


@register_model(options=UNet2d, example=(1, 24, 24))
def unet2d_tiny(**options: Any) -> UNet2d:
    """Three resolutions from 8 filters on, for tests and small images."""
    return UNet2d(**(_TINY | options))
