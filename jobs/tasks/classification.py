"""Classification: one class per sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc.errors import UserError
from jobs.tasks import losses, measures
from jobs.tasks.contract import Stored
from jobs.tasks.options import Options


class Classification:
    """(B, K) logits and (B,) class numbers; the counts are the confusion matrix."""

    name = "classification"

    def __init__(self, options: Options, device: torch.device) -> None:
        self.class_names = options.class_names
        self.num_classes = len(self.class_names)
        self.cells = self.num_classes**2
        self._options = options
        self._weights = None if options.class_weights is None else torch.tensor(options.class_weights, device=device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.losses(outputs, targets).mean()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        settings = self._options.loss
        if self._options.name == "focal":
            return losses.focal(outputs, targets, self._weights, settings.gamma)
        return losses.cross_entropy(outputs, targets, self._weights, settings.label_smoothing)

    def count(self, outputs: Tensor, targets: Tensor) -> Tensor:
        called = self.probabilities(outputs).argmax(1)  # ties as in the stored ones
        return torch.bincount(targets * self.num_classes + called, minlength=self.cells)

    def probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.float().softmax(1)

    def rows(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.probabilities(outputs)

    def nothing(self) -> tuple[Tensor, Tensor]:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, self.num_classes)

    def scores(self, cells: np.ndarray, loss: float, samples: int, stored: Stored | None) -> ClassificationScores:
        matrix = np.asarray(cells).reshape(self.num_classes, self.num_classes)
        return ClassificationScores(self.class_names, matrix, loss, samples, stored)

    def check_outputs(self, shape: Sequence[int], inputs_shape: Sequence[int]) -> None:
        require_scores(self.name, shape, inputs_shape, self.num_classes)


def require_scores(task: str, shape: Sequence[int], inputs_shape: Sequence[int], num_classes: int) -> None:
    """UserError where outputs are not (B, K)."""
    if tuple(shape) != (inputs_shape[0], num_classes):
        given = tuple(shape[1:])
        raise UserError(
            f"it gives scores of shape {given} for a sample, not ({num_classes},): {task} needs one per class"
        )


@dataclass(frozen=True)
class ClassificationScores:
    """The metrics of a confusion matrix, and of the stored probabilities."""

    class_names: Sequence[str]
    matrix: np.ndarray
    """(K, K) counts [truth, prediction]."""
    loss: float
    samples: int
    stored: Stored | None = None
    task = "classification"

    def metrics(self) -> dict[str, float]:
        """Means over classes are, as scikit-learn's, over those that occur as truth or prediction; map and roc_auc
        over those that are the truth of some samples, but not of all for roc_auc. NaN is a mean over none."""
        hits, truths, calls = np.diag(self.matrix), self.matrix.sum(1), self.matrix.sum(0)
        recall, seen = measures.ratio(hits, truths), truths + calls > 0
        accuracy = measures.share(hits.sum(), self.matrix.sum())
        found = {
            "accuracy": accuracy,
            "balanced_accuracy": measures.mean(recall[truths > 0]),
            "f1_macro": measures.mean(measures.ratio(2 * hits, truths + calls)[seen]),
            "f1_micro": accuracy,
            "precision_macro": measures.mean(measures.ratio(hits, calls)[seen]),
            "recall_macro": measures.mean(recall[seen]),
        }
        return {**found, **self._of_probabilities(), "loss": self.loss}

    def _of_probabilities(self) -> dict[str, float]:
        if self.stored is None:
            return {}
        right = self.stored.rows.argmax(1) == self.stored.targets
        return {
            "map": measures.mean(self._per_class["ap"]),
            "roc_auc": measures.mean(self._per_class["auc"]),
            "calibration_error": measures.calibration_error(right, self.stored.rows.max(1)),
        }

    @cached_property
    def _per_class(self) -> dict[str, list[float]]:
        """Average precision and ROC AUC of each class against all others."""
        assert self.stored is not None and self.stored.targets is not None
        pairs = [(self.stored.targets == k, self.stored.rows[:, k]) for k in range(len(self.class_names))]
        return {
            "ap": [measures.average_precision(truths, scores) for truths, scores in pairs],
            "auc": [measures.roc_auc(truths, scores) for truths, scores in pairs],
        }

    @cached_property
    def baseline(self) -> dict[str, float]:
        """Of always naming the commonest class; map: the mean share of the classes, roc_auc: 0.5 or undefined."""
        support = self.matrix.sum(1)
        constant = np.zeros_like(self.matrix)
        constant[:, support.argmax()] = support
        found = ClassificationScores(self.class_names, constant, 0.0, self.samples).metrics()
        del found["loss"]
        if self.stored is not None:
            shares = support[support > 0] / max(support.sum(), 1)
            found |= {"map": measures.mean(shares), "roc_auc": 0.5 if len(shares) > 1 else float("nan")}
        return found

    def per_class(self) -> list[dict[str, Any]]:
        """Precision, recall and F1 of each class (0 where undefined); ap and auc where probabilities are stored."""
        hits, truths, calls = np.diag(self.matrix), self.matrix.sum(1), self.matrix.sum(0)
        columns = {
            "precision": measures.ratio(hits, calls),
            "recall": measures.ratio(hits, truths),
            "f1": measures.ratio(2 * hits, truths + calls),
            **({} if self.stored is None else self._per_class),
        }
        counts = {"support": truths, "predicted": calls}
        return table(self.class_names, counts, columns)


def table(names: Sequence[str], counts: dict[str, np.ndarray], columns: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each class, as plain data; NaN as None."""
    rows = []
    for number, name in enumerate(names):
        row: dict[str, Any] = {"name": name, **{key: int(values[number]) for key, values in counts.items()}}
        for key, values in columns.items():
            row[key] = None if np.isnan(values[number]) else float(values[number])
        rows.append(row)
    return rows
