"""Which samples an epoch is made of, and in which order: a function of (seed, epoch), whatever the ranks.

uniform    each sample once (or `views` times), shuffled or in file order
balanced   each class equally often; of a class no sample comes again before all others of it have come. Samples of
           several labels, and label maps, come in inverse proportion to their rarest class
weighted   each sample in proportion to its weight, rounded up or down and never further off (systematic resampling)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from datasets.layout import VolumeFile
from datasets.order import Stream, epoch_order, philox_bits, random_bits, uniforms

SAMPLERS = ("uniform", "balanced", "weighted")
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """One rank's part of a global batch: (B,) each."""

    samples: Numbers
    """numbers in the volume file"""
    views: Numbers
    """how often the sample has come in this epoch before"""
    places: Numbers
    """in the epoch, over all ranks"""


@dataclass(frozen=True)
class Epoch:
    """All samples of an epoch in order, over all ranks."""

    samples: Numbers
    views: Numbers

    def share(self, step: int, batch_size: int, rank: int, world_size: int) -> Share:
        """This rank's part of global batch `step`: every world_size-th of its batch_size places, beginning at rank."""
        end = min((step + 1) * batch_size, len(self.samples))
        places = np.arange(step * batch_size + rank, max(end, step * batch_size + rank), world_size)
        return Share(self.samples[places], self.views[places], places)


class Sampler(Protocol):
    def draw(self, epoch: int) -> Numbers:
        """Positions in the split, in the order of this epoch."""


@dataclass(frozen=True)
class Uniform:
    seed: int
    count: int
    views: int
    shuffle: bool

    def draw(self, epoch: int) -> Numbers:
        return epoch_order(self.count * self.views, self.seed, epoch, self.shuffle) % self.count


