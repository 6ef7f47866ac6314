"""The one door to SLURM's commands: each call returns parsed data, in 30 s at most; only `accounting` needs sacct.

Times are seconds since 1970, durations seconds, sizes decimal GB of 1000 SLURM megabytes each, as a request has them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from hpc import allocation
from hpc.errors import UserError

_TIMEOUT_S = 30
_FEW = 100
"""So many job ids are named one by one on a command line; of more, arrays are named as a whole."""
_SHOWN = 3
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
_OWN_DEFAULTS = ("SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_")
"""Variables by which a user changes what a command shows, or hides: our questions mean what they say."""
_SILENT = re.compile("contact slurm controller|timed out|connect failure|communication|unexpected message", re.I)
"""Words of a command that got no answer; what it asked for may be done all the same."""
_MEGABYTES = {"": 1 / 1024**2, "K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


class SlurmError(RuntimeError):
    """A command of SLURM that failed, is missing or does not answer: one line, with its own words."""


class SilentError(SlurmError):
    """The controller did not answer, or not in time: what was asked may be done all the same."""


class RequeueDisabled(SlurmError):
    """The cluster (JobRequeue=0) or the job (--no-requeue) forbids it."""


@dataclass(frozen=True)
class JobInfo:
    """One line of squeue."""

    job: str
    """Of an array task 123_4."""
    state: str
    """PENDING, RUNNING, COMPLETING, ..."""
    reason: str
    """Of a pending job: Priority, Resources, BeginTime, ..."""
    node: str
    comment: str
    partition: str = ""
    nodes: int = 0
    submitted: float | None = None
    start: float | None = None
    """Of a pending job SLURM's estimate, None where it has none yet."""
    end: float | None = None
    """When the time limit ends it, or when it ended."""
    time_limit_s: int | None = None
    """None: unlimited."""
    priority: int = 0
    """0: held."""
    dependency: str = ""
    """What it still waits for: afterok:12(unfulfilled)."""
    excluded: str = ""
    """Nodes that it may not have: node[1-3],node7."""

    @property
    def live(self) -> bool:
        """Pending, running, requeued or on its way between these."""
        return self.state not in _ENDED


@dataclass(frozen=True)
class Accounted:
    """What sacct keeps of a job: its last attempt, and the states that earlier ones ended in."""

    job: str
    state: str
    """COMPLETED, FAILED, OUT_OF_MEMORY, TIMEOUT, PREEMPTED, NODE_FAIL, CANCELLED, RUNNING, ..."""
    exit_code: int
    signal: int
    """That ended it, 0 for none."""
    elapsed_s: int
    start: float | None
    end: float | None
    time_limit_s: int | None
    req_mem_gb: float | None
    """Per node; None where SLURM counts it per core."""
    max_rss_gb: float | None
    """The highest of its steps' tasks; None where nothing was sampled."""
    nodes: str
    reason: str
    steps: tuple[str, ...] = ()
    """How the steps of the last attempt ended: a step may be OUT_OF_MEMORY where the job is only FAILED."""
    earlier: tuple[str, ...] = ()
    """The states of the attempts before, the first one first; a requeue adds one."""


def available() -> bool:
    """Whether sbatch is here and a controller answers."""
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        return False
    try:
        return _run("sinfo", "--noheader", "--format=%P", timeout=10).returncode == 0
    except SlurmError:
        return False


def version() -> str:
    """Of the commands here: 22.05.8. Raises SlurmError."""
    return _ask("sbatch", "--version").split()[-1]


def queue(jobs: Sequence[str] = ()) -> dict[str, JobInfo]:
    """The user's jobs still known to the controller, by id (all of them, or those named); array tasks one by one.

    Raises SlurmError when the controller does not answer.
    """
    fields = "%i|%T|%r|%N|%P|%D|%V|%S|%e|%l|%Q|%E|%x|%k"
    text = _ask("squeue", "--me", "--all", "--noheader", "--array", "--states=all", f"--format={fields}")
    found = map(_job_info, text.splitlines())
    return {info.job: info for info in found if not jobs or info.job in jobs}


