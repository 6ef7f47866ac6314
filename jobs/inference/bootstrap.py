"""Confidence intervals of metrics by the bootstrap: samples, or whole groups of them, are drawn again with replacement.

The percentile interval of Efron (Annals of Statistics 7, 1979; Efron and Tibshirani, An Introduction to the Bootstrap,
1993, chapter 13). Where samples belong together (patients with several scans) whole groups are drawn (the cluster
bootstrap: Field and Welsh, J. R. Statist. Soc. B 69, 2007): single ones would give intervals that are too narrow.

Of the calibration error it goes from the lower end of the basic interval (Davison and Hinkley, Bootstrap Methods and
their Application, 1997, section 5.2), which turns the bias round, to the upper end of the percentiles: a mean of
absolute differences grows with their noise, in the value and again in each resample, so that percentiles alone lie
above the truth of a calibrated model always, and may lie above the value itself.

A resample is a row of counts, how often each sample was drawn. All metrics are computed from such rows at once, by the
definitions of jobs/tasks; draws are raw Philox bits of the seed, so they are the same everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datasets.order import philox_bits
from jobs.tasks.contract import Stored

_BLOCK = 2**22
"""numbers of a block of resamples x samples"""
MOST = 4 * 10**9
"""resamples x samples x classes whose scores are sorted through, for map and roc_auc: about a minute"""
BINS = 15
BIASED = "calibration_error"
"""whose resamples lie above the value"""
PER_SAMPLE = "dice_per_sample"
"""of a class the mean Dice of the samples that have it or call it, then over the classes, as in nnU-Net's summary"""

Metrics = dict[str, np.ndarray]
"""name -> (R,) values, NaN where undefined"""


@dataclass(frozen=True)
class Intervals:
    """Of each metric; `units` were drawn, `resamples` times."""

    bounds: dict[str, tuple[float, float]]
    units: int
    grouped: bool
    resamples: int
    confidence: float
    seed: int
    left_out: tuple[str, ...] = ()
    """metrics that would have taken too long"""

    @property
    def drawn(self) -> str:
        return f"{self.units} groups" if self.grouped else f"{self.units} samples"


