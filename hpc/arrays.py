"""Submission of sweeps: one sbatch per chunk, all of them or none; here, one controller for all rows."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hpc import badnodes, slurm
from hpc.attempt import process_start
from hpc.errors import UserError
from hpc.rundir import locked
from hpc.submission import LocalRunExecutor, Refused, SlurmRunExecutor, check_place
from hpc.sweepdir import Chunk, SweepDir, spec

_SETTLED_S = 60
"""A sweep younger than this may be in the hands of the command that makes it, where the file system has no locks."""


def most_tasks(cluster: str) -> int | None:
    """SLURM's MaxArraySize: a chunk has no more rows. None where there is no limit. Raises UserError."""
    if cluster == "local":
        return None
    try:
        most = int(slurm.config()["MaxArraySize"])
    except (slurm.SlurmError, KeyError, ValueError) as error:
        raise UserError(f"how many tasks an array may have here is not known: {error}; try again") from None
    if not most:
        raise UserError("this cluster has no job arrays (MaxArraySize=0): submit the runs one by one with 'hpc submit'")
    return most


def submit(sweep: SweepDir, cluster: str, rows: Iterable[int] | None = None, after: Sequence[str] = ()) -> list[str]:
    """Submit a sweep, or some of its rows, and record the jobs; their ids.

    Raises Refused when nothing is submitted, UserError where SLURM is silent: `repair` tells later.
    `after`: what must be finished before, as `hpc.after` gives it for this cluster.
    """
    check_place(sweep.path, sweep.script(0))
    try:
        with locked(_lease(sweep)):
            if cluster == "local":
                return [_submit_local(sweep, rows, after)]
            return _submit_slurm(sweep, rows, after)
    except OSError as error:
        raise _refused(sweep.name, error) from None


def _parts(sweep: SweepDir, rows: Iterable[int] | None) -> list[tuple[Chunk, list[int]]]:
    """Each chunk with those of its rows that are wanted; chunks without any are left out."""
    wanted = None if rows is None else set(rows)
    parts = []
    for chunk in sweep.chunks():
        own = range(chunk.first, chunk.first + chunk.count)
        if chosen := [row for row in own if wanted is None or row in wanted]:
            parts.append((chunk, chosen))
    return parts


def _submit_slurm(sweep: SweepDir, rows: Iterable[int] | None, after: Sequence[str]) -> list[str]:
    """Several chunks are held until all of them are accepted: a refusal finds none that has started."""
    parts, submission = _parts(sweep, rows), sweep.count_submissions()
    common = [*badnodes.exclusion(sweep.path.parent), *(["--hold"] if len(parts) > 1 else [])]
    jobs: dict[int, str] = {}
    tokens = [sweep.token(chunk.number, submission) for chunk, _ in parts]
    with taken_back(sweep.name, "slurm", tokens, jobs.values()):
        for chunk, chosen in parts:
            waits = [f"afterany:{jobs[chunk.after]}"] if chunk.after in jobs else []
            token = sweep.token(chunk.number, submission)
            options = [*common, *_dependency(after, waits), *_some(chunk, chosen)]
            options += [f"--comment={token}"] if submission else []
            executor = SlurmRunExecutor(sweep.script(chunk.number), sweep.logs, token, options)
            jobs[chunk.number] = executor.submit_script().job_id
        sweep.record("slurm", {chunk.number: (jobs[chunk.number], chosen) for chunk, chosen in parts})
    if len(parts) > 1:
        release(list(jobs.values()))
    return list(jobs.values())


def release(jobs: Sequence[str]) -> None:
    """Let held jobs start. Raises UserError with what starts them later."""
    try:
        slurm.release(*jobs)
    except slurm.SlurmError as error:
        again = f"'scontrol release {','.join(jobs)}' lets them start"
        raise UserError(f"submitted as {', '.join(jobs)}, which are held still ({error}); {again}") from None


@contextmanager
def taken_back(name: str, cluster: str, tokens: Sequence[str], jobs: Collection[str]) -> Iterator[None]:
    """All of several submissions, or none: what ends them takes back the `jobs` so far, and becomes a refusal.

    A job whose number never arrived here is found by its token. Where SLURM is silent nothing is taken back: UserError.
    """
    try:
        yield
    except BaseException as error:
        try:
            take_back(cluster, tokens, jobs)
        except (slurm.SlurmError, UserError) as silence:
            if isinstance(error, UserError):
                raise error from None
            raise UserError(f"{name}: {error!r}, and {silence}: see 'hpc ls' when SLURM answers again") from None
        raise _refused(name, error) from None


