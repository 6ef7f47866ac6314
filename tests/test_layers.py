"""Which layers are the backbone, what a stage freezes, and each parameter's rate."""

from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from hpc.errors import UserError
from hpc.optimisation import Optimizer, Stage
from jobs.layers import Layers, head_of, resolve
from jobs.optimize import build_optimizer
from models3d import create_model

HEADS = {
    "timm:resnet18": ["fc"],
    "timm:efficientnet_b0": ["classifier"],
    "timm:vit_tiny_patch16_224": ["head"],
    "timm:convnext_atto": ["head.fc"],
    "timm:deit_tiny_distilled_patch16_224": ["head", "head_dist"],
    "torchvision:resnet18": ["fc"],
    "torchvision:mobilenet_v3_small": ["classifier"],
    "torchvision:vit_b_16": ["heads"],
    "torchvision:swin_t": ["head"],
    "torchvision:squeezenet1_1": ["classifier"],
    "torchvision:r3d_18": ["fc"],
    "resnet3d_tiny": ["head"],
    "transformer3d_tiny": ["head"],
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_what_makes_the_scores(name: str) -> None:
    options = {"input_size": (16, 16, 16)} if name.startswith("transformer3d") else {}
    with torch.device("meta"):
        model = create_model(name, in_channels=3, num_classes=5, **options)
    assert head_of(model) == HEADS[name]


def test_of_a_segmentation_model_the_backbone_is_its_encoder() -> None:
    with torch.device("meta"):
        model = smp.Unet("resnet18", encoder_weights=None)
    assert head_of(model) == ["decoder", "segmentation_head"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.stem2 = nn.BatchNorm2d(2, affine=False)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)) for _ in range(2)])
        self.last = nn.Linear(2, 3)


def layers(lr: float = 1e-3, **stage: Any) -> Layers:
    model = Net()
    names = [name for name, _ in model.named_parameters()]
    return resolve(Stage.model_validate({"epochs": 1, **stage}), "train.stages.0", model, lr, names)


def test_without_anything_all_is_trained_at_the_rate_of_the_run() -> None:
    found = layers()
    assert [*found.rates] == [name for name, _ in Net().named_parameters()]
    assert {*found.rates.values()} == {1e-3} and found.norms == []


def test_a_frozen_backbone_leaves_the_last_layer_and_stills_the_norms() -> None:
    found = layers(freeze="backbone", lr=0.1)
    assert found.rates == {"last.weight": 0.1, "last.bias": 0.1}
    assert len(found.norms) == 4, "one of them without weights"


def test_names_are_compared_as_far_as_a_dot() -> None:
    found = layers(freeze=["stem", "blocks.0", "blocks.1.1.bias"])
    assert [*found.rates] == ["blocks.1.0.weight", "blocks.1.0.bias", "blocks.1.1.weight", "last.weight", "last.bias"]
    assert len(found.norms) == 2, "stem2 is another layer than stem"


def test_the_longest_name_gives_the_rate() -> None:
    found = layers(backbone_lr=1e-5, layer_lrs={"blocks": 1e-4, "blocks.1.0": 2e-4}).rates
    assert found["stem.0.weight"] == 1e-5 and found["last.bias"] == 1e-3
    assert found["blocks.0.0.weight"] == 1e-4 and found["blocks.1.0.weight"] == 2e-4


def test_each_rate_and_decay_has_a_group() -> None:
    model = Net()
    found = layers(backbone_lr=1e-5).rates
    groups = build_optimizer(Optimizer(weight_decay=0.1), model, found).param_groups
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (1e-5, 0.1, 3),
        (1e-5, 0.0, 9),
        (1e-3, 0.1, 1),
        (1e-3, 0.0, 1),
    ]


def test_freezing_is_undone_by_the_next_stage() -> None:
    model = Net()
    layers(freeze="backbone").freeze(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["last.weight", "last.bias"]
    layers().freeze(model)
    assert all(p.requires_grad for p in model.parameters())


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown layer": ({"freeze": ["stm"]}, r"train\.stages\.0\.freeze: .* 'stm'; did you mean 'stem'"),
    "a deep one": ({"freeze": ["blocks.5"]}, r"'blocks.5'; did you mean 'blocks"),
    "half a name": ({"freeze": ["blo"]}, "no layer 'blo'"),
    "a rate for nothing": ({"layer_lrs": {"lost": 1}}, r"train\.stages\.0\.layer_lrs: .*'lost'; .*last"),
    "a rate of frozen ones": ({"freeze": ["stem"], "layer_lrs": {"stem.0": 1}}, r"stem\.0 has no effect.*frozen"),
    "nothing left": ({"freeze": ["stem", "blocks", "last"]}, "leaves nothing to train"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_the_model_is_told(name: str) -> None:
    given, told = FAULTS[name]
    with pytest.raises(UserError, match=told) as caught:
        layers(**given)
    assert "\n" not in str(caught.value)


def test_a_backbone_that_cannot_be_told_is_an_error_with_the_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1))
    with pytest.raises(UserError, match=r"train\.stages\.1\.freeze: .*Sequential.*it has 0, 1"):
        resolve(Stage(epochs=1, freeze="backbone"), "train.stages.1", model, 1.0, [])
