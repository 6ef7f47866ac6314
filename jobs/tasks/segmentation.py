"""Segmentation: one class per voxel of a label map; 255 is no class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.layout import UNLABELLED
from hpc.errors import UserError
from jobs.tasks import losses, measures
from jobs.tasks.classification import table
from jobs.tasks.contract import Stored
from jobs.tasks.options import Options


class Segmentation:
    """(B, K, *spatial) logits and (B, *spatial) maps; the counts are the confusion matrix of the voxels.

    A sample's loss is the mean over its voxels, of ignored classes left out, or its soft Dice loss.
    """

    name = "segmentation"

    def __init__(self, options: Options, device: torch.device) -> None:
        self.class_names = options.class_names
        self.num_classes = len(self.class_names)
        self.cells = self.num_classes**2
        self._options = options
        self._weights = None if options.class_weights is None else torch.tensor(options.class_weights, device=device)
        # A balanced weight of 0 says that no training map has the class: what is scored may have it all the same.
        balanced = options.loss.class_weights == "balanced"
        self._means = tuple(
            number not in options.ignored and (balanced or self._weight(number) > 0)
            for number in range(self.num_classes)
        )
        in_dice = list(self._means)
        in_dice[0] &= options.loss.include_background
        if not any(in_dice):
            raise UserError(
                f"no class is left for Dice: of {', '.join(self.class_names)} the first is the background "
                f"(train.loss.include_background: true counts it), the others are ignored or of weight 0"
            )
        self._dice = tuple(in_dice)
        self._in_dice = torch.tensor(in_dice, device=device)
        self._ignored = torch.tensor(options.ignored, dtype=torch.uint8, device=device)

    def _weight(self, number: int) -> float:
        return 1.0 if self._options.class_weights is None else self._options.class_weights[number]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.losses(outputs, targets).mean()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        known, name = self._known(targets), self._options.name
        if name == "dice":
            return self._dice_loss(outputs, targets, known)
        found = self._mean_over_voxels(outputs, targets, known)
        return found + self._dice_loss(outputs, targets, known) if name == "dice_ce" else found

    def _known(self, targets: Tensor) -> Tensor:
        """(B, *spatial) whether a voxel counts; 255 is no class, nor is another value without a name."""
        known = targets < self.num_classes
        return known & ~torch.isin(targets, self._ignored) if len(self._ignored) else known

    def drawn(self, targets: Tensor) -> Tensor:
        """Label maps for pictures: what does not count is no class."""
        return torch.where(self._known(targets), targets, UNLABELLED)

    def _mean_over_voxels(self, outputs: Tensor, targets: Tensor, known: Tensor) -> Tensor:
        """(B,); of a sample without a known voxel 0.

        Voxels are put in rows: torch's loss of maps has no deterministic form on CUDA.
        """
        settings, rows = self._options.loss, outputs.movedim(1, -1).reshape(-1, self.num_classes)
        flat = torch.where(known, targets.long(), -1).flatten()
        if self._options.name == "focal":
            voxels = losses.focal(rows, flat, self._weights, settings.gamma)
        else:
            voxels = losses.cross_entropy(rows, flat, self._weights, settings.label_smoothing)
        return voxels.view(len(targets), -1).sum(1) / known.flatten(1).sum(1).clamp(min=1)

    def _dice_loss(self, outputs: Tensor, targets: Tensor, known: Tensor) -> Tensor:
        return losses.soft_dice(self.probabilities(outputs), targets, known, self._in_dice)

    def count(self, outputs: Tensor, targets: Tensor) -> Tensor:
        called = outputs.max(1).indices  # as argmax, of volumes on the CPU eight times as fast
        cells = targets.long() * self.num_classes + called
        cells = torch.where(self._known(targets), cells, self.cells)
        return torch.bincount(cells.flatten(), minlength=self.cells + 1)[: self.cells]

    def probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.float().softmax(1)

    def rows(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B, 3 K) float64: voxels of each class that are right, predicted, and true."""
        k, matrices = (
            self.num_classes,
            [self.count(one[None], map[None]) for one, map in zip(outputs, targets, strict=True)],
        )
        if not matrices:
            return outputs.new_empty(0, 3 * k, dtype=torch.float64)
        counts = torch.stack(matrices).view(-1, k, k)
        return torch.cat([counts.diagonal(dim1=1, dim2=2), counts.sum(1), counts.sum(2)], dim=1).double()

    def nothing(self) -> tuple[Tensor, Tensor]:
        return torch.empty(0, 0, dtype=torch.uint8), torch.empty(0, 3 * self.num_classes, dtype=torch.float64)

    def scores(self, cells: np.ndarray, loss: float, samples: int, stored: Stored | None) -> SegmentationScores:
        matrix = np.asarray(cells).reshape(self.num_classes, self.num_classes)
        return SegmentationScores(self.class_names, matrix, loss, samples, self._means, self._dice)

    def check_outputs(self, shape: Sequence[int], inputs_shape: Sequence[int]) -> None:
        if tuple(shape) != (inputs_shape[0], self.num_classes, *inputs_shape[2:]):
            wanted = (self.num_classes, *inputs_shape[2:])
            raise UserError(
                f"it gives scores of shape {tuple(shape[1:])} for a sample, not {wanted}: "
                f"segmentation needs one per class and voxel"
            )


@dataclass(frozen=True)
class SegmentationScores:
    """The metrics of the voxels of all samples together."""

    class_names: Sequence[str]
    matrix: np.ndarray
    """(K, K) voxels [truth, prediction], without those whose truth is ignored."""
    loss: float
    samples: int
    in_iou: Sequence[bool]
    """(K,) whether a class counts in the mean IoU."""
    in_dice: Sequence[bool]
    """(K,) the same of Dice, without the background."""
    task = "segmentation"

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        """Of each class; Dice and IoU are NaN where it is neither there nor predicted."""
        hits, truths, calls = np.diag(self.matrix), self.matrix.sum(1), self.matrix.sum(0)
        both = np.where(truths + calls > 0, truths + calls, np.nan)
        return {
            "precision": measures.ratio(hits, calls),
            "recall": measures.ratio(hits, truths),
            "dice": 2 * hits / both,
            "iou": hits / (both - hits),
        }

    def metrics(self) -> dict[str, float]:
        """Means over the classes that count and are there or predicted; NaN of none."""
        return {
            "dice": measures.mean(self._columns["dice"][list(self.in_dice)]),
            "iou": measures.mean(self._columns["iou"][list(self.in_iou)]),
            "accuracy": measures.share(np.trace(self.matrix), self.matrix.sum()),
            "loss": self.loss,
        }

    @cached_property
    def baseline(self) -> dict[str, float]:
        """Of naming the commonest class for every voxel."""
        support = self.matrix.sum(1)
        constant = np.zeros_like(self.matrix)
        constant[:, support.argmax()] = support
        found = SegmentationScores(self.class_names, constant, 0.0, self.samples, self.in_iou, self.in_dice).metrics()
        del found["loss"]
        return found

    def per_class(self) -> list[dict[str, Any]]:
        """Of each class its voxels (support, predicted), precision, recall, dice and iou."""
        counts = {"support": self.matrix.sum(1), "predicted": self.matrix.sum(0)}
        return table(self.class_names, counts, self._columns)
