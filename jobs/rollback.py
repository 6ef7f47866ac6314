"""Going back to a checkpoint of the same run: which one, and what becomes of the newer ones."""

from __future__ import annotations

from pathlib import Path

from jobs import checkpoint
from jobs.checkpoint import Checkpoint, Damaged
from jobs.guards import LossGuard


def choose(folder: Path, guard: LossGuard) -> Checkpoint | None:
    """The newest one from before all that the guard will pass over; else the oldest from before the bad steps."""
    chosen = None
    for path in checkpoint.newest_first(folder):
        try:
            found = checkpoint.verify(path)
        except Damaged:
            continue
        if found.step < guard.first_bad:
            chosen = found
        if found.step <= guard.rollback_target:
            break
    return chosen


def take_back(folder: Path, quarantine: Path, step: int) -> None:
    """Move the checkpoints after `step` to quarantine: a resumed run must not go on from them."""
    newer = [path for path in checkpoint.newest_first(folder) if checkpoint.step_of(path.name) > step]
    for path in newer:
        checkpoint.set_aside(path, quarantine, f"the run went back to step {step}")
