"""What a run does about a loss that is not finite, and how a spike of the loss is seen: decisions only, no tensors.

Step numbers are those of the checkpoints: step s leads from s - 1 steps done to s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any

IN_A_ROW = 5
"""Bad steps in a row that make a run go back to a checkpoint."""
ROLLBACKS = 2


class Verdict(Enum):
    """What becomes of a step."""

    OK = "ok"
    SKIP = "skip"
    """No optimizer step; the run goes on with the next batch."""
    ROLL_BACK = "roll back"
    STOP = "stop"


class LossGuard:
    """Decides on each step by one flag that all ranks agreed on, so that all ranks decide the same.

    A bad step (loss or gradient norm not finite on any rank) is skipped. The fifth in a row rolls the run back, the
    third such row ends it. Training is a function of the step, so a replay would meet the same steps with the same
    weights: a rollback therefore passes over the bad steps and as many good ones before them as were bad, twice as
    many at the second (PaLM, arXiv 2204.02311, section 5.1, skips the batches before and during a spike).

    To roll back: load the newest checkpoint at or before `rollback_target` (else the oldest one before the bad steps),
    keep this guard rather than the one stored there, and call `roll_back(its step)`. A newer checkpoint would cut the
    good steps off, and where a run goes would depend on when it happened to save.
    """

    def __init__(self) -> None:
        self._skipped: set[int] = set()
        self._rollbacks = 0
        self._streak: list[int] = []

    @staticmethod
    def from_state(state: dict[str, Any]) -> LossGuard:
        """A guard as it was when `state()` was stored; a new one from {}."""
        guard = LossGuard()
        guard._skipped = set(state.get("skipped", []))
        guard._rollbacks = int(state.get("rollbacks", 0))
        guard._streak = list(state.get("streak", []))
        return guard

    def state(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint."""
        return {"skipped": sorted(self._skipped), "rollbacks": self._rollbacks, "streak": list(self._streak)}

    def skipped(self, step: int) -> bool:
        """Whether this step is passed over without being computed; no verdict is asked for then."""
        return step in self._skipped

    def verdict(self, step: int, bad: bool) -> Verdict:
        """What becomes of a step that was computed; `bad` as agreed by all ranks."""
        if not bad or (self._streak and step != self._streak[-1] + 1):  # a step that is passed over ends a row, too
            self._streak = []
        if not bad:
            return Verdict.OK
        self._streak.append(step)
        if len(self._streak) < IN_A_ROW:
            return Verdict.SKIP
        return Verdict.ROLL_BACK if self._rollbacks < ROLLBACKS else Verdict.STOP

    @property
    def in_streak(self) -> bool:
        """Whether the last step was bad: the weights may be, too."""
        return bool(self._streak)

    @property
    def first_bad(self) -> int:
        """The first of the bad steps in a row. Raises ValueError when no step was bad."""
        if not self._streak:
            raise ValueError("no bad step to go back from")
        return self._streak[0]

    @property
    def rollback_target(self) -> int:
        """The step to go back to: a checkpoint at or before it contains none of the steps to be passed over.

        Raises ValueError when no step was bad.
        """
        return self._to_pass_over()[0] - 1

    def _to_pass_over(self) -> list[int]:
        """The bad steps and the good ones before them, in order."""
        chosen = list(range(self.first_bad, self._streak[-1] + 1))
        wanted = len(self._streak) * (1 + 2**self._rollbacks)
        while len(chosen) < wanted and chosen[0] > 1:
            chosen.insert(0, chosen[0] - 1)
            if self.skipped(chosen[0]):  # passed over already: neither good nor bad
                wanted += 1
        return chosen

    def roll_back(self, checkpoint_step: int) -> list[int]:
        """Count a rollback to this checkpoint: the steps that are newly passed over, all of them after it."""
        new = [step for step in self._to_pass_over() if step > checkpoint_step and not self.skipped(step)]
        self._skipped.update(new)
        self._rollbacks += 1
        self._streak = []
        return new

    def reason(self, samples: Sequence[str] = ()) -> str:
        """Why the run stops, and what to try, in one line; `samples` are the ids of the bad steps' samples."""
        line = f"the loss or the gradient was not finite at {_steps(self._streak)}"
        if self._rollbacks:
            times = "1 rollback" if self._rollbacks == 1 else f"{self._rollbacks} rollbacks"
            line += f", after {times} that passed over {_steps(sorted(self._skipped))}"
        look = f", or look at the samples {_some(samples)}" if samples else ", or look at the samples of these steps"
        return f"{line}: lower train.optimizer.lr, set train.clip_norm, use train.precision=fp32{look}"


def _steps(steps: Sequence[int]) -> str:
    """'step 7', 'steps 7-9 and 12'."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return f"step{'s' * (len(steps) != 1)} {' and '.join(filter(None, [', '.join(texts[:-1]), *texts[-1:]]))}"


def _some(names: Sequence[str], most: int = 20) -> str:
    listed = ", ".join(names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


class SpikeDetector:
    """Tells a loss that is far above the last ones: a spike is reported, and changes nothing.

    Far is `sigma` standard deviations above the mean of the last `window` losses (OLMo-core's SkipStepOptimizer), and
    twice as far above the mean as any of them: losses of small batches have a heavy tail, in which 6 sigma are common.
    Spikes do not enter the window, unless LEAST of them follow each other: that is a new level.
    """

    LEAST = 32
    """Losses before which nothing is told."""
    _FLOOR = 1e-3
    """Of the mean: what a loss that hardly moves may rise by, in standard deviations."""

    def __init__(self, window: int = 128, sigma: float = 6) -> None:
        if window < self.LEAST:
            raise ValueError(f"a window of {window} losses is too short: at least {self.LEAST}")
        self._window, self._sigma = window, sigma
        self._losses: list[tuple[int, float]] = []
        self._spikes: list[tuple[int, float]] = []

    @staticmethod
    def from_state(state: dict[str, Any], window: int = 128, sigma: float = 6) -> SpikeDetector:
        """A detector as it was when `state()` was stored; a new one from {}."""
        detector = SpikeDetector(window, sigma)
        detector._losses = [(int(step), float(loss)) for step, loss in state.get("losses", [])]
        detector._spikes = [(int(step), float(loss)) for step, loss in state.get("spikes", [])]
        return detector

    def state(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint; floats come back bit by bit."""
        return {"losses": [list(pair) for pair in self._losses], "spikes": [list(pair) for pair in self._spikes]}

    def seen(self, step: int, loss: float) -> bool:
        """Whether the loss of this step is a spike. A step that is done again takes back what followed it.

        After a rollback go on with the detector that the checkpoint holds: of this one's window the oldest are gone.
        A loss that is not finite is LossGuard's: it is no spike, and does not enter the window.
        """
        for seen in (self._losses, self._spikes):
            while seen and seen[-1][0] >= step:
                seen.pop()
        if not math.isfinite(loss):
            return False
        spike = len(self._losses) >= self.LEAST and loss > self._highest()
        if not spike:
            self._spikes = []
            self._losses = [*self._losses, (step, loss)][-self._window :]
            return False
        self._spikes.append((step, loss))
        if len(self._spikes) >= self.LEAST:
            self._losses, self._spikes = self._spikes, []
        return True

    def _highest(self) -> float:
        """The loss above which a spike begins."""
        losses = [loss for _, loss in self._losses]
        mean = math.fsum(losses) / len(losses)
        deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1))
        far = self._sigma * max(deviation, self._FLOOR * abs(mean))
        return mean + max(far, 2 * (max(losses) - mean))
