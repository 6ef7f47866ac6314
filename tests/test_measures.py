"""Curves and calibration of stored scores against scikit-learn's, at their edges."""

import numpy as np
import pytest
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from jobs.tasks.measures import average_precision, calibration_error, mean, roc_auc

RANDOM = np.random.default_rng(5)
SCORES = {
    "random": (RANDOM.integers(0, 2, 300), RANDOM.random(300)),
    "ties": (RANDOM.integers(0, 2, 300), RANDOM.integers(0, 5, 300) / 4),
    "all tied": (np.array([0, 1, 1, 0, 1]), np.full(5, 0.3)),
    "perfect": (np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9])),
    "inverted": (np.array([1, 1, 0, 0]), np.array([0.1, 0.2, 0.8, 0.9])),
    "one positive": (np.array([0, 1, 0]), np.array([0.5, 0.4, 0.6])),
    "float32": (RANDOM.integers(0, 2, 500), RANDOM.random(500).astype(np.float32)),
}


@pytest.mark.parametrize("name", SCORES)
def test_average_precision_and_auc_are_scikit_learns(name: str) -> None:
    truths, scores = SCORES[name]
    assert average_precision(truths, scores) == pytest.approx(reference.average_precision_score(truths, scores))
    assert roc_auc(truths, scores) == pytest.approx(reference.roc_auc_score(truths, scores))


@pytest.mark.parametrize(("truths", "ap"), [([0, 0], None), ([1, 1], 1.0), ([1], 1.0), ([], None)])
def test_what_is_undefined_is_nan(truths: list[int], ap: float | None) -> None:
    labels, scores = np.array(truths, int), np.linspace(0, 1, len(truths))
    found = average_precision(labels, scores)
    assert np.isnan(found) if ap is None else found == ap
    assert np.isnan(roc_auc(labels, scores))


def test_a_mean_leaves_out_what_is_undefined() -> None:
    assert mean([0.5, float("nan"), 1.0]) == 0.75
    assert np.isnan(mean([float("nan")])) and np.isnan(mean([]))


def binned(right: np.ndarray, confidence: np.ndarray) -> float:
    """By the bins of scikit-learn's reliability curve."""
    shares, confidences = calibration_curve(right, confidence, n_bins=15, strategy="uniform")
    edges = np.linspace(0, 1, 16)
    counts = np.bincount(np.searchsorted(edges[1:-1], confidence), minlength=15)
    return float((counts[counts > 0] * np.abs(shares - confidences)).sum() / len(right))


@pytest.mark.parametrize("name", ["random", "ties", "perfect", "float32"])
def test_calibration_error_is_that_of_scikit_learns_curve(name: str) -> None:
    right, confidence = SCORES[name]
    assert calibration_error(right, confidence) == pytest.approx(binned(right, confidence), abs=1e-6)


def test_calibration_error_of_known_cases() -> None:
    assert calibration_error(np.array([1, 1, 1, 0]), np.full(4, 0.75)) == pytest.approx(0)
    assert calibration_error(np.array([0, 0]), np.ones(2)) == 1.0
    assert calibration_error(np.array([1, 1]), np.array([0.0, 1.0])) == pytest.approx(0.5)
    assert np.isnan(calibration_error(np.array([]), np.array([])))


def test_a_network_that_has_diverged_has_no_calibration() -> None:
    assert np.isnan(calibration_error(np.array([1, 0]), np.array([0.5, np.nan])))
