"""Segmentation's metrics against scikit-learn's over voxels; ignored classes, weights, and how little is kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from datasets import open_volumes
from datasets.layout import UNLABELLED
from datasets.writer import VolumeWriter
from hpc.errors import UserError
from hpc.experiment import validate
from jobs.tasks import make_task
from jobs.tasks.options import training_counts
from tests import tiny_tasks
from tests.toy_tasks import CPU, NAMES, samples, scores_of, seen, toy


def logits(calls: np.ndarray, classes: int) -> torch.Tensor:
    """(B, *spatial) predictions -> (B, K, *spatial)."""
    return torch.from_numpy(np.moveaxis(np.eye(classes, dtype=np.float32)[calls], -1, 1).copy())


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, np.ndarray, np.ndarray, list[int]]:
    """Classes (2 to 4), truths (B, 2, 3) with 255, predictions, ignored classes; some classes never occur."""
    classes, size = draw(st.integers(2, 4)), 6 * draw(st.integers(1, 4))
    occurring = draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=3))
    truths = draw(st.lists(st.sampled_from([*occurring, UNLABELLED]), min_size=size, max_size=size))
    calls = draw(st.lists(st.integers(0, classes - 1), min_size=size, max_size=size))
    ignored = draw(st.sampled_from([[], [], [classes - 1]] if classes > 2 else [[]]))
    return classes, np.array(truths, np.uint8).reshape(-1, 2, 3), np.array(calls).reshape(-1, 2, 3), ignored


@given(cases())
@settings(deadline=None)
def test_metrics_are_those_of_scikit_learn(case: tuple[int, np.ndarray, np.ndarray, list[int]]) -> None:
    classes, truths, calls, ignored = case
    task = toy("segmentation", classes, ignore=[NAMES[number] for number in ignored])
    scores = scores_of(task, logits(calls, classes), torch.from_numpy(truths))
    known = ~np.isin(truths, [UNLABELLED, *ignored])
    if not known.any():  # scikit-learn needs a voxel
        assert all(np.isnan(scores.metrics()[name]) for name in ("dice", "iou", "accuracy")) and not scores.matrix.any()
        return
    y, p, labels = truths[known], calls[known], list(range(classes))
    there = [k for k in labels if (y == k).any() or (p == k).any()]
    in_iou, in_dice = ([k for k in there if k >= first and k not in ignored] for first in (0, 1))
    dice = reference.f1_score(y, p, labels=labels, average=None, zero_division=0)
    iou = reference.jaccard_score(y, p, labels=labels, average=None, zero_division=0)
    columns = reference.precision_recall_fscore_support(y, p, labels=labels, zero_division=0)
    found = scores.metrics()
    assert found.pop("loss") == pytest.approx(scores.loss)
    assert found == pytest.approx(
        {
            "dice": float(np.mean(dice[in_dice])) if in_dice else np.nan,
            "iou": float(np.mean(iou[in_iou])) if in_iou else np.nan,
            "accuracy": float((y == p).mean()),
        },
        abs=1e-6,
        nan_ok=True,
    )
    table = scores.per_class()
    for key, column in zip(("precision", "recall", "_", "support"), columns, strict=True):
        assert key == "_" or [row[key] for row in table] == pytest.approx(list(column))
    for number, row in enumerate(table):
        assert [row["dice"], row["iou"]] == ([dice[number], iou[number]] if number in there else [None, None])
    assert scores.matrix.sum() == known.sum() and scores.samples == len(truths)


def test_a_class_of_no_weight_is_out_of_the_means() -> None:
    """As the seed's unknown class: its voxels are counted, its own IoU is not."""
    truths, calls = np.array([[[0, 1, 1, 2, 2, 2]]], np.uint8), np.array([[[0, 1, 0, 2, 0, 0]]])
    weighted = toy("segmentation", weights=(1.0, 2.0, 0.0))
    found = scores_of(weighted, logits(calls, 3), torch.from_numpy(truths)).metrics()
    iou = reference.jaccard_score(truths.flatten(), calls.flatten(), average=None)
    assert found["iou"] == pytest.approx(iou[:2].mean()) and found["dice"] == pytest.approx(2 / 3)
    assert found["accuracy"] == pytest.approx(0.5)


def test_the_background_counts_in_dice_only_where_it_is_asked_for() -> None:
    truths, calls = np.array([[[0, 1, 1, 2]]], np.uint8), np.array([[[0, 0, 1, 2]]])
    dice = reference.f1_score(truths.flatten(), calls.flatten(), average=None)
    for options, wanted in (({}, dice[1:].mean()), ({"include_background": True}, dice.mean())):
        task = toy("segmentation", **options)  # type: ignore[arg-type]
        assert scores_of(task, logits(calls, 3), torch.from_numpy(truths)).metrics()["dice"] == pytest.approx(wanted)


