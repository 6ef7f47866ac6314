"""One step of every task: parts of a batch give its gradient, a bound its norm, and a dropped step changes nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from datasets.loader import Batch
from hpc.optimisation import Ema as EmaSettings
from hpc.optimisation import Optimizer
from hpc.training import Train
from jobs.ema import Ema
from jobs.engine import Engine
from jobs.optimize import build_optimizer
from jobs.passes import RankPasses, make_passes
from jobs.precision import Precision
from jobs.stepclock import StepClock
from jobs.strategies import Strategy, make_strategy
from jobs.update import Updater
from tests.toy_tasks import CPU, samples, toy

TASKS = ("classification", "multilabel", "segmentation")


def engine() -> Engine:
    """Of one rank, without the process's settings."""
    found: Any = SimpleNamespace(device=CPU, rank=0, world_size=1, clock=StepClock(CPU))
    return found


def begun(model: nn.Module, settings: Train) -> Strategy:
    strategy = make_strategy(settings, engine(), model)
    strategy.begin(lambda: build_optimizer(Optimizer(name="sgd", lr=0.1), model))
    return strategy


def network(task: str) -> nn.Sequential:
    torch.manual_seed(1)
    if task == "segmentation":
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 3, 1))
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def batch(task: str) -> Batch:
    inputs, targets = samples(task, 8)
    return Batch(inputs, targets, torch.arange(8))


def make(task: str, parts: int = 1, clip: float | None = None, **loss: Any) -> tuple[nn.Module, RankPasses, Updater]:
    model = network(task)
    settings = Train(accumulate=parts, device="cpu")
    strategy = begun(model, settings)
    passes = make_passes(settings, engine(), strategy, Precision(settings, engine().device), model, toy(task, **loss))
    rates = [0.1] * len(strategy.optimizer.param_groups)
    assert isinstance(passes, RankPasses)
    return model, passes, Updater(strategy, passes, lambda step: rates, clip)


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("task", TASKS)
def test_parts_of_a_batch_give_the_gradient_of_the_whole(task: str) -> None:
    found = []
    for parts in (1, 2, 8):
        model, _, update = make(task, parts)
        counts, bad = update.gradients(batch(task), 0)
        assert not bad and counts.samples == 8
        found.append((gradient(model), counts.total_loss(), counts.cells))
    for own, loss, cells in found[1:]:
        torch.testing.assert_close(own, found[0][0])
        assert loss == pytest.approx(found[0][1], rel=1e-6) and torch.equal(cells, found[0][2])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("parts", [1, 4])
def test_the_norm_of_the_whole_gradient_is_bounded(task: str, parts: int) -> None:
    free, _, update = make(task, parts)
    update.gradients(batch(task), 0)
    bounded, _, other = make(task, parts, clip=0.01)
    other.gradients(batch(task), 0)
    assert gradient(free).norm() > 0.02
    assert float(gradient(bounded).norm()) == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(gradient(bounded) * (gradient(free).norm() / 0.01), gradient(free), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_only_a_step_that_counts_changes_weights_and_average(task: str) -> None:
    model, settings = network(task), Train(device="cpu")
    ema, strategy = Ema(EmaSettings(decay=0.5), model), begun(model, settings)
    passes = make_passes(settings, engine(), strategy, Precision(settings, engine().device), model, toy(task))
    rates = [0.1] * len(strategy.optimizer.param_groups)
    update = Updater(strategy, passes, lambda step: rates, None, ema.update)
    before = [p.detach().clone() for p in model.parameters()]
    spoilt = batch(task)
    spoilt.inputs.fill_(float("nan"))
    _, bad = update.gradients(spoilt, 0)
    assert bad
    update.drop()
    for weights in (model, ema.model):
        assert all(torch.equal(a, b) for a, b in zip(weights.parameters(), before, strict=True))
    assert ema.updates == 0 and all(p.grad is None for p in model.parameters())
    update.gradients(batch(task), 0)
    update.apply()
    assert ema.updates == 1
    assert not any(torch.equal(a, b) for a, b in zip(ema.model.parameters(), before, strict=True))


def test_layers_that_are_still_keep_their_statistics_in_a_training_step() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    settings, task = Train(device="cpu"), toy("classification")
    strategy, precision = begun(model, settings), Precision(settings, engine().device)
    passes = make_passes(settings, engine(), strategy, precision, model, task, still=[model[1]])
    before = model[1].running_mean.clone(), model[2].running_mean.clone()
    passes.backward(batch("classification"), 0)
    assert torch.equal(model[1].running_mean, before[0]) and not torch.equal(model[2].running_mean, before[1])
    assert not model[1].training and model[2].training
