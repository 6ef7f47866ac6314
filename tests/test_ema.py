"""The average of the weights, step by step, beside its formula and timm's; what is trained never sees it."""

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from hpc.errors import UserError
from hpc.optimisation import Ema as Settings
from jobs.ema import Ema


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def change(model: nn.Module, step: int) -> None:
    """As a step of training does."""
    torch.manual_seed(step)
    model.train()(torch.randn(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)


def test_the_average_is_what_the_formula_says() -> None:
    model = network()
    ema, wanted = Ema(Settings(decay=0.5), model), model[0].weight.detach().double()
    for step in range(1, 30):
        change(model, step)
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * model[0].weight.detach().double()
        assert torch.allclose(ema.model[0].weight.double(), wanted, atol=1e-6)  # type: ignore[index]
    assert ema.updates == 29


def test_after_the_warm_up_it_is_timms_buffers_and_all() -> None:
    model = network()
    ema = Ema(Settings(decay=0.9), model)
    ema.updates = 1000
    theirs = ModelEmaV3(model, decay=0.9, foreach=True)
    for step in range(20):
        change(model, step)
        ema.update()
        theirs.update(model)
    for (name, mine), other in zip(ema.model.state_dict().items(), theirs.module.state_dict().values(), strict=True):
        assert torch.allclose(mine, other), name
    assert int(ema.model.state_dict()["1.num_batches_tracked"]) == 20


def test_it_is_no_part_of_the_training() -> None:
    model, alone = network(), network()
    ema = Ema(Settings(), model)
    for step in range(5):
        change(model, step)
        change(alone, step)
        ema.update()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), alone.state_dict().values(), strict=True))
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert not ema.model.training


def test_tied_weights_are_averaged_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    ema = Ema(Settings(decay=0.5), model)
    ema.updates = 1000
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
    ema.update()
    assert torch.allclose(ema.model[1].weight, before + 0.5)  # type: ignore[index]
    assert ema.model[0].weight is ema.model[1].weight  # type: ignore[index]


def test_a_model_that_cannot_be_copied_is_told() -> None:
    model = network()
    model.open = open(__file__)  # type: ignore[assignment]  # noqa: PTH123, SIM115
    with pytest.raises(UserError, match=r"train\.ema needs a copy"):
        Ema(Settings(), model)
    model.open.close()
