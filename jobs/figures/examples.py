"""Samples with truth and prediction for the pictures: which ones to show, and how they are read from a volume file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from datasets.census import mean_bytes, spacings
from datasets.layout import VolumeFile

_LOG = logging.getLogger(__name__)
MOST, MOST_MAPS = 24, 8
"""samples in one figure of pictures; with label maps"""
MOST_BYTES = 1 << 30
"""read for the pictures of one evaluation; of large volumes there are fewer"""

Predict = Callable[[int], NDArray[np.uint8]]
"""Sample number -> predicted label map, shaped like the sample's own."""


class Stored(Protocol):
    """What an evaluation keeps of each sample, in order of the sample numbers."""

    @property
    def samples(self) -> NDArray[np.int64]: ...
    @property
    def targets(self) -> NDArray[Any] | None: ...
    @property
    def rows(self) -> NDArray[Any]: ...
    @property
    def losses(self) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Example:
    """One sample of any task.

    image: (C, *spatial) as stored. truth: a class number, (K,) of 0 and 1, or a label map (*spatial), 255: ignored.
    prediction: a label map, or None where the probabilities (K,) say it. spacing: mm by axis, for the proportions.
    """

    id: str
    image: NDArray[Any]
    truth: Any
    loss: float
    prediction: NDArray[Any] | None = None
    probabilities: NDArray[Any] | None = None
    spacing: Sequence[float] = (1.0, 1.0, 1.0)
    damaged: str = ""
    """Why there is no picture."""


def worst(stored: Stored, most: int = MOST) -> list[int]:
    """Positions in `stored` of the largest losses, those that are not finite first."""
    losses = np.where(np.isfinite(stored.losses), stored.losses, np.inf)
    return [int(place) for place in np.argsort(-losses, kind="stable")[:most]]


def spread(stored: Stored, num_classes: int, most: int = MOST) -> list[int]:
    """Positions in `stored`: of each class evenly spaced ones; without class numbers evenly spaced ones of all.

    More classes than `most`: one sample of as many of them, evenly spaced. A sample of several labels is shown once.
    """
    targets, total = stored.targets, len(stored.samples)
    if targets is None:
        return [int(place) for place in evenly(np.arange(total), most)]
    groups = [np.flatnonzero(targets == k if targets.ndim == 1 else targets[:, k] > 0) for k in range(num_classes)]
    if targets.ndim == 2:
        groups.append(np.flatnonzero(~(targets > 0).any(axis=1)))
    groups = [group for group in groups if len(group)]
    chosen = evenly(np.arange(len(groups)), most).tolist()
    each = max(most // max(len(chosen), 1), 1)
    picked = [position for number in chosen for position in evenly(groups[number], each).tolist()]
    return list(dict.fromkeys(picked))[:most]


def evenly(items: NDArray[Any], most: int) -> NDArray[Any]:
    """At most `most` of them, first and last included."""
    if len(items) <= most:
        return items
    return np.asarray(items[np.linspace(0, len(items) - 1, most).round().astype(int)])


def affordable(volumes: VolumeFile, most: int) -> int:
    """How many samples may be read for pictures: at least one."""
    return int(np.clip(MOST_BYTES // mean_bytes(volumes), 1, most))


def read_examples(
    volumes: VolumeFile, stored: Stored, positions: Sequence[int], predict: Predict | None = None
) -> list[Example]:
    """The samples at these positions of `stored`, in their order; not more than `affordable`.

    predict: needed for label maps. A sample that cannot be read is an Example that says so.
    """
    most = affordable(volumes, len(positions) or 1)
    try:
        voxels = spacings(volumes)
    except (OSError, ValueError):  # nor will the samples be read
        voxels = np.ones((len(volumes), volumes.spatial_axes))
    return [_read(volumes, stored, position, predict, voxels) for position in positions[:most]]


def _read(
    volumes: VolumeFile, stored: Stored, position: int, predict: Predict | None, voxels: NDArray[np.float64]
) -> Example:
    sample, loss = int(stored.samples[position]), float(stored.losses[position])
    name, spacing = str(volumes.ids[sample]), voxels[sample].tolist()
    maps = volumes.task == "segmentation"
    probabilities = None if maps else np.asarray(stored.rows[position], np.float64)
    truth = stored.targets[position] if stored.targets is not None else None
    try:
        image, target = volumes.read(sample)
        prediction = predict(sample) if maps and predict else None
    except (OSError, ValueError) as error:
        _LOG.warning("no picture of %s: %s", name, error)
        empty = np.zeros((1, *[1] * volumes.spatial_axes), np.uint8)
        return Example(name, empty, truth, loss, None, probabilities, spacing, "cannot be read")
    return Example(name, image, target if maps else truth, loss, prediction, probabilities, spacing)
