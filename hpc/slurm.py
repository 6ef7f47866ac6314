"""The one door to SLURM's commands: each call returns parsed data, in 30 s at most; only `accounting` needs sacct.

Times are seconds since 1970, durations seconds, sizes decimal GB of 1000 SLURM megabytes each, as a request has them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from hpc import allocation
from hpc.errors import UserError

_TIMEOUT_S = 30
_FEW = 100
"""So many job ids are named one by one on a command line; of more, arrays are named as a whole."""
_PICKED = 20
"""So many jobs are picked out by squeue itself; of more it tells all that the user has."""
_SHOWN = 3
_JOB_ID = re.compile(r"\d+([_+]\S+)?")
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
NOT_SET_UP = re.compile("configuration source|fetch config|slurm.conf", re.I)
_SBATCH = "SBATCH_"
_SITE = ("ACCOUNT", "PARTITION", "QOS", "RESERVATION", "CONSTRAINT", "CLUSTERS")
_MEGABYTES = {"": 1 / 1024**2, "K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


_until: ContextVar[float] = ContextVar("_until", default=float("inf"))
"""By time.monotonic(): then every command ends."""


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
    submitted: float | None
    """The first of its attempts; a requeue counts as a submission."""
    cluster: str
    comment: str
    """Empty where the site does not keep it."""
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

    @property
    def over(self) -> bool:
        """Whether it has ended; an end reaches sacct late where slurmdbd was away."""
        return self.state in _ENDED


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """All that is asked in this block has so long together; what is late is a SilentError."""
    before = _until.set(min(_until.get(), time.monotonic() + seconds))
    try:
        yield
    finally:
        _until.reset(before)


def available() -> bool:
    """Whether there is a SLURM here. Raises SilentError where it is installed and set up, but does not answer."""
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        return False
    result = _run("sinfo", "--noheader", "--format=%P", timeout=10)
    if result.returncode and not NOT_SET_UP.search(words := _words(result)):
        raise SilentError(f"sinfo: {words}")
    return result.returncode == 0


def environment(script: Path) -> dict[str, str]:
    """In which sbatch does what the script says: a user's SBATCH_ variables win over its #SBATCH lines.

    What sites set on purpose (`inherited`) stays where the script says nothing.
    """
    kept = inherited(script.read_text())
    return {k: v for k, v in allocation.without_job().items() if not k.startswith(_SBATCH) or k in kept}


def inherited(text: str) -> dict[str, str]:
    """The user's SBATCH_ variables that count for a script of this text."""
    names = [name for name in _SITE if f"#SBATCH --{name.lower()}=" not in text]
    return {key: os.environ[key] for name in names if (key := f"{_SBATCH}{name}") in os.environ}


def version() -> str:
    """Of the commands here: 22.05.8. Raises SlurmError."""
    return _ask("sbatch", "--version").split()[-1]


QUEUE_FIELDS = {
    "job": "%i",
    "state": "%T",
    "reason": "%r",
    "node": "%N",
    "partition": "%P",
    "nodes": "%D",
    "submitted": "%V",
    "start": "%S",
    "end": "%e",
    "time_limit_s": "%l",
    "priority": "%Q",
    "dependency": "%E",
    "excluded": "%x",
    "comment": "%k",
}
"""Fields of JobInfo, and how squeue calls them. The comment is the last: it may hold anything."""


def cluster_name() -> str:
    """Of the cluster that answers here: several may share a folder of runs. Empty where none does."""
    try:
        return allocation.cluster_name() or config().get("ClusterName", "")
    except SlurmError:
        return ""


def queue(jobs: Sequence[str] = ()) -> dict[str, JobInfo]:
    """The user's jobs still known to the controller, by id; of an array its tasks one by one.

    All of them, or those named: jobs, tasks (123_4) and whole arrays (123). Raises SlurmError when the controller does
    not answer.
    """
    command = ["squeue", "--me", "--all", "--noheader", "--array", "--states=all"]
    command += [f"--format={'|'.join(QUEUE_FIELDS.values())}"]
    command += [f"--jobs={','.join(jobs)}"] if 0 < len(jobs) <= _PICKED else []
    try:
        text = _ask(*command)
    except SlurmError as error:
        if jobs and "Invalid job id" in str(error):  # of a single one that it has forgotten
            return {}
        raise
    found = filter(None, map(_job_info, text.split("\n")))
    return {info.job: info for info in found if not jobs or {info.job, info.job.partition("_")[0]} & set(jobs)}