def _job_info(line: str) -> JobInfo:
    parts = [part.strip() for part in line.split("|", 13)]
    (
        job,
        state,
        reason,
        node,
        partition,
        nodes,
        submitted,
        start,
        end,
        limit,
        priority,
        dependency,
        excluded,
        comment,
    ) = parts
    return JobInfo(
        job=job,
        state=state,
        reason=reason,
        node=node,
        comment=comment,
        partition=partition,
        nodes=int(nodes) if nodes.isdecimal() else 0,
        submitted=epoch(submitted),
        start=epoch(start),
        end=epoch(end),
        time_limit_s=duration(limit),
        priority=int(priority) if priority.isdecimal() else 0,
        dependency="" if dependency == "(null)" else dependency,
        excluded=excluded,
    )


def find_by_comment(token: str) -> str | None:
    """The unfinished job that carries this submission token: a failed sbatch may still have submitted."""
    return next((job for job, info in queue().items() if info.comment == token and info.live), None)


def submission(script: Path, *options: str) -> list[str]:
    """The command that submits a script, for those who run it themselves (submitit)."""
    return ["sbatch", *options, str(script)]


def submit(script: Path, *options: str) -> str:
    """sbatch a script, with `--key=value` options that win over its own; the job id.

    Raises SlurmError with sbatch's own words; the job may have been submitted all the same.
    """
    return _ask("sbatch", "--parsable", *options, str(script)).strip().split(";")[0]


def test_only(script: Path, *options: str) -> tuple[bool, str]:
    """sbatch's verdict on a script without submitting it, and its words (with the estimated start).

    Raises SlurmError where there is no verdict: sbatch is missing, or its controller does not answer.
    """
    result = _run("sbatch", "--test-only", *options, str(script))
    words = _words(result).removeprefix("allocation failure: ")
    if result.returncode and _SILENT.search(words):
        raise SilentError(f"sbatch: {words}")
    return result.returncode == 0, words


def requeue(job: str) -> None:
    """Raises RequeueDisabled, SilentError, or SlurmError with scontrol's words (SLURM requeued it already, say).

    SLURM ends the batch script with TERM as soon as it agrees, and its processes with it: scontrol ignores that, so
    that an answer of yes is not mistaken for a failure.
    """
    command = ["bash", "-c", 'trap "" TERM; exec "$@"', "bash", "scontrol", "requeue", job]
    result = _run(*command)
    if result.returncode:
        words = _words(result)
        kind = RequeueDisabled if "disabled" in words.lower() else SilentError if _SILENT.search(words) else SlurmError
        raise kind(f"scontrol requeue {job}: {words}")


def cancel(*jobs: str) -> None:
    """One scancel for all of them; jobs that have ended already are no fault. Raises UserError with scancel's words."""
    try:
        result = _run("scancel", *jobs)
    except SlurmError as error:
        raise UserError(str(error)) from None
    if result.returncode:
        raise UserError(f"scancel {' '.join(jobs[:_SHOWN])}{' ...' if len(jobs) > _SHOWN else ''}: {_words(result)}")


def release(*jobs: str) -> None:
    """Let held jobs start. Raises SlurmError."""
    _ask("scontrol", "release", ",".join(jobs))


def update(job: str, **fields: str) -> None:
    """`scontrol update JobId=JOB KEY=VALUE ...`: StartTime="now+60", ExcNodeList="node3".

    Raises SlurmError. Of a job that is requeued only after `requeue`; StartTime=now loses such a job, now+1 does not.
    """
    _ask("scontrol", "update", f"JobId={job}", *(f"{key}={value}" for key, value in fields.items()))


def config() -> dict[str, str]:
    """`scontrol show config`: {"MaxArraySize": "1001", "KillWait": "30 sec", ...}. Raises SlurmError."""
    pairs = (line.partition("=") for line in _ask("scontrol", "show", "config").splitlines())
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def partitions() -> dict[str, dict[str, str]]:
    """`scontrol show partition` by name, hidden ones too: {"gpu": {"MaxTime": "1:00:00", ...}}. Raises SlurmError."""
    return {fields["PartitionName"]: fields for fields in _records("partition")}


def nodes() -> list[dict[str, str]]:
    """`scontrol show node`, one entry a node: {"NodeName": "node0", "Gres": "gpu:a100:1", ...}. Raises SlurmError."""
    return list(_records("node"))


def _records(kind: str) -> Iterator[dict[str, str]]:
    for line in _ask("scontrol", "--oneliner", "--all", "show", kind).splitlines():
        if "=" in line:  # or it says that there are none
            yield dict(re.findall(r"(\w+)=(.*?)(?=\s+\w+=|\s*$)", line))


