"""Classification's metrics against scikit-learn's, and its weights of classes."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from sklearn.utils.class_weight import compute_class_weight

from hpc.metrics import DIRECTIONS
from hpc.training import Loss
from jobs.tasks.contract import Stored
from jobs.tasks.options import class_weights
from tests.toy_tasks import NAMES, logits, samples, scores_of, toy


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, list[int], np.ndarray]:
    """Classes (1 to 4), truths and probabilities of 1 to 30 samples: some never occur, many scores are equal."""
    classes = draw(st.integers(1, 4))
    occurring = draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=3))
    size = draw(st.integers(1, 30))
    truths = draw(st.lists(st.sampled_from(occurring), min_size=size, max_size=size))
    row = st.lists(st.sampled_from([1.0, 2.0, 3.0, 8.0]), min_size=classes, max_size=classes)
    parts = np.array(draw(st.lists(row, min_size=size, max_size=size)))
    return classes, truths, parts / parts.sum(1, keepdims=True)


def scores(classes: int, truths: list[int], probabilities: np.ndarray) -> "tuple[dict[str, float], object]":
    """Of these very probabilities: what goes through logits is rounded, and ties would be none."""
    task, calls = toy("classification", classes), probabilities.argmax(1)
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (truths, calls), 1)
    stored = Stored(np.arange(len(truths)), np.array(truths), probabilities, np.zeros(len(truths), np.float32))
    found = task.scores(matrix.flatten(), 0.25, len(truths), stored)
    return found.metrics(), found


def expected_of_probabilities(classes: int, truths: list[int], probabilities: np.ndarray) -> dict[str, float]:
    hot = np.eye(classes)[truths]
    there = [k for k in range(classes) if hot[:, k].any()]
    ap = [reference.average_precision_score(hot[:, k], probabilities[:, k]) for k in there]
    auc = [reference.roc_auc_score(hot[:, k], probabilities[:, k]) for k in there if not hot[:, k].all()]
    return {"map": float(np.mean(ap)), "roc_auc": float(np.mean(auc)) if auc else math.nan}


@given(cases())
@settings(deadline=None)
def test_metrics_are_those_of_scikit_learn(case: tuple[int, list[int], np.ndarray]) -> None:
    classes, truths, probabilities = case
    calls = probabilities.argmax(1)
    found, scored = scores(*case)
    macro = {"average": "macro", "zero_division": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that only the predictions have
        expected = {
            "accuracy": reference.accuracy_score(truths, calls),
            "balanced_accuracy": reference.balanced_accuracy_score(truths, calls),
            "f1_macro": reference.f1_score(truths, calls, **macro),
            "f1_micro": reference.f1_score(truths, calls, average="micro"),
            "precision_macro": reference.precision_score(truths, calls, **macro),
            "recall_macro": reference.recall_score(truths, calls, **macro),
            **expected_of_probabilities(*case),
            "loss": 0.25,
        }
        labels = list(range(classes))
        columns = reference.precision_recall_fscore_support(truths, calls, labels=labels, zero_division=0)
    error = found.pop("calibration_error")
    assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert 0 <= error <= 1
    table = scored.per_class()  # type: ignore[attr-defined]
    for key, column in zip(("precision", "recall", "f1", "support"), columns, strict=True):
        assert [row[key] for row in table] == pytest.approx(list(column))
    assert [row["name"] for row in table] == list(NAMES[:classes])
    assert scored.baseline["accuracy"] == pytest.approx(np.bincount(truths).max() / len(truths))  # type: ignore[attr-defined]


def test_roc_auc_is_scikit_learns_where_all_classes_occur() -> None:
    outputs, targets = samples("classification", 40)
    task = toy("classification")
    rows = task.probabilities(outputs).numpy().astype(np.float64)
    wanted = reference.roc_auc_score(targets, rows / rows.sum(1, keepdims=True), multi_class="ovr")
    assert scores_of(task, outputs, targets).metrics()["roc_auc"] == pytest.approx(wanted, abs=1e-6)


def test_the_baseline_is_what_a_constant_answer_gets() -> None:
    task, targets = toy("classification"), torch.tensor([0, 0, 0, 1, 2])
    constant = scores_of(task, logits([[0.5, 0.25, 0.25]] * 5), targets)
    found, baseline = constant.metrics(), constant.baseline
    assert baseline["map"] == pytest.approx(1 / 3)
    assert {key: found[key] for key in baseline} == pytest.approx(baseline)


def test_no_sample_at_all_is_no_error() -> None:
    task = toy("classification")
    outputs, targets = samples("classification", 0)
    found = scores_of(task, outputs, targets)
    assert set(found.metrics()) == set(DIRECTIONS["classification"])
    assert all(math.isnan(value) for name, value in found.metrics().items() if name != "loss"), "undefined, not 0"
    assert found.samples == 0 and math.isnan(found.baseline["accuracy"])


def test_counts_place_truth_in_rows() -> None:
    counted = toy("classification").count(torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]), torch.tensor([0, 2]))
    assert counted.view(3, 3).tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]


# Weights of classes.


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = [0] * 10 + [1] * 3 + [2] * 7
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights(Loss(class_weights="balanced"), lambda: [10, 3, 7]) == pytest.approx(tuple(expected))


def test_a_class_that_never_occurs_gets_no_weight() -> None:
    found = class_weights(Loss(class_weights="balanced"), lambda: [10, 0, 5])
    assert found == pytest.approx((15 / 20, 0.0, 15 / 10))


def test_balanced_weights_leave_the_mean_at_one() -> None:
    counts = [40, 8, 2]
    found = class_weights(Loss(class_weights="balanced"), lambda: counts)
    assert found and sum(w * n for w, n in zip(found, counts, strict=True)) / 50 == pytest.approx(1.0)


def test_given_weights_count() -> None:
    assert class_weights(Loss(), lambda: [3, 4]) is None
    assert class_weights(Loss(class_weights=[1, 2]), lambda: [3, 4]) == (1.0, 2.0)
