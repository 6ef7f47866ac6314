"""Stages, averages, plateau and an early end: stopped, killed and resumed anywhere, a run is the undisturbed one."""

import io
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc.errors import UserError
from hpc.experiment import load
from hpc.preempt import ExitCode
from hpc.rundir import RunDir, read_json
from jobs import checkpoint, evaluate
from jobs.precision import Fault
from jobs.setup import check
from tests import tiny_run
from tests.tiny_run import CONTEXT, STEPS_PER_EPOCH, Outcome, assert_same, free_port, in_child, outcome, play, run_ranks

WORKERS = 3
PLATEAU = "{name: plateau, patience: 0, factor: 0.5, metric: loss, threshold: 0.9}"  # no epoch is ten times better
STAGED = (
    "train.stages=[{epochs: 1, freeze: backbone, lr: 0.05, scheduler: {name: constant}},"
    f" {{epochs: 3, lr: 0.04, backbone_lr: 0.01, scheduler: {PLATEAU}}}]",
    "train.epochs=4",
    "train.scheduler=null",
    "train.keep=9",
    "train.ema={decay: 0.9}",
    "train.clip_norm=1",
)
# In an epoch there are four boundaries after a step and two in the validation: 5 to 7 are at the end of stage 0.
BOUNDARIES = 1 + 4 * (STEPS_PER_EPOCH + 2)
STOPS = [(3,), (5,), (7,), (8,), (20,), (3, 4, 6)]
EARLY = ("train.early_stopping={patience: 1, metric: accuracy, min_delta: 1}", "train.ema={decay: 0.5}")
EARLY_STOPS = [(8,), (13,)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(WORKERS, mp_context=CONTEXT) as executor:
        yield executor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def staged(pool: ProcessPoolExecutor, data: Path, folder: Path) -> dict[Any, "Future[Outcome]"]:
    return {row: staged_row(pool, folder, data, row) for row in [(), *STOPS]}


def staged_row(pool: ProcessPoolExecutor, folder: Path, data: Path, row: tuple[int, ...]) -> "Future[Outcome]":
    return pool.submit(play, folder / name_of("staged", row), data, row, *STAGED, boundaries=BOUNDARIES)


@pytest.fixture(scope="module")
def early(pool: ProcessPoolExecutor, data: Path, folder: Path) -> dict[Any, "Future[Outcome]"]:
    return {row: pool.submit(play, folder / name_of("early", row), data, row, *EARLY) for row in [(), *EARLY_STOPS]}


@pytest.fixture(scope="module", autouse=True)
def early_start(staged: dict[Any, Any], early: dict[Any, Any]) -> None:
    """The rows run beside the other tests."""


def name_of(kind: str, row: tuple[int, ...]) -> str:
    return "-".join(map(str, (kind, *row)))


def rates(run: RunDir) -> list[float]:
    """Of each step, as TensorBoard has them."""
    return tiny_run.shown_values(run, "step/learning_rate")


# Stages.


@pytest.mark.parametrize("stops", STOPS, ids=lambda stops: "-".join(map(str, stops)))
def test_stopped_in_a_stage_or_at_its_border_it_is_bit_identical(
    stops: tuple[int, ...], staged: dict[Any, "Future[Outcome]"]
) -> None:
    assert_same(staged[stops].result(), staged[()].result())


def kill(folder: Path, generation: int, boundary: int | None) -> None:
    answer = tiny_run.train(RunDir(folder), generation, boundary, signal.SIGKILL, save_always=True)
    os._exit(ExitCode.DONE if answer == "done" else ExitCode.CRASH)


def test_killed_at_the_border_with_all_saved_it_is_bit_identical(
    data: Path, tmp_path: Path, staged: dict[Any, "Future[Outcome]"]
) -> None:
    run = tiny_run.make_run(tmp_path / "run", data, *STAGED)
    assert in_child(kill, run.path, 1, 8) == -signal.SIGKILL  # after the first step of stage 1
    newest = tiny_run.newest(run)
    assert newest.step == STEPS_PER_EPOCH and newest.state()["learner"]["stage"] == 0, "of the border itself"
    assert in_child(kill, run.path, 2, None) == ExitCode.DONE
    assert_same(outcome(run), staged[()].result())


def test_a_frozen_backbone_keeps_its_weights_and_statistics(
    data: Path, folder: Path, staged: dict[Any, "Future[Outcome]"]
) -> None:
    staged[()].result()
    run = tiny_run.make_run(folder / "fresh", data, *STAGED)
    assert in_child(compare_first_stage, run.path, folder / name_of("staged", (5,))) == 0


def compare_first_stage(fresh: Path, stopped: Path) -> None:
    """The checkpoint at the border, beside the model as it began."""
    start = tiny_run.make_trainer(RunDir(fresh)).model.state_dict()
    [path] = (RunDir(stopped).checkpoints).glob(f"g001-s{STEPS_PER_EPOCH:08d}")
    found = checkpoint.verify(path)
    for weights in (found.trained(), found.model()):
        changed = {name for name, value in weights.items() if not torch.equal(value, start[name])}
        assert changed and all(name.startswith("head.") for name in changed), changed
    assert any(name.endswith("running_mean") for name in start)


def test_each_stage_has_its_rates_and_plateau_lowers_them(folder: Path, staged: dict[Any, "Future[Outcome]"]) -> None:
    found = staged[()].result()
    assert rates(RunDir(folder / "staged")) == pytest.approx([0.05] * 4 + [0.04] * 8 + [0.02] * 4)
    assert [group["lr"] for group in found["groups"]] == [0.005, 0.005, 0.02, 0.02], "of the backbone and of the head"
    assert [line["epoch"] for line in found["learner"]["history"]] == [1, 2, 3, 4]


def test_what_is_evaluated_is_the_average(data: Path, folder: Path, staged: dict[Any, "Future[Outcome]"]) -> None:
    found = staged[()].result()
    differ = [name for name, value in found["weights"].items() if value != found["trained"][name]]
    assert "head.0.weight" in differ and found["learner"]["averaged"] == 4 * STEPS_PER_EPOCH
    run = RunDir(folder / "staged")
    assert in_child(compare_with_evaluate, run.path) == 0


def compare_with_evaluate(folder: Path) -> None:
    torch.set_num_threads(1)
    run = RunDir(folder)
    with redirect_stdout(io.StringIO()) as out:
        assert evaluate.main([str(folder), "--checkpoint", "last", "--json"]) == ExitCode.DONE
    told, last = json.loads(out.getvalue())["metrics"], read_json(run.result)["last"]["metrics"]
    assert told["loss"] == pytest.approx(last["loss"], rel=1e-5), (told, last)


def skip_a_step(folder: Path) -> None:
    """Step 6 is not finite: the average must not move."""
    trainer = tiny_run.make_trainer(RunDir(folder))
    trainer.resume()
    update, ema, seen = trainer.learner.update, trainer.learner.ema, {}
    assert ema
    gradients = update.gradients

    def spoilt(batch: Any, step: int) -> Any:
        counts, bad = gradients(batch, step)
        seen[step] = [value.clone() for value in ema.model.state_dict().values()]
        return counts, Fault.NOT_FINITE if step == 5 else bad

    update.gradients = spoilt  # type: ignore[method-assign]
    trainer.fit()
    assert ema.updates == 11 and trainer.step == 12
    assert all(torch.equal(a, b) for a, b in zip(seen[5], seen[6], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[4], seen[5], strict=True))
    os._exit(0)


def test_a_skipped_step_does_not_enter_the_average(data: Path, tmp_path: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", data, "train.ema={decay: 0.9}")
    assert in_child(skip_a_step, run.path) == 0
    assert tiny_run.newest(run).state()["learner"]["averaged"] == 11


LAYOUT = (*STAGED, "train.deterministic=layout", "data.batch_size=4")


def play_ranks(rank: int, rows: list[tuple[Path, int, int, int | None, int]]) -> None:
    """Attempts (run, generation, ranks, boundary, port) one after another; only the last rank is signalled."""
    from hpc.allocation import Allocation

    for folder, generation, world, boundary, port in rows:
        if rank >= world:
            continue
        place = Allocation(rank, world, rank, cpus_per_task=1, master_port=port)
        answer = tiny_run.train(RunDir(folder), generation, boundary if rank == world - 1 else None, allocation=place)
        assert answer == ("done" if boundary is None else "stopped")
    os._exit(0)


@pytest.mark.parametrize("layout", [False, True], ids=["run", "layout"])
def test_two_ranks_stop_in_each_stage_and_go_on_bit_identical(layout: bool, data: Path, tmp_path: Path) -> None:
    """Of the layout the undisturbed run has one rank, and the resumed one changes their number."""
    given = LAYOUT if layout else (*STAGED, "train.accumulate=2")
    whole, stopped = (tiny_run.make_run(tmp_path / name, data, *given) for name in ("whole", "stopped"))
    rows = [(whole.path, 1, 1 if layout else 2, None)]
    rows += [(stopped.path, 1, 2, 3), (stopped.path, 2, 2, 6), (stopped.path, 3, 2, None)]
    plan = [(*row, free_port()) for row in rows]
    assert run_ranks(play_ranks, [(rank, plan) for rank in range(2)]) == [0, 0]
    signals = [event["step"] for event in stopped.read_events() if event["event"] == "signal"]
    assert len(signals) == 2 and signals[0] < STEPS_PER_EPOCH < signals[1], "one in each stage"
    assert_same(outcome(stopped), outcome(whole))


# An early end.


@pytest.mark.parametrize("stops", EARLY_STOPS, ids=lambda stops: "-".join(map(str, stops)))
def test_stopped_before_an_early_end_it_is_bit_identical(
    stops: tuple[int, ...], early: dict[Any, "Future[Outcome]"]
) -> None:
    assert_same(early[stops].result(), early[()].result())


def test_an_early_end_is_a_finished_run_that_tells_its_epochs(
    data: Path, folder: Path, early: dict[Any, "Future[Outcome]"]
) -> None:
    assert early[()].result()["step"] == 2 * STEPS_PER_EPOCH
    run = RunDir(folder / "early")
    result, state = read_json(run.result), read_json(run.state)
    assert result["finished"] and (result["epochs"], result["steps"]) == (2, 8)
    assert result["stopped_early"] == {"metric": "accuracy", "epochs_without_gain": 1, "planned_epochs": 3}
    assert (state["phase"], state["step"], state["steps"]) == ("ending", 8, 8)


def test_its_schedule_is_that_of_the_whole_length(
    data: Path, folder: Path, early: dict[Any, "Future[Outcome]"]
) -> None:
    early[()].result()
    found = rates(RunDir(folder / "early"))
    assert len(found) == 8 and found[-1] > 0.2 * max(found), "a third of the cycle is left"
    assert np.argmax(found) in (3, 4), "three tenths of twelve steps"


# The check before a run queues.


CHECKED = {
    "an unknown layer": (
        "train.stages=[{epochs: 3, freeze: [stm]}]",
        r"train\.stages\.0\.freeze: .*'stm'.*did you mean",
    ),
    "an unknown optimizer": ("train.optimizer={name: timm:lyon}", "did you mean 'lion'"),
    "an option of none": ("train.optimizer={name: timm:lion, options: {bets: 1}}", "did you mean 'betas'"),
}


@pytest.mark.parametrize("name", CHECKED)
def test_the_check_refuses_before_the_job_queues(name: str, data: Path, tmp_path: Path) -> None:
    override, told = CHECKED[name]
    run = tiny_run.make_run(tmp_path / "run", data, override)
    with pytest.raises(UserError, match=told):
        check(load(run.experiment)[0])


def test_the_check_tells_what_each_stage_trains(data: Path, tmp_path: Path) -> None:
    lines = check(load(tiny_run.make_run(tmp_path / "run", data, *STAGED).experiment)[0])
    assert "parameters trained at 0.05" in lines[-2] and lines[-2].startswith("stage 0: 1 epoch, ")
    assert lines[-1].startswith("stage 1: 3 epochs, ") and lines[-1].endswith("trained at 0.01, 0.04")
