"""Jobs of a submitted function, as submitit's Job objects: waiting for them needs the result file and squeue only.

A result that succeeded is final. An error is final once the job has ended: a function that SLURM takes down in the
middle may fail of that, and succeeds when SLURM has started the job again.
"""

from __future__ import annotations

import pickletools
import time
from pathlib import Path
from typing import Any

from submitit.core.core import InfoWatcher, Job, R
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.local.local import LocalJob
from submitit.slurm.slurm import SlurmJob

from hpc import slurm, trust
from hpc.attempt import same_process
from hpc.errors import UserError
from hpc.functions import payload
from hpc.rundir import read_json

_GONE = "ENDED"
"""Of a job that the controller has forgotten: it ended more than MinJobAge (300 s) ago."""
_LEFT_RESULT = ("COMPLETED", "FAILED", _GONE)
_FIRST_WAIT_S, _LAST_WAIT_S = 0.02, 1.0


class QueueWatcher(InfoWatcher):
    """One squeue for all jobs of this process, two seconds after a submission and ever more rarely later."""

    def update(self) -> None:
        self._num_calls += 1
        self._last_status_check = time.time()
        try:
            queue = slurm.queue()
        except slurm.SlurmError:
            return  # what was known stands: no answer ends no job
        for job in self._registered - self._finished:
            info = queue.get(job)
            self._info_dict[job] = {"JobID": job, "State": info.state if info else _GONE}
            if info is None or not info.live:
                self._finished.add(job)

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        """SLURM's word, ENDED where it has forgotten the job, UNKNOWN before the first answer."""
        return self.get_info(job_id, mode=mode).get("State", "UNKNOWN")

    def register_job(self, job_id: str) -> None:
        """A new submission: another cluster, or one that counts anew, may have had a job of this number."""
        self._finished.discard(job_id)
        self._info_dict.pop(job_id, None)
        super().register_job(job_id)

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        self.get_info(job_id, mode=mode)
        return job_id in self._finished


def _wait(job: Job[Any]) -> None:
    """Until the job has ended; looks often at first."""
    pause = _FIRST_WAIT_S
    while not job.done():
        time.sleep(pause)
        pause = min(pause * 1.5, _LAST_WAIT_S)


class SlurmFunctionJob(SlurmJob[R]):
    """A function's job on SLURM. No second base class: submitit's batch() turns a DelayedJob into one in place."""

    watcher = QueueWatcher(delay_s=10)  # type: ignore[assignment]  # submitit names its own, which asks sacct

    def done(self, force_check: bool = False) -> bool:
        """Whether a final result is there, or the job has ended without one."""
        if self._sub_jobs:
            return all(job.done(force_check) for job in self._sub_jobs)
        _refresh(self.paths.folder)
        found = outcome(self.paths)
        return found == "success" or self.watcher.is_done(self.job_id, "force" if force_check or found else "standard")

    def wait(self) -> None:
        _wait(self)

    def submission(self) -> DelayedSubmission:
        """What it calls: `function`, `args`, `kwargs`."""
        return _submission(self.paths)

    def _get_outcome_and_result(self) -> tuple[str, Any]:
        # A result may take a while to be seen over a shared file system; a killed job has left none.
        state = self.watcher.get_state(self.job_id, mode="cache")
        self._results_timeout_s = _check_result(self.paths, 15 if state in _LEFT_RESULT else 1)
        return super()._get_outcome_and_result()

    def cancel(self, check: bool = True) -> None:
        """scancel; without `check` a failure of it is no error. Raises UserError with its words."""
        try:
            slurm.cancel(self.job_id)
        except UserError:
            if check:
                raise


class LocalFunctionJob(LocalJob[R]):
    """A function's job here, under hpc.functions.localmap, which writes a result for whatever leaves none."""

    def done(self, force_check: bool = False) -> bool:
        if self._sub_jobs:
            return all(job.done() for job in self._sub_jobs)
        return outcome(self.paths) is not None or not self._controlled

    def wait(self) -> None:
        _wait(self)

    def submission(self) -> DelayedSubmission:
        """What it calls: `function`, `args`, `kwargs`."""
        return _submission(self.paths)

    @property
    def _controlled(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            return False
        controller = read_json(controller_file(self.paths.folder, self.job_id))
        return bool(controller) and same_process(controller["pid"], controller["process_start"])

    def _get_outcome_and_result(self) -> tuple[str, Any]:
        self._results_timeout_s = _check_result(self.paths, 1)
        return super()._get_outcome_and_result()

    def get_info(self, mode: str = "force") -> dict[str, str]:
        if self.done():
            return {"jobState": "FINISHED" if outcome(self.paths) else "INTERRUPTED"}
        return {"jobState": "RUNNING" if self.paths.stdout.exists() else "PENDING"}

    def cancel(self, check: bool = True) -> None:
        """The controller ends it, or never starts it."""
        cancel_mark(self.paths).touch()


def _submission(paths: JobPaths) -> DelayedSubmission:
    """Raises FileNotFoundError where it was removed."""
    found = payload.load(paths)
    if found is None:
        raise FileNotFoundError(f"no pickle of job {paths.job_id} in {paths.folder}")
    return found


def controller_file(folder: Path, job: str) -> Path:
    """Which process is the controller of a local job, or of all tasks of a local array."""
    return folder / f"{job.partition('_')[0]}_controller.json"


def cancel_mark(paths: JobPaths) -> Path:
    """The file that asks hpc.functions.localmap to end a job."""
    return paths.folder / f"{paths.job_id}_cancelled"


def outcome(paths: JobPaths) -> str | None:
    """'success' or 'error' of the result file, read without its value; None while there is none."""
    try:
        with paths.result_pickle.open("rb") as file:
            return next((word for _, word, _ in pickletools.genops(file) if word in ("success", "error")), None)
    except (OSError, ValueError):
        return None


def _check_result(paths: JobPaths, patience_s: float) -> int:
    """Waits for the result, and raises UserError where others may have written it: to unpickle is to run.

    Returns how long submitit is to wait for it then: not at all.
    """
    end = time.monotonic() + patience_s
    while time.monotonic() < end and not paths.result_pickle.exists():
        time.sleep(_LAST_WAIT_S / 4)
        _refresh(paths.folder)
    trust.check(paths.result_pickle)
    return 0


def _refresh(folder: Path) -> None:
    """NFS: a change of the folder's mode makes its listing be read anew, where it is ours to change."""
    try:
        folder.chmod(folder.stat().st_mode)
    except OSError:
        return
