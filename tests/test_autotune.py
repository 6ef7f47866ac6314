"""The search for the fastest settings: what it picks, what it leaves out, its budget, and that a run feels nothing."""

import itertools
import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.allocation import Allocation
from hpc.errors import UserError
from hpc.experiment import load
from hpc.rundir import RunDir, read_json
from jobs import autotune, choice
from jobs.autotune import Search
from jobs.choice import Choice
from jobs.precision import Scaler
from jobs.probe import Measured, Probe
from tests import tiny_run

PLAIN = Choice(threads=1)
LAST = replace(PLAIN, channels_last=True)
MODEL = """
import time
import torch
from torch import nn

class Net(nn.Module):
    '''Slow in one of two layouts, and checkpointed.'''

    def __init__(self, in_channels=1, num_classes=2, slow="first", checkpoint=False):
        super().__init__()
        self.slow, self.checkpoint = slow, checkpoint
        self.first, self.second = nn.Conv3d(in_channels, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)
        self.norm, self.drop, self.head = nn.BatchNorm3d(4), nn.Dropout(0.3), nn.Linear(4, num_classes)

    def forward(self, x):
        last = self.second.weight.stride(1) == 1
        if self.checkpoint or last == (self.slow == "last"):
            time.sleep(0.15)
        x = self.norm(self.second(torch.relu(self.first(x))))
        return self.head(self.drop(x.mean((2, 3, 4))))
"""


def search(seconds: dict[Choice, Any], left: Any = lambda: 1e9, agree: Any = list, **more: Any) -> Search:
    """Of a table: seconds, or what was measured."""

    def measure(candidate: Choice, best_s: float | None) -> Measured:
        found = seconds.get(candidate, 9.0)
        return found if isinstance(found, Measured) else Measured(found, found, loss=1.0, norm=2.0)

    return Search(PLAIN, measure, agree, left, more.pop("compile_s", lambda kind: 1.0), **more)


def test_the_fastest_of_all_is_kept_and_each_is_tried_once() -> None:
    both = replace(LAST, compile="blocks")
    found = search({PLAIN: 5.0, LAST: 3.0, both: 2.0})
    assert found.run(["fp32"], checkpoint=True) == both
    tried = [line["choice"] for line in found.tried]
    assert len(set(tried)) == len(tried) == 5
    assert replace(LAST, checkpoint=True) in tried and replace(LAST, compile="model") in tried


def test_a_gain_below_the_noise_changes_nothing() -> None:
    assert search({PLAIN: 5.0, LAST: 4.9}).run(["fp32"], checkpoint=False) == PLAIN


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        (Measured(1.0, 1.0, loss=1.01, norm=2.0), "loss 1.01, not 1"),
        (Measured(1.0, 1.0, loss=1.0, norm=2.1), "gradient 2.1, not 2"),
        (Measured(1.0, 1.0, loss=float("nan"), norm=2.0), "loss or gradient is not finite"),
        (Measured(fault="out of memory"), "out of memory"),
    ],
)
def test_what_computes_something_else_is_left_out(found: Measured, outcome: str) -> None:
    made = search({PLAIN: 5.0, LAST: found})
    assert made.run(["fp32"], checkpoint=False) == PLAIN
    assert next(line["outcome"] for line in made.tried if line["choice"] == LAST) == outcome


def test_precision_is_compared_with_fp32_and_layout_within_each() -> None:
    half = replace(PLAIN, precision="bf16")
    near = Measured(2.0, 2.0, loss=1.02, norm=2.1)
    table = {PLAIN: 5.0, half: near, replace(half, channels_last=True): replace(near, seconds=1.0)}
    assert search(table).run(["fp32", "bf16"], checkpoint=False) == replace(half, channels_last=True)


def test_where_the_plain_way_has_no_memory_checkpointing_is_the_beginning() -> None:
    held = replace(PLAIN, checkpoint=True)
    table = {PLAIN: Measured(fault="out of memory"), held: 3.0, replace(held, channels_last=True): 2.0}
    assert search(table).run(["fp32"], checkpoint=True) == replace(held, channels_last=True)
    assert search({PLAIN: Measured(fault="out of memory")}).run(["fp32"], checkpoint=False) is None