class Balanced:
    """Rounds in which each class comes once; the classes of a last, shorter round take turns from epoch to epoch."""

    def __init__(self, seed: int, labels: Numbers, total: int) -> None:
        """`labels` (n,) class of each sample of the split; `total` samples make an epoch."""
        self._seed, self._total = seed, total
        order = np.argsort(labels, kind="stable")
        self._members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)

    def draw(self, epoch: int) -> Numbers:
        count = len(self._members)
        full, rest = divmod(self._total, count)
        first = epoch * rest
        bits = random_bits(self._seed, epoch, Stream.SAMPLER, (full + 1) * count).reshape(full + 1, count)
        rounds = np.argsort(bits[:full], axis=1, kind="stable").ravel()
        last = (first + np.argsort(bits[full, :rest], kind="stable")) % count
        classes = np.concatenate([rounds, last])
        by_class = np.split(np.argsort(classes, kind="stable"), np.cumsum(np.bincount(classes, minlength=count))[:-1])
        drawn = np.empty(self._total, np.int64)
        for label, places in enumerate(by_class):
            before = epoch * full + (first - label + count - 1) // count
            drawn[places] = self._of_class(label, before, len(places))
        return drawn

    def _of_class(self, label: int, before: int, number: int) -> Numbers:
        """The next `number` of a class of which `before` were drawn in earlier epochs, permutation by permutation."""
        members = self._members[label]
        size = len(members)
        cycles = range(before // size, -(-(before + number) // size))
        blocks = -(-size // 4)  # each counter gives 4 numbers
        counter = (cycles.start * blocks, 0, 1 + label, int(Stream.SAMPLER))
        bits = philox_bits((self._seed, 0), counter, len(cycles) * blocks * 4).reshape(len(cycles), blocks * 4)
        drawn = members[np.argsort(bits[:, :size], axis=1, kind="stable")].ravel()
        skipped = before - cycles.start * size
        return drawn[skipped : skipped + number]


@dataclass(frozen=True)
class Weighted:
    """Systematic resampling (Kitagawa, Journal of Computational and Graphical Statistics 5, 1996)."""

    seed: int
    weights: NDArray[np.float64]
    total: int

    def draw(self, epoch: int) -> Numbers:
        order = epoch_order(len(self.weights), self.seed, epoch, shuffle=True)
        edges = np.cumsum(self.weights[order])
        edges = edges / edges[-1] * self.total
        ticks = np.arange(self.total) + uniforms(self.seed, epoch, Stream.SAMPLER, 1)[0]
        drawn: Numbers = order[np.searchsorted(edges, ticks, side="right")]
        return drawn[np.argsort(random_bits(self.seed, epoch, Stream.SAMPLER, self.total, sample=1), kind="stable")]


def draw_epoch(sampler: Sampler, samples: Numbers, epoch: int) -> Epoch:
    """`samples` are the split's numbers in the volume file."""
    drawn = sampler.draw(epoch)
    return Epoch(samples[drawn], count_before(drawn))


def count_before(drawn: Numbers) -> Numbers:
    """For each entry, how many before it are equal."""
    order = np.argsort(drawn, kind="stable")
    new = np.flatnonzero(np.diff(drawn[order], prepend=-1))
    counts = np.diff(new, append=len(drawn))
    before = np.empty(len(drawn), np.int64)
    before[order] = np.arange(len(drawn)) - np.repeat(new, counts)
    return before


def make_sampler(
    name: str, volumes: VolumeFile, samples: Numbers, seed: int, total: int, views: int, weights: Any = None
) -> Sampler:
    """A shuffling sampler by name; `total` samples make an epoch. ValueError for what does not fit the file."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown; use {', '.join(SAMPLERS)}")
    if (weights is not None) != (name == "weighted"):
        raise ValueError(f"sampler {name!r} and weights: weights belong to sampler 'weighted', which needs them")
    if name == "uniform":
        return Uniform(seed, len(samples), views, shuffle=True)
    if name == "weighted":
        return Weighted(seed, _checked(np.asarray(weights, np.float64), volumes, samples), total)
    labels = volumes.labels[samples]
    return Balanced(seed, labels, total) if labels.ndim == 1 else Weighted(seed, rarity(labels), total)


def _checked(weights: NDArray[np.float64], volumes: VolumeFile, samples: Numbers) -> NDArray[np.float64]:
    """Those of the split, of weights for all samples of the file."""
    if weights.shape != (len(volumes),):
        raise ValueError(f"weights have shape {weights.shape}: give one for each of the {len(volumes)} samples")
    own = weights[samples]
    if not np.isfinite(own).all() or (own < 0).any() or not own.any():
        raise ValueError("weights must be finite numbers of 0 or more, and not all 0")
    return own


def rarity(targets: NDArray[Any]) -> NDArray[np.float64]:
    """(n,) weights for (n, K) multi-hot targets: one over the number of samples with the rarest label of each."""
    labels = np.concatenate([targets != 0, ~targets.any(axis=1, keepdims=True)], axis=1)
    weights: NDArray[np.float64] = 1.0 / np.where(labels, labels.sum(axis=0), len(targets)).min(axis=1)
    return weights


def class_weights(volumes: VolumeFile, weights: dict[str, float]) -> NDArray[np.float64]:
    """(N,) sample weights by class name; 1 for classes not named; of several that a sample has, the highest one.

    Raises ValueError.
    """
    unknown: Sequence[str] = [name for name in weights if name not in volumes.class_names]
    if unknown:
        raise ValueError(f"weights: there is no class {unknown[0]!r}; classes are {', '.join(volumes.class_names)}")
    by_class = np.array([weights.get(name, 1.0) for name in volumes.class_names])
    targets = volumes.labels
    own = targets[volumes.indices("train")]
    counts = own.sum(axis=0) if own.ndim > 1 else np.bincount(own, minlength=len(by_class))
    absent = [name for name, count in zip(volumes.class_names, counts.tolist(), strict=True) if not count]
    if idle := [name for name in weights if name in absent]:
        there = ", ".join(name for name in volumes.class_names if name not in absent)
        raise ValueError(f"weights: no training sample is of {', '.join(idle)}; classes with samples are {there}")
    if targets.ndim > 1:
        return np.where(targets.any(axis=1), np.where(targets != 0, by_class, 0.0).max(axis=1), 1.0)
    chosen: NDArray[np.float64] = by_class[targets]
    return chosen
