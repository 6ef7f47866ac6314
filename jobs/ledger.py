"""One rank's side of the step ledger (hpc/stepledger.py): a line per step, in the run folder at once."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from datasets.loader import Batch
from hpc import stepledger
from hpc.rundir import RunDir

_LOG = logging.getLogger(__name__)
_WEIGHTS_EVERY = 10


class StepLedger:
    """Lines reach the kernel one by one, so a killed process loses none of them; they are not fsync'd."""

    def __init__(self, run: RunDir, generation: int, rank: int, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """`weights` are those that are trained; all ranks ask for them together, and some may get none."""
        run.ledger.mkdir(exist_ok=True)
        self._file = stepledger.path(run, generation, rank).open("ab", buffering=0)
        self._weights_now, self._rank = weights, rank
        self._refused = False

    def write(self, step: int, batch: Batch, loss: float, skipped: bool) -> None:
        """What this rank did at `step`; `loss` is its sum over the rank's samples."""
        sums = [_crc(pixels) for pixels in batch.inputs]
        weights = None
        # Right after a rollback the others have rank 0's statistics, later, where a step is skipped, their own.
        now = self._weights_now() if step % _WEIGHTS_EVERY == 0 else {}
        if now and not (skipped and self._rank):
            weights = 0
            for value in now.values():
                weights = _crc(value, weights)
        samples = list(zip(batch.samples.tolist(), sums, strict=True))
        line = stepledger.line(step, samples, loss, weights, skipped)
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:  # a full disk never stops training; the ledger's reader sees the gap
            if not self._refused:
                _LOG.warning("steps are missing in the step ledger: %s", error)
            self._refused = True


def _crc(tensor: Tensor, start: int = 0) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), start)
