"""Learning rates at their ends and in between, each beside torch's own scheduler where there is one."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, MultiStepLR, PolynomialLR, StepLR

from hpc.optimisation import Scheduler
from jobs import rates as module

HIGHEST = 0.02


def rates(total: int, per_epoch: int, **settings: object) -> list[float]:
    share = module.share(Scheduler.model_validate(settings), total, per_epoch)
    return [HIGHEST * share(step) for step in range(total)]


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


@pytest.mark.parametrize("name", ["constant", "cosine", "exponential", "poly"])
def test_the_warm_up_is_linear_and_the_schedule_begins_after_it(name: str) -> None:
    found = rates(40, 10, name=name, warmup_epochs=1.5)
    assert found[:15] == pytest.approx([HIGHEST * (step + 1) / 15 for step in range(15)])
    assert found[15] == HIGHEST
    assert found[15:] == pytest.approx(rates(25, 10, name=name))


@given(
    name=st.sampled_from(["constant", "cosine", "exponential", "one_cycle", "poly", "step", "plateau"]),
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
    if name == "step":
        settings["milestones"] = [1, 3]
    for rate in rates(total, per_epoch, **settings):
        assert math.isfinite(rate) and 0 <= rate <= HIGHEST * (1 + 1e-12)


def stepped(scheduler_of: Callable[[torch.optim.Optimizer], LRScheduler], epochs: int) -> list[float]:
    """The rates that one of torch's schedulers gives, a call each."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=HIGHEST)
    scheduler, found = scheduler_of(optimizer), []
    for _ in range(epochs):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def test_stairs_are_those_of_torch() -> None:
    every = stepped(lambda optimizer: StepLR(optimizer, step_size=3, gamma=0.5), 10)
    assert rates(40, 4, name="step", step_size=3, gamma=0.5)[::4] == pytest.approx(every)
    assert rates(40, 4, name="step", step_size=3, gamma=0.5)[3::4] == pytest.approx(every), "all of an epoch"
    given = stepped(lambda optimizer: MultiStepLR(optimizer, milestones=[2, 7]), 10)
    assert rates(40, 4, name="step", milestones=[2, 7])[::4] == pytest.approx(given)
    decayed = stepped(lambda optimizer: ExponentialLR(optimizer, gamma=0.9), 10)
    assert rates(40, 4, name="exponential")[::4] == pytest.approx(decayed)


@pytest.mark.parametrize("power", [0.9, 2.0])
def test_poly_is_that_of_torch_at_each_step(power: float) -> None:
    theirs = stepped(lambda optimizer: PolynomialLR(optimizer, total_iters=50, power=power), 50)
    assert rates(50, 7, name="poly", power=power) == pytest.approx(theirs)


def test_milestones_are_counted_from_the_beginning_with_a_warm_up_too() -> None:
    found = rates(40, 10, name="step", milestones=[2], warmup_epochs=1)
    assert found[:10] == pytest.approx([HIGHEST * (step + 1) / 10 for step in range(10)])
    assert found[19] == HIGHEST and found[20] == pytest.approx(HIGHEST / 10)