def intervals(
    task: str,
    stored: Stored,
    groups: Sequence[str],
    counting: tuple[Sequence[bool], Sequence[bool]] | None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Intervals:
    """Of all metrics of an evaluation.

    groups: (N,) of the samples. counting: of a segmentation, whether each class counts in the mean IoU, and in Dice.
    """
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1]
    units = int(numbers.max()) + 1
    classes = stored.rows.shape[1]
    ranked = task != "segmentation" and resamples * len(stored) * classes <= MOST
    values: list[Metrics] = []
    step = max(1, _BLOCK // max(len(stored), units))
    for first in range(0, resamples, step):
        count = min(step, resamples - first)
        values.append(metrics_of(task, stored, _draw(seed, first, count, units)[:, numbers], counting, ranked))
    joined = {name: np.concatenate([part[name] for part in values]) for name in values[0]}
    tails = (1 - confidence) / 2
    once = metrics_of(task, stored, np.ones((1, len(stored))), counting, ranked=False)
    bounds = {}
    for name, found in joined.items():
        known = found[~np.isnan(found)]
        if len(known):
            low, high = np.quantile(known, [tails, 1 - tails])
            bounds[name] = (float(low), float(high)) if name != BIASED else both_ways(float(once[name][0]), low, high)
    left_out = () if ranked or task == "segmentation" else ("map", "roc_auc")
    return Intervals(bounds, units, units < len(stored), resamples, confidence, seed, left_out)


def both_ways(value: float, low: float, high: float) -> tuple[float, float]:
    """Of a value >= 0 and the quantiles of its resamples, which are biased upwards; the value is in it."""
    return max(min(2 * value - float(high), value, float(low)), 0.0), max(float(high), value)


def _draw(seed: int, first: int, count: int, units: int) -> np.ndarray:
    """(count, units) how often each unit is drawn in the resamples `first` and following."""
    rows = []
    for resample in range(first, first + count):
        chosen = philox_bits((seed, 0), (0, 0, resample, 0), units) % np.uint64(units)
        rows.append(np.bincount(chosen.astype(np.int64), minlength=units))
    return np.stack(rows).astype(np.float64)


def metrics_of(
    task: str,
    stored: Stored,
    weights: np.ndarray,
    counting: tuple[Sequence[bool], Sequence[bool]] | None = None,
    ranked: bool = True,
) -> Metrics:
    """Each metric of each resample; weights (R, N): how often a sample is in it. `ranked`: map and roc_auc, too."""
    with warnings.catch_warnings(action="ignore"):  # of 0 / 0, which is meant
        loss = {"loss": weights @ stored.losses.astype(np.float64) / weights.sum(1)}
        if task == "segmentation":
            assert counting is not None
            return {**_segmentation(stored, weights, *map(np.array, counting)), **loss}
        found = (_classification if task == "classification" else _multilabel)(stored, weights)
        if ranked:
            found |= _ranked(task, stored, weights)
        return {**found, **loss}


def _classification(stored: Stored, weights: np.ndarray) -> Metrics:
    assert stored.targets is not None
    classes = np.arange(stored.rows.shape[1])
    called = stored.rows.argmax(1)
    right = called == stored.targets
    truth, call = (values[:, None] == classes for values in (stored.targets, called))
    truths, calls, hits = weights @ truth, weights @ call, weights @ (truth & right[:, None])
    recall, seen = _ratio(hits, truths), truths + calls > 0
    accuracy = hits.sum(1) / weights.sum(1)
    return {
        "accuracy": accuracy,
        "balanced_accuracy": _mean(recall, truths > 0),
        "f1_macro": _mean(_ratio(2 * hits, truths + calls), seen),
        "f1_micro": accuracy,
        "precision_macro": _mean(_ratio(hits, calls), seen),
        "recall_macro": _mean(recall, seen),
        "calibration_error": _calibration(right, stored.rows.max(1), weights),
    }


def _multilabel(stored: Stored, weights: np.ndarray) -> Metrics:
    assert stored.targets is not None
    truth, call = stored.targets > 0, stored.rows > 0.5
    tp, calls, truths = weights @ (truth & call), weights @ call, weights @ truth
    everything = np.ones(tp.shape, bool)
    wrong = weights @ (truth != call)
    errors = [_calibration(t, p, weights) for t, p in zip(truth.T, stored.rows.T, strict=True)]
    return {
        "f1_macro": _mean(_ratio(2 * tp, truths + calls), everything),
        "f1_micro": _ratio(2 * tp.sum(1), (truths + calls).sum(1)),
        "precision_macro": _mean(_ratio(tp, calls), everything),
        "recall_macro": _mean(_ratio(tp, truths), everything),
        "hamming": wrong.sum(1) / (weights.sum(1) * truth.shape[1]),
        "exact_match": weights @ (truth == call).all(1) / weights.sum(1),
        "calibration_error": np.mean(errors, axis=0),
    }


def _segmentation(stored: Stored, weights: np.ndarray, in_iou: np.ndarray, in_dice: np.ndarray) -> Metrics:
    rows = stored.rows.astype(np.float64)
    hits, calls, truths = np.split(weights @ rows, 3, axis=1)
    both = truths + calls
    own_hits, own_calls, own_truths = np.split(rows, 3, axis=1)
    own = own_calls + own_truths
    known = weights @ (own > 0)
    dice = _ratio(weights @ _ratio(2 * own_hits, own), known)
    return {
        "dice": _mean(_ratio(2 * hits, both), (both > 0) & in_dice),
        "iou": _mean(_ratio(hits, both - hits), (both > 0) & in_iou),
        "accuracy": np.where(truths.any(1), hits.sum(1) / np.maximum(truths.sum(1), 1), np.nan),
        PER_SAMPLE: _mean(dice, (known > 0) & in_dice),
    }


def per_sample_dice(stored: Stored, in_dice: Sequence[bool]) -> float:
    """PER_SAMPLE of the samples as they are; NaN where no class that counts is there or predicted."""
    in_iou = [True] * len(in_dice)
    return float(metrics_of("segmentation", stored, np.ones((1, len(stored))), (in_iou, in_dice))[PER_SAMPLE][0])


def _ranked(task: str, stored: Stored, weights: np.ndarray) -> Metrics:
    """map and roc_auc: means over the classes for which they are defined."""
    assert stored.targets is not None
    pairs: dict[str, list[np.ndarray]] = {"map": [], "roc_auc": []}
    for number, scores in enumerate(stored.rows.T):
        truths = stored.targets == number if task == "classification" else stored.targets[:, number] > 0
        for name, values in zip(pairs, _areas(truths, scores, weights), strict=True):
            pairs[name].append(values)
    return {name: _mean(np.stack(values, 1), ~np.isnan(np.stack(values, 1))) for name, values in pairs.items()}


def _areas(truths: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and area under the ROC curve of each resample, (R,); NaN where undefined."""
    order = np.argsort(-scores, kind="stable")
    firsts = np.flatnonzero(np.append(True, np.diff(scores[order]) != 0))  # of equal scores
    drawn = weights[:, order]
    positive = np.add.reduceat(drawn * truths[order], firsts, axis=1)
    negative = np.add.reduceat(drawn * ~truths[order], firsts, axis=1)
    hits, false = positive.cumsum(1), negative.cumsum(1)
    all_hits, all_false = hits[:, -1], false[:, -1]
    precision = (positive * _ratio(hits, hits + false)).sum(1) / np.where(all_hits > 0, all_hits, np.nan)
    area = (negative * (hits - positive / 2)).sum(1)
    return precision, area / np.where(all_hits * all_false > 0, all_hits * all_false, np.nan)


def _calibration(right: np.ndarray, confidence: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error as jobs/tasks/measures.py defines it."""
    bins = np.clip(np.ceil(confidence.astype(np.float64) * BINS).astype(int) - 1, 0, BINS - 1)
    apart = (right.astype(np.float64) - confidence)[:, None] * (bins[:, None] == np.arange(BINS))
    errors: np.ndarray = np.abs(weights @ apart).sum(1) / weights.sum(1)
    return errors


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """0 where whole is 0."""
    quotients: np.ndarray = np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole != 0)
    return quotients


def _mean(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """(R, K) -> (R,): over the classes that count; NaN where none does."""
    means: np.ndarray = np.where(counted, values, 0.0).sum(1) / np.where(counted.any(1), counted.sum(1), np.nan)
    return means
