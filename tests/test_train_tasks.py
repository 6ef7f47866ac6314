"""Multilabel and segmentation runs: stopped anywhere, on any ranks, they end as if nothing had happened."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets.writer import VolumeWriter
from hpc.allocation import Allocation
from hpc.errors import UserError
from hpc.experiment import load
from hpc.logs.event import as_kept
from hpc.logs.series import scalars
from hpc.metrics import DEFAULT_MONITOR, DIRECTIONS, STEP_METRIC
from hpc.rundir import RunDir, read_json
from jobs import validation
from jobs.check import open_data
from jobs.setup import check
from jobs.tasks.contract import Stored
from tests import tiny_run, tiny_tasks
from tests.test_train import assert_same, free_port, play_rank, run_ranks
from tests.tiny_run import CONTEXT, outcome
from tests.tiny_tasks import BOUNDARIES, SPLITS, STEPS

TASKS = ("multilabel", "segmentation")


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=CONTEXT) as executor:
        yield executor


def play(folder: Path, data: Path, task: str, stops: tuple[int, ...], *overrides: str) -> dict[str, Any]:
    run = tiny_tasks.make_run(folder, data, task, *overrides)
    for generation, boundary in enumerate(stops, start=1):
        assert tiny_run.train(run, generation, boundary) == "stopped"
    assert tiny_run.train(run, len(stops) + 1, None if stops else BOUNDARIES + 1) == "done"
    return outcome(run)


LOSSES = {"multilabel": ("train.loss.pos_weight=balanced",), "segmentation": ("train.loss.class_weights=balanced",)}
# Boundaries: 1 before the first step, 2 and 3 after a step, 4 and 5 after a batch of the first validation.
STOPS = [(2,), (4,), (6, 2)]


@pytest.mark.parametrize("task", TASKS)
def test_stopped_anywhere_and_resumed_is_bit_identical(task: str, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    data = tiny_tasks.make_data(tmp_path, task)
    rows = [(), *STOPS]
    jobs = [pool.submit(play, tmp_path / f"run{n}", data, task, stops, *LOSSES[task]) for n, stops in enumerate(rows)]
    golden, *others = [job.result() for job in jobs]
    assert golden["step"] == STEPS and len({line["metrics"]["loss"] for line in golden["metrics"]}) == 2
    for found in others:
        assert_same(found, golden)


def bf16_run(folder: Path, data: Path, task: str) -> None:
    """An evaluation in bf16 keeps float32, as the losses are."""
    run = tiny_tasks.make_run(folder, data, task, "train.precision=bf16")
    trainer = tiny_run.make_trainer(run)
    trainer.learner.started()
    found = trainer._evaluate()
    assert found.stored is not None and found.stored.losses.dtype == np.float32
    assert found.stored.rows.dtype == (np.float64 if task == "segmentation" else np.float32)
    if task == "multilabel":
        rounded = found.stored.rows.view(np.uint32) & 0xFFFF
        assert rounded.any(), "these are numbers of bf16"
    trainer.close()
    os._exit(0)


@pytest.mark.parametrize("task", TASKS)
def test_an_evaluation_in_bf16_keeps_float32(task: str, tmp_path: Path) -> None:
    assert tiny_run.in_child(bf16_run, tmp_path / "run", tiny_tasks.make_data(tmp_path, task), task) == 0


@pytest.mark.parametrize("task", TASKS)
def test_the_result_and_the_events_have_the_tasks_own_metrics(task: str, tmp_path: Path) -> None:
    run = tiny_tasks.make_run(tmp_path / "run", tiny_tasks.make_data(tmp_path, task), task)
    assert tiny_run.in_child(train, run.path) == 0
    result, metric = read_json(run.result), DEFAULT_MONITOR[task]
    assert (result["task"], result["monitor"], result["direction"]) == (task, metric, "max")
    assert set(result["best"]) == {"epoch", "step", "checkpoint", "metrics"}
    assert set(result["best"]["metrics"]) == set(DIRECTIONS[task])
    assert metric in result["baseline"] and "majority" not in result
    assert [row["name"] for row in result["per_class"]] == list(tiny_tasks.CLASSES[task]) == result["class_names"]
    assert np.array(result["confusion_matrix"]).shape == ((3, 2, 2) if task == "multilabel" else (3, 3))
    for tag in ("step/loss", f"step/{STEP_METRIC[task]}"):
        assert tiny_run.shown_steps(run, tag) == list(range(1, STEPS + 1))
    for tag in ("train/loss", "validation/loss", f"validation/{metric}", "speed/validation_samples_per_second"):
        assert tiny_run.shown_steps(run, tag) == [2, 4]
    for line in run.read_metrics():
        assert STEP_METRIC[task] in line["train"] and set(line["metrics"]) == set(DIRECTIONS[task])
    evaluations = scalars(run.tensorboard)["validation/loss"]
    kept = [(line["step"], line["time"], as_kept(line["metrics"]["loss"])) for line in run.read_metrics()]
    assert evaluations == kept, "the same points, whichever file they are taken from"


def train(folder: Path) -> None:
    assert tiny_run.train(RunDir(folder)) == "done"
    os._exit(0)


# What does not fit is told before a run queues.

FAULTS: list[tuple[str, tuple[str, ...], list[str]]] = [
    ("multilabel", ("task=classification",), ["task is classification", "packed for multilabel", "task: multilabel"]),
    ("multilabel", ("train.loss.pos_weight=[1, 2]",), ["pos_weight has 2 weights", "3 classes"]),
    ("segmentation", ("train.loss.ignore=[egde]",), ["no class 'egde'", "did you mean 'edge'"]),
    ("segmentation", ("train.loss.ignore=[disc, edge]",), ["two classes", "train.loss.ignore leaves out disc, edge"]),
    ("segmentation", ("data.sampler=balanced",), ["no stored voxels of each class", "pack it again"]),
    ("segmentation", ("data.sampler=weighted", "data.weights={disc: 2}"), ["no stored voxels of each class"]),
]


@pytest.mark.parametrize(("task", "overrides", "words"), FAULTS)
def test_what_does_not_fit_is_one_line(task: str, overrides: tuple[str, ...], words: list[str], tmp_path: Path) -> None:
    run = tiny_tasks.make_run(tmp_path / "run", tiny_tasks.make_data(tmp_path, task), task, *overrides)
    with pytest.raises((UserError, ValueError)) as caught:
        check(load(run.experiment)[0])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


def test_a_metric_that_the_validation_leaves_undefined_is_not_followed(tmp_path: Path) -> None:
    one_class = {f"validation{number}": 0 for number in range(tiny_run.SPLITS["validation"])}
    run = tiny_run.make_run(tmp_path / "run", tiny_run.make_data(tmp_path, **one_class))
    assert open_data(load(run.experiment, ["train.monitor=map"])[0])
    for override, key in (
        ("train.monitor=roc_auc", "train.monitor"),
        ("train.early_stopping={patience: 1, metric: roc_auc}", "train.early_stopping.metric"),
    ):
        with pytest.raises(UserError, match=f"{key} roc_auc is undefined: all validation samples are of one class"):
            open_data(load(run.experiment, [override])[0])


def test_labels_that_no_validation_sample_has_leave_map_undefined(tmp_path: Path) -> None:
    path = tmp_path / "none.h5"
    options: dict[str, Any] = {"shape": (1, 6, 8), "dtype": "int16", "num_samples": 8, "class_names": ("a", "b")}
    with VolumeWriter(path, task="multilabel", **options) as writer:
        for number in range(8):
            labels = np.array([number % 2 and number < 6, 0], np.uint8)
            split = "train" if number < 6 else "validation"
            writer.add(np.zeros((1, 6, 8), np.int16), labels, id=str(number), split=split)
    run = tiny_tasks.make_run(tmp_path / "run", path, "multilabel")
    assert open_data(load(run.experiment, ["train.monitor=f1_macro"])[0])
    with pytest.raises(UserError, match=r"train\.monitor map is undefined: no label"):
        open_data(load(run.experiment)[0])


NORM_OF_ONE_VOXEL = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, in_channels, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(48 * in_channels, 4), nn.BatchNorm1d(4), nn.Linear(4, num_classes))
"""


