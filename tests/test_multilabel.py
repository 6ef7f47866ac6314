"""Multilabel's metrics against scikit-learn's, and its weights from the training split."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from datasets import open_volumes
from datasets.writer import VolumeWriter
from hpc.experiment import validate
from jobs.tasks import make_task
from jobs.tasks.contract import Stored
from tests.toy_tasks import CPU, samples, scores_of, toy


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) truths and probabilities of 1 to 25 samples and 1 to 4 labels: labels of none and of all, many ties."""
    size, labels = draw(st.integers(1, 25)), draw(st.integers(1, 4))
    kinds = st.sampled_from(["none", "all", "some"])
    columns = []
    for _ in range(labels):
        kind = draw(kinds)
        some = st.lists(st.integers(0, 1), min_size=size, max_size=size)
        columns.append(draw(some) if kind == "some" else [int(kind == "all")] * size)
    row = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.50001, 0.9, 1.0]), min_size=labels, max_size=labels)
    return np.array(columns, np.uint8).T, np.array(draw(st.lists(row, min_size=size, max_size=size)))


def counted(truths: np.ndarray, calls: np.ndarray) -> np.ndarray:
    pairs = [truths & calls, ~truths & calls, truths & ~calls, ~truths & ~calls]
    return np.stack([pair.sum(0) for pair in pairs], 1)


def expected(truths: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    calls = probabilities > 0.5
    macro, micro = {"average": "macro", "zero_division": 0}, {"average": "micro", "zero_division": 0}
    columns = list(zip(truths.T, probabilities.T, strict=True))
    if truths.shape[1] == 1:  # scikit-learn takes a column for a task of two classes
        truths, calls = np.hstack([truths, truths]), np.hstack([calls, calls])
    ap = [reference.average_precision_score(y, p) for y, p in columns if y.any()]
    auc = [reference.roc_auc_score(y, p) for y, p in columns if 0 < y.sum() < len(y)]
    return {
        "map": float(np.mean(ap)) if ap else np.nan,
        "roc_auc": float(np.mean(auc)) if auc else np.nan,
        "f1_macro": reference.f1_score(truths, calls, **macro),
        "f1_micro": reference.f1_score(truths, calls, **micro),
        "precision_macro": reference.precision_score(truths, calls, **macro),
        "recall_macro": reference.recall_score(truths, calls, **macro),
        "hamming": reference.hamming_loss(truths, calls),
        "exact_match": reference.accuracy_score(truths, calls),
        "loss": 0.25,
    }


@given(cases())
@settings(deadline=None)
def test_metrics_are_those_of_scikit_learn(case: tuple[np.ndarray, np.ndarray]) -> None:
    truths, probabilities = case
    size, labels = truths.shape
    calls = probabilities > 0.5
    stored = Stored(np.arange(size), truths, probabilities, np.zeros(size, np.float32))
    scores = toy("multilabel", labels).scores(counted(truths > 0, calls).flatten(), 0.25, size, stored)
    found = scores.metrics()
    error = found.pop("calibration_error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a single sample
        assert found == pytest.approx(expected(truths, probabilities), abs=1e-6, nan_ok=True)
    assert 0 <= error <= 1
    for number, row in enumerate(scores.per_class()):
        columns = reference.precision_recall_fscore_support(
            truths[:, number], calls[:, number], average="binary", zero_division=0
        )
        assert [row[key] for key in ("precision", "recall", "f1")] == pytest.approx(list(columns[:3]))
        assert row["support"] == truths[:, number].sum()
        assert (row["ap"] is None) == (not truths[:, number].any())
    twice = [np.hstack([columns, columns]) for columns in (truths, calls)]  # one column would be a task of two classes
    assert scores.matrix.tolist() == reference.multilabel_confusion_matrix(*twice)[:labels].tolist()


def test_a_label_is_called_above_a_half_in_counts_and_rows_alike() -> None:
    """In float32 the sigmoid of a tiny logit is a half."""
    task, outputs = toy("multilabel", 1), torch.tensor([[1e-12], [0.0], [1e-3], [-1e-3]])
    scores = scores_of(task, outputs, torch.ones(4, 1, dtype=torch.uint8))
    assert scores.matrix[0].tolist() == [[0, 0], [3, 1]]
    assert scores.metrics()["exact_match"] == 0.25 == scores.metrics()["recall_macro"]


def test_the_baseline_is_what_a_constant_answer_gets() -> None:
    targets = torch.tensor([[1, 0, 0], [1, 0, 1], [1, 1, 0], [0, 0, 0]], dtype=torch.uint8)
    constant = scores_of(toy("multilabel"), torch.tensor([[1.0, -1.0, -1.0]] * 4), targets)
    found = constant.metrics()
    assert constant.baseline == pytest.approx({key: found[key] for key in constant.baseline})
    assert constant.baseline["map"] == pytest.approx((3 / 4 + 1 / 4 + 1 / 4) / 3)


# Weights are counted in the training split, and nowhere else.

LABELS = {"train": [[1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]], "validation": [[0, 1, 1]] * 3}


def write(folder: Path) -> Path:
    path = folder / "labels.h5"
    options = {"shape": (1, 2, 2), "dtype": "uint8", "num_samples": 7, "class_names": ("often", "seldom", "never")}
    with VolumeWriter(path, task="multilabel", **options) as writer:  # type: ignore[arg-type]
        for split, rows in LABELS.items():
            for number, row in enumerate(rows):
                writer.add(np.zeros((1, 2, 2), np.uint8), np.array(row, np.uint8), id=f"{split}{number}", split=split)
    return path


WEIGHTED = [
    ({"pos_weight": "balanced"}, [1 / 3, 3.0, 0.0], [1.0, 1.0, 1.0]),
    ({"pos_weight": [2, 3, 4]}, [2.0, 3.0, 4.0], [1.0, 1.0, 1.0]),
    ({"name": "weighted_bce"}, [4 / (2 * 3), 4 / 2, 0.0], [4 / 2, 4 / (2 * 3), 1.0]),
]


@pytest.mark.parametrize(("loss", "positive", "negative"), WEIGHTED)
def test_weights_are_those_of_the_training_split(
    loss: dict[str, object], positive: list[float], negative: list[float], tmp_path: Path
) -> None:
    volumes = open_volumes(write(tmp_path))
    values = {"name": "a", "task": "multilabel", "model": {"name": "m"}, "data": {"file": "f"}, "train": {"loss": loss}}
    task, plain = make_task(validate(values, "test"), volumes, CPU), toy("multilabel")
    outputs, _ = samples("multilabel", 2)
    for label, weights in ((1, positive), (0, negative)):
        targets = torch.full((2, 3), label, dtype=torch.uint8)
        for number, weight in enumerate(weights):
            only = torch.where(torch.arange(3) == number, outputs, 200.0 if label else -200.0)  # the others have none
            wanted = weight * plain.losses(only, targets)
            torch.testing.assert_close(task.losses(only, targets), wanted, rtol=1e-5, atol=1e-6)
