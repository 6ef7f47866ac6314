"""The names of the metrics of each task, and which way each gets better; the numbers come from jobs/tasks."""

from __future__ import annotations

from typing import Literal

Direction = Literal["max", "min"]

_SHARED: dict[str, Direction] = {
    "f1_macro": "max",
    "f1_micro": "max",
    "precision_macro": "max",
    "recall_macro": "max",
    "map": "max",
    "roc_auc": "max",
    "calibration_error": "min",
    "loss": "min",
}
DIRECTIONS: dict[str, dict[str, Direction]] = {
    "classification": {"accuracy": "max", "balanced_accuracy": "max", **_SHARED},
    "multilabel": {**_SHARED, "hamming": "min", "exact_match": "max"},
    "segmentation": {"dice": "max", "iou": "max", "accuracy": "max", "loss": "min"},
}
"""task -> metric -> which way it gets better."""

DEFAULT_MONITOR = {"classification": "accuracy", "multilabel": "map", "segmentation": "dice"}
"""task -> the validation metric that names the best checkpoint."""

STEP_METRIC = {"classification": "accuracy", "multilabel": "f1_micro", "segmentation": "dice"}
"""task -> the metric of single training steps: it follows from counts alone."""


def lower_is_better(metric: str) -> bool | None:
    """Of a metric of any task; None for another name."""
    known = {way for ways in DIRECTIONS.values() for name, way in ways.items() if name == metric}
    return "min" in known if known else None
