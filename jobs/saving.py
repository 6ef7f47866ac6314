"""Saving beside the training: a snapshot is the only stall; one thread writes it, reads it back, deletes older ones."""

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpc import saves
from jobs import checkpoint
from jobs.checkpoint import Snapshot
from jobs.durable import StorageError, storage_error

_LOG = logging.getLogger(__name__)
_MOST_FAILURES = 5
"""Failed saves in a row; then the training ends with StorageError."""
_TRIES = 2


@dataclass
class _Job:
    name: str
    """Of the checkpoint; the snapshot's is that of the next save as soon as it is free again."""
    step: int
    snapshot: Snapshot
    protect: set[str]
    urgent: bool
    began: float
    """By time.monotonic(), when the caller asked."""
    stall: float
    done: bool = False
    error: StorageError | None = None


class Saver:
    """Rank 0's checkpoints of one attempt: at most one is being written and one waits, in two buffers used in turn.

    `fence()` raises when this attempt no longer holds the run; it is asked right before a commit and a deletion.
    `report("checkpoint", step=, name=, seconds=, stall=)` follows each durable one, `report("save-failed", step=,
    reason=)` each try that failed; both come from the writing thread. `keeps(step)` is true of steps to keep for ever.
    One thread calls; the writing thread does not keep the process alive, and may die with it at any point.
    """

    def __init__(
        self,
        folder: Path,
        generation: int,
        *,
        keep: int,
        device: torch.device,
        fence: Callable[[], object],
        report: Callable[..., None],
        keeps: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self._folder, self._generation, self._keep, self._keeps = folder, generation, keep, keeps
        self._fence, self._report = fence, report
        self._changed = threading.Condition()
        self._free = [Snapshot(pinned=device.type == "cuda") for _ in range(2)]
        self._waiting: _Job | None = None
        self._writing: _Job | None = None
        self._newest: _Job | None = None
        self._durable = {path.name for path in checkpoint.newest_first(folder)}
        self._verified: set[str] = set()
        self._protected: set[str] = set()
        self._failures = 0
        self._last: StorageError | None = None
        self._deletes = True
        self._broken: BaseException | None = None
        self._closed = False
        self._seconds: deque[float] = deque(maxlen=100)
        self.failed: set[str] = set()
        """Names given by `save` of checkpoints that never became durable."""
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    # The caller's side.

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Any],
        state: Mapping[str, Any],
        facts: Mapping[str, Any],
        protect: set[str],
        wait: bool = False,
        trained: Mapping[str, Tensor] | None = None,
    ) -> str:
        """Copy everything and return the checkpoint's name; with `wait`, once it is durable.

        `trained`: as for Snapshot.take. `protect`: names that are not to be deleted, nor dropped for a newer one while
        they wait. Raises StorageError when this save failed (with `wait`) or the last five did, and whatever stopped
        the writing thread.
        """
        began, name = time.monotonic(), checkpoint.name_of(self._generation, step)
        with self._changed:
            self._raise()
            if name in self._durable and (self._folder / name).exists():  # else it was set aside by a rollback
                return name
            job = next((job for job in (self._writing, self._waiting) if job and job.name == name), None)
        if job is None:
            snapshot = self._buffer(protect)
            try:
                snapshot.take(self._generation, step, model, optimizer, state, facts, trained)
            except BaseException:
                self._give_back(snapshot)
                raise
            job = _Job(name, step, snapshot, set(protect), wait, began, time.monotonic() - began)
            self._queue(job)
        if wait:
            self._await(job)
        return name

    @property
    def busy(self) -> bool:
        """A save is under way."""
        with self._changed:
            return self._writing is not None or self._waiting is not None

    def wait(self) -> None:
        """Return when no save is under way. Raises as `save` does with `wait`: for the newest save asked for."""
        with self._changed:
            job = self._newest
        if job is not None:
            self._await(job)

    def close(self) -> None:
        """Finish what is under way, deletions too, and end the thread. Raises as `save` does without `wait`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._raise()

    @property
    def slow_s(self) -> float | None:
        """95th percentile of the seconds from the call to the durable checkpoint; None before the first."""
        with self._changed:
            return saves.slow(self._seconds) if self._seconds else None

    def _raise(self) -> None:
        if self._broken is not None:
            raise self._broken
        if self._last is not None and self._failures >= _MOST_FAILURES:
            raise self._last

    def _buffer(self, protect: set[str]) -> Snapshot:
        """A free buffer; when there is none, that of the save that waits, or the next one to be free."""
        with self._changed:
            while not self._free and not self._drop_waiting(protect):
                self._changed.wait()
                self._raise()
            return self._free.pop()

    def _drop_waiting(self, protect: set[str]) -> bool:
        """A newer save takes the place of one that was not begun, unless that one is to be kept."""
        job = self._waiting
        if job is None or job.name in protect or self._keeps(job.step):
            return False
        self._waiting = None
        self._free.append(job.snapshot)
        self.failed.add(job.name)
        return True

    def _queue(self, job: _Job) -> None:
        with self._changed:
            while self._waiting is not None and not self._drop_waiting(job.protect):
                self._changed.wait()
            self._waiting = self._newest = job
            self.failed.discard(job.name)
            self._changed.notify_all()

    def _give_back(self, snapshot: Snapshot) -> None:
        with self._changed:
            self._free.append(snapshot)
            self._changed.notify_all()

    def _await(self, job: _Job) -> None:
        with self._changed:
            job.urgent = True
            while self._broken is None and not job.done:
                self._changed.wait()
            self._raise()
        if job.error is not None:
            raise job.error

    # The writing thread.

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                error = self._write(job)
                self._finish(job, error)
                if error is None:
                    self._lay_out_other(job.snapshot)
                    self._retain(job)
        except BaseException as error:  # the caller's to know, whatever it is
            with self._changed:
                self._broken = error
                self.failed |= {job.name for job in (self._writing, self._waiting) if job}
                self._writing = self._waiting = None
                self._changed.notify_all()

    def _next(self) -> _Job | None:
        with self._changed:
            while self._waiting is None and not self._closed:
                self._changed.wait()
            self._writing, self._waiting = self._waiting, None
            return self._writing

    def _write(self, job: _Job) -> StorageError | None:
        """Twice at most: a fault may pass, and a file whose fsync failed is written anew under another name."""
        error = None
        for attempt in range(_TRIES):
            try:
                job.snapshot.write(self._folder, attempt, self._fence)
            except OSError as reason:
                error = storage_error(f"checkpoint {job.name} not written to {self._folder}", reason)
                again = "; it is tried again at once" if attempt < _TRIES - 1 else ""
                self._report("save-failed", step=job.step, reason=f"{error}{again}")
            else:
                return None
        return error

    def _finish(self, job: _Job, error: StorageError | None) -> None:
        seconds, failures = time.monotonic() - job.began, self._failures
        if error is None:
            took = {"seconds": round(seconds, 3), "stall": round(job.stall, 4)}
            self._report("checkpoint", step=job.step, name=job.name, **took)
            if failures:
                _LOG.warning("checkpoints are written again: %s", job.name)
        elif not failures:  # the first of a streak
            _LOG.warning("%s (training goes on, older checkpoints stay, the next save tries again)", error)
        with self._changed:
            self._writing = None
            self._free.append(job.snapshot)
            job.done, job.error = True, error
            if error is None:
                self._failures = 0
                self._durable.add(job.name)
                self._verified.discard(job.name)
                self._seconds.append(seconds)
            else:
                self._failures, self._last = failures + 1, error
                self.failed.add(job.name)
            self._changed.notify_all()

    def _lay_out_other(self, model: Snapshot) -> None:
        """Make the second buffer's memory beside the training, before it is needed."""
        with self._changed:
            other = next((snapshot for snapshot in self._free if snapshot is not model), None)
            if other is None or len(self._free) < 2:
                return
            self._free.remove(other)
            specs = model.pages.specs
        other.pages.lay_out(specs)
        self._give_back(other)

    def _retain(self, job: _Job) -> None:
        """Read the new one back, then delete what it makes superfluous; put off when a save is awaited."""
        with self._changed:
            # While the best one is not durable, the one before it stays.
            self._protected = job.protect if job.protect <= self._durable else job.protect | self._protected
        try:
            good = checkpoint.readable(self._folder / job.name, self._awaited)
            if self._awaited():
                return
            if not good:
                self._lost(job)
                return
            self._verified.add(job.name)
            checkpoint.prune(
                *(self._folder, self._keep, self._protected, self._keeps),
                verified=self._verified,
                before_delete=self._fence,
                cancelled=self._awaited,
            )
            self._deletes = True
        except OSError as error:
            if self._deletes:  # the first of a streak
                where = f"older checkpoints in {self._folder} are not deleted for now"
                _LOG.warning("%s", storage_error(where, error))
            self._deletes = False

    def _awaited(self) -> bool:
        job = self._waiting
        return job is not None and job.urgent

    def _lost(self, job: _Job) -> None:
        reason = f"{self._folder / job.name} does not read back as it was written; older ones stay"
        with self._changed:
            self._durable.discard(job.name)
            self.failed.add(job.name)
        _LOG.warning("%s", reason)
        self._report("save-failed", step=job.step, reason=reason)


