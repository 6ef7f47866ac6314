"""Which samples a run tells of: those of a step that is not finite, and bad ones that others were taken for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

import torch

from datasets import Loader
from datasets.layout import VolumeFile
from datasets.loader import Batch
from hpc.rundir import RunDir
from jobs.engine import Engine

_LOG = logging.getLogger(__name__)
FEW = 20
"""Names of samples in one record."""


class SampleEvents:
    """One rank's words about samples, in its own file of events."""

    def __init__(self, run: RunDir, engine: Engine, volumes: VolumeFile) -> None:
        self._run, self._engine, self._volumes = run, engine, volumes
        self.replaced = 0
        """bad samples of this rank, in this attempt"""

    def ids(self, batch: Batch) -> list[str]:
        return [str(self._volumes.ids[sample]) for sample in batch.samples.tolist()]

    def skipped(self, step: int, ids: Sequence[str]) -> None:
        """Samples of a step whose loss is not finite on this rank; rank 0 tells the step itself."""
        if ids:
            self._event("skipped", step=step, samples=list(ids)[:FEW])

    def tell_replaced(self, step: int, *loaders: Loader) -> None:
        """Name those that others were taken for."""
        for loader in loaders:
            for sample, reason in loader.skipped:
                self.replaced += 1
                with suppress(OSError):  # the ids are read from the file
                    self._event("bad-sample", step=step, sample=str(self._volumes.ids[sample]), reason=reason)
            loader.skipped.clear()

    def count_replaced(self) -> None:
        """Rank 0 logs how many there were on all ranks; all ranks call it."""
        count = int(self._engine.sum(torch.tensor([self.replaced]))[0])
        if count:
            _LOG.warning("%d bad samples were replaced by others in this attempt", count)

    def _event(self, kind: str, **fields: object) -> None:
        with suppress(OSError):
            self._run.event(kind, f"rank{self._engine.rank}", self._engine.allocation.generation, **fields)
