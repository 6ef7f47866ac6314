"""The names of the metrics of each task, and which way each gets better; the numbers come from jobs/tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeGuard

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


UNDEFINED = "–"
"""In place of a metric that is undefined: no class has what it needs."""


_DIFFICULTY = {"multilabel": ("ap", "f1"), "segmentation": ("dice",)}
"""Of single classes: the lower, the more difficult; the first of these that the classes have. Else recall."""


def is_finite(value: Any) -> TypeGuard[int | float]:
    """What files tell may be anything: True, NaN and 10**400 are no number that can be drawn or reckoned with."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def by_difficulty(task: str, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Positions in `rows` {support, recall, ...}, the most difficult class first, those without a value last.

    A class that does not occur has none.
    """

    def value(row: Mapping[str, Any], key: str) -> float:
        found = row.get(key) if row.get("support") else None
        return float(found) if is_finite(found) else math.inf

    keys = _DIFFICULTY.get(task, ("recall",))
    key = next((key for key in keys if any(math.isfinite(value(row, key)) for row in rows)), keys[-1])
    return sorted(range(len(rows)), key=lambda place: value(rows[place], key))


def decimals(value: Any, digits: int = 4) -> str:
    """A metric as tables show it: 0.5000, or UNDEFINED of NaN and None (so JSON has it)."""
    undefined = value is None or (isinstance(value, float) and math.isnan(value))
    return UNDEFINED if undefined else f"{value:.{digits}f}"


def defined(metrics: dict[str, float]) -> dict[str, float]:
    """Without those that are undefined; a loss that is no number is a fault, and stays."""
    return {name: value for name, value in metrics.items() if name == "loss" or not math.isnan(value)}


def lower_is_better(metric: str) -> bool | None:
    """Of a metric of any task; None for another name."""
    known = {way for ways in DIRECTIONS.values() for name, way in ways.items() if name == metric}
    return "min" in known if known else None