def test_what_may_not_end_in_the_budget_is_not_begun() -> None:
    """Time is what the measurements take: no clock is read."""
    spent = 0.0
    begun: list[Choice] = []

    def measure(candidate: Choice, best_s: float | None) -> Measured:
        nonlocal spent
        begun.append(candidate)
        spent += 4.0 + (20.0 if candidate.compile != "off" else 0)
        return Measured(1.0, 20.0 if candidate.compile != "off" else 1.0, 1.0, 2.0)

    def run(budget: float, compile_s: float) -> list[dict[str, Any]]:
        nonlocal spent
        spent = 0.0
        begun.clear()
        found = Search(PLAIN, measure, list, lambda: budget - spent, lambda kind: compile_s)
        found.run(["fp32", "bf16"], checkpoint=True)
        return found.tried

    tried = run(60.0, 15.0)
    assert spent <= 60 and {one.compile for one in begun} == {"off", "blocks"}
    assert [line["outcome"].split(":")[0] for line in tried][-1] == "not begun"
    run(12.0, 15.0)
    assert spent <= 12 and len(begun) == 2
    run(60.0, 500.0)
    assert {one.compile for one in begun} == {"off"}


def test_ranks_decide_alike_by_the_slowest() -> None:
    def slower_elsewhere(values: Sequence[int]) -> list[int]:
        return [max(value, 6_000_000) if value > 1 else value for value in values]

    assert search({PLAIN: 5.0, LAST: 1.0}, agree=slower_elsewhere).run(["fp32"], checkpoint=False) == PLAIN


def test_a_choice_survives_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chosen, key = Choice("bf16", True, "blocks", True, 4), {"torch": "2", "shape": [1, 2]}
    assert Choice.decode(chosen.codes()) == chosen and choice.look_up(key) is None
    assert choice.publish(key, chosen, {}) == chosen == choice.look_up(key)
    assert choice.publish(key, PLAIN, {}) == chosen  # who comes later takes what is there
    assert choice.look_up({**key, "torch": "3"}) is None
    for text in ("{", "[]", '{"choice": {"precision": "fp8"}}', '{"choice": {"threads": "2"}}', '{"choice": 3}'):
        (choice.cache_folder() / f"{choice.digest(key)}.json").write_text(text)
        assert choice.look_up(key) is None
    run = RunDir(tmp_path / "run")
    choice.remember(run, chosen, {"seconds": 1})
    assert choice.recall(run) == chosen
    run.autotune.write_text('{"choice": {"compile": "maybe"}}')
    with pytest.raises(UserError, match="remove it to measure anew"):
        choice.recall(run)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert choice.publish(key, chosen, {}) == chosen


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_data(tmp_path_factory.mktemp("data"))


def planted(folder: Path, slow: str, *more: str) -> tuple[str, ...]:
    path = folder / "net.py"
    path.write_text(MODEL)
    return ("model=null", f"model={{name: 'file:{path}:Net', slow: {slow}}}", "train.epochs=2", *more)


def make(folder: Path, data: Path, *overrides: str) -> RunDir:
    return tiny_run.make_run(folder, data, *[text for text in overrides if text != "model=null"])


def settings(run: RunDir, generation: int = 1) -> tuple[Choice, Any]:
    trainer = tiny_run.make_trainer(run, generation)
    try:
        return Choice.of(trainer.experiment), trainer
    finally:
        trainer.leave_data()


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and no compilation: it takes more than the budget."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "_COMPILE_S", 1e6)
    return tmp_path