# Space, before the first save.


def estimated_bytes(model: nn.Module, optimizer: Optimizer) -> tuple[int, int]:
    """Of a full checkpoint's two large files: weights, and the optimizer's state once it has some.

    Optimizers with `betas` (Adam, AdamW) keep two values for each trained weight, those with momentum one.
    """
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    moments = 0
    for group in optimizer.param_groups:
        kept = 2 + bool(group.get("amsgrad")) if "betas" in group else int(bool(group.get("momentum")))
        moments += kept * sum(p.numel() * p.element_size() for p in group["params"] if p.requires_grad)
    return weights, moments


def room(folder: Path, *sizes: int) -> None:
    """Raises StorageError unless two checkpoints with files of these sizes fit in. A quota is not seen here."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    status = os.statvfs(there)
    free, needed = status.f_bavail * status.f_frsize, 2 * sum(sizes)
    if free < needed:
        raise StorageError(
            errno.ENOSPC,
            f"{there} has {_size(free)} free, and two checkpoints need {_size(needed)}: free some "
            f"space there, or move the runs to a larger file system",
        )
    limit, largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0], max(sizes)
    if limit != resource.RLIM_INFINITY and limit < largest:
        raise StorageError(
            errno.EFBIG,
            f"a file may have {_size(limit)} here (ulimit -f), and a checkpoint's largest needs "
            f"{_size(largest)}: raise the limit in the profile of your shell, or ask your administrators",
        )


def _size(count: int) -> str:
    """1.2 GB, 340 kB"""
    for unit, word in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {word}"
    return f"{count / 1e3:.0f} kB"