def accounting(jobs: Sequence[str]) -> dict[str, Accounted]:
    """What sacct keeps of these jobs and array tasks, by id, in one call; those it does not know are left out.

    Raises SlurmError; "Slurm accounting storage is disabled" where a cluster has none.
    """
    if not jobs:
        return {}
    named = jobs if len(jobs) <= _FEW else dict.fromkeys(job.partition("_")[0] for job in jobs)
    fields = "JobID,State,ExitCode,ElapsedRaw,Start,End,Timelimit,ReqMem,MaxRSS,NodeList,Reason"
    command = ["--duplicates", "--noheader", "--parsable2", f"--format={fields}", f"--jobs={','.join(named)}"]
    wanted = set(jobs)
    return {job: told for job, told in _attempts(_ask("sacct", *command)).items() if job in wanted}


def _attempts(text: str) -> dict[str, Accounted]:
    """Each line is an attempt of a job, or a step (123.batch, 123.0) of the attempt above it.

    Of a later attempt that ended at once sacct may lack the request: it is the job's. Before 21.08 a request of memory
    ends in n, per node, or c, per core.
    """
    found: dict[str, Accounted] = {}
    for line in text.splitlines():
        job, state, code, elapsed, start, end, limit, memory, rss, nodes, reason = line.split("|", 10)
        state = state.split()[0] if state else ""  # CANCELLED by 1000
        job, _, step = job.partition(".")
        before = found.get(job)
        if step and before:
            peak = max(filter(None, (before.max_rss_gb, _gigabytes(rss))), default=None)
            found[job] = replace(before, max_rss_gb=peak, steps=(*before.steps, state))
            continue
        status, _, number = code.partition(":")
        found[job] = Accounted(
            job=job,
            state=state,
            exit_code=int(status or 0),
            signal=int(number or 0),
            elapsed_s=int(elapsed or 0),
            start=epoch(start),
            end=epoch(end),
            time_limit_s=duration(limit) or (before.time_limit_s if before else None),
            req_mem_gb=_gigabytes(memory.removesuffix("n")) or (before.req_mem_gb if before else None),
            max_rss_gb=_gigabytes(rss),
            nodes="" if nodes == "None assigned" else nodes,
            reason="" if reason == "None" else reason,
            earlier=(*before.earlier, before.state) if before else (),
        )
    return found


def epoch(text: str) -> float | None:
    """SLURM's 2030-01-31T12:00:00 (local time) as seconds since 1970; None for N/A, Unknown, NONE."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def duration(text: str) -> int | None:
    """SLURM's [days-][hours:]minutes:seconds in seconds; None for UNLIMITED, NONE, NOT_SET and the like."""
    clock = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not clock:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _gigabytes(text: str) -> float | None:
    size = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", text)
    return float(size[1]) * _MEGABYTES[size[2]] / 1000 if size else None


def _ask(*command: str) -> str:
    """Its output. Raises SlurmError with its words when it fails."""
    result = _run(*command)
    if result.returncode:
        words = _words(result)
        raise (SilentError if _SILENT.search(words) else SlurmError)(f"{command[0]}: {words}")
    return result.stdout


def _words(result: subprocess.CompletedProcess[str]) -> str:
    """What a command said on stderr, in one line, without its own name before each part."""
    own = rf"^({re.escape(result.args[0])}: )?((error|fatal): )?"
    lines = [re.sub(own, "", line.strip()) for line in result.stderr.splitlines()]
    return "; ".join(filter(None, lines)) or f"left with exit code {result.returncode}"


def _run(*command: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Raises SlurmError where the command is missing, or gives no answer in time."""
    limit = timeout or _TIMEOUT_S
    environ = {key: value for key, value in allocation.without_job().items() if not key.startswith(_OWN_DEFAULTS)}
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            command, stdin=nothing, stdout=pipe, stderr=pipe, text=True, errors="replace", env=environ, process_group=0
        )
    except OSError as error:
        raise SlurmError(f"{command[0]}: {error.strerror} (is SLURM installed, and its folder on PATH?)") from None
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        raise SilentError(f"{' '.join(command)}: no answer within {limit:g} s") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # a site's wrapper script and what it started
            process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)
