"""The one door to SLURM's commands: each call returns parsed data, none needs sacct."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc import allocation
from hpc.errors import UserError

_TIMEOUT_S = 30
_ENDED = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    ]
)


class SlurmError(RuntimeError):
    """A command of SLURM that failed, with its own words."""


class RequeueDisabled(SlurmError):
    """The cluster (JobRequeue=0) or the job (--no-requeue) forbids it."""


@dataclass(frozen=True)
class JobInfo:
    """One line of squeue."""

    job: str
    state: str
    """PENDING, RUNNING, COMPLETING, ..."""
    reason: str
    """Of a pending job: Priority, Resources, BeginTime, ..."""
    node: str
    comment: str

    @property
    def live(self) -> bool:
        """Pending, running, requeued or on its way between these."""
        return self.state not in _ENDED


def available() -> bool:
    """Whether sbatch is here and a controller answers."""
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        return False
    try:
        return _run("sinfo", "--noheader", "--format=%P", timeout=10).returncode == 0
    except (OSError, SlurmError):
        return False


def queue(jobs: Sequence[str] = ()) -> dict[str, JobInfo]:
    """The user's jobs still known to the controller, by id (all of them, or those named).

    Raises SlurmError when the controller does not answer.
    """
    result = _run("squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%N|%k")
    if result.returncode:
        raise SlurmError(f"squeue: {result.stderr.strip()}")
    found = {}
    for line in result.stdout.splitlines():
        job, state, reason, node, comment = (part.strip() for part in line.split("|", 4))
        found[job] = JobInfo(job, state, reason, node, comment)
    return {job: info for job, info in found.items() if not jobs or job in jobs}


def find_by_comment(token: str) -> str | None:
    """The unfinished job that carries this submission token: a failed sbatch may still have submitted."""
    return next((job for job, info in queue().items() if info.comment == token and info.live), None)


def submit(script: Path) -> str:
    """sbatch a script; the job id. Raises SlurmError with sbatch's own words."""
    result = _run("sbatch", "--parsable", str(script), env=True)
    if result.returncode:
        raise SlurmError(f"sbatch: {result.stderr.strip()}")
    return result.stdout.strip().split(";")[0]


def requeue(job: str) -> None:
    """Raises RequeueDisabled, or SlurmError with scontrol's own words (SLURM requeued it already, say).

    SLURM ends the batch script with TERM as soon as it agrees, and its processes with it: scontrol ignores that, so
    that an answer of yes is not mistaken for a failure.
    """
    command = ["bash", "-c", 'trap "" TERM; exec "$@"', "bash", "scontrol", "requeue", job]
    result = _run(*command)
    if result.returncode:
        kind = RequeueDisabled if "disabled" in result.stderr.lower() else SlurmError
        raise kind(f"scontrol requeue {job}: {result.stderr.strip()}")


def cancel(job: str) -> None:
    """Raises UserError with scancel's own words."""
    try:
        result = _run("scancel", job)
    except SlurmError as error:
        raise UserError(str(error)) from None
    if result.returncode:
        raise UserError(f"scancel {job}: {result.stderr.strip()}")


def test_only(script: Path) -> tuple[bool, str]:
    """sbatch's verdict on a script without submitting it, and its words (with the estimated start)."""
    result = _run("sbatch", "--test-only", str(script), env=True)
    words = result.stderr.strip().removeprefix("sbatch: ").replace("allocation failure: ", "")
    return result.returncode == 0, words


def _run(*command: str, timeout: float | None = None, env: bool = False) -> subprocess.CompletedProcess[str]:
    """Raises SlurmError when there is no answer in time: a controller that hangs answers late or never."""
    environ, limit = allocation.without_job() if env else None, timeout or _TIMEOUT_S
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environ, check=False)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{' '.join(command)}: no answer within {limit:g} s") from None
