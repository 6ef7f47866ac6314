"""The seed's 3D vision transformer: patches of a volume, 18 pre-norm layers, six of their outputs read together.

Source: experiment journal 004 (3D transformer and 3D ResNet on an A100 of 40 GB), "Modelo basado en transformers".

    encoder   four 3D convs of 8P, 4P, 2P and P filters with ReLU (P = projection_dim = 256), learned positions,
              18 layers: LayerNorm, attention of 4 heads, sum; LayerNorm, MLP 512 -> 256, sum;
              GELU and dropout 0.15 after each dense layer of the MLP
    decoder   outputs of layers 3, 6, 9, 12, 15 and 18 concatenated on features (1,536), BatchNorm over features,
              mean over tokens, dense 128 with ReLU, dense classes

A volume of 190 x 190 x 10 in patches of 10 is 19 x 19 = 361 tokens, the seed's num_patch. One input channel and three
classes: 28,782,083 parameters (head_dim 64: 14,584,835). There are biases everywhere.

**The stem.** The seed gives all four convs kernel = stride = patch_size. Read so, 2 x 2 x 1 tokens are left after the
second conv and one after the third, and the second alone holds 2.1 G weights: its 361 tokens contradict it. So by
default (`stem="pointwise"`) the first conv cuts the patches and the other three are 1 x 1 x 1, which gives the 361
tokens. `stem="literal"` builds the text as it stands, for small patch sizes.

What the seed leaves open, and what is done: head_dim is 256, as Keras's `key_dim = projection_dim` has it (64 would be
P / heads); pooling is the mean over tokens ("flatten" is the option); volumes that do not divide by the patch are
padded with zeros on both sides, the seed's padding='same'; no dropout inside attention; GELU is the exact one;
LayerNorm's epsilon is 1e-6, BatchNorm has torch's defaults; dense layers start from Glorot's uniform with zero biases,
as in Keras, but the ReLU stem from He's normal: Glorot's fan-out over a whole patch would shrink the signal thirtyfold.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from models3d._layers import DropPath, recompute
from models3d._options import Triple, check_input, fraction, one_of, per_axis, whole, wholes
from models3d._registry import register_model

__all__ = ["Layer", "PatchConv", "Transformer3d", "transformer3d", "transformer3d_tiny"]


class PatchConv(nn.Conv3d):
    """Conv with kernel = stride = patch and padding 'same', computed as the matrix product that it is.

    (B, C, D, H, W) -> (B, F, ceil(D / p), ceil(H / p), ceil(W / p)). As a conv a patch of 10 takes 100 times as long in
    bfloat16 on a CPU, and 4 times in float32. Padding is zeros, the odd one at the end, as Keras has it.
    """

    def __init__(self, in_channels: int, out_channels: int, patch: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, patch, stride=patch)
        self.patch = patch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        missing = [-n % p for n, p in zip(x.shape[2:], self.patch, strict=True)]
        if any(missing):
            x = F.pad(x, [side for m in reversed(missing) for side in (m // 2, m - m // 2)])
        (b, c), (p, q, r) = x.shape[:2], self.patch
        d, h, w = (n // k for n, k in zip(x.shape[2:], self.patch, strict=True))
        x = x.reshape(b, c, d, p, h, q, w, r).permute(0, 2, 4, 6, 1, 3, 5, 7)
        x = F.linear(x.reshape(b, d, h, w, c * p * q * r), self.weight.flatten(1), self.bias)
        return x.permute(0, 4, 1, 2, 3)


class Attention(nn.Module):
    """Self-attention over (B, T, dim); heads * head_dim need not equal dim."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        result: torch.Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


