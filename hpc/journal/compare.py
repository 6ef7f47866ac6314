"""Metrics side by side: which direction is better, how a number and its difference to the baseline are written."""

from __future__ import annotations

import math
import re
from typing import Any, TypeGuard

from hpc import metrics

_LOWER = re.compile(r"loss|error|hamming|brier|perplexity|mae|mse|hausdorff|ece", re.IGNORECASE)


def is_number(value: Any) -> TypeGuard[int | float]:
    """NaN is none: what was written of an undefined metric; nor is an integer beyond all floats."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    except OverflowError:
        return False


def lower_is_better(metric: str) -> bool:
    """As hpc.metrics says; of another by the words of its name: losses and errors fall, everything else rises."""
    known = metrics.lower_is_better(metric)
    return known if known is not None else any(_LOWER.fullmatch(word) for word in re.split(r"[^A-Za-z]+", metric))


def better(value: float, other: float, lower: bool) -> bool:
    """Whether `value` beats `other`; a number beats NaN, NaN beats nothing."""
    if math.isnan(value) or math.isnan(other):
        return math.isnan(other) and not math.isnan(value)
    return value < other if lower else value > other


def number(value: Any, digits: int = 4) -> str:
    """`digits` significant digits, whole numbers whole; a dash for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return metrics.UNDEFINED
    if not is_number(value):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e15 else text


def difference(value: Any, baseline: Any) -> str:
    """`+0.02`; `=` where both are written alike, empty where one of the two is no finite number."""
    if not (metrics.is_finite(value) and metrics.is_finite(baseline)):
        return ""
    if number(value) == number(baseline):
        return "="
    change = value - baseline
    return f"{'+' if change > 0 else ''}{number(change, digits=3)}"


def tone(value: Any, baseline: Any, lower: bool) -> str:
    """`better`, `worse`, or empty where the difference is empty or none."""
    if difference(value, baseline) in ("", "="):
        return ""
    return "better" if better(value, baseline, lower) else "worse"