@pytest.mark.parametrize("slow", ["first", "last"])
def test_the_known_fastest_is_chosen_and_kept(apart: Path, data: Path, slow: str) -> None:
    run = make(apart / "run", data, *planted(apart, slow, "train.autotune=true"))
    chosen, _ = settings(run)
    assert chosen.channels_last is (slow == "first") and chosen.compile == "off"
    tried = read_json(run.autotune)["tried"]
    assert {"fp32, channels first, 1 thread", "fp32, channels last, 1 thread"} <= {line["what"] for line in tried}
    assert any("not begun" in line["outcome"] for line in tried)
    other = {"choice": {**read_json(run.autotune)["choice"], "channels_last": slow == "last"}}
    run.autotune.write_text(json.dumps(other))  # as if an earlier attempt had found that
    assert settings(run, 2)[0] == replace(chosen, channels_last=slow == "last")
    elsewhere = apart / "elsewhere"  # as each run has a copy of the code in its own folder
    elsewhere.mkdir()
    again = make(apart / "again", data, *planted(elsewhere, slow, "train.autotune=true"))
    assert settings(again)[0] == chosen  # a later run of the same model, shape and machine
    assert read_json(again.autotune)["from"] == str(choice.cache_folder())


def test_a_run_is_that_with_the_same_settings_in_its_file_and_resumes(apart: Path, data: Path) -> None:
    assert tiny_run.in_child(compare, apart, data) == 0


def compare(folder: Path, data: Path) -> None:
    os.environ["XDG_CACHE_HOME"], autotune._COMPILE_S = str(folder / "cache"), 1e6
    overrides = planted(folder, "first")[1:]
    fixed = tiny_run.play(folder / "fixed", data, (), *overrides, "train.channels_last=true")
    found = tiny_run.play(folder / "found", data, (4,), *overrides, "train.autotune=true")
    tiny_run.assert_same(found, fixed)
    run = RunDir(folder / "found")
    assert read_json(run.result)["autotune"]["channels_last"] is True
    assert "autotune" not in read_json(RunDir(folder / "fixed").result)


def test_probing_leaves_random_numbers_and_every_choice_has_its_own_model(data: Path, apart: Path) -> None:
    run = make(apart / "run", data, *planted(apart, "last", "train.precision=auto", "train.autotune=true"))
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    experiment, _ = load(run.experiment)
    from jobs.setup import prepare
    from jobs.tasks import make_task

    parts = prepare(experiment)
    x, y = torch.randn(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0])
    steps = itertools.count()
    probe = Probe(
        experiment, parts, make_task(experiment, parts.volumes, x.device), x, y, True, clock=lambda: next(steps)
    )
    first = probe.measure(PLAIN)
    assert first == probe.measure(PLAIN) and not first.fault and first.seconds == 1
    assert probe.measure(replace(PLAIN, channels_last=True)).loss == pytest.approx(first.loss, rel=1e-5)
    assert probe.measure(replace(PLAIN, compile="blocks")).fault.startswith("fails: UserError")
    torch.testing.assert_close(torch.rand(3), wanted, rtol=0, atol=0)


