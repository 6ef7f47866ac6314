"""Which parameters are decayed and how fast each goes; timm's optimizers, and what each leaves in a checkpoint."""

import json
import warnings

import pytest
import torch
from torch import nn

from hpc.errors import UserError
from hpc.optimisation import Optimizer
from jobs import tensorfile
from jobs.optimize import build_optimizer, timm_optimizers


def model() -> nn.Module:
    frozen = nn.Linear(4, 4)
    frozen.requires_grad_(False)
    return nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Flatten(), nn.Linear(16, 4), frozen)


def build(**settings: object) -> torch.optim.Optimizer:
    return build_optimizer(Optimizer.model_validate(settings), model())


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_only_weights_of_more_than_one_dimension_are_decayed(name: str) -> None:
    decayed, plain = build(name=name, weight_decay=0.05).param_groups
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0.0
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 1, 3, 3, 3), (4, 16)]
    assert [tuple(p.shape) for p in plain["params"]] == [(2,), (2,), (2,), (4,)]


def test_every_name_is_the_optimizer_that_torch_calls_so() -> None:
    adam = build(name="adam", lr=0.3, betas=(0.8, 0.99))
    assert type(adam) is torch.optim.Adam
    assert adam.defaults["lr"] == 0.3 and adam.defaults["betas"] == (0.8, 0.99)
    assert type(build(name="adamw")) is torch.optim.AdamW
    sgd = build(name="sgd", momentum=0.8)
    assert type(sgd) is torch.optim.SGD and sgd.defaults["momentum"] == 0.8 and sgd.defaults["nesterov"]
    assert not build(name="sgd", momentum=0.0).defaults["nesterov"]


def test_a_model_without_one_dimensional_weights_can_be_trained() -> None:
    network = nn.Linear(3, 2, bias=False)
    optimizer = build_optimizer(Optimizer(), network)
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


# timm's.


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 3))


def run_steps(network: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        inputs, targets = torch.randn(4, 1, 4, 4), torch.randint(0, 3, (4,))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        nn.functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(optimizer: torch.optim.Optimizer) -> tuple[str, dict[str, torch.Tensor]]:
    """What a checkpoint holds of it."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(tensorfile.apart(optimizer.state_dict(), tensors))
    return text, {name: tensor.clone() for name, tensor in tensors.items()}


def goes_on(settings: Optimizer) -> bool:
    """Whether a run that is saved and resumed is the undisturbed one, bit by bit."""
    whole, first = small(), small()
    undisturbed = build_optimizer(settings, whole)
    run_steps(whole, undisturbed, 0, 12)
    stopped = build_optimizer(settings, first)
    run_steps(first, stopped, 0, 7)
    text, tensors = saved(stopped)
    second = small()
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(settings, second)
    resumed.load_state_dict(tensorfile.together(json.loads(text), tensors))
    run_steps(second, resumed, 7, 12)
    (wanted, theirs), (found, mine) = saved(undisturbed), saved(resumed)
    same = all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in theirs)
    weights = zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
    return found == wanted and mine.keys() == theirs.keys() and same and all(torch.equal(a, b) for a, b in weights)


def test_the_state_of_every_one_that_is_allowed_survives_a_checkpoint() -> None:
    names = timm_optimizers()
    assert len(names) > 70 and {"lion", "lamb", "nadamw", "adafactor", "muon"} <= {*names}
    with warnings.catch_warnings(action="ignore"):
        given = ["adam", "adamw", "sgd", *(f"timm:{name}" for name in names)]
        lost = [name for name in given if not goes_on(Optimizer(name=name, lr=0.01, weight_decay=0.05))]
    assert not lost


def test_one_of_timm_has_our_groups_and_its_options() -> None:
    lion = build(name="timm:lion", lr=0.3, weight_decay=0.1, options={"betas": [0.8, 0.9]})
    assert type(lion).__name__ == "Lion" and lion.defaults["betas"] == [0.8, 0.9]
    assert [(group["lr"], group["weight_decay"]) for group in lion.param_groups] == [(0.3, 0.1), (0.3, 0.0)]


REFUSED = {
    "timm:lyon": ({}, "no such; did you mean 'lion'"),
    "timm:adahessian": ({}, "second derivatives"),
    "timm:adafactorbv": ({}, "timm:adafactor"),
    "timm:bnbadam": ({}, "bitsandbytes"),
    "timm:kron": ({}, "random numbers"),
    "timm:lion": ({"bethas": [0.1, 0.2]}, "no 'bethas'; did you mean 'betas'"),
    "timm:sgd": ({"lr": 0.1}, "no 'lr'"),
    "timm:adamw": ({"capturable": True}, "no 'capturable'"),
    "timm:adam": ({"betas": [2.0, 3.0]}, r"timm:adam refuses .*betas.*beta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_timm_does_not_have_is_told_in_a_line(name: str) -> None:
    options, told = REFUSED[name]
    with pytest.raises(UserError, match=told) as caught:
        build(name=name, options=options)
    assert "\n" not in str(caught.value)
