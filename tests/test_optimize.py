"""Learning rates at their ends and in between, and which parameters are decayed."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hpc.training import Optimizer, Scheduler
from jobs.optimize import build_optimizer, learning_rate

HIGHEST = 0.02


def rates(total: int, per_epoch: int, **settings: object) -> list[float]:
    rate = learning_rate(Scheduler.model_validate(settings), HIGHEST, total, per_epoch)
    return [rate(step) for step in range(total)]


def rises(values: list[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def falls(values: list[float]) -> bool:
    return all(a > b for a, b in pairwise(values))


def test_constant() -> None:
    assert rates(20, 5, name="constant") == [HIGHEST] * 20


def test_cosine_falls_from_the_highest_rate_to_the_final_share() -> None:
    found = rates(101, 10, name="cosine", final=0.1)
    assert found[0] == HIGHEST
    assert found[-1] == pytest.approx(0.1 * HIGHEST)
    assert found[50] == pytest.approx((1 + 0.1) / 2 * HIGHEST)
    assert falls(found)


def test_cosine_agrees_with_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=HIGHEST)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=49, eta_min=0.05 * HIGHEST)
    theirs = []
    for _ in range(50):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(50, 7, name="cosine", final=0.05) == pytest.approx(theirs)


def test_exponential_is_a_stair_of_epochs_as_torch_has_it() -> None:
    found = rates(30, 10, name="exponential", gamma=0.85)
    assert found == pytest.approx([HIGHEST] * 10 + [0.85 * HIGHEST] * 10 + [0.85**2 * HIGHEST] * 10)


def test_one_cycle_rises_for_three_tenths_and_falls_to_the_final_share() -> None:
    found = rates(101, 10, name="one_cycle", final=0.001)
    assert found[0] == pytest.approx(HIGHEST / 25)
    assert found[30] == pytest.approx(HIGHEST)
    assert found[-1] == pytest.approx(0.001 * HIGHEST)
    assert rises(found[:31]) and falls(found[30:])


def test_one_cycle_agrees_with_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=HIGHEST, total_steps=101, pct_start=0.307, cycle_momentum=False, final_div_factor=1e4 / 25
    )
    theirs = []
    for _ in range(101):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(theirs) < 101:
            scheduler.step()
    # torch counts the rise as pct_start * total - 1 steps, we as 30 % of the distance
    assert rates(101, 10, name="one_cycle", final=1e-4) == pytest.approx(theirs, rel=1e-2, abs=HIGHEST * 1e-3)


@pytest.mark.parametrize("name", ["constant", "cosine", "exponential"])
def test_the_warm_up_is_linear_and_the_schedule_begins_after_it(name: str) -> None:
    found = rates(40, 10, name=name, warmup_epochs=1.5)
    assert found[:15] == pytest.approx([HIGHEST * (step + 1) / 15 for step in range(15)])
    assert found[15] == HIGHEST
    assert found[15:] == pytest.approx(rates(25, 10, name=name))


@given(
    name=st.sampled_from(["constant", "cosine", "exponential", "one_cycle"]),
    total=st.integers(1, 60),
    per_epoch=st.integers(1, 20),
    warmup=st.sampled_from([0.0, 0.01, 0.5, 1.0, 2.7, 100.0]),
    final=st.floats(0, 1),
)
def test_every_rate_is_finite_and_within_bounds(
    name: str, total: int, per_epoch: int, warmup: float, final: float
) -> None:
    settings: dict[str, object] = {"name": name}
    if name != "one_cycle":
        settings["warmup_epochs"] = warmup
    if name in ("cosine", "one_cycle"):
        settings["final"] = final
    for rate in rates(total, per_epoch, **settings):
        assert math.isfinite(rate) and 0 <= rate <= HIGHEST * (1 + 1e-12)


# Optimizers.


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
