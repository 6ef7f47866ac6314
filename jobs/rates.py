"""The learning rate as a share of the highest: a function of the step alone, so a resumed run needs no state of it.

`plateau` and early stopping need the validation metrics besides: jobs/history.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from hpc.optimisation import Scheduler

# one_cycle of Smith & Topin (arXiv 1708.07120): 30 % of the steps rise from 1/25 of the highest rate.
_RISE, _START = 0.3, 1 / 25
_GAMMA = {"exponential": 0.9, "step": 0.1}
"""Where the file does not say; 0.1 is torch's."""


def share(settings: Scheduler, total_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The share of step 0, 1, ... total_steps - 1 of a stage.

    After the warm-up `exponential`, `cosine` and `poly` begin; `step` counts the epochs of the stage, as torch does.
    """
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    rest = max(total_steps - 1 - warmup, 1)

    def of(step: int) -> float:
        if settings.name == "one_cycle":
            return _one_cycle(step / max(total_steps - 1, 1), settings.final)
        if step < warmup:
            return (step + 1) / warmup
        if settings.name == "cosine":
            return _cosine((step - warmup) / rest, 1.0, settings.final)
        if settings.name == "exponential":
            return float(_gamma(settings) ** ((step - warmup) // steps_per_epoch))
        if settings.name == "step":
            return float(_gamma(settings) ** _stairs(settings, step // steps_per_epoch))
        if settings.name == "poly":
            return float(max(1 - (step - warmup) / max(total_steps - warmup, 1), 0.0) ** settings.power)
        return 1.0

    return of


def _gamma(settings: Scheduler) -> float:
    return _GAMMA[settings.name] if settings.gamma is None else settings.gamma


def _stairs(settings: Scheduler, epoch: int) -> int:
    """How often the rate has fallen in `epoch` whole epochs."""
    if settings.step_size is not None:
        return epoch // settings.step_size
    return sum(milestone <= epoch for milestone in settings.milestones)


def _one_cycle(done: float, final: float) -> float:
    if done < _RISE:
        return _cosine(done / _RISE, _START, 1.0)
    return _cosine((done - _RISE) / (1 - _RISE), 1.0, final)


def _cosine(done: float, start: float, end: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
