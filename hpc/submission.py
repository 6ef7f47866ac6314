"""Submission through submitit: its Slurm and local executors, given our batch text instead of their own.

An experiment's run carries no pickle: the job object is made from our script by submitit's `_submit_command`, and its
`result()` reads result.json. Plain `sbatch job.sbatch` or `bash job.sbatch` is exactly the same run. Sweeps:
hpc/arrays.py.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError
from submitit.local.local import LocalExecutor, LocalJob
from submitit.slurm.slurm import SlurmExecutor, SlurmJob

from hpc import badnodes, slurm
from hpc.attempt import record_submission
from hpc.errors import UserError
from hpc.rundir import RunDir, read_json
from hpc.sweepdir import alone

_SLOW = re.compile("timed out|no answer|communication", re.I)
_LATE_S, _LOOK_S = 20.0, 1.0
_NO_LIMIT_MIN = 60 * 24 * 3650  # hpc.localstep keeps the time limit: it starts afresh with every attempt


class Refused(UserError):
    """Nothing was submitted, for certain: what was made for it may be removed."""


class _Result:
    """`result()` of a run: result.json; RunDir is the parent of submitit's log folder."""

    paths: Any

    def result(self) -> dict[str, Any]:
        """The run's result once its job has ended. Raises submitit's UncompletedJobError when it left none."""
        self.wait()
        run = RunDir(self.paths.folder.parent)
        result = read_json(run.result)
        if not result:
            raise UncompletedJobError(f"{run.name} left no result; its output is in {run.logs}")
        return result

    def wait(self) -> None:
        raise NotImplementedError


class SlurmRunJob(_Result, SlurmJob[Any]):
    """A run on SLURM, asked for with squeue: sacct is not there on every cluster."""

    def wait(self) -> None:
        while (info := slurm.queue([self.job_id]).get(self.job_id)) and info.live:
            time.sleep(2)


class LocalRunJob(_Result, LocalJob[Any]):
    def wait(self) -> None:
        while not self.done():
            time.sleep(0.5)


class SlurmRunExecutor(SlurmExecutor):
    """submitit's SLURM executor with a script of ours, and `options` on sbatch's command line."""

    job_class = SlurmRunJob

    def __init__(self, script: Path, logs: Path, token: str, options: Sequence[str] = ()) -> None:
        super().__init__(logs)
        self._script, self._token, self._options = script, token, options

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._script.read_text()

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return slurm.submission(submission_file_path, *self._options)

    def submit_script(self) -> SlurmRunJob:
        """sbatch the script. A failed sbatch may have submitted: the token (--comment) tells.

        Raises Refused, or UserError where SLURM is silent.
        """
        told = io.StringIO()  # submitit prints what sbatch says
        try:
            with _environment(slurm.environment(self._script)), redirect_stderr(told):
                job = self._submit_command("").job_id
        except (FailedJobError, FailedSubmissionError) as error:
            said = told.getvalue().strip() or str(error).strip().splitlines()[-1]
            job = self._found("; ".join(line.removeprefix("sbatch: error: ") for line in said.splitlines()))
        return SlurmRunJob(self.folder, job, [0])

    def _found(self, words: str) -> str:
        try:
            found = find_submitted(self._token, words)
        except slurm.SlurmError as doubt:
            name = self._token.split("/")[0]
            raise UserError(
                f"sbatch failed ({words}) and may have submitted all the same ({doubt}); when SLURM answers again, "
                f"'hpc ls' shows whether {name} is in the queue, and 'hpc resume {name}' submits it if it is not"
            ) from None
        if found is None:
            raise Refused(f"sbatch refused {self._script}: {words}")
        return found


def find_submitted(token: str, words: str) -> str | None:
    """The job (of an array the whole) that an sbatch with these last `words` has submitted all the same; None: none.

    A controller that was too slow to answer may be at it still: it is given a while. Raises SlurmError in doubt.
    """
    end = time.monotonic() + _LATE_S
    while True:
        found = slurm.find_by_comment(token)
        if found or not _SLOW.search(words):
            return found.partition("_")[0] if found else None
        if time.monotonic() > end:
            raise slurm.SilentError("it is not in the queue yet")
        time.sleep(_LOOK_S)


