"""What a task promises to the training, the evaluation and the figures.

- `loss` and `losses` are in float32, whatever the model computes in, and each sample's loss is its own: the mean over
  a batch is the sum over samples / B, so it does not depend on how samples are cut into parts, batches and ranks.
  torch's weighted mean, which divides by the weights that a batch happens to have, does.
- `count` is exact: integers, to be summed over batches and ranks.
- `rows` are what metrics need of each evaluated sample beyond the counts. They are small: no map is kept.

tests/test_tasks.py holds every task to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """What is kept of an evaluation: of all ranks, ordered by sample number, each sample once."""

    samples: np.ndarray
    """(N,) int64 numbers in the volume file."""
    targets: np.ndarray | None
    """(N,) int64 class numbers or (N, K) uint8; None of a segmentation."""
    rows: np.ndarray
    """(N, R): see Task.rows."""
    losses: np.ndarray
    """(N,) float32."""

    def __len__(self) -> int:
        return len(self.samples)


class Scores(Protocol):
    """The metrics of an evaluation, or of training steps."""

    @property
    def task(self) -> str: ...

    @property
    def samples(self) -> int: ...

    @property
    def loss(self) -> float:
        """Mean over the samples."""

    @property
    def matrix(self) -> np.ndarray:
        """(K, K) counts [truth, prediction], of voxels in a segmentation; multilabel: (K, 2, 2), each label's."""

    @property
    def baseline(self) -> dict[str, float]:
        """The metrics of always naming what is commonest, without a look at the input."""

    def metrics(self) -> dict[str, float]:
        """By the names of hpc.metrics, NaN where undefined; without what needs Stored where there is none."""

    def per_class(self) -> list[dict[str, Any]]:
        """name, support and the metrics of each class; None for a value that is undefined."""


class Task(Protocol):
    """K classes, batches of B samples; outputs are logits (B, K, *spatial)."""

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    cells: int
    """Length of the vector of counts."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean of `losses` over the batch (B >= 1): a scalar, float32."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B,) float32."""

    def count(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(cells,) int64."""

    def probabilities(self, outputs: Tensor) -> Tensor:
        """(B, K, ...) float32, of logits in any precision."""

    def rows(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B, R): probabilities (R = K, float32); of a segmentation the voxels of each class that are intersection,
        predicted and true (R = 3 K, float64)."""

    def nothing(self) -> tuple[Tensor, Tensor]:
        """(targets, rows) as they are stored of no sample: (0,), (0, K) or, of label maps, (0, 0); and (0, R)."""

    def scores(self, cells: np.ndarray, loss: float, samples: int, stored: Stored | None) -> Scores:
        """Of summed counts (cells,) and the mean loss of so many samples."""

    def check_outputs(self, shape: Sequence[int], inputs_shape: Sequence[int]) -> None:
        """UserError where a model's outputs of this shape, for inputs (B, C, *spatial), are no logits of the task."""
