"""The way back from losses that are no number: across the border of two stages, and with an average of the weights."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc.rundir import RunDir, read_json
from jobs import checkpoint
from jobs.guards import IN_A_ROW
from jobs.precision import Fault
from jobs.train import Stopped
from tests import tiny_run
from tests.tiny_run import STEPS_PER_EPOCH

STAGED = (
    "train.stages=[{epochs: 2, freeze: backbone, lr: 0.05, scheduler: {name: constant}}, {epochs: 2, lr: 0.04}]",
    "train.epochs=4",
    "train.scheduler=null",
    "train.keep=20",
    "train.ema={decay: 0.9}",
)
BORDER, STEPS = 2 * STEPS_PER_EPOCH, 4 * STEPS_PER_EPOCH
BAD = range(BORDER + 2, BORDER + 2 + IN_A_ROW)
"""Steps of the second stage: five bad ones; the five before them are passed over as well, back into the first."""
TARGET = BAD[0] - IN_A_ROW - 1


def spoil(trainer: Any, bad_steps: range = BAD) -> None:
    """Each new optimizer has an updater of its own."""
    begin = trainer.learner._begin

    def begun(number: int) -> None:
        begin(number)
        gradients = trainer.learner.update.gradients

        def spoilt(batch: Any, step: int) -> Any:
            counts, bad = gradients(batch, step)
            return counts, Fault.NOT_FINITE if step + 1 in bad_steps else bad

        trainer.learner.update.gradients = spoilt

    trainer.learner._begin = begun


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(value, wanted[name]) for name, value in found.items())


def go_back(folder: Path) -> None:
    trainer = tiny_run.make_trainer(RunDir(folder))
    spoil(trainer)
    tiny_run._save_at_each_step(trainer)
    learner, roll_back, seen = trainer.learner, trainer._roll_back, []

    def rolled() -> None:
        assert (trainer.step, learner.number) == (BAD[-1], 1) and learner.ema
        before = {path.name: checkpoint.verify(path) for path in checkpoint.newest_first(trainer.run.checkpoints)}
        roll_back()
        [found] = [one for one in before.values() if one.step == TARGET]
        assert (trainer.step, learner.number) == (TARGET, 0), "in the first stage again"
        assert same(learner.model.state_dict(), found.trained()) and same(learner.ema.model.state_dict(), found.model())
        assert not same(found.trained(), found.model()) and learner.ema.updates == TARGET
        assert {group["lr"] for group in learner.strategy.optimizer.param_groups} == {0.05}
        moments, wanted = learner.strategy.optimizer.state_dict()["state"], found.optimizer()["state"]
        assert moments.keys() == wanted.keys() and all(
            torch.equal(moments[key][name], wanted[key][name]) for key in moments for name in ("exp_avg", "exp_avg_sq")
        )
        seen.append(trainer.step)

    trainer._roll_back = rolled  # type: ignore[method-assign]
    trainer.resume()
    trainer.fit()
    passed_over = BAD[-1] - TARGET
    assert seen == [TARGET] and trainer.step == STEPS and learner.number == 1
    assert learner.ema and learner.ema.updates == STEPS - passed_over, "no skipped step enters the average"
    trainer.close()
    os._exit(0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("rolled")
    run = tiny_run.make_run(folder / "run", tiny_run.make_data(folder), *STAGED)
    assert tiny_run.in_child(go_back, run.path) == 0
    return run


def test_weights_average_moments_and_stage_go_back_together(run: RunDir) -> None:
    events = [event for event in run.read_events() if event["event"] == "rollback"]
    assert [(event["step"], event["left"]) for event in events] == [(TARGET, BAD[-1])]
    assert read_json(run.result)["steps"] == STEPS


def test_each_step_that_counts_has_the_rate_of_its_stage(run: RunDir) -> None:
    steps = tiny_run.shown_steps(run, "step/learning_rate")
    assert steps == [*range(1, TARGET + 1), *range(BAD[-1] + 1, STEPS + 1)]
    rates = dict(zip(steps, tiny_run.shown_values(run, "step/learning_rate"), strict=True))
    assert all(rates[step] == pytest.approx(0.05 if step <= BORDER else 0.04) for step in steps)
    lines = run.read_metrics()
    assert [line["step"] for line in lines] == [4, 8, 12, 16] and all(
        np.isfinite(line["metrics"]["loss"]) for line in lines
    )


EARLY = range(3, 3 + IN_A_ROW)


def train_early(folder: Path, generation: int, boundary: int | None) -> None:
    """Five bad steps before the first save is due; stopped at a boundary, if one is given."""
    flag = tiny_run.SignalAtBoundary(boundary, signal.SIGTERM)
    trainer = tiny_run.make_trainer(RunDir(folder), generation, flag.install())
    spoil(trainer, EARLY)
    trainer.resume()
    with suppress(Stopped):
        trainer.fit()
    trainer.close()
    os._exit(0)


def test_stops_within_a_row_of_bad_steps_keep_what_it_goes_back_to(tmp_path: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", tiny_run.make_data(tmp_path))
    for generation, boundary in enumerate((3, 3, 2, None), start=1):  # stops at steps 2, 4 and 5, where 2 are kept
        assert tiny_run.in_child(train_early, run.path, generation, boundary) == 0
    [rollback] = [event for event in run.read_events() if event["event"] == "rollback"]
    assert (rollback["step"], rollback["left"]) == (EARLY[0] - 1, EARLY[-1]) and run.result.exists()


def test_bad_steps_before_the_first_checkpoint_have_a_place_to_go_back_to(tmp_path: Path) -> None:
    data = tiny_run.make_data(tmp_path)
    undisturbed, stopped = (tiny_run.make_run(tmp_path / name, data) for name in ("undisturbed", "stopped"))
    assert tiny_run.in_child(train_early, undisturbed.path, 1, None) == 0
    assert tiny_run.in_child(train_early, stopped.path, 1, 3) == 0 and not stopped.result.exists()
    assert tiny_run.in_child(train_early, stopped.path, 2, None) == 0
    last = [checkpoint.verify(next(checkpoint.newest_first(run.checkpoints))) for run in (undisturbed, stopped)]
    assert last[0].step == last[1].step == read_json(undisturbed.result)["steps"]
    assert same(last[0].model(), last[1].model()), "wherever it was stopped"
    for run in (undisturbed, stopped):
        [rollback] = [event for event in run.read_events() if event["event"] == "rollback"]
        assert (rollback["step"], rollback["left"]) == (EARLY[0] - 1, EARLY[-1])
