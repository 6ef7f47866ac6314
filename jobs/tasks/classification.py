"""Classification: one class per sample. Metrics come from counts, so they are exact over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from datasets.census import balanced_weights
from hpc.training import Loss

METRICS = ("accuracy", "balanced_accuracy", "f1_macro", "loss")
DIRECTION = {"accuracy": "max", "balanced_accuracy": "max", "f1_macro": "max", "loss": "min"}


def class_weights(settings: Loss, counts: Sequence[int]) -> list[float] | None:
    """One weight per class, or None. balanced: N / (K * count), as scikit-learn has it, from the training split.

    Raises ValueError for a wrong number of weights.
    """
    given = settings.class_weights
    if given is None:
        return None
    if given == "balanced":
        return balanced_weights(counts)
    if len(given) != len(counts):
        raise ValueError(f"train.loss.class_weights has {len(given)} weights, but the data has {len(counts)} classes")
    return [float(weight) for weight in given]


class Classification:
    """Cross entropy over (B, K) scores and (B,) class numbers."""

    def __init__(self, settings: Loss, weights: list[float] | None, device: torch.device) -> None:
        self._smoothing = settings.label_smoothing
        self._weights = torch.tensor(weights, device=device) if weights else None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Weighted sum over the batch divided by its samples (B >= 1), in fp32.

        torch's own mean divides by the sum of the weights of those samples: it would depend on how samples are cut
        into batches, parts and ranks, and be NaN where all are of a class of weight 0.
        """
        total = functional.cross_entropy(
            outputs.float(), targets, weight=self._weights, label_smoothing=self._smoothing, reduction="sum"
        )
        return total / len(targets)


class Counts:
    """Loss sums and confusion matrix [truth, prediction] of the samples seen so far, on one device.

    Loss sums are kept apart for `parts` (virtual ranks): who adds them up must not matter.
    """

    def __init__(self, num_classes: int, device: torch.device, parts: int = 1) -> None:
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.loss = torch.zeros(parts, dtype=torch.float64, device=device)

    def total_loss(self) -> float:
        """Over all parts, in an order that cannot matter."""
        return total(self.loss)

    def add(self, outputs: Tensor, targets: Tensor, mean_loss: Tensor, part: int = 0) -> None:
        """One batch: (B, K) scores, (B,) class numbers and the batch's mean loss."""
        classes = len(self.matrix)
        cells = targets * classes + outputs.detach().argmax(1)
        self.matrix += torch.bincount(cells, minlength=classes * classes).view(classes, classes)
        self.loss[part] += mean_loss.detach().double() * len(targets)


def total(losses: Tensor) -> float:
    """(parts,) -> the exact sum, rounded once; not a number where one of them is none."""
    values = losses.tolist()
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


@dataclass(frozen=True)
class Scores:
    """The metrics of a confusion matrix."""

    matrix: np.ndarray
    """(K, K) counts [truth, prediction]."""
    loss: float
    """Mean over the samples."""

    @property
    def samples(self) -> int:
        return int(self.matrix.sum())

    def metrics(self) -> dict[str, float]:
        """accuracy, balanced accuracy (mean recall of the classes that occur), macro F1, loss."""
        table = self.per_class([""] * len(self.matrix))
        recalls = [row["recall"] for row in table if row["support"]]
        f1 = [row["f1"] for row in table if row["support"] or row["predicted"]]
        return {
            "accuracy": float(np.trace(self.matrix) / max(self.samples, 1)),
            "balanced_accuracy": float(np.mean(recalls)) if recalls else 0.0,
            "f1_macro": float(np.mean(f1)) if f1 else 0.0,
            "loss": self.loss,
        }

    @property
    def majority(self) -> float:
        """The accuracy of always naming the commonest class."""
        return float(self.matrix.sum(1).max() / max(self.samples, 1))

    def per_class(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Precision, recall and F1 of each class (0 where undefined, as scikit-learn's zero_division=0)."""
        hits, truths, calls = np.diag(self.matrix), self.matrix.sum(1), self.matrix.sum(0)
        return [
            {
                "name": name,
                "support": int(truth),
                "predicted": int(call),
                "precision": float(hit / call) if call else 0.0,
                "recall": float(hit / truth) if truth else 0.0,
                "f1": float(2 * hit / (truth + call)) if truth + call else 0.0,
            }
            for name, hit, truth, call in zip(names, hits, truths, calls, strict=True)
        ]
