"""Intervals of metrics: each resample has the metrics of its samples written out, as the tasks and sklearn say."""

import math
import time

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk

from hpc.metrics import DIRECTIONS
from hpc.training import Loss
from jobs.inference.bootstrap import _draw, intervals, metrics_of
from jobs.tasks import _TASKS
from jobs.tasks.contract import Stored
from jobs.tasks.options import Options

NAMES = ("a", "b", "c", "d")


def stored_of(task, samples=60, seed=0, ties=True, absent=False):
    """An evaluation of noise with a little truth in it; with ties, and a class that is never true."""
    generator = np.random.default_rng(seed)
    classes = len(NAMES)
    losses = generator.exponential(1, samples).astype(np.float32)
    if task == "segmentation":
        truth, called = generator.integers(0, 90, (2, samples, classes))
        hits = np.minimum(truth, called) * generator.integers(0, 2, (samples, classes))
        rows = np.concatenate([hits, called, truth], axis=1).astype(np.float64)
        rows[:, [classes - 1, 2 * classes - 1, 3 * classes - 1]] *= not absent
        return Stored(np.arange(samples), None, rows, losses)
    if task == "classification":
        targets = generator.integers(0, classes - absent, samples)
        logits = generator.normal(size=(samples, classes)) + 1.5 * (targets[:, None] == np.arange(classes))
        rows = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    else:
        targets = (generator.random((samples, classes)) < 0.3).astype(np.uint8)
        targets[:, -1] *= not absent
        rows = 1 / (1 + np.exp(-(generator.normal(size=(samples, classes)) + 2.0 * targets - 1)))
    rows = np.round(rows, 1) if ties else rows
    return Stored(np.arange(samples), targets, rows.astype(np.float32), losses)


def chosen(stored, numbers):
    """The samples of these numbers, again and again, as an evaluation of their own."""
    targets = None if stored.targets is None else stored.targets[numbers]
    return Stored(np.arange(len(numbers)), targets, stored.rows[numbers], stored.losses[numbers])


def make(task):
    return _TASKS[task](Options(NAMES, Loss(), Loss().of_task(task)), torch.device("cpu"))


def counting(task):
    scores = make(task).scores(np.zeros(16), 0.0, 0, None) if task == "segmentation" else None
    return None if scores is None else (scores.in_iou, scores.in_dice)


def per_sample_dice(stored, in_dice):
    """As nnU-Net's summary: of each class the mean over the samples that have it or call it, then over the classes."""
    means = []
    for hits, called, truth in zip(*np.split(stored.rows.T, 3), strict=True):
        dice = [2 * h / (c + t) for h, c, t in zip(hits, called, truth, strict=True) if c + t]
        means.append(np.mean(dice) if dice else np.nan)
    return np.nanmean(np.array(means)[list(in_dice)])


def defined(stored, task):
    """The metrics as the task itself has them of these samples."""
    kind = make(task)
    if task == "segmentation":  # its rows are the sums of a matrix, which are all that its metrics look at
        hits, called, truth = np.split(stored.rows.sum(0), 3)
        scores = kind.scores(np.zeros(16), float(stored.losses.mean(dtype=np.float64)), len(stored), stored)
        both = truth + called
        known = both > 0
        return {
            "dice": (2 * hits / np.maximum(both, 1))[known & np.array(scores.in_dice)].mean(),
            "iou": (hits / np.maximum(both - hits, 1))[known & np.array(scores.in_iou)].mean(),
            "accuracy": hits.sum() / truth.sum(),
            "dice_per_sample": per_sample_dice(stored, scores.in_dice),
            "loss": stored.losses.mean(dtype=np.float64),
        }
    logits = torch.log(torch.from_numpy(stored.rows).clamp(min=1e-30))
    if task == "multilabel":
        logits = torch.logit(torch.from_numpy(stored.rows))
    cells = kind.count(logits, torch.from_numpy(stored.targets)).numpy()
    if task == "classification":
        called = stored.rows.argmax(1)
        cells = np.bincount(stored.targets * len(NAMES) + called, minlength=16)
    return kind.scores(cells, float(stored.losses.mean(dtype=np.float64)), len(stored), stored).metrics()