def test_predict_computes_as_the_run_was_trained(tmp_path: Path, data: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", data, "train.autotune=true", "train.precision=auto")
    experiment, _ = load(run.experiment)
    assert choice.chosen(run, experiment).train.precision == "auto"
    choice.remember(run, replace(PLAIN, precision="bf16"), {})
    found = choice.chosen(run, experiment)
    assert found.train.precision == "bf16" and found.model.options == experiment.model.options


def test_a_model_out_of_memory_is_left_out(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe.__new__(Probe)
    probe._inputs, probe._window = torch.zeros(1), nullcontext

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probe, "_measure", full)
    assert probe.measure(PLAIN).fault == "out of memory"


def test_ranks_choose_and_overflow_together(tmp_path: Path, data: Path) -> None:
    """Stopped and resumed on two ranks: one choice, one scale, and the bits of the undisturbed run."""
    overrides = planted(tmp_path, "first", "train.autotune=true", "train.precision=fp16")
    whole, parts = make(tmp_path / "whole", data, *overrides), make(tmp_path / "parts", data, *overrides)
    rows = [(whole.path, 1, None), (parts.path, 1, 5), (parts.path, 2, None)]
    ports = [(*row, tiny_run.free_port()) for row in rows]
    assert tiny_run.run_ranks(one_rank, [(rank, ports, tmp_path) for rank in range(2)]) == [0, 0]
    found = [tiny_run.outcome(run) for run in (whole, parts)]
    tiny_run.assert_same(found[1], found[0])
    assert found[0]["learner"]["precision"]["overflows"] > 0
    assert [choice.recall(run) for run in (whole, parts)] == [Choice("fp16", True, threads=1)] * 2


def test_a_search_broken_off_on_one_of_two_ranks_begins_anew(tmp_path: Path, data: Path) -> None:
    """By a stop, and by a kill: both ranks choose one way afterwards, and their run is the undisturbed one."""
    overrides = planted(tmp_path, "first", "train.autotune=true", "train.epochs=1")
    made = [make(tmp_path / name, data, *overrides) for name in ("whole", "stopped", "killed")]
    breaks = (None, (signal.SIGUSR2, [0, 0]), (signal.SIGKILL, [1, -signal.SIGKILL]))
    for run, broken in zip(made, breaks, strict=True):
        if broken:
            number, ends = broken
            port = tiny_run.free_port()
            assert tiny_run.run_ranks(broken_off, [(rank, run, port, number) for rank in range(2)]) == ends
            assert not run.autotune.exists() and not (run.path / "cache").exists()
        rows = [(run.path, 2, None, tiny_run.free_port())]
        assert tiny_run.run_ranks(one_rank, [(rank, rows, run.path) for rank in range(2)]) == [0, 0]
        tiny_run.assert_same(tiny_run.outcome(run), tiny_run.outcome(made[0]))
        assert choice.recall(run) == Choice(channels_last=True, threads=1)


def broken_off(rank: int, run: RunDir, port: int, number: int) -> None:
    """The last rank gets the signal in its second choice."""
    os.environ["XDG_CACHE_HOME"], autotune._COMPILE_S = str(run.path / "cache"), 1e6
    timed = Probe._timed

    def signalled(probe: Probe, model: Any, precision: Any, choice: Choice) -> Any:
        if choice.channels_last and rank == 1:
            os.kill(os.getpid(), number)
        return timed(probe, model, precision, choice)

    Probe._timed = signalled  # type: ignore[method-assign]
    place = Allocation(rank, 2, rank, cpus_per_task=1, master_port=port)
    assert tiny_run.train(run, 1, allocation=place) == "stopped"
    os._exit(0)


def test_a_stop_breaks_the_search_off(tmp_path: Path, data: Path) -> None:
    assert tiny_run.in_child(stop, tmp_path, data) == 0


def stop(folder: Path, data: Path) -> None:
    """A signal comes during the second choice: the run stops before its first step, and measures anew afterwards."""
    os.environ["XDG_CACHE_HOME"], autotune._COMPILE_S = str(folder / "cache"), 1e6
    timed, begun = Probe._timed, []

    def signalled(probe: Probe, model: Any, precision: Any, choice: Choice) -> Any:
        begun.append(choice)
        if choice.channels_last and len(set(begun)) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            while True:  # as a compiler that takes minutes
                time.sleep(0.01)
        return timed(probe, model, precision, choice)

    Probe._timed = signalled  # type: ignore[method-assign]
    overrides = planted(folder, "first", "train.autotune=true")
    run = make(folder / "run", data, *overrides)
    assert tiny_run.train(run, 1) == "stopped"
    assert len(set(begun)) == 2 and not run.autotune.exists() and not choice.cache_folder().exists()
    assert tiny_run.newest(run).step == 0 and read_json(run.stop)["cause"] == "SIGTERM"
    Probe._timed = timed  # type: ignore[method-assign]
    assert tiny_run.train(run, 2) == "done" and choice.recall(run) == Choice(channels_last=True, threads=1)


def one_rank(rank: int, rows: list[Any], folder: Path) -> None:
    os.environ["XDG_CACHE_HOME"], autotune._COMPILE_S = str(folder / "cache"), 1e6
    Scaler.__init__.__defaults__ = (2.0**40, 2000)  # type: ignore[misc]
    tiny_run.play_rank(rank, 2, rows)
