"""All figures of one evaluation by name: which ones a task has, and what is drawn in each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from jobs.figures import calibration, classes, matrices, pictures, progress, rates
from jobs.figures.examples import Example, Stored
from jobs.figures.progress import Steps

_LOG = logging.getLogger(__name__)

CURVES = {
    "classification": ("loss", "accuracy", "balanced_accuracy", "f1_macro", "map", "roc_auc", "calibration_error"),
    "multilabel": ("loss", "map", "f1_macro", "f1_micro", "precision_macro", "recall_macro", "roc_auc", "hamming"),
    "segmentation": ("loss", "dice", "iou", "accuracy"),
}
"""Metrics that have a panel, in this order; the monitored one comes second."""


class Scores(Protocol):
    """The part of jobs.tasks' Scores that figures need."""

    @property
    def matrix(self) -> NDArray[Any]: ...
    @property
    def baseline(self) -> Mapping[str, float]: ...
    def per_class(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class History:
    """How a run came here. lines: of metrics.jsonl; loss, learning_rate: of each step."""

    lines: Sequence[Mapping[str, Any]] = ()
    best_epoch: int | None = None
    monitor: str = "loss"
    loss: Steps | None = None
    learning_rate: Steps | None = None


@dataclass(frozen=True)
class Shown:
    """The samples of the pictures."""

    examples: Sequence[Example] = field(default_factory=tuple)
    worst: Sequence[Example] = field(default_factory=tuple)


def plans(
    task: str,
    scores: Scores,
    stored: Stored | None,
    names: Sequence[str],
    title: str = "",
    history: History | None = None,
    shown: Shown | None = None,
) -> dict[str, Callable[[], Figure]]:
    """What can be drawn, as calls: the names are those of hpc.journal.captions. At most a dozen.

    title: split and checkpoint. stored None: nothing that needs each sample; history, shown None: no curves, pictures.
    """
    found = _curve_plans(task, scores, history) if history else {}
    if task == "multilabel":
        found["label_matrices"] = lambda: matrices.label_matrices(scores.matrix, names, title)
    else:
        found["confusion_matrix"] = lambda: matrices.confusion_matrix(scores.matrix, names, title)
        found["confusion_matrix_normalised"] = lambda: matrices.confusion_matrix(scores.matrix, names, title, True)
    found["per_class"] = lambda: classes.per_class_table(task, scores.per_class(), title)
    if stored is not None and len(stored.samples):
        found |= _stored_plans(task, stored, names, title)
    if shown and shown.examples:
        found["predictions"] = lambda: pictures.predictions(shown.examples, names, title)
    if shown and shown.worst:
        found["worst_samples"] = lambda: pictures.worst_samples(
            shown.worst, names, f"{title}; the largest losses first"
        )
    return found


def _curve_plans(task: str, scores: Scores, history: History) -> dict[str, Callable[[], Figure]]:
    found: dict[str, Callable[[], Figure]] = {}
    first = ("loss", history.monitor)
    names = [*dict.fromkeys([*first, *CURVES[task]])][: progress.MOST_PANELS - 1]
    found["curves"] = lambda: progress.curves(
        history.lines, names, history.best_epoch, scores.baseline, learning_rate=history.learning_rate
    )
    if history.loss is not None and len(history.loss[0]) and history.lines:
        last, loss = max(history.lines, key=lambda line: int(line["step"])), history.loss
        found["batch_loss"] = lambda: progress.batch_loss(loss, last["step"] / max(last["epoch"], 1))
    return found


def _stored_plans(task: str, stored: Stored, names: Sequence[str], title: str) -> dict[str, Callable[[], Figure]]:
    rows, targets = stored.rows, stored.targets
    if task == "segmentation" or targets is None:
        return {"dice_by_sample": lambda: classes.dice_by_sample(rows, names, title)}
    return {
        "roc": lambda: rates.roc(targets, rows, names, title),
        "precision_recall": lambda: rates.precision_recall(targets, rows, names, title),
        "calibration": lambda: calibration.calibration(targets, rows, title),
    }


def drawings(
    task: str,
    scores: Scores,
    stored: Stored | None,
    names: Sequence[str],
    title: str = "",
    history: History | None = None,
    shown: Shown | None = None,
    only: Sequence[str] | None = None,
) -> dict[str, Figure]:
    """The figures by name, see `plans`; only: those of these names. One that fails is left out, with one warning."""
    made = {}
    for name, draw in plans(task, scores, stored, names, title, history, shown).items():
        if only is not None and name not in only:
            continue
        try:
            made[name] = draw()
        except Exception as error:
            _LOG.warning("figure %s is left out: %s: %s", name, type(error).__name__, error)
    return made


def step_series(steps: Mapping[str, Sequence[tuple[int, float, float]]], tag: str) -> Steps | None:
    """A series of hpc.logs.series.scalars, (step, wall time, value), as arrays; None where there is none."""
    points = steps.get(tag)
    if not points:
        return None
    return np.array([point[0] for point in points]), np.array([point[2] for point in points], np.float64)
