"""Label maps to be drawn: of the samples that this rank evaluates some evenly spaced ones, and those of largest loss.

Kept while the evaluation runs, since the maps of a whole split would not fit anywhere: of a volume the one slice with
most label, as the network saw it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MOST = 8
"""of either kind"""
_IGNORED = 255


@dataclass(frozen=True)
class Pictured:
    """image (C, *spatial) float32; truth, found: label maps (*spatial) uint8; of a volume the last axis is 1."""

    sample: int
    loss: float
    image: NDArray[np.float32]
    truth: NDArray[np.uint8]
    found: NDArray[np.uint8]


@dataclass
class Gallery:
    """Of one evaluation on one rank."""

    seen: int = 0
    spread: list[tuple[int, Pictured]] = field(default_factory=list)
    """Position among the samples seen, and sample: every `step`-th, so that there are never more than 2 MOST."""
    worst: list[Pictured] = field(default_factory=list)
    """The largest losses first, those that are not finite before all."""
    _step: int = 1

    def add(self, samples: Tensor, inputs: Tensor, outputs: Tensor, targets: Tensor, losses: Tensor) -> None:
        """A batch of inputs (B, C, *spatial), logits (B, K, *spatial), label maps (B, *spatial) and losses (B,)."""
        for row, (sample, loss) in enumerate(zip(samples.tolist(), losses.tolist(), strict=True)):
            even, bad = self.seen % self._step == 0, self._is_among_worst(loss)
            if even or bad:
                kept = _cut(sample, loss, inputs[row], outputs[row], targets[row])
                if even:
                    self._spread(kept)
                if bad:
                    self.worst = sorted([*self.worst, kept], key=lambda one: -_badness(one.loss))[:MOST]
            self.seen += 1

    def evenly(self) -> list[Pictured]:
        """At most MOST, first and last of those kept included."""
        if len(self.spread) <= MOST:
            return [kept for _, kept in self.spread]
        return [self.spread[n][1] for n in np.linspace(0, len(self.spread) - 1, MOST).round().astype(int).tolist()]

    def _spread(self, kept: Pictured) -> None:
        self.spread.append((self.seen, kept))
        if len(self.spread) > 2 * MOST:
            self._step *= 2
            self.spread = [one for one in self.spread if one[0] % self._step == 0]

    def _is_among_worst(self, loss: float) -> bool:
        return len(self.worst) < MOST or _badness(loss) > _badness(self.worst[-1].loss)


def _badness(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _cut(sample: int, loss: float, image: Tensor, logits: Tensor, truth: Tensor) -> Pictured:
    found = logits.argmax(0)
    if truth.ndim == 3:
        known = (truth > 0) & (truth != _IGNORED)
        labelled = known if bool(known.any()) else found > 0
        at = int(labelled.sum((0, 1)).argmax()) if bool(labelled.any()) else truth.shape[2] // 2
        image, truth, found = (part[..., at : at + 1] for part in (image, truth, found))
    return Pictured(sample, loss, image.float().cpu().numpy(), truth.byte().cpu().numpy(), found.byte().cpu().numpy())
