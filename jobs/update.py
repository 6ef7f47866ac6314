"""One optimizer step: the rate, the gradients, whether they are finite, and the weights' change or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from datasets.loader import Batch
from jobs.passes import Passes
from jobs.precision import Fault
from jobs.strategies import Strategy
from jobs.tasks.counts import Counts

_TINY = 1e-6
"""Beside a norm that is divided by, as torch's clip_grad_norm_ has it."""


class Updater:
    """The step of a run; what it does is a function of the weights, the batch and the step's number."""

    def __init__(
        self,
        strategy: Strategy,
        passes: Passes,
        rates: Callable[[int], Sequence[float]],
        clip_norm: float | None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`rates`: of each of the optimizer's groups; `changed` is called when the weights are those after a step."""
        self._strategy, self._passes = strategy, passes
        self._rates, self._clip_norm, self._changed = rates, clip_norm, changed

    def gradients(self, batch: Batch, step: int) -> tuple[Counts, Fault]:
        """The gradients of the step after `step` others, and whether a loss or they are not finite on this rank."""
        for group, rate in zip(self._strategy.optimizer.param_groups, self._rates(step), strict=True):
            group["lr"] = rate
        counts = self._passes.backward(batch, step)
        precision = self._passes.precision
        with self._passes.clock.phase("optimizer"):
            precision.unscale(self._strategy.gradients(), step + 1)
            norm = self._norm()  # of all ranks together, even where this rank's loss says enough
        return counts, precision.fault(counts.total_loss(), norm)

    def apply(self) -> None:
        """Change the weights."""
        with self._passes.clock.phase("optimizer"):
            self._strategy.step()
            self._passes.commit()
            self._passes.precision.update(overflow=False)
            self._changed()

    def drop(self, overflow: bool = False) -> None:
        """Leave the weights as they were before the step, and running statistics too; an overflow lowers the scale."""
        self._strategy.drop()
        self._passes.drop()
        if overflow:
            self._passes.precision.update(overflow)

    def _norm(self) -> float:
        """The norm of all gradients, before they are clipped to clip_norm; the same on all ranks."""
        norm = self._strategy.norm()
        if self._clip_norm is not None and norm > self._clip_norm - _TINY:
            self._strategy.scale_gradients(self._clip_norm / (norm + _TINY))
        return norm
