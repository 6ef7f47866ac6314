"""From `train.loss` and the training split to the numbers that a task is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from datasets.census import balanced_weights, positive_weights
from datasets.layout import VolumeFile
from datasets.reading import Reader
from hpc.errors import UserError, nearest
from hpc.experiment import Experiment
from hpc.training import Loss

_BLOCK = 1 << 20
"""voxels that are counted at once: bincount makes 8 bytes of each"""


@dataclass(frozen=True)
class Options:
    """A loss with its weights resolved."""

    class_names: tuple[str, ...]
    loss: Loss
    name: str
    """That of the loss, the task's default where `train.loss` has none."""
    class_weights: tuple[float, ...] | None = None
    """(K,)"""
    positive: tuple[float, ...] | None = None
    """(K,) weight of the positive term of each label."""
    negative: tuple[float, ...] | None = None
    """(K,) weight of the negative term of each label."""
    ignored: tuple[int, ...] = ()
    """Class numbers that neither loss nor metrics look at."""


def check_loss(experiment: Experiment, volumes: VolumeFile) -> None:
    """Whether `train.loss` fits the classes of the file, of which no sample is read. Raises ValueError or UserError."""
    loss, names = experiment.train.loss, volumes.class_names
    for key in ("class_weights", "pos_weight"):
        given = getattr(loss, key)
        if isinstance(given, list) and len(given) != len(names):
            raise ValueError(f"train.loss.{key} has {len(given)} weights, but the data has {len(names)} classes")
    for name in loss.ignore:
        if name not in names:
            raise UserError(f"train.loss.ignore: there is no class {name!r}; {nearest(name, names)}")
    if volumes.task == "segmentation" and len(set(names) - set(loss.ignore)) < 2:
        less = f", and train.loss.ignore leaves out {', '.join(loss.ignore)}" if loss.ignore else ""
        raise UserError(f"a segmentation needs two classes or more; {volumes.name} has {', '.join(names)}{less}")


def make_options(experiment: Experiment, volumes: VolumeFile) -> Options:
    """Balanced weights are counted in the training split."""
    loss, names = experiment.train.loss, tuple(volumes.class_names)
    ignored = tuple(names.index(name) for name in loss.ignore)
    weights = class_weights(loss, lambda: training_counts(volumes, ignored))
    name = loss.of_task(experiment.task)
    positive = negative = None
    if experiment.task == "multilabel":
        positive, negative = label_weights(loss, name, volumes)
    return Options(names, loss, name, weights, positive, negative, ignored)


def class_weights(loss: Loss, count: Callable[[], Sequence[int]]) -> tuple[float, ...] | None:
    """One weight per class, or None. balanced: N / (K * count), as scikit-learn has it; 0 for a class without any."""
    if loss.class_weights == "balanced":
        return tuple(balanced_weights(count()))
    return None if loss.class_weights is None else tuple(map(float, loss.class_weights))


def label_weights(
    loss: Loss, name: str, volumes: VolumeFile
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """(K,) weights of the positive and of the negative term of each label, or None.

    weighted_bce weighs both by the inverse of how often they occur, so that their mean over the samples is 1.
    """
    if name == "weighted_bce":
        has = training_counts(volumes)
        both = [balanced_weights([len(volumes.indices("train")) - count, count]) for count in has]
        return tuple(pair[1] for pair in both), tuple(pair[0] for pair in both)
    if loss.pos_weight == "balanced":
        return tuple(positive_weights(training_counts(volumes), len(volumes.indices("train")))), None
    return None if loss.pos_weight is None else tuple(map(float, loss.pos_weight)), None


def training_counts(volumes: VolumeFile, ignored: Sequence[int] = ()) -> list[int]:
    """Of each class: samples of the training split that have it; of label maps its voxels there, each map read once."""
    train, num = volumes.indices("train"), len(volumes.class_names)
    if volumes.task == "segmentation":
        counts = _voxels(volumes, train.tolist())[:num]
        counts[list(ignored)] = 0
    elif volumes.task == "multilabel":
        counts = volumes.targets[train].sum(axis=0, dtype=np.int64)
    else:
        counts = np.bincount(volumes.targets[train], minlength=num)
    found: list[int] = counts.tolist()
    return found


def _voxels(volumes: VolumeFile, samples: Sequence[int]) -> np.ndarray:
    """(256,) voxels of each value."""
    counts, largest = np.zeros(256, np.int64), max(math.prod(volumes.sample_shape(sample)[1:]) for sample in samples)
    buffer = np.empty(largest, np.uint8)
    with Reader(volumes) as reader:
        for sample in samples:
            voxels = buffer[: math.prod(volumes.sample_shape(sample)[1:])]
            reader.read_map(sample, voxels.data)
            for start in range(0, len(voxels), _BLOCK):
                counts += np.bincount(voxels[start : start + _BLOCK], minlength=256)
    return counts