def test_rows_are_the_voxels_of_each_sample_and_no_map_is_kept() -> None:
    outputs, targets = samples("segmentation", 5)
    task = toy("segmentation")
    counts, stored = seen(task, outputs, targets, [2, 3])
    assert stored.targets is None and stored.rows.shape == (5, 9) and stored.rows.dtype == np.float64
    matrix = counts.cells.view(3, 3).numpy()
    assert stored.rows.sum(0).tolist() == [*np.diag(matrix), *matrix.sum(0), *matrix.sum(1)]
    for number in range(5):
        alone = task.count(outputs[number : number + 1], targets[number : number + 1]).view(3, 3).numpy()
        assert stored.rows[number].tolist() == [*np.diag(alone), *alone.sum(0), *alone.sum(1)]


def test_the_baseline_is_what_a_constant_answer_gets() -> None:
    truths = np.array([[[0, 0, 1, 2]], [[0, 0, 0, 255]]], np.uint8)
    constant = scores_of(toy("segmentation"), logits(np.zeros((2, 1, 4), int), 3), torch.from_numpy(truths))
    assert constant.baseline == pytest.approx({"dice": 0.0, "iou": (5 / 7) / 3, "accuracy": 5 / 7})


# From a file.


def task_of(path: Path, **loss: Any) -> Any:
    values: dict[str, Any] = {"name": "a", "task": "segmentation", "model": {"name": "m"}, "data": {"file": "f"}}
    return make_task(validate({**values, "train": {"loss": loss}}, "test"), open_volumes(path), CPU)


def test_balanced_weights_are_of_the_training_splits_voxels(tmp_path: Path) -> None:
    path = tiny_tasks.make_data(tmp_path, "segmentation")
    volumes = open_volumes(path)
    maps = np.concatenate([volumes.read(int(sample))[1].flatten() for sample in volumes.indices("train")])
    counts = np.bincount(maps[maps != UNLABELLED], minlength=3)
    assert training_counts(volumes) == counts.tolist()
    given = counts.sum() / (3 * counts)
    outputs, targets = samples("segmentation", 4)
    balanced, explicit = task_of(path, class_weights="balanced"), task_of(path, class_weights=given.tolist())
    torch.testing.assert_close(balanced.losses(outputs, targets), explicit.losses(outputs, targets))
    ignoring = task_of(path, class_weights="balanced", ignore=["edge"])
    two = [*(counts[:2].sum() / (2 * counts[:2])), 1.0]
    same = task_of(path, class_weights=two, ignore=["edge"])
    torch.testing.assert_close(ignoring.losses(outputs, targets), same.losses(outputs, targets))


def test_a_class_that_the_training_lacks_counts_where_weights_are_balanced(tmp_path: Path) -> None:
    """Else a file that happens to lack a class would be scored without it, and better."""
    path = tmp_path / "lacks.h5"
    with VolumeWriter(
        path, shape=(1, 2, 2, 2), dtype="uint8", num_samples=2, class_names=["a", "b", "c"], task="segmentation"
    ) as out:
        for split, other in (("train", 1), ("validation", 2)):
            map = np.array([0, other] * 4, np.uint8).reshape(2, 2, 2)
            out.add(np.zeros((1, 2, 2, 2), np.uint8), map, id=split, split=split)
    truth = torch.from_numpy(open_volumes(path).read(1)[1])[None]
    right_but_c = logits(torch.zeros_like(truth).numpy(), 3)
    found = scores_of(task_of(path, class_weights="balanced"), right_but_c, truth).metrics()
    assert found["iou"] == pytest.approx(0.25) and found["dice"] == 0, "c is there, and never found"


def test_what_does_not_count_is_drawn_as_no_class() -> None:
    truths = torch.tensor([[[0, 1, 2, 255]]], dtype=torch.uint8)
    task: Any = toy("segmentation", ignore=[NAMES[1]])
    shown = task.drawn(truths)
    assert shown.tolist() == [[[0, UNLABELLED, 2, UNLABELLED]]] and shown.dtype == torch.uint8


FAULTS = [
    ({"ignore": ["egde"]}, ["no class 'egde'", "did you mean 'edge'"]),
    ({"ignore": ["disc", "edge"]}, ["two classes"]),
    ({"class_weights": [1, 2]}, ["2 weights", "3 classes"]),
    ({"class_weights": [1, 0, 0]}, ["no class is left", "background, disc, edge", "include_background"]),
]


@pytest.mark.parametrize(("loss", "words"), FAULTS)
def test_what_does_not_fit_the_file_is_told_in_a_line(loss: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    path = tiny_tasks.make_data(tmp_path, "segmentation")
    with pytest.raises((UserError, ValueError)) as caught:
        task_of(path, **loss)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value