class Layer(nn.Module):
    """One pre-norm transformer layer, (B, T, dim) -> (B, T, dim)."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, mlp_dim: int, dropout: float, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads, head_dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(mlp_dim, dim), nn.GELU(), nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        result: torch.Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return result


class Transformer3d(nn.Module):
    """(B, in_channels, *input_size) -> logits (B, num_classes).

    input_size: D, H, W of the volumes in voxels; it fixes the number of positions.
    patch_size: voxels per patch, one number or three in the order D, H, W.
    projection_dim: features of a token, P above. depth, heads, head_dim: of the transformer layers.
    mlp_dim: the hidden dense layer of each MLP; its second is projection_dim, for the sum.
    dropout: after each dense layer of the MLPs.
    drop_path: chance to skip each of the last layer's two branches, rising linearly from 0 at the first layer.
    taps: layers whose outputs are read, from 1; None: every third and the last. The last layer must be among them.
    hidden: width of the decoder's dense layer.
    pooling: "mean" over tokens, or "flatten". stem: "pointwise" or "literal", see the top of this file.
    checkpoint: keep only the inputs of stem and layers, and compute the rest again in the backward pass.

    Raises ValueError for an option out of its range, and for an input with another number of channels or tokens.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        input_size: Triple = (190, 190, 10),
        patch_size: Triple = 10,
        projection_dim: int = 256,
        depth: int = 18,
        heads: int = 4,
        head_dim: int = 256,
        mlp_dim: int = 512,
        dropout: float = 0.15,
        drop_path: float = 0.0,
        taps: Sequence[int] | None = None,
        hidden: int = 128,
        pooling: str = "mean",
        stem: str = "pointwise",
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.checkpoint = in_channels, checkpoint
        self.input_size = per_axis("input_size", input_size)
        self.pooling = one_of("pooling", pooling, ("mean", "flatten"))
        self.taps = _taps(whole("depth", depth), taps)
        dim = whole("projection_dim", projection_dim)
        sizes = [whole(n, v) for n, v in (("heads", heads), ("head_dim", head_dim), ("mlp_dim", mlp_dim))]
        self.stem = _stem(in_channels, dim, per_axis("patch_size", patch_size), stem)
        self.grid = _grid(self.stem, self.input_size)
        self.num_tokens = self.grid[0] * self.grid[1] * self.grid[2]
        self.positions = nn.Parameter(torch.empty(self.num_tokens, dim))
        rate, skipped = fraction("dropout", dropout), fraction("drop_path", drop_path)
        rises = [skipped * number / max(depth - 1, 1) for number in range(depth)]
        self.layers = nn.ModuleList(Layer(dim, sizes[0], sizes[1], sizes[2], rate, rise) for rise in rises)
        self.norm = nn.BatchNorm1d(dim * len(self.taps))
        features = self.norm.num_features * (self.num_tokens if pooling == "flatten" else 1)
        width = whole("hidden", hidden)
        self.head = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, num_classes))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.apply(_initialise)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, *input_size) -> normalised outputs of the taps, (B, num_tokens, projection_dim * taps)."""
        check_input("transformer3d", x, self.in_channels)
        self._check_grid(x)
        x = self._run(self.stem, x).flatten(2).transpose(1, 2) + self.positions
        outputs = []
        for number, layer in enumerate(self.layers, start=1):
            x = self._run(layer, x)
            if number in self.taps:
                outputs.append(x)
        tokens = torch.cat(outputs, dim=-1)
        result: torch.Tensor = self.norm(tokens.flatten(0, 1)).reshape(tokens.shape)
        return result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.forward_features(x)
        result: torch.Tensor = self.head(tokens.mean(1) if self.pooling == "mean" else tokens.flatten(1))
        return result

    def _run(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return recompute(part, x) if self.checkpoint and torch.is_grad_enabled() else part(x)

    def _check_grid(self, x: torch.Tensor) -> None:
        size = (x.shape[2], x.shape[3], x.shape[4])
        if _grid(self.stem, size) != self.grid:
            raise ValueError(
                f"transformer3d was built for volumes of {self.input_size}, {self.num_tokens} tokens, got {size}; "
                f"build it with input_size={size}"
            )


def _taps(depth: int, taps: Sequence[int] | None) -> tuple[int, ...]:
    numbers = {*range(3, depth + 1, 3), depth} if taps is None else set(wholes("taps", taps))
    if not numbers or max(numbers) != depth:
        raise ValueError(
            f"taps is {taps}; the last layer, {depth}, must be the last tap, or what follows would not train"
        )
    return tuple(sorted(numbers))


def _stem(in_channels: int, dim: int, patch: tuple[int, int, int], kind: str) -> nn.Sequential:
    literal = one_of("stem", kind, ("pointwise", "literal")) == "literal"
    widths = [in_channels, 8 * dim, 4 * dim, 2 * dim, dim]
    stem = nn.Sequential()
    for i in range(4):
        stem.append(PatchConv(widths[i], widths[i + 1], patch if literal or i == 0 else (1, 1, 1)))
        stem.append(nn.ReLU())
    return stem


def _grid(stem: nn.Sequential, size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tokens per axis that the stem makes of a volume of `size`."""
    for conv in stem:
        if isinstance(conv, PatchConv):
            d, h, w = (-(-n // p) for n, p in zip(size, conv.patch, strict=True))
            size = (d, h, w)
    return size


def _initialise(module: nn.Module) -> None:
    if isinstance(module, PatchConv):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, Attention):
        for weight in module.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(weight)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    if isinstance(module, PatchConv | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@register_model(options=Transformer3d, example=(1, 190, 190, 10))
def transformer3d(**options: Any) -> Transformer3d:
    """The seed's network: 361 tokens and 28,782,083 parameters with one channel and three classes."""
    return Transformer3d(**options)


_TINY: dict[str, Any] = {
    "input_size": (16, 16, 8), "patch_size": 8, "projection_dim": 16, "depth": 4, "heads": 2, "head_dim": 8,
    "mlp_dim": 32, "hidden": 16,
}  # fmt: skip


@register_model(options=Transformer3d, example=(1, 16, 16, 8))
def transformer3d_tiny(**options: Any) -> Transformer3d:
    """The same with four layers of 16 features on volumes of 16 x 16 x 8, for tests."""
    return Transformer3d(**(_TINY | options))