def test_batches_of_one_sample_are_refused_where_a_layer_cannot_normalise_them(tmp_path: Path) -> None:
    (tmp_path / "norm.py").write_text(NORM_OF_ONE_VOXEL)
    run = tiny_tasks.make_run(tmp_path / "run", tiny_tasks.make_data(tmp_path, "multilabel"), "multilabel")
    model = f"model.name=file:{tmp_path / 'norm.py'}:Net"
    for parts in (("data.batch_size=1",), ("train.accumulate=4",), ("train.deterministic=layout",)):
        with pytest.raises(UserError, match=r"norm\.py:Net cannot train on one sample at a time.*batch_size than"):
            check(load(run.experiment, [model, *parts])[0])
    still = ["train.epochs=null", "train.stages=[{epochs: 1, freeze: backbone}]"]
    assert check(load(run.experiment, [model, "data.batch_size=1", *still])[0])
    assert check(load(run.experiment, [model, "train.accumulate=2"])[0])


def test_a_network_too_deep_for_the_samples_is_told_by_name(tmp_path: Path) -> None:
    run = tiny_tasks.make_run(tmp_path / "run", tiny_tasks.make_data(tmp_path, "segmentation"), "segmentation")
    with pytest.raises(UserError, match=r"^unet2d: .* one voxel left of 6 x 8 .* of 8: use model\.depth=3, ") as caught:
        check(load(run.experiment, ["model.name=unet2d"])[0])
    assert "\n" not in str(caught.value)
    assert check(load(run.experiment, ["model.name=unet2d", "model.depth=3"])[0])


