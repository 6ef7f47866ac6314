"""Loss scale, autocast and TF32: torch's own sequence, steps that are skipped, runs that resume bit by bit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hpc.errors import UserError
from hpc.experiment import validate
from hpc.optimisation import Optimizer
from hpc.training import Train
from jobs import autotune
from jobs import precision as precisions
from jobs.guards import Verdict
from jobs.optimize import build_optimizer
from jobs.passes import make_passes
from jobs.precision import SCALE_TAG, Fault, Precision, Scaler
from jobs.stepclock import StepClock
from jobs.strategies import make_strategy
from jobs.update import Updater
from tests import tiny_run
from tests.toy_tasks import CPU, samples, toy


def by_torch(overflows: list[bool], interval: int) -> list[float]:
    """The scale after each step, of torch's own scaler."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", growth_interval=interval)
    found = []
    for overflow in overflows:
        scaler.scale(weight.sum() * (torch.inf if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(scaler.get_scale())
    return found


def test_the_scale_goes_as_torch_s_does_and_goes_on_from_its_state() -> None:
    generator = torch.Generator().manual_seed(3)
    overflows = (torch.rand(60, generator=generator) < 0.12).tolist()
    own, found = Scaler(interval=5), []
    for number, overflow in enumerate(overflows):
        if number % 7 == 3:
            state, own = own.state(), Scaler(interval=5)
            own.load(state)
        own.update(overflow)
        found.append(own.scale)
    assert found == by_torch(overflows, 5) and len(set(found)) > 3
    assert own.overflows == sum(overflows)


def make(task: str = "classification") -> tuple[nn.Module, Updater, Precision]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    engine: Any = SimpleNamespace(device=CPU, rank=0, world_size=1, clock=StepClock(CPU))
    settings = Train(precision="fp16", device="cpu")
    precision = Precision(settings, CPU)
    strategy = make_strategy(settings, engine, model)
    strategy.begin(lambda: build_optimizer(Optimizer(name="adamw", lr=0.1), model))
    passes = make_passes(settings, engine, strategy, precision, model, toy(task))
    rates = [0.1] * len(strategy.optimizer.param_groups)
    return model, Updater(strategy, passes, lambda step: rates, None), precision


def batch() -> Any:
    inputs, targets = samples("classification", 8)
    return SimpleNamespace(inputs=inputs, targets=targets, samples=torch.arange(8))


def test_an_overflow_changes_the_scale_and_nothing_else() -> None:
    model, update, precision = make()
    assert precision.scaler
    precision.scaler.scale = 2.0**40  # of which no gradient fits into fp16
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _, fault = update.gradients(batch(), 0)
    assert fault is Fault.OVERFLOW
    update.drop(overflow=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert precision.state() == {"scale": 2.0**39, "good": 0, "overflows": 1}
    assert precision.shown(1) == {SCALE_TAG: 2.0**40} and precision.shown(2) == {}


def test_scaled_gradients_are_those_without_a_scale() -> None:
    found = []
    for scale in (1.0, 2.0**10):
        model, update, precision = make()
        assert precision.scaler
        precision.scaler.scale = scale
        assert update.gradients(batch(), 0)[1] is Fault.NONE
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=1e-5)


def test_what_no_scale_can_help_is_the_guards() -> None:
    precision = Precision(Train(precision="fp16"), CPU)
    assert precision.scaler
    assert precision.fault(0.5, float("inf")) is Fault.OVERFLOW
    assert precision.fault(float("nan"), float("inf")) is Fault.NOT_FINITE
    precision.scaler.scale = 1.0
    assert precision.fault(0.5, float("inf")) is Fault.NOT_FINITE
    assert Precision(Train(precision="bf16"), CPU).fault(0.5, float("inf")) is Fault.NOT_FINITE


def test_tf32_is_both_matrix_products_and_convolutions_and_fp32_is_neither() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for name, wanted in (("tf32", "tf32"), ("fp32", "ieee"), ("bf16", "ieee")):
            Precision(Train(precision=name), torch.device("cuda"))
            assert torch.backends.cuda.matmul.fp32_precision == wanted
            assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is (wanted == "tf32")
            assert torch.backends.cudnn.allow_tf32 is (wanted == "tf32")
            assert torch.backends.cuda.matmul.allow_tf32 is (wanted == "tf32")
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_what_takes_no_effect_is_refused_or_told(caplog: pytest.LogCaptureFixture) -> None:
    values = {"name": "a", "model": {"name": "resnet3d"}, "data": {"file": "a.h5"}}
    with pytest.raises(UserError, match="precision tf32 has no effect on device cpu; use fp32, or bf16"):
        validate({**values, "train": {"precision": "tf32", "device": "cpu"}}, "exp.yaml")
    with pytest.raises(UserError, match="write fp32, tf32, bf16 or fp16"):
        Precision(Train(precision="auto", autotune=True), CPU)
    with caplog.at_level("INFO"):
        precisions.say_idle(Train(precision="tf32"), CPU)
    assert "train.precision tf32 has no effect on cpu" in caplog.text


@pytest.mark.parametrize("emulated", [True, False])
def test_where_bf16_is_emulated_it_is_neither_tried_nor_passed_over_in_silence(
    emulated: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: not emulated)
    values = {"name": "a", "model": {"name": "resnet3d"}, "data": {"file": "a.h5"}}
    auto = validate({**values, "train": {"precision": "auto", "autotune": True, "device": "cpu"}}, "exp.yaml")
    assert autotune.precisions(auto, CPU) == (["fp32"] if emulated else ["fp32", "bf16"])
    precisions.say_idle(Train(precision="bf16"), CPU)
    assert ("use train.precision=fp32 here" in caplog.text) == emulated


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_data(tmp_path_factory.mktemp("data"))


ROWS = (
    ("train.precision=fp16", "train.channels_last=true", "train.accumulate=2", "train.epochs=2"),
    ("train.precision=bf16", "train.channels_last=true", "train.ema={decay: 0.9}", "train.epochs=2"),
)


@pytest.mark.parametrize("overrides", ROWS, ids=lambda row: "-".join(row))
def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, data: Path, overrides: tuple[str, ...]) -> None:
    code = tiny_run.in_child(compare, tmp_path, data, overrides)
    assert code == 0


def compare(folder: Path, data: Path, overrides: tuple[str, ...]) -> None:
    """In fp16 the scale grows with each good step, so that steps overflow before and after the stop."""
    Scaler.__init__.__defaults__ = (2.0**17, 1)  # type: ignore[misc]
    whole = tiny_run.play(folder / "whole", data, (), *overrides)
    tiny_run.assert_same(tiny_run.play(folder / "parts", data, (5,), *overrides), whole)
    if "fp16" in overrides[0]:
        assert whole["learner"]["precision"]["overflows"] > 0
        runs = [tiny_run.RunDir(folder / name) for name in ("whole", "parts")]
        shown = [(tiny_run.shown_steps(run, SCALE_TAG), tiny_run.shown_values(run, SCALE_TAG)) for run in runs]
        assert shown[0] == shown[1] and len(set(shown[0][1])) > 1
        for run in runs:
            skipped = [event["step"] for event in run.read_events() if event["event"] == "overflow"]
            assert min(skipped) <= 5 < max(skipped) and not set(skipped) & set(shown[0][0])


def test_overflows_never_enter_the_guard_s_streak(tmp_path: Path, data: Path) -> None:
    assert tiny_run.in_child(overflow_often, tmp_path, data) == 0


def overflow_often(folder: Path, data: Path) -> None:
    Scaler.__init__.__defaults__ = (2.0**100, 2000)  # type: ignore[misc]
    trainer = tiny_run.make_trainer(tiny_run.make_run(folder / "run", data, "train.precision=fp16"))
    trainer.resume()
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer._begin_epoch()
    trainer.loader.seek(0)
    for given in trainer.loader:
        assert trainer._train_step(given) is Verdict.SKIP
    for given in trainer.loader:
        assert trainer._train_step(given) is Verdict.SKIP
    assert trainer.step == 8 and not trainer.guard.in_streak
    assert all(torch.equal(before[key], value) for key, value in trainer.model.state_dict().items())
    assert trainer.learner.state()["precision"] == {"scale": 2.0**92, "good": 0, "overflows": 8}
    trainer.close()
