"""Where the time of a step goes: planted times show in the right part, and the parts add up; FLOPs by hand; traces."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from datasets import prefetch, reading
from hpc import steptimes
from hpc.errors import UserError
from hpc.experiment import Experiment, load, validate
from hpc.journal import markdown, sections
from hpc.journal.compose import compose
from hpc.journal.rundata import RunData
from hpc.rundir import RunDir, read_json
from hpc.steptimes import PHASES, STEP
from jobs import flops, profiling, stepclock
from jobs.flops import Work
from jobs.guards import LossGuard
from jobs.profiling import Profiling
from jobs.setup import Parts
from jobs.stepclock import StepClock
from jobs.watchdog import Watchdog
from models3d import create_model
from tests import tiny_run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALONE: Any = SimpleNamespace(world_size=1, sum=lambda tensor: tensor, is_main=True, device=CPU)
PLANTED = {"data": 1.0, "host": 2.0, "forward": 4.0, "backward": 8.0, "optimizer": 16.0, "save": 32.0}


class Time:
    """It passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def during(self, seconds: float, function: Any) -> Any:
        """The function, which takes so long."""

        def slow(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return function(*args, **kwargs)

        return slow


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(stepclock, "perf_counter", time)
    monkeypatch.setattr(prefetch, "time", SimpleNamespace(monotonic=time))
    return time


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_data(tmp_path_factory.mktemp("data"))


# --- the clock ---


def plant(time: Time, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of a step takes as long as PLANTED says: each reads 4 samples, and saves before the next one."""
    monkeypatch.setattr(reading.Reader, "read", time.during(PLANTED["data"] / tiny_run.BATCH, reading.Reader.read))
    monkeypatch.setattr(LossGuard, "verdict", time.during(PLANTED["host"], LossGuard.verdict))
    trainer.model.register_forward_pre_hook(time.during(PLANTED["forward"], lambda *_: None))
    first = next(trainer.model.parameters())
    first.register_hook(time.during(PLANTED["backward"], lambda gradient: gradient))
    trainer.learner.strategy.optimizer.register_step_pre_hook(time.during(PLANTED["optimizer"], lambda *_: None))
    trainer._snapshot = time.during(PLANTED["save"], trainer._snapshot)
    tiny_run._save_at_each_step(trainer)


def test_each_part_of_a_step_is_told_where_it_is_spent_and_all_parts_add_up(
    tmp_path: Path, data: Path, clock: Time, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run.make_run(tmp_path / "run", data, "train.epochs=2", "data.threads=0")
    trainer = tiny_run.make_trainer(run)
    caplog.set_level(logging.INFO)
    trainer.resume()
    plant(clock, trainer, monkeypatch)
    trainer.fit()
    trainer.close()
    first, second = (line["step_seconds"] for line in run.read_metrics())
    # a run saves before its first step, and after the evaluation of an epoch: that counts for the step that follows
    for found in (first, second):
        assert {phase: found[phase] for phase in PHASES} == pytest.approx(PLANTED)
        assert found[STEP] == pytest.approx(sum(PLANTED.values()))
    shown = {phase: tiny_run.shown_values(run, f"time/{phase}") for phase in (*PHASES, STEP)}
    assert shown["forward"] == pytest.approx([4.0] * len(shown["forward"])) and shown["save"][-1] == pytest.approx(32)
    assert all(len(values) == len(shown[STEP]) > 1 for values in shown.values())
    result = read_json(run.result)
    assert result["step_seconds"]["backward"] == pytest.approx(8.0)
    per_sample = trainer.work.flops[0]
    alone = second[STEP] - second["save"]
    assert run.read_metrics()[1]["flops_per_second"] == pytest.approx(per_sample * tiny_run.BATCH / alone)
    assert "mfu" not in result and "forward 6 %" in caplog.text


def test_the_report_shows_the_parts_of_a_step() -> None:
    timing = {"step_seconds": {**PLANTED, STEP: 63.0}, "flops_per_second": 3e12, "mfu": 0.125}
    run = RunData("a", result=timing)
    table = next(table for table in sections.section(run, run, "").tables if "time" in table.title)
    assert [row[0].text for row in table.rows] == list(PHASES.values())
    assert [row[3].text for row in table.rows][2:4] == ["6.3%", "12.7%"] and table.rows[5][1].text == "#" * 10
    assert "| Computing | 3 TFLOP/s, 12.5 % of the peak (MFU) |" in markdown.render(compose([run], {}))
    assert sections._timing(RunData("old", result={"waiting_share": 0.1})) is None


def test_of_several_evaluations_the_median_is_told_and_what_none_has_is_left_out() -> None:
    lines: list[dict[str, Any]] = [{"step_seconds": {**PLANTED, STEP: 63.0 + n}, "mfu": n / 10} for n in (1, 2, 9)]
    found = steptimes.typical([*lines, {"step": 1}])
    assert found["step_seconds"][STEP] == 65 and found["mfu"] == 0.2 and "flops_per_second" not in found
    strange = {"step_seconds": {"data": "soon", "step": True}, "mfu": float("nan"), "flops_per_second": "many"}
    assert steptimes.typical([*lines, strange]) == found  # a file that something else wrote, too
    assert steptimes.typical([{}]) == {} and steptimes.lines({}) == []
    assert steptimes.rate(3.9e11) == "390 GFLOP/s" and steptimes.milliseconds(0.01234) == "12.3 ms"


def test_the_times_of_all_ranks_are_averaged(clock: Time) -> None:
    mine = StepClock(CPU)
    mine.begin(0.0)
    with mine.phase("forward"):
        clock.now += 2
    mine.end(waited=0.0)
    two: Any = SimpleNamespace(world_size=2, sum=lambda tensor: tensor + torch.tensor([[6.0, 0, 0, 0, 0, 0, 6.0]]))
    found = mine.flush(two)
    assert (found["data"], found["forward"], found[STEP]) == (3.0, 1.0, 4.0)
    assert mine.flush(two) == {} and mine.epoch() == found


class Event:
    """A CUDA event whose device is `behind` seconds late; asking the newest step's before its end is a wait."""

    time = Time()
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = self.time.now

    def synchronize(self) -> None:
        Event.waits += self.at == self.time.now

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.at - self.at)


def test_on_a_gpu_events_are_read_once_the_device_has_passed_them(clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.time, Event.waits = clock, 0
    mine = StepClock(CUDA)
    mine.begin(0.0)
    for step in range(1, 4):
        for phase, seconds in (("forward", 1.0), ("backward", 2.0), ("backward", 2.0), ("optimizer", 0.5)):
            with mine.phase(phase):
                clock.now += seconds * step
        mine.end(waited=0.0)
    found = mine.flush(ALONE, newest=False)
    assert (found["forward"], found["backward"], found["optimizer"], found["host"]) == (1.5, 6.0, 0.75, 0.0)
    assert Event.waits == 0, "the newest step stays until the next flush"
    assert mine.flush(ALONE)["backward"] == 12.0 and mine.epoch()["forward"] == 2.0


# --- FLOPs ---


def by_hand(model: nn.Module, inputs: torch.Tensor) -> dict[str, int]:
    """2 x outputs x weights: a convolution has a multiply-add for each output voxel and number of its kernel."""
    found: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(module: Any, _: Any, out: torch.Tensor) -> None:
            each = out[0, 0].numel() if isinstance(module, nn.Conv3d) else 1
            found[name] = 2 * each * module.weight.numel() * len(out)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv3d | nn.Linear):
            module.register_forward_hook(count(name))
    model(inputs)
    return found


def parts_of(name: str, shape: tuple[int, ...], **options: Any) -> Parts:
    nothing: Any = None
    return Parts(nothing, shape, 3, options)


def experiment(name: str = "resnet3d", **train: Any) -> Experiment:
    values = {"name": "a", "model": {"name": name}, "data": {"file": "a.h5", "batch_size": 6}, "train": train}
    return validate({**values, "launch": {"instance": "cedia-a100-40gb"}}, "test")


def test_flops_of_the_seed_resnet_are_those_counted_by_hand() -> None:
    """Forward, the gradient of the weights and that of the input, which the first layer need not have."""
    shape = (1, 32, 32, 32)
    with torch.device("meta"):
        hand = by_hand(create_model("resnet3d", 1, 3), torch.empty(1, *shape))
    wanted = 3 * sum(hand.values()) - next(iter(hand.values()))
    assert flops.per_sample(experiment(), parts_of("resnet3d", shape)) == (wanted,)
    assert flops.per_sample(experiment(), parts_of("resnet3d", shape, checkpoint=True)) == (wanted,), "no recomputation"
    head = experiment(stages=[{"epochs": 1, "freeze": "backbone"}, {"epochs": 1}])
    last = list(hand)[-1]
    assert flops.per_sample(head, parts_of("resnet3d", shape))[1] == wanted
    assert sum(hand.values()) + hand[last] <= flops.per_sample(head, parts_of("resnet3d", shape))[0] < wanted
    # 6 samples in 0.5 s, of which 0.1 s are saving, on 4 GPUs of 312 TFLOP/s
    work = Work((wanted,), 6, flops.peak(experiment(precision="bf16"), CUDA, 4))
    timing = work.timing(0, {**dict.fromkeys(PHASES, 0.0), "save": 0.1, STEP: 0.5})
    assert timing["flops_per_second"] == pytest.approx(wanted * 6 / 0.4)
    assert timing["mfu"] == pytest.approx(wanted * 6 / 0.4 / (4 * 312e12)) and work.timing(0, {}) == {}


def test_without_a_known_peak_there_are_flops_and_without_a_count_neither(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16 = experiment(precision="bf16")
    assert flops.peak(bf16, CPU, 1) is None
    assert flops.peak(bf16.model_copy(update={"launch": SimpleNamespace(instance="gone")}), CUDA, 1) is None
    assert Work((2.0,), 1).rates(0, 3.0) == {"flops_per_second": 6.0} and Work().rates(0, 3.0) == {}

    def refuse(*_: object) -> None:
        raise RuntimeError("aten::nonzero has no meta kernel\nmore")

    monkeypatch.setattr(flops, "per_sample", refuse)
    caplog.set_level(logging.INFO)
    assert flops.work_of(bf16, parts_of("resnet3d", (1, 8, 8, 8)), ALONE).flops == ()
    assert [r.message for r in caplog.records] == [
        "the model's FLOPs are not counted: aten::nonzero has no meta kernel"
    ]


# --- train.profile ---


def steps_of(trace: Path) -> list[str]:
    """The steps in a trace, each of which has run convolutions."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    steps = [event for event in events if event["name"].startswith("ProfilerStep#")]
    for step in steps:
        inside = [e["name"] for e in events if step["ts"] <= e["ts"] <= step["ts"] + step["dur"]]
        assert "aten::convolution" in inside and "aten::convolution_backward" in inside
    return sorted(event["name"] for event in steps)


def test_a_window_of_steps_is_traced_and_a_stop_in_it_leaves_the_rest_to_the_next_attempt(
    tmp_path: Path, data: Path
) -> None:
    run = tiny_run.make_run(tmp_path / "run", data, "train.profile=[5, 9]", "train.epochs=3")
    assert tiny_run.train(run, 1, signal_at=10) == "stopped"  # after 7 steps and an evaluation of two batches
    assert tiny_run.train(run, 2) == "done"
    names = sorted(path.name for path in run.tensorboard.glob("*.json"))
    assert names == ["g001-s00000005-00000007.pt.trace.json", "g002-s00000007-00000009.pt.trace.json"]
    assert steps_of(run.tensorboard / names[0]) == ["ProfilerStep#5", "ProfilerStep#6"]
    assert steps_of(run.tensorboard / names[1]) == ["ProfilerStep#7", "ProfilerStep#8"]
    assert not list(run.tensorboard.glob(".*")) and tiny_run.shown_steps(run, "step/loss") == list(range(1, 13))


@pytest.mark.parametrize("fault", ["start", "stop", "export_chrome_trace"])
def test_a_profiler_that_fails_ends_no_run(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    methods = dict.fromkeys(("start", "stop", "export_chrome_trace"), lambda *_: None) | {fault: refuse}
    monkeypatch.setattr(profiling, "profile", lambda **_: SimpleNamespace(**methods))
    run, done = RunDir(tmp_path), []
    engine: Any = SimpleNamespace(**vars(ALONE), allocation=SimpleNamespace(generation=1, rank=0))
    mine = Profiling(run, (1, 3), engine, Watchdog(run, engine.allocation, 60))
    for number in range(5):
        with mine.step(number):
            done.append(number)
    mine.close()
    assert done == [0, 1, 2, 3, 4] and not list(tmp_path.rglob("*.json"))
    assert caplog.text.count("no profiler trace") == 1 and "INSUFFICIENT_PRIVILEGES" in caplog.text


def test_a_window_that_would_fill_the_memory_is_refused(tmp_path: Path, data: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", data)
    with pytest.raises(UserError, match=r"traces 400 steps.*100 at most, \[10, 110\]"):
        load(run.experiment, ["train.profile=[10, 410]"])