def test_a_network_of_the_other_task_is_told(tmp_path: Path) -> None:
    run = tiny_tasks.make_run(tmp_path / "run", tiny_tasks.make_data(tmp_path, "segmentation"), "segmentation")
    labels = f"model.name=file:{run.path / 'net.py'}:Labels"
    with pytest.raises(UserError, match=r"net\.py:Labels: it gives scores of shape \(3,\).* not \(3, 6, 8\)"):
        check(load(run.experiment, [labels])[0])


# Ranks.


def evaluate_rank(rank: int, world: int, port: int, folder: Path) -> None:
    """An evaluation of a fresh network; rank 0 leaves what it has, every rank the metrics it goes by."""
    place = Allocation(rank, world, rank, cpus_per_task=1, master_port=port) if world > 1 else None
    trainer = tiny_run.make_trainer(RunDir(folder), allocation=place)
    trainer.learner.started()
    found = trainer._evaluate()
    (folder / f"metrics{rank}").write_text(repr(sorted(found.metrics.items())))
    assert (found.stored is not None) == (rank == 0)
    if found.stored is not None:
        assert found.metrics == found.scores.metrics()
        named = {key: value for key, value in vars(found.stored).items() if value is not None}
        np.savez(folder / "stored.npz", cells=found.scores.matrix, **named)
    trainer.close()
    os._exit(0)


EVALUATIONS = [("multilabel", {}), ("segmentation", {}), ("segmentation", {"train": 9, "validation": 1})]


@pytest.mark.parametrize(("task", "splits"), EVALUATIONS, ids=["multilabel", "segmentation", "a rank has no sample"])
def test_ranks_gather_each_sample_once_and_in_order(task: str, splits: dict[str, int], tmp_path: Path) -> None:
    data = tiny_tasks.make_data(tmp_path, task, splits or SPLITS)
    found: dict[int, Any] = {}
    for world in (1, 2):
        run = tiny_tasks.make_run(tmp_path / f"run{world}", data, task)
        port = free_port()
        assert run_ranks(evaluate_rank, [(rank, world, port, run.path) for rank in range(world)]) == [0] * world
        found[world] = np.load(run.path / "stored.npz")
        assert len({(run.path / f"metrics{rank}").read_text() for rank in range(world)}) == 1
    assert found[2]["samples"].tolist() == list(range(9, 9 + (splits or SPLITS)["validation"]))
    assert (
        set(found[1].files)
        == set(found[2].files)
        == {"samples", "rows", "losses", "cells"} | ({"targets"} if task == "multilabel" else set())
    )
    for key in found[1].files:  # other batches, other kernels
        np.testing.assert_allclose(found[2][key], found[1][key], rtol=1e-5, atol=1e-6)
        assert found[2][key].dtype == found[1][key].dtype


class Parts:
    """A world of ranks without processes: what Engine does with the rows of each."""

    def __init__(self, rows: list[list[Any]]) -> None:
        self.rows, self.is_main, self._next = rows, True, 0

    def gather(self, column: Any) -> Any:
        self._next += 1
        return column.new_tensor(np.concatenate([rank[self._next - 1] for rank in self.rows]))


def test_rows_that_come_out_of_order_are_sorted_with_all_that_is_theirs() -> None:
    from tests.toy_tasks import samples, seen, toy

    task, (outputs, targets) = toy("classification"), samples("classification", 7)
    _, whole = seen(task, outputs, targets, [7])
    picked = [np.array([6, 1, 3]), np.array([], int), np.array([0, 5, 2, 4])]
    rows = [[whole.samples[p], whole.targets[p], whole.rows[p], whole.losses[p]] for p in picked]  # type: ignore[index]

    from jobs.tasks.counts import Kept

    gathered: Callable[..., Stored | None] = validation.gather
    found = gathered(Parts(rows), Kept(task))
    assert found is not None
    for key, value in vars(whole).items():
        assert np.array_equal(vars(found)[key], value), key


@pytest.mark.parametrize("task", TASKS)
def test_the_layout_of_the_ranks_does_not_show(task: str, tmp_path: Path) -> None:
    """1 rank, 2 ranks, and 2 that are stopped and go on, with train.deterministic: layout."""
    data, given = tiny_tasks.make_data(tmp_path, task), ("train.deterministic=layout", *LOSSES[task])
    runs = [tiny_tasks.make_run(tmp_path / name, data, task, *given) for name in ("one", "two", "stopped")]
    assert run_ranks(play_rank, [(0, 1, [(runs[0].path, 1, None, free_port())])]) == [0]
    legs = [(runs[1], 1, None), (runs[2], 1, 4), (runs[2], 2, None)]
    plan = [(run.path, generation, boundary, free_port()) for run, generation, boundary in legs]
    assert run_ranks(play_rank, [(rank, 2, plan) for rank in range(2)]) == [0, 0]
    whole = outcome(runs[0])
    for run in runs[1:]:
        assert_same(outcome(run), whole)
