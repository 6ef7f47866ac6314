"""The pickles of a submission in one file, however many tasks it has: a shared file system is slow per file.

A single job's is submitit's JOB_submitted.pkl. An array's is ARRAY_tasks.pkl: the pickle of each task, that of the list
of their offsets, and the offset of this list in the last eight bytes. A checkpoint writes ARRAY_TASK_submitted.pkl,
which comes first from then on. A pickle runs what is in it: one that others may have written is not opened.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable
from pathlib import Path

import cloudpickle  # type: ignore[import-untyped]  # submitit's pickler
from submitit.core.utils import DelayedSubmission, JobPaths

from hpc import trust

_TAIL = struct.Struct("<Q")


def size(submission: DelayedSubmission) -> int:
    """In bytes."""
    return len(cloudpickle.dumps(submission, pickle.HIGHEST_PROTOCOL))


def write_array(path: Path, submissions: Iterable[DelayedSubmission]) -> None:
    offsets = []
    with path.open("wb") as file:
        for submission in submissions:
            offsets.append(file.tell())
            cloudpickle.dump(submission, file, pickle.HIGHEST_PROTOCOL)
        end = file.tell()
        pickle.dump(offsets, file)
        file.write(_TAIL.pack(end))


def path_of(folder: Path, job: str, array: bool) -> Path:
    """Where the submissions of a job, or of an array of this id, are."""
    return folder / f"{job}_tasks.pkl" if array else JobPaths(folder, job).submitted_pickle


def load(paths: JobPaths) -> DelayedSubmission | None:
    """What this job, or task of an array, is to call; None while it is not there. Raises UserError."""
    array, _, task = str(paths.job_id).partition("_")
    try:
        with paths.submitted_pickle.open("rb") as file:
            trust.check_open(file, paths.submitted_pickle)
            own: DelayedSubmission = pickle.load(file)
            return own
    except FileNotFoundError:
        if not task:
            return None
    try:
        path = path_of(paths.folder, array, True)
        with path.open("rb") as file:
            trust.check_open(file, path)
            file.seek(-_TAIL.size, 2)
            file.seek(*_TAIL.unpack(file.read()))
            file.seek(pickle.load(file)[int(task)])
            submission: DelayedSubmission = pickle.load(file)
            return submission
    except FileNotFoundError:
        return None
