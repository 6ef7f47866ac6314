"""Multilabel: a sample has any number of labels; one is called where its probability is above a half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.tasks import losses, measures
from jobs.tasks.classification import require_scores, table
from jobs.tasks.contract import Stored
from jobs.tasks.options import Options


class Multilabel:
    """(B, K) logits and (B, K) of 0 and 1; the counts are TP, FP, FN and TN of each label."""

    name = "multilabel"

    def __init__(self, options: Options, device: torch.device) -> None:
        self.class_names = options.class_names
        self.num_classes = len(self.class_names)
        self.cells = 4 * self.num_classes
        self._options = options
        both = (options.positive, options.negative)
        self._positive, self._negative = (None if w is None else torch.tensor(w, device=device) for w in both)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.losses(outputs, targets).mean()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A sample's loss is the mean over its labels."""
        name, settings = self._options.name, self._options.loss
        if name == "focal":
            found = losses.binary_focal(outputs, targets, settings.gamma, settings.alpha)
        else:
            found = losses.binary_cross_entropy(outputs, targets, self._positive, self._negative)
        if name == "focal_bce":
            found = found + losses.binary_focal(outputs, targets, settings.gamma, settings.alpha)
        return found.mean(1)

    def count(self, outputs: Tensor, targets: Tensor) -> Tensor:
        truth, call = targets > 0, self.probabilities(outputs) > 0.5
        cells = torch.stack([truth & call, ~truth & call, truth & ~call, ~truth & ~call], dim=2)
        return cells.sum(0).flatten()

    def probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.float().sigmoid()

    def rows(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.probabilities(outputs)

    def nothing(self) -> tuple[Tensor, Tensor]:
        return torch.empty(0, self.num_classes, dtype=torch.uint8), torch.empty(0, self.num_classes)

    def scores(self, cells: np.ndarray, loss: float, samples: int, stored: Stored | None) -> MultilabelScores:
        counts = np.asarray(cells).reshape(self.num_classes, 4)
        return MultilabelScores(self.class_names, counts, loss, samples, stored)

    def check_outputs(self, shape: Sequence[int], inputs_shape: Sequence[int]) -> None:
        require_scores(self.name, shape, inputs_shape, self.num_classes)


@dataclass(frozen=True)
class MultilabelScores:
    """The metrics of each label's counts, and of the stored probabilities."""

    class_names: Sequence[str]
    counts: np.ndarray
    """(K, 4): TP, FP, FN, TN of each label."""
    loss: float
    samples: int
    stored: Stored | None = None
    task = "multilabel"

    @property
    def matrix(self) -> np.ndarray:
        """(K, 2, 2) counts [truth, prediction] of each label, as scikit-learn's multilabel_confusion_matrix."""
        return self.counts[:, [3, 1, 2, 0]].reshape(-1, 2, 2)

    def metrics(self) -> dict[str, float]:
        """Means are over all labels, 0 where undefined; of map and roc_auc over those for which they are defined, NaN
        of none."""
        tp, fp, fn, _ = self.counts.T
        found = {
            "f1_macro": measures.mean(measures.ratio(2 * tp, 2 * tp + fp + fn)),
            "f1_micro": float(measures.ratio(2 * tp.sum(), (2 * tp + fp + fn).sum())),
            "precision_macro": measures.mean(measures.ratio(tp, tp + fp)),
            "recall_macro": measures.mean(measures.ratio(tp, tp + fn)),
            "hamming": float(measures.ratio((fp + fn).sum(), self.counts.sum())),
        }
        return {**self._of_probabilities(), **found, "loss": self.loss}

    def _of_probabilities(self) -> dict[str, float]:
        if self.stored is None:
            return {}
        calls = self.stored.rows > 0.5
        return {
            "map": measures.mean(self._per_class["ap"]),
            "roc_auc": measures.mean(self._per_class["auc"]),
            "exact_match": measures.mean((calls == self.stored.targets).all(1)),
            "calibration_error": measures.mean(self._per_class["calibration_error"]),
        }

    @cached_property
    def _per_class(self) -> dict[str, list[float]]:
        assert self.stored is not None and self.stored.targets is not None
        pairs = list(zip(self.stored.targets.T, self.stored.rows.T, strict=True))
        return {
            "ap": [measures.average_precision(truths, scores) for truths, scores in pairs],
            "auc": [measures.roc_auc(truths, scores) for truths, scores in pairs],
            "calibration_error": [measures.calibration_error(truths, scores) for truths, scores in pairs],
        }

    @cached_property
    def baseline(self) -> dict[str, float]:
        """Of calling each label always or never, as most samples have it; map: the mean prevalence, roc_auc: 0.5
        where it is defined."""
        has, lacks = self.counts[:, [0, 2]].sum(1), self.counts[:, [1, 3]].sum(1)
        called, none = has > lacks, np.zeros_like(has)
        constant = np.where(
            called[:, None], np.stack([has, lacks, none, none], 1), np.stack([none, none, has, lacks], 1)
        )
        found = MultilabelScores(self.class_names, constant, 0.0, self.samples).metrics()
        del found["loss"]
        if self.stored is None:
            return found
        exact = measures.mean((self.stored.targets == called).all(1))
        prevalence = measures.mean(measures.ratio(has, has + lacks)[has > 0])
        area = 0.5 if ((has > 0) & (lacks > 0)).any() else float("nan")
        return {"map": prevalence, "roc_auc": area, "exact_match": exact, **found}

    def per_class(self) -> list[dict[str, Any]]:
        """Precision, recall and F1 of each label (0 where undefined); ap, auc and calibration_error where stored."""
        tp, fp, fn, _ = self.counts.T
        columns = {
            "precision": measures.ratio(tp, tp + fp),
            "recall": measures.ratio(tp, tp + fn),
            "f1": measures.ratio(2 * tp, 2 * tp + fp + fn),
            **({} if self.stored is None else self._per_class),
        }
        return table(self.class_names, {"support": tp + fn, "predicted": tp + fp}, columns)
