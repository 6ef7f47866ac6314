"""What a run draws: all figures of its best evaluation at the end, after a resume too, and never at its own cost."""

import logging
import os

import numpy as np
import pytest

from datasets import open_volumes
from hpc.experiment import load
from hpc.journal.captions import CAPTIONS
from hpc.logs import series
from hpc.preempt import ExitCode
from jobs import bestrows, drawing
from jobs.figures import rates
from jobs.pictured import Pictured
from jobs.tasks.contract import Stored
from tests import tiny_run, tiny_tasks
from tests.drawn import ink, pixels
from tests.tiny_run import in_child

BOTH = {"curves", "batch_loss", "per_class", "predictions", "worst_samples"}
FIGURES = {
    "multilabel": BOTH | {"label_matrices", "roc", "precision_recall", "calibration"},
    "segmentation": BOTH | {"confusion_matrix", "confusion_matrix_normalised", "dice_by_sample"},
}


def trains(folder, task):
    data = tiny_tasks.make_data(folder, task)
    run = tiny_tasks.make_run(folder / "run", data, task, "train.figures=all", "train.epochs=1")
    drawing.FIRST_S = 0.0
    outcome = tiny_run.train(run)
    pictures = series.images(run.tensorboard)
    made = {path.stem for path in run.figures.glob("*.png")}
    good = outcome == "done" and made == FIGURES[task] <= set(CAPTIONS)
    good = good and all(ink(pixels(run.figure(name).read_bytes())) > 0.01 for name in made)
    good = good and {f"{name}/best" for name in made} <= set(pictures)
    good = good and f"{next(iter({'roc', 'dice_by_sample'} & made))}/validation" in pictures  # at a new best
    os._exit(ExitCode.DONE if good else ExitCode.CRASH)


@pytest.mark.parametrize("task", FIGURES)
def test_a_run_leaves_all_figures_of_its_task(task, tmp_path):
    assert in_child(trains, tmp_path, task) == ExitCode.DONE


class NoTracker:
    def flush(self, *_):
        pass

    def picture(self, *_):
        pass


def draws_again(folder, data):
    """Another attempt finds the best evaluation's rows in the run's folder; one figure is broken."""
    run = tiny_run.make_run(folder / "run", data, "train.figures=all", "train.epochs=1")
    good = tiny_run.train(run) == "done"
    before = {path.name: path.read_bytes() for path in run.figures.iterdir()}
    best = tiny_run.newest(run).state()["best"]
    anew = drawing.Drawer(run, _experiment(run), tiny_run.CLASSES, NoTracker(), open_volumes(data))
    for path in run.figures.iterdir():
        path.unlink()
    rates.roc = lambda *_: 1 / 0
    anew.finish(best["step"], best, run.read_metrics())
    good = good and len(before) == 10 and before.pop("roc.png")
    good = good and before == {path.name: path.read_bytes() for path in run.figures.iterdir()}
    os._exit(ExitCode.DONE if good else ExitCode.CRASH)


def test_another_attempt_draws_the_same_and_one_that_fails_costs_no_other(tmp_path):
    assert in_child(draws_again, tmp_path, tiny_run.make_data(tmp_path)) == ExitCode.DONE


def test_the_rows_of_the_best_evaluation_come_back(tmp_path):
    run = tiny_run.make_run(tmp_path / "run", tmp_path / "none.h5")
    rows = Stored(np.array([3, 5]), None, np.arange(12.0).reshape(2, 6), np.array([0.5, 1.0], np.float32))
    shown = Pictured(5, 1.0, np.ones((1, 2, 2), np.float32), *(np.zeros((2, 2), np.uint8),) * 2)
    assert bestrows.load(run, 8) is None
    assert bestrows.save(run, 8, rows, {"worst_samples": [shown], "predictions": []}, ["a", "b"], ["x", "y"])
    found, pictures = bestrows.load(run, 8)
    assert found.targets is None and (found.rows == rows.rows).all() and (found.samples == rows.samples).all()
    assert pictures["predictions"] == [] and pictures["worst_samples"][0].image.shape == (1, 2, 2)
    assert bestrows.load(run, 9) is None, "of another evaluation"
    run.prediction("best").write_bytes(b"PK cut short")
    assert bestrows.load(run, 8) is None


def test_an_error_is_one_warning(caplog, tmp_path):
    run = tiny_run.make_run(tmp_path / "run", tmp_path / "none.h5")
    drawer = drawing.Drawer(run, _experiment(run), ["a"], None, None)
    with caplog.at_level(logging.WARNING):
        drawer.finish(4, {"matrix": [[1]]}, [])
        drawer.finish(4, {}, [])
    assert [record.message for record in caplog.records] == ["figures are missing: KeyError: 'baseline'"]


def _experiment(run):
    return load(run.experiment)[0]
