"""Test-time flips: the mean of what a network says of an input and of its mirror images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.inference.windows import Predict


def flipped(predict: Predict, axes: Sequence[int], maps: bool) -> Predict:
    """`predict` over all combinations of flips along the spatial `axes` (2 ** n passes), their mean.

    maps: what is predicted lies on the input's grid, and is flipped back. nnU-Net's mirroring, on probabilities.
    """
    if not axes:
        return predict
    sides = [some for count in range(len(axes) + 1) for some in itertools.combinations(axes, count)]

    def mean(inputs: Tensor) -> Tensor:
        total = torch.zeros(())
        for side in sides:
            dims = [2 + axis for axis in side]
            told = predict(inputs.flip(dims) if dims else inputs).float()
            total = (told.flip(dims) if maps and dims else told) + total.to(told.device)
        return total / len(sides)

    return mean


def check_axes(axes: Sequence[int], count: int) -> None:
    """ValueError for an axis that the volumes do not have, or that stands twice."""
    wrong = [axis for axis in axes if not 0 <= axis < count]
    if wrong or len(set(axes)) < len(axes):
        names = "0 (x), 1 (y), 2 (z)" if count == 3 else "0 (rows), 1 (columns)"
        raise ValueError(f"--flips {','.join(map(str, axes))}: axes are {names}, each once")
