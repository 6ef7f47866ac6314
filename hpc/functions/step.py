"""One rank of a submitted function: `python -u -m hpc.functions.step FOLDER` calls what hpc.launch pickled there.

The files are submitit's (JOB_submitted.pkl, JOB_RANK_result.pkl), and so is `submitit.JobEnvironment()` inside the
function. What a signal does is not: forked children (data loader workers) never checkpoint, TERM without a USR2 is a
preemption too, and a job that SLURM has already requeued or cancelled leaves at once.
"""

from __future__ import annotations

import argparse
import atexit
import multiprocessing.util  # it registers its end here, to come after ours
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from submitit.core.utils import DelayedSubmission, JobPaths, UncompletedJobError, cloudpickle_dump
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE, LocalJobEnvironment
from submitit.slurm.slurm import SlurmJobEnvironment

from hpc import allocation, slurm, trust
from hpc.functions import payload
from hpc.preempt import NOTICE, ExitCode, ignore_stops

_PICKLE_WAIT_S = 60
_NOTICE_S = 180
"""USR2 so close to the time limit, or closer, is its notice: two minutes, and SLURM may be one early."""
_LOOKS = 20
_TERMINATED = 128 + signal.SIGTERM


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hpc.functions.step", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--path", default="", help="folders of the submitter's sys.path, parted by colons")
    options = parser.parse_args()
    sys.path += [folder for folder in options.path.split(os.pathsep) if folder and folder not in sys.path]
    local = allocation.job_id() is None
    os.environ["SUBMITIT_EXECUTOR"] = "local" if local else "slurm"
    os.environ["SUBMITIT_FOLDER"] = str(options.folder)
    environment = LocalJobEnvironment() if local else SlurmJobEnvironment()
    return call(environment.paths, local)


def call(paths: JobPaths, local: bool) -> int:
    """Call the function of `paths` and write its result, or its traceback; the exit code."""
    start = time.time()
    paths.result_pickle.unlink(missing_ok=True)  # of an attempt that SLURM took back
    stops: Stops | None = None
    try:
        submission = _load(paths)
        stops = Stops(submission, paths, local, start).install()
        outcome = ("success", submission.result())
    except trust.Untrusted as fault:
        outcome = ("error", str(fault))
    except Exception:
        outcome = ("error", traceback.format_exc())
        if stops and stops.told:  # a child that SLURM ended, say: no error of the function
            print(outcome[1], file=sys.stderr)
            stops.leave()
    if stops:
        stops.done = True
    try:
        dump(outcome, paths.result_pickle)
    except Exception:  # no result that can be pickled, or no space for it
        outcome = ("error", traceback.format_exc())
        dump(outcome, paths.result_pickle)
    if outcome[0] == "success":
        return ExitCode.DONE
    print(outcome[1], file=sys.stderr)
    return ExitCode.CRASH


def _kill_workers() -> None:
    """Before multiprocessing's own end, which sends them TERM, to which they are deaf, and waits for them."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def dump(value: Any, path: Path) -> None:
    """Pickle written aside and renamed: a kill in the middle leaves what was there before."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with trust.private():
            cloudpickle_dump(value, aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _load(paths: JobPaths) -> DelayedSubmission:
    """The submission; it gets its name only when sbatch has said the job's."""
    end = time.monotonic() + _PICKLE_WAIT_S
    while (submission := payload.load(paths)) is None:
        if time.monotonic() > end:
            raise UncompletedJobError(
                f"no pickle of job {paths.job_id} in {paths.folder} within {_PICKLE_WAIT_S} s: "
                f"its submission was broken off"
            )
        time.sleep(0.05)
    return submission


class Stops:
    """What USR2 and TERM do to the function; rank 0 decides for all, as submitit has it."""

    def __init__(self, submission: DelayedSubmission, paths: JobPaths, local: bool, start: float) -> None:
        self._submission, self._paths, self._local, self._start = submission, paths, local, start
        function = submission.function
        self._saves = hasattr(function, "__submitit_checkpoint__") or hasattr(function, "checkpoint")
        self.done = False
        """Once set, no signal changes anything."""
        self.told = False
        """By TERM, on SLURM: this attempt will not be left to its end."""

    def install(self) -> Stops:
        signal.signal(NOTICE, self._notice)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored until here, and so by what it would execute
        signal.signal(signal.SIGTERM, self._terminate_here if self._local else self._terminate)
        atexit.register(_kill_workers)
        os.register_at_fork(after_in_child=_end_at_term if self._local else ignore_stops)
        return self

    def _notice(self, number: int, frame: FrameType | None) -> None:
        """The time limit is near, or the cluster tells of a preemption so. A function that cannot save goes on."""
        if self.done or not self._leads or not self._saves:
            return
        self.done = True
        limit_s = self._submission._timeout_min * 60
        self._save(spent=time.time() - self._start >= limit_s - _NOTICE_S)
        self._come_again()

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        """Preempted or cancelled. A function that cannot save may use what grace there is."""
        self.told = True
        if self.done or not self._leads:
            return
        if self._saves:
            self.done = True
            self._save()
            self.leave()
        if _state() not in (None, "RUNNING"):
            sys.exit(_TERMINATED)

    def leave(self) -> NoReturn:
        """End this attempt. In a time of grace the job is RUNNING, and its end is ours; else SLURM has decided."""
        state = _state() if self._leads else ""
        if state == "RUNNING":
            self._come_again()
        while state is None:  # nobody answers: KILL ends this
            signal.pause()
        sys.exit(_TERMINATED)

    def _terminate_here(self, number: int, frame: FrameType | None) -> None:
        if not self.done:
            sys.exit(_TERMINATED)

    @property
    def _leads(self) -> bool:
        return self._paths.task_id == 0

    def _save(self, spent: bool = False) -> None:
        """The submission that checkpoint() returns takes the place of this one. `spent`: one timeout less is left."""
        left = self._submission._timeout_countdown - spent
        if left < 0:
            raise UncompletedJobError("not started again: it has reached its time limit too often (max_num_timeout)")
        again = self._submission._checkpoint_function()
        if again is None:
            raise UncompletedJobError("not started again: checkpoint() returned None")
        again.set_timeout(self._submission._timeout_min, left)
        dump(again, self._paths.submitted_pickle)

    def _come_again(self) -> NoReturn:
        if self._local:
            sys.exit(LOCAL_REQUEUE_RETURN_CODE)
        job = str(allocation.job_id())
        try:
            slurm.requeue(job)
        except slurm.RequeueDisabled as refusal:
            raise UncompletedJobError(f"not started again: {refusal}") from None
        except slurm.SlurmError as error:
            print(f"{error}: left to SLURM", file=sys.stderr)
        sys.exit(_TERMINATED)


def _state() -> str | None:
    """This job's state, RUNNING in a time of grace; None when nobody answers."""
    job, state = str(allocation.job_id()), None
    for _ in range(_LOOKS):
        try:
            info = slurm.queue([job]).get(job)
            state = info.state if info else None
        except slurm.SlurmError:  # squeue is a process of this step: SLURM's TERM may have ended it, too
            state = None
        if state not in (None, "SIGNALING"):  # so until slurmctld knows that its signal has arrived
            return state
        time.sleep(0.1)
    return "RUNNING" if state else None


def _end_at_term() -> None:
    ignore_stops()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