def _job_info(line: str) -> JobInfo | None:
    """None for what is no line of squeue: the rest of a comment that holds line breaks."""
    parts = [part.strip() for part in line.split("|", len(QUEUE_FIELDS) - 1)]
    told = dict(zip(QUEUE_FIELDS, parts, strict=False))
    if len(parts) < len(QUEUE_FIELDS) or not _JOB_ID.fullmatch(told["job"]):
        return None
    return JobInfo(
        job=told["job"],
        state=told["state"],
        reason="" if told["reason"] == "None" else told["reason"],
        node=told["node"],
        comment=told["comment"],
        partition=told["partition"],
        nodes=_number(told["nodes"]),
        submitted=epoch(told["submitted"]),
        start=epoch(told["start"]),
        end=epoch(told["end"]),
        time_limit_s=duration(told["time_limit_s"]),
        priority=_number(told["priority"]),
        dependency="" if told["dependency"] == "(null)" else told["dependency"],
        excluded=told["excluded"],
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
    command = ("sbatch", "--parsable", *options, str(script))
    return _ask(*command, environ=environment(script)).strip().split(";")[0]


def test_only(script: Path, *options: str) -> tuple[bool, str]:
    """sbatch's verdict on a script without submitting it, and its words (with the estimated start).

    Raises SlurmError where there is no verdict: sbatch is missing, or its controller does not answer.
    """
    result = _run("sbatch", "--test-only", *options, str(script), environ=environment(script))
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


def send(job: str, signal_name: str) -> None:
    """A signal to the tasks of a running job, as a preemption with grace sends it: its batch shell hears nothing.

    KILL goes to the first step of the attempt: of the job as a whole it would be a cancellation. Raises SlurmError.
    """
    target = f"{job}.0" if signal_name == signal.SIGKILL.name else job
    _ask("scancel", f"--signal={signal_name}", target)


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
    pairs = (line.partition("=") for line in _ask("scontrol", "show", "config").split("\n"))
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def partitions() -> dict[str, dict[str, str]]:
    """`scontrol show partition` by name, hidden ones too: {"gpu": {"MaxTime": "1:00:00", ...}}. Raises SlurmError."""
    return {fields["PartitionName"]: fields for fields in _records("partition", "PartitionName")}


def nodes(names: str = "") -> list[dict[str, str]]:
    """`scontrol show node`, one entry a node: {"NodeName": "node0", "Gres": "gpu:a100:1", ...}. Raises SlurmError.

    `names`: of these alone (node[1-3],node7), or of all.
    """
    return list(_records("node", "NodeName", *filter(None, [names])))


def _records(kind: str, name: str, *wanted: str) -> Iterator[dict[str, str]]:
    """Of a line without a name nothing is told: there are none, or it is the rest of a text with line breaks."""
    for line in _ask("scontrol", "--oneliner", "--all", "show", kind, *wanted).split("\n"):
        if line.startswith(f"{name}="):
            yield dict(re.findall(r"(\w+)=(.*?)(?=\s+\w+=|\s*$)", line))


def accounting(jobs: Sequence[str], since: Mapping[str, float] | None = None) -> dict[str, Accounted]:
    """What sacct keeps of these jobs and array tasks, by id, in one call; those it does not know are left out.

    `since`: attempts that were submitted before are of another job that had the same number. Raises SlurmError;
    "Slurm accounting storage is disabled" where a cluster has none.
    """
    if not jobs:
        return {}
    named = jobs if len(jobs) <= _FEW else dict.fromkeys(job.partition("_")[0] for job in jobs)
    command = ["--duplicates", "--noheader", "--parsable2", f"--format={_ACCOUNT}", f"--jobs={','.join(named)}"]
    wanted = set(jobs)
    return {job: told for job, told in _attempts(_ask("sacct", *command), since or {}).items() if job in wanted}


_ACCOUNT = "JobID,State,ExitCode,ElapsedRaw,Start,End,Timelimit,ReqMem,MaxRSS,NodeList,Reason,Submit,Cluster,Comment"
"""The comment is the last: it may hold anything."""


def _attempts(text: str, since: Mapping[str, float]) -> dict[str, Accounted]:
    """Each line is an attempt of a job, or a step (123.batch, 123.0) of the attempt above it."""
    found: dict[str, Accounted] = {}
    names = _ACCOUNT.split(",")
    left_out = False
    for line in text.split("\n"):
        parts = line.split("|", len(names) - 1)
        job, _, step = parts[0].partition(".")
        if len(parts) < len(names) or not _JOB_ID.fullmatch(job):
            continue  # the rest of a comment that holds line breaks
        told = dict(zip(names, parts, strict=True))
        before = found.get(job)
        if not step:
            left_out = (epoch(told["Submit"]) or float("inf")) < since.get(job, 0)
        if left_out:
            continue
        if step and before:
            peak = max(filter(None, (before.max_rss_gb, _gigabytes(told["MaxRSS"]))), default=None)
            found[job] = replace(before, max_rss_gb=peak, steps=(*before.steps, _state(told)))
        elif not step:
            found[job] = _attempt(job, told, before)
    return found


def _attempt(job: str, told: Mapping[str, str], before: Accounted | None) -> Accounted:
    """Of a later attempt that ended at once sacct may lack the request: it is the job's.

    Before 21.08 a request of memory ends in n, per node, or c, per core.
    """
    status, _, number = told["ExitCode"].partition(":")
    memory = _gigabytes(told["ReqMem"].removesuffix("n"))
    return Accounted(
        job=job,
        state=_state(told),
        submitted=before.submitted if before else epoch(told["Submit"]),
        cluster=told["Cluster"],
        comment=told["Comment"] or (before.comment if before else ""),
        exit_code=_number(status),
        signal=_number(number),
        elapsed_s=_number(told["ElapsedRaw"]),
        start=epoch(told["Start"]),
        end=epoch(told["End"]),
        time_limit_s=duration(told["Timelimit"]) or (before.time_limit_s if before else None),
        req_mem_gb=memory or (before.req_mem_gb if before else None),
        max_rss_gb=_gigabytes(told["MaxRSS"]),
        nodes="" if told["NodeList"] == "None assigned" else told["NodeList"],
        reason="" if told["Reason"] == "None" else told["Reason"],
        earlier=(*before.earlier, before.state) if before else (),
    )


def _state(told: Mapping[str, str]) -> str:
    return told["State"].partition(" ")[0]  # CANCELLED by 1000


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


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


def _ask(*command: str, environ: dict[str, str] | None = None) -> str:
    """Its output. Raises SlurmError with its words when it fails."""
    result = _run(*command, environ=environ)
    if result.returncode:
        words = _words(result)
        raise (SilentError if _SILENT.search(words) else SlurmError)(f"{command[0]}: {words}")
    return result.stdout


def _words(result: subprocess.CompletedProcess[str]) -> str:
    """What a command said on stderr, in one line, without its own name before each part."""
    own = rf"^({re.escape(result.args[0])}: )?((error|fatal): )?"
    lines = [re.sub(own, "", line.strip()) for line in result.stderr.splitlines()]
    return "; ".join(filter(None, lines)) or f"left with exit code {result.returncode}"


def _run(
    *command: str, timeout: float | None = None, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Raises SlurmError where the command is missing, or gives no answer in time."""
    limit = max(0.0, min(timeout or _TIMEOUT_S, _until.get() - time.monotonic()))
    given = allocation.without_job() if environ is None else environ
    environ = {key: value for key, value in given.items() if not key.startswith(_OWN_DEFAULTS)}
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
        raise SilentError(f"{' '.join(command)}: no answer within {limit:.3g} s") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # a site's wrapper script and what it started
            process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)
