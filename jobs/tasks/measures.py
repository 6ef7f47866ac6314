"""Metrics of counts and of stored probabilities, in NumPy; tests compare them with scikit-learn's."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_BINS = 15
"""of equal width, as in Guo et al., arXiv 1706.04599"""


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole as float64, 0 where whole is 0 (scikit-learn's zero_division=0)."""
    shape = np.broadcast_shapes(np.shape(part), np.shape(whole))
    quotients: np.ndarray = np.divide(part, whole, out=np.zeros(shape), where=np.asarray(whole) != 0)
    return quotients


def mean(values: Iterable[float] | np.ndarray) -> float:
    """Of those that are no NaN; NaN, undefined, of none."""
    array = np.asarray(list(values), np.float64)
    known = array[~np.isnan(array)]
    return float(known.mean()) if len(known) else float("nan")


def share(part: float, whole: float) -> float:
    """part / whole, NaN of nothing."""
    return float(part / whole) if whole else float("nan")


def average_precision(truths: np.ndarray, scores: np.ndarray) -> float:
    """Sum over the thresholds of (recall gained) x precision; (N,) of 0 and 1, (N,) scores. NaN without positives."""
    hits, calls = _by_threshold(truths, scores)
    if not len(hits) or not hits[-1]:
        return float("nan")
    gained = np.diff(hits, prepend=0) / hits[-1]
    return float((gained * hits / calls).sum())


def roc_auc(truths: np.ndarray, scores: np.ndarray) -> float:
    """The area under the ROC curve, ties counting half. NaN where all truths are equal."""
    hits, calls = _by_threshold(truths, scores)
    if not len(hits) or not 0 < hits[-1] < calls[-1]:
        return float("nan")
    false = calls - hits
    before = np.concatenate([[0], hits[:-1]])
    area = (np.diff(false, prepend=0) * (hits + before)).sum() / 2
    return float(area / (hits[-1] * false[-1]))


def _by_threshold(truths: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True positives and positives called at each distinct score, the highest first."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1) if len(order) else np.empty(0, int)
    return np.cumsum(truths[order] != 0, dtype=np.int64)[ends], ends + 1


def calibration_error(right: np.ndarray, confidence: np.ndarray) -> float:
    """Expected calibration error: the mean of |share right - mean confidence| over 15 bins, weighted by their samples.

    right (N,) of 0 and 1, confidence (N,) in 0 to 1. A bin is open below and closed above. Guo et al., On Calibration
    of Modern Neural Networks, 2017, arXiv 1706.04599, equation 3. NaN of no sample.
    """
    if not len(confidence):
        return float("nan")
    bins = np.clip(np.ceil(np.nan_to_num(confidence.astype(np.float64)) * _BINS).astype(int) - 1, 0, _BINS - 1)
    sums = [np.bincount(bins, values.astype(np.float64), _BINS) for values in (right, confidence)]
    return float(np.abs(sums[0] - sums[1]).sum() / len(confidence))
