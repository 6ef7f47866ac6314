"""Plateau is torch's ReduceLROnPlateau as a function of the metrics; an early end is what its patience says."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hpc.optimisation import EarlyStopping, Scheduler
from jobs.history import plateau, without_gain

LEVELS = st.lists(st.sampled_from([0.0, 0.5, 0.50001, 0.6, 0.9, 1.0, math.nan]), max_size=40)


@settings(deadline=None)
@given(
    values=LEVELS,
    direction=st.sampled_from(["min", "max"]),
    patience=st.integers(0, 4),
    cooldown=st.integers(0, 3),
    final=st.sampled_from([0.0, 0.03]),
    threshold=st.sampled_from([0.0, 1e-4, 0.1]),
)
def test_plateau_is_that_of_torch(
    values: list[float],
    direction: Literal["min", "max"],
    patience: int,
    cooldown: int,
    final: float,
    threshold: float,
) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, direction, 0.5, patience, threshold, cooldown=cooldown, min_lr=final, eps=0
    )
    given = {"name": "plateau", "factor": 0.5, "patience": patience, "cooldown": cooldown, "final": final}
    scheduler = Scheduler.model_validate({**given, "threshold": threshold})
    for number, value in enumerate(values, start=1):
        theirs.step(value)
        assert plateau(scheduler, direction, values[:number]) == pytest.approx(optimizer.param_groups[0]["lr"])


ENDS = {
    "better each time": ("max", [0.1, 0.2, 0.3, 0.4], 0, 0.0),
    "two without": ("max", [0.5, 0.4, 0.5], 2, 0.0),
    "lower is better": ("min", [0.5, 0.4, 0.45], 1, 0.0),
    "too little is none": ("max", [0.5, 0.505, 0.509], 2, 0.01),
    "little by little is some, as the best stays": ("max", [0.5, 0.505, 0.511], 0, 0.01),
    "never a number": ("min", [math.nan] * 3, 3, 0.0),
    "nothing yet": ("max", [], 0, 0.0),
}


@pytest.mark.parametrize("name", ENDS)
def test_epochs_without_a_gain_are_counted(name: str) -> None:
    direction, values, wanted, least = ENDS[name]
    assert without_gain(EarlyStopping(patience=3, min_delta=least), direction, values) == wanted  # type: ignore[arg-type]
