"""What follows from the validation metrics so far: both are functions of their list, which the checkpoint holds.

A metric that is not a number is no better than any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from hpc.optimisation import EarlyStopping, Scheduler

Direction = Literal["min", "max"]


def plateau(settings: Scheduler, direction: Direction, values: Sequence[float]) -> float:
    """The share of the highest rate after epochs with these values, as torch's ReduceLROnPlateau has it."""
    best, bad, cooldown, share = _worst(direction), 0, 0, 1.0
    for value in values:
        factor = 1 - settings.threshold if direction == "min" else 1 + settings.threshold
        better = value < best * factor if direction == "min" else value > best * factor
        best, bad = (value, 0) if better else (best, bad + 1)
        if cooldown > 0:
            cooldown, bad = cooldown - 1, 0
        if bad > settings.patience:
            share, cooldown, bad = max(share * settings.factor, settings.final), settings.cooldown, 0
    return share


def without_gain(settings: EarlyStopping, direction: Direction, values: Sequence[float]) -> int:
    """Epochs since the last one that was better than all before it by more than min_delta; at `patience` a run ends."""
    best, waited = _worst(direction), 0
    for value in values:
        gain = best - value if direction == "min" else value - best
        best, waited = (value, 0) if gain > settings.min_delta else (best, waited + 1)
    return waited


def _worst(direction: Direction) -> float:
    return math.inf if direction == "min" else -math.inf
