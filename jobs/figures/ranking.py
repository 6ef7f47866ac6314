"""Points of ROC and precision-recall curves, and calibration bins, exactly as scikit-learn defines them; no drawing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BINS = 15
"""of equal width, from 0 to 1 (Guo et al., On Calibration of Modern Neural Networks, 2017)"""


def roc_points(truth: NDArray[Any], scores: NDArray[Any]) -> tuple[Floats, Floats, Floats]:
    """(N,) truths of 0 and 1, (N,) finite scores -> (false positive rate, true positive rate, threshold), falling.

    As `sklearn.metrics.roc_curve(truth, scores, drop_intermediate=False)`; NaN rates where a class is missing.
    """
    false, true, thresholds = _cumulated(truth, scores)
    false, true = np.r_[0, false], np.r_[0, true]
    with np.errstate(invalid="ignore", divide="ignore"):
        return false / false[-1], true / true[-1], np.r_[np.inf, thresholds]


def precision_recall_points(truth: NDArray[Any], scores: NDArray[Any]) -> tuple[Floats, Floats, Floats]:
    """(N,) truths of 0 and 1, (N,) finite scores -> (precision, recall, threshold), thresholds rising.

    As `sklearn.metrics.precision_recall_curve(truth, scores)`: ends in precision 1, recall 0. NaN recall where there
    is no positive (scikit-learn: 1, with a warning).
    """
    false, true, thresholds = _cumulated(truth, scores)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = true / true[-1]
    return np.r_[(true / (true + false))[::-1], 1.0], np.r_[recall[::-1], 0.0], thresholds[::-1]


def _cumulated(truth: NDArray[Any], scores: NDArray[Any]) -> tuple[Floats, Floats, Floats]:
    """False and true positives at each distinct score as threshold, the highest first."""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    ranked, hits = np.asarray(scores, np.float64)[order], np.asarray(truth, bool)[order]
    ends = np.r_[np.flatnonzero(np.diff(ranked)), len(ranked) - 1]
    true = np.cumsum(hits, dtype=np.float64)[ends]
    return 1.0 + ends - true, true, ranked[ends]


def area(x: Floats, y: Floats) -> float:
    """Under the curve, by the trapezoid rule."""
    return float(np.trapezoid(y, x))


def average_precision(precision: Floats, recall: Floats) -> float:
    """The sum of precision times gain in recall, as `sklearn.metrics.average_precision_score`."""
    return float(-np.sum(np.diff(recall) * precision[:-1]))


def one_hot(targets: NDArray[Any], num_classes: int) -> NDArray[np.bool_]:
    """(N,) class numbers, or (N, K) of 0 and 1 -> (N, K)."""
    targets = np.asarray(targets)
    return targets.astype(bool) if targets.ndim == 2 else targets[:, None] == np.arange(num_classes)


@dataclass(frozen=True)
class Reliability:
    """What was said, what came true and how often, in each bin of confidence. Arrays (BINS,); NaN: an empty bin."""

    confidence: Floats
    accuracy: Floats
    samples: NDArray[np.int64]

    @property
    def error(self) -> float:
        """Expected calibration error: the mean gap, weighted by samples. NaN without samples."""
        total = self.samples.sum()
        return float(np.nansum(self.samples * np.abs(self.confidence - self.accuracy)) / total) if total else np.nan


def reliability(confidence: NDArray[Any], right: NDArray[Any]) -> Reliability:
    """(N,) probabilities said, (N,) whether it was so. A bin holds its upper edge, the first 0."""
    confidence = np.asarray(confidence, np.float64)
    which = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    samples = np.bincount(which, minlength=BINS)
    with np.errstate(invalid="ignore"):
        said = np.bincount(which, weights=confidence, minlength=BINS) / samples
        true = np.bincount(which, weights=np.asarray(right, np.float64), minlength=BINS) / samples
    return Reliability(said, true, samples)