def take_back(cluster: str, tokens: Sequence[str], jobs: Collection[str]) -> None:
    """End these jobs, and those that carry one of the tokens. Raises SlurmError or UserError where SLURM is silent."""
    if cluster == "local":
        for job in reversed(list(jobs)):
            with suppress(ProcessLookupError):
                os.kill(int(job), signal.SIGTERM)
        return
    queue = slurm.queue().items()
    found = {job.partition("_")[0] for job, info in queue if info.live and info.comment in tokens}
    if ids := sorted({*jobs, *found}):
        slurm.cancel(*ids)


def _refused(name: str, error: BaseException) -> BaseException:
    """What ended a submission of which nothing is left."""
    if isinstance(error, UserError):  # Refused, or in doubt: a job may come yet
        return error
    if isinstance(error, KeyboardInterrupt):
        return Refused(f"{name}: interrupted, nothing is submitted")
    return Refused(f"{name}: not submitted: {error}") if isinstance(error, OSError | slurm.SlurmError) else error


def _some(chunk: Chunk, rows: list[int]) -> list[str]:
    """The option for a part of a chunk; a whole one has it in its script."""
    if len(rows) == chunk.count:
        return []
    cap = f"%{chunk.parallel}" if chunk.parallel else ""
    return [f"--array={spec(row - chunk.first for row in rows)}{cap}"]


def _dependency(after: Sequence[str], waits: list[str]) -> list[str]:
    """One --dependency for all: sbatch takes the last of several. Other options stay as they are."""
    given = [option.removeprefix("--dependency=") for option in after if option.startswith("--dependency=")]
    others = [option for option in after if not option.startswith("--dependency=")]
    return [*([f"--dependency={','.join([*given, *waits])}"] if given or waits else []), *others]


def _submit_local(sweep: SweepDir, rows: Iterable[int] | None, after: Sequence[str]) -> str:
    chosen = [row for _, some in _parts(sweep, rows) for row in some]
    command = [sys.executable, "-m", "hpc.localarray", str(sweep.path), "--rows", spec(chosen)]
    for path in after:
        command += ["--after", path]
    jobs: list[str] = []
    with taken_back(sweep.name, "local", [], jobs):
        jobs.append(LocalRunExecutor(command, sweep.logs).submit_script().job_id)
        chunks = {chunk.number: (jobs[0], some) for chunk, some in _parts(sweep, rows)}
        sweep.record("local", chunks, process_start=process_start(int(jobs[0])))
    return jobs[0]


def _lease(sweep: SweepDir) -> Path:
    """Held by the one command that submits this sweep."""
    return sweep.path / ".lease"


def repair(sweep: SweepDir, jobs: Mapping[str, slurm.JobInfo]) -> bool:
    """A submission whose command was killed before it was recorded: recorded if whole, ended if only a part of it is.

    Returns whether one was recorded. `jobs` is squeue's answer, by job and index. Raises UserError or SlurmError.
    """
    settled = time.time() - sweep.rows_file.stat().st_mtime > _SETTLED_S
    with locked(_lease(sweep), wait=False, without=settled) as free:
        submission = sweep.count_submissions() if free else 0
        tokens = {sweep.token(chunk.number, submission): chunk for chunk in sweep.chunks()} if free else {}
        found: dict[int, tuple[str, list[int]]] = {}
        held = False
        for job, info in jobs.items():
            if info.live and (chunk := tokens.get(info.comment)):
                number, _, index = job.partition("_")
                found.setdefault(chunk.number, (number, []))[1].append(chunk.first + int(index))
                held = held or info.reason == "JobHeldUser"
        ids = [job for job, _ in found.values()]
        if held and (submission or len(found) < len(tokens)):  # which chunks were to come is not known
            slurm.cancel(*ids)
            return False
        if found:
            times = [info.submitted for info in jobs.values() if info.comment in tokens and info.submitted]
            sweep.record("slurm", found, **({"time": min(times)} if times else {}))
        if held:
            slurm.release(*ids)
        return bool(found)
