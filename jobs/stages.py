"""The stages of a run: which one a step belongs to, and where each begins."""

from __future__ import annotations

from itertools import accumulate

from hpc.optimisation import Stage
from hpc.training import Train


class Stages:
    """Stages are numbered from 0; a run without any in its file is one."""

    def __init__(self, train: Train, steps_per_epoch: int) -> None:
        self._stages = train.stages or [Stage(epochs=train.epochs)]
        self._per_epoch = steps_per_epoch
        self._ends = list(accumulate(stage.epochs for stage in self._stages))
        self.named = bool(train.stages)
        """Whether the file has them."""

    def __len__(self) -> int:
        return len(self._stages)

    def __getitem__(self, number: int) -> Stage:
        return self._stages[number]

    @property
    def total_steps(self) -> int:
        return self._ends[-1] * self._per_epoch

    def at(self, step: int) -> int:
        """The stage of the step that comes after `step` others; the last one at the end of the run."""
        ended = sum(end * self._per_epoch <= step for end in self._ends)
        return min(ended, len(self) - 1)

    def first_epoch(self, number: int) -> int:
        """Epochs done before the stage begins."""
        return self._ends[number] - self._stages[number].epochs

    def first_step(self, number: int) -> int:
        """Steps done before the stage begins."""
        return self.first_epoch(number) * self._per_epoch

    def steps(self, number: int) -> int:
        """Of the stage itself."""
        return self._stages[number].epochs * self._per_epoch

    def where(self, number: int) -> str:
        """Its place in the experiment's file, for messages."""
        return f"train.stages.{number}" if self.named else "train"
