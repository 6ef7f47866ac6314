"""Where a run goes on: from which checkpoint, whether all ranks read the same, and whether the data are its own."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from datasets.layout import VolumeFile
from hpc.errors import UserError
from hpc.experiment import Experiment, flatten
from hpc.rundir import ACCEPT_DATA_CHANGE, DATA_CHANGED, RunDir
from jobs import checkpoint
from jobs.checkpoint import Checkpoint, Damaged, StorageError
from jobs.engine import Engine
from jobs.guards import LossGuard
from jobs.saving import room

_LOG = logging.getLogger(__name__)
_HOW = re.compile(
    r"(name|launch|data\.(file|threads|stage|verify)"
    r"|train\.(device|precision|channels_last|compile|autotune|strategy|zero|deterministic|virtual_ranks"
    r"|checkpoint_every|keep|keep_every|hang_after|profile|figures|stage_logs|ledger))(\.|$)"
)


def agree(engine: Engine, folder: Path, found: Checkpoint | None) -> None:
    """Raises StorageError on all ranks where they have read different ones, as a node with an old listing does."""
    position = [int(found.manifest["generation"]), found.step] if found else [-1, -1]
    if not engine.same(position):
        mine = found.name if found else "none"
        where = f"rank {engine.rank} on {engine.allocation.node} reads {mine} in {folder}"
        raise StorageError(errno.ESTALE, f"the ranks do not see the same checkpoint: {where}")


def refuse_fresh(run: RunDir, found: Checkpoint | None) -> None:
    """Raises Damaged where a run has saved before and nothing is left of it, as after a purge of a scratch folder."""
    if found is None and (saved := run.saved_step()) is not None:
        raise Damaged(
            f"{run.name} has saved step {saved}, and {run.checkpoints} is empty: restore a checkpoint from a "
            f"copy, or start a new run with 'hpc submit'"
        )


def check_room(folder: Path, sizes: Sequence[int], fresh: bool) -> None:
    """Raises StorageError where a new run has no room for checkpoints; one that has saved before goes on.

    sizes: bytes of a checkpoint's large files.
    """
    try:
        room(folder, *sizes)
    except StorageError as error:
        if fresh:
            raise
        _LOG.warning("%s", error)


def identity(experiment: Experiment) -> dict[str, Any]:
    """{dotted key: value} of what a run trains; how it is computed, kept and told may change between two attempts."""
    told = flatten(experiment.as_dict())
    return {key: value for key, value in told.items() if not _HOW.match(key)}


def refuse_another(run: RunDir, own: dict[str, Any], found: Checkpoint | None) -> None:
    """Raises UserError for a checkpoint of another identity than the run's, as one that was copied from another run."""
    saved = found.manifest["experiment"] if found else own
    differing = [key for key in sorted(saved | own) if saved.get(key) != own.get(key)]
    if found and differing:
        first, more = differing[0], f" and {len(differing) - 1} more" if differing[1:] else ""
        raise UserError(
            f"{found.path} was saved by another experiment: its {first} is {saved.get(first)}, not {own.get(first)}"
            f"{more}. Move it away, then 'hpc resume {run.name}'; another experiment is a new run: 'hpc submit'"
        )


def compare_data(run: RunDir, experiment: Experiment, volumes: VolumeFile, found: Checkpoint | None) -> str | None:
    """The fingerprint that the checkpoint's data had, where they are others now and the user has agreed to that.

    Raises UserError where nobody has.
    """
    if found is None or found.manifest["data"] == volumes.fingerprint:
        return None
    before, now = str(found.manifest["data"]), volumes.fingerprint
    events = run.read_events()
    agreed = sum(event["event"] == ACCEPT_DATA_CHANGE for event in events)
    changes = [(event.get("before"), event.get("now")) for event in events if event["event"] == DATA_CHANGED]
    used = [change for change, _ in groupby([*changes, (before, now)])]  # attempts that were killed repeat theirs
    if agreed >= len(used):  # more often than it was made use of: no clock is asked
        return before
    raise UserError(
        f"{experiment.data.file} is not the data that {found.name} was trained on "
        f"(fingerprint {now[:12]}, not {before[:12]}): restore the file, start a new run with 'hpc submit', "
        f"or go on all the same with 'hpc resume {run.name} --accept-data-change'"
    )


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


def needed(folder: Path, guard: LossGuard) -> set[str]:
    """Within a row of bad steps: the checkpoints from before it, one of which a rollback will ask for."""
    if not guard.in_streak:
        return set()
    names = [path.name for path in checkpoint.newest_first(folder)]
    return {name for name in names if checkpoint.step_of(name) < guard.first_bad}


def take_back(folder: Path, quarantine: Path, step: int) -> None:
    """Move the checkpoints after `step` to quarantine: a resumed run must not go on from them."""
    newer = [path for path in checkpoint.newest_first(folder) if checkpoint.step_of(path.name) > step]
    for path in newer:
        checkpoint.set_aside(path, quarantine, f"the run went back to step {step}")