class LocalRunExecutor(LocalExecutor):
    """submitit's local executor with a command of ours."""

    def __init__(self, command: Sequence[str], logs: Path) -> None:
        super().__init__(logs)
        self._command = command
        self.update_parameters(timeout_min=_NO_LIMIT_MIN, signal_delay_s=0)

    def submit_script(self) -> LocalRunJob:
        """Start the command in the background; it outlives this process and its terminal."""
        # submitit would hide the GPUs that are visible here.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = ["-u", "CUDA_VISIBLE_DEVICES"] if visible is None else [f"CUDA_VISIBLE_DEVICES={visible}"]
        hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as by nohup
        try:
            environ = {**os.environ, "HPC_STEP": "local"}
            with _environment(environ), _output_to(Path(self.folder) / "local_controller_log.out"):
                job: LocalJob[Any] = self._submit_command(shlex.join(["env", *gpus, *self._command]))
        finally:
            signal.signal(signal.SIGHUP, hangup)
        return LocalRunJob(self.folder, job.job_id, [0], process=job._process)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Exactly `values` as the environment meanwhile: submitit's executors start their commands with os.environ."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """No stdin, stdout and stderr to a file meanwhile: a pipe inherited by submitit's controller would stay open."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in range(3)]
    with Path(os.devnull).open() as nothing, path.open("a") as log:
        for number, file in enumerate((nothing, log, log)):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, copy in enumerate(kept):
            os.dup2(copy, number)
            os.close(copy)


def submit(run: RunDir, cluster: str, after: Sequence[str] = ()) -> SlurmRunJob | LocalRunJob:
    """Submit a run's script to 'slurm' or 'local' and record the job in submit.json. Raises UserError.

    `after`: what must be finished before, as `hpc.after` gives it for this cluster.
    """
    single = alone(run)
    check_place(run.path.parent if run.in_sweep else run.path, single.script)
    run.logs.mkdir(exist_ok=True)
    if cluster == "local":
        index = [] if single.index is None else [f"HPC_ARRAY_TASK_ID={single.index}"]
        local = _local([*index, "bash", str(single.script)], run.logs, after)
        record_submission(run, cluster, local.job_id)
        return local
    options = [*after, *badnodes.exclusion(run.runs), *single.options]
    job = SlurmRunExecutor(single.script, run.logs, single.token, options).submit_script()
    record_submission(run, cluster, single.job(job.job_id))
    return job


def _local(command: list[str], logs: Path, after: Sequence[str]) -> LocalRunJob:
    if after:
        command = [sys.executable, "-m", "hpc.after", *after, "--", "env", *command]
    return LocalRunExecutor(command, logs).submit_script()


def check_place(place: Path, script: Path) -> None:
    """A script names its folder, and would feed the one from which this was moved or copied. Raises UserError."""
    output = re.search("^#SBATCH --output=(.+_log[.]out.*)$", script.read_text(), re.M)
    logs = "".join(shlex.split(output[1])).replace("%%", "%") if output else None
    if logs and Path(logs).parent.parent != place:
        raise UserError(
            f"{place} was moved or copied, and {script.name} still runs where it was made: move it back to resume it, "
            f"or submit its experiment.yaml anew"
        )


def choose_cluster(wanted: str) -> str:
    """'slurm' or 'local'; auto is SLURM where there is one. Raises UserError where it is wanted and does not answer.

    A SLURM that is silent for a moment is no reason to train on its login node.
    """
    if wanted == "local":
        return wanted
    try:
        there = slurm.available()
    except slurm.SlurmError as silence:
        raise UserError(
            f"SLURM is here, but does not answer ({silence}): try again, or run on this machine: launch.cluster=local"
        ) from None
    if wanted == "slurm" and not there:
        raise UserError("launch.cluster is slurm, but there is no SLURM on this machine; use auto or local")
    return "slurm" if there else "local"