@pytest.mark.parametrize("task", DIRECTIONS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("absent", [False, True])
def test_each_resample_has_the_metrics_of_its_samples(task, ties, absent):
    stored = stored_of(task, ties=ties, absent=absent)
    weights = np.concatenate([np.ones((1, len(stored))), _draw(3, 0, 20, len(stored))])
    assert (weights.sum(1) == len(stored)).all()
    found = metrics_of(task, stored, weights, counting(task))
    assert set(found) - {"dice_per_sample"} == set(DIRECTIONS[task])
    for row, counts in enumerate(weights.astype(int)):
        wanted = defined(chosen(stored, np.repeat(np.arange(len(stored)), counts)), task)
        for name, value in wanted.items():
            assert found[name][row] == pytest.approx(value, rel=1e-7, abs=1e-7), (name, row)


def test_map_and_roc_auc_are_scikit_learns():
    stored = stored_of("multilabel")
    weights = _draw(1, 0, 10, len(stored))
    found = metrics_of("multilabel", stored, weights)
    for row, counts in enumerate(weights):
        told = [
            (sk.average_precision_score(t, p, sample_weight=counts), sk.roc_auc_score(t, p, sample_weight=counts))
            for t, p in zip(stored.targets.T, stored.rows.T, strict=True)
        ]
        assert found["map"][row] == pytest.approx(np.mean([ap for ap, _ in told]), abs=1e-9)
        assert found["roc_auc"][row] == pytest.approx(np.mean([auc for _, auc in told]), abs=1e-9)


def test_the_interval_of_accuracy_is_scipys():
    """SciPy's own percentile bootstrap with other draws, and the binomial's normal approximation."""
    stored = stored_of("classification", samples=400, ties=False)
    right = (stored.rows.argmax(1) == stored.targets).astype(float)
    low, high = intervals("classification", stored, range(400), None, 4000).bounds["accuracy"]
    theirs = stats.bootstrap((right,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    half = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert (low, high) == pytest.approx((right.mean() - half, right.mean() + half), abs=0.008)
    narrow = intervals("classification", stored, range(400), None, 4000, confidence=0.5).bounds["accuracy"]
    assert low < narrow[0] < right.mean() < narrow[1] < high


@pytest.mark.parametrize("task", ["classification", "multilabel"])
@pytest.mark.parametrize(("gap", "least"), [(0.0, 0.6), (0.05, 0.9), (0.15, 0.9)])
def test_the_interval_of_the_calibration_error_holds_the_value_and_the_truth(task, gap, least):
    """Of 100 samples each of a known error: percentiles would miss the truth of calibrated ones always."""
    generator, held, missed, tries = np.random.default_rng(5), 0, 0, 60
    for number in range(tries):
        confidence = generator.uniform(0.55, 0.95, (100, 1))
        right = generator.random((100, 1)) < confidence - gap
        rows = np.concatenate([confidence, 1 - confidence], 1).astype(np.float32)
        targets = np.where(right, 0, 1)[:, 0]
        if task == "multilabel":
            rows, targets = rows[:, :1], 1 - targets[:, None].astype(np.uint8)
        stored = Stored(np.arange(100), targets, rows, np.zeros(100, np.float32))
        value = metrics_of(task, stored, np.ones((1, 100)), None, False)["calibration_error"][0]
        low, high = intervals(task, stored, range(100), None, 200, seed=number).bounds["calibration_error"]
        assert 0 <= low <= value <= high <= 1
        held += low <= gap <= high
        resampled = metrics_of(task, stored, _draw(number, 0, 200, 100), None, False)["calibration_error"]
        missed += not np.quantile(resampled, 0.025) <= gap <= np.quantile(resampled, 0.975)
    assert held >= least * tries and (gap or missed == tries)


def test_the_same_seed_gives_the_same_interval_whatever_the_blocks(monkeypatch):
    stored = stored_of("classification")
    first = intervals("classification", stored, range(60), None, 200, seed=4)
    monkeypatch.setattr("jobs.inference.bootstrap._BLOCK", 60 * 7)
    assert intervals("classification", stored, range(60), None, 200, seed=4) == first
    assert intervals("classification", stored, range(60), None, 200, seed=5).bounds != first.bounds


def test_groups_are_drawn_as_wholes():
    """Ten copies of each sample tell no more than one: the interval is that of the samples alone, and not narrower."""
    stored = stored_of("classification", samples=50, ties=False)
    copies = chosen(stored, np.repeat(np.arange(50), 10))
    alone = intervals("classification", stored, range(50), None, 500)
    groups = [f"patient{number // 10}" for number in range(500)]
    grouped = intervals("classification", copies, groups, None, 500)
    single = intervals("classification", copies, range(500), None, 500)
    assert grouped.grouped and grouped.drawn == "50 groups" and not alone.grouped and alone.drawn == "50 samples"

    def width(found):
        low, high = found.bounds["accuracy"]
        return high - low

    assert width(grouped) == pytest.approx(width(alone), rel=0.2) and width(single) < 0.5 * width(grouped)


def test_one_sample_and_one_class_are_no_error():
    stored = chosen(stored_of("classification"), [0])
    bounds = intervals("classification", stored, ["x"], None, 20).bounds
    assert "roc_auc" not in bounds, "it is undefined in every resample"
    assert bounds["accuracy"][0] == bounds["accuracy"][1]


def test_what_would_take_too_long_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr("jobs.inference.bootstrap.MOST", 1000)
    found = intervals("multilabel", stored_of("multilabel"), range(60), None, 100)
    assert found.left_out == ("map", "roc_auc") and "map" not in found.bounds and "f1_macro" in found.bounds


def test_it_is_fast_enough_to_be_the_default(record_property):
    began = time.monotonic()
    intervals("classification", stored_of("classification", 2000, ties=False), range(2000), None, 1000)
    record_property("measured", f"1000 resamples of 2000 samples in 4 classes: {time.monotonic() - began:.1f} s")
