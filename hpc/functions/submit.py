"""Submission of functions that are pickled already: files and jobs of it are there as a whole, or not at all."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from submitit.core.utils import DelayedSubmission, FailedSubmissionError, JobPaths

from hpc import allocation, slurm, trust
from hpc.arrays import release, take_back
from hpc.attempt import process_start
from hpc.errors import UserError
from hpc.functions import payload
from hpc.functions.job import LocalFunctionJob, SlurmFunctionJob, controller_file
from hpc.instances import Request
from hpc.rundir import write_json
from hpc.submission import find_submitted
from hpc.sweepdir import Chunk


class SubmissionError(UserError, FailedSubmissionError):
    """sbatch refused, or nobody answered: for those who catch ours, and those who catch submitit's."""


class Files:
    """Pickles and scripts of one submission under names of their own until `keep`; without it they are removed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = uuid.uuid4().hex
        self.payloads: list[Path] = []
        self.scripts: list[Path] = []
        self._made: list[Path] = []
        """Folders that were not there before, the innermost first."""
        self._array = self._kept = False

    def __enter__(self) -> Files:
        place = self.folder
        while not place.exists():
            self._made.append(place)
            place = place.parent
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with trust.private():
                self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be made ({error})") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._kept:
            return
        for path in (*self.payloads, *self.scripts):
            path.unlink(missing_ok=True)
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def token(self, chunk: int) -> str:
        """What a chunk's job carries as its --comment."""
        return f"{self.id}/{chunk}"

    def write(self, submissions: Sequence[DelayedSubmission], array: bool, text: str) -> None:
        """Payload and script of one job or one array. Raises UserError."""
        pickled, script = (self.folder / f"{self.id}-{len(self.scripts)}.{kind}" for kind in ("pkl", "sh"))
        self.payloads.append(pickled)
        self.scripts.append(script)
        self._array = array
        try:
            with trust.private():
                script.write_text(text)
                if array:
                    payload.write_array(pickled, submissions)
                else:
                    submissions[0].dump(pickled)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error})") from None
        except Exception as error:
            raise UserError(f"the function or its arguments cannot be pickled: {error}") from error

    def keep(self, jobs: Sequence[str]) -> None:
        """Each payload and script gets the name of its job, or array.

        A cluster that counts anew, or another one, may have left results under the same ids: they go first.
        """
        for old in self.folder.glob("*_*.pkl"):
            if old.name.partition("_")[0] in jobs:
                old.unlink(missing_ok=True)
        for job, pickled, script in zip(jobs, self.payloads, self.scripts, strict=True):
            script.rename(JobPaths(self.folder, job).submission_file)
            pickled.rename(payload.path_of(self.folder, job, self._array))
        self._kept = True


def submit_slurm(files: Files, chunks: Sequence[Chunk], request: Request, single: bool) -> list[SlurmFunctionJob[Any]]:
    """One sbatch per chunk; several are held until all of them are accepted. Raises SubmissionError."""
    arrays: list[str] = []
    try:
        for chunk in chunks:
            options = ["--hold"] if len(chunks) > 1 else []
            options += [f"--dependency=afterany:{arrays[chunk.after]}"] if chunk.after is not None else []
            arrays.append(_sbatch(files.scripts[chunk.number], files.token(chunk.number), options))
        files.keep(arrays)
    except BaseException as error:
        _roll_back([files.token(chunk.number) for chunk in chunks], arrays, error)
        raise
    if len(chunks) > 1:
        release(arrays)
    ids = arrays if single else [f"{arrays[chunk.number]}_{i}" for chunk in chunks for i in range(chunk.count)]
    return [SlurmFunctionJob(files.folder, job, range(request.world_size)) for job in ids]


def _sbatch(script: Path, token: str, options: Sequence[str]) -> str:
    """The job's id. A failed sbatch may have submitted all the same: the token tells."""
    try:
        return slurm.submit(script, *options)
    except slurm.SlurmError as error:
        words = str(error)
    try:
        found = find_submitted(token, words)
    except slurm.SlurmError as doubt:
        raise SubmissionError(
            f"{words}; it may have submitted all the same ({doubt}): "
            f"before you repeat it, look for a job with the comment {token}"
        ) from None
    if found is None:
        raise SubmissionError(words)
    return found


def _roll_back(tokens: Sequence[str], jobs: Sequence[str], error: BaseException) -> None:
    """Also a job whose number never arrived here, as after Ctrl-C."""
    if not jobs and isinstance(error, SubmissionError):
        return
    try:
        take_back("slurm", tokens, jobs)
    except (slurm.SlurmError, UserError) as silence:
        which = f"jobs {', '.join(jobs)}" if jobs else f"a job with a comment of {', '.join(tokens)}"
        raise SubmissionError(
            f"{error!r}, and {silence}: look for {which} when SLURM answers, and scancel it"
        ) from None


def submit_local(
    files: Files, request: Request, slots: Sequence[str], count: int | None
) -> list[LocalFunctionJob[Any]]:
    """Start the controller, which outlives this process and its terminal; `slots`: see hpc.functions.localmap --gpus.

    `count`: of tasks of an array, None for a single job.
    """
    job = f"local{files.id[:12]}"
    files.keep([job])
    command = [sys.executable, "-m", "hpc.functions.localmap", str(files.folder), job]
    command += [str(JobPaths(files.folder, job).submission_file), "--ranks", str(request.tasks_per_node)]
    command += [] if count is None else ["--count", str(count)]
    record = controller_file(files.folder, job)
    with record.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--gpus", *slots],
            env=allocation.without_job(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    write_json(record, {"pid": process.pid, "process_start": process_start(process.pid)})
    ids = [job] if count is None else [f"{job}_{index}" for index in range(count)]
    return [LocalFunctionJob(files.folder, name, range(request.tasks_per_node), process) for name in ids]
