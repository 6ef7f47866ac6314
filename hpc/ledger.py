"""The state of runs, from their folders and squeue: it outlives the shell that submitted them and needs no sacct."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from hpc import slurm, yamlfile
from hpc.attempt import same_process
from hpc.errors import UserError
from hpc.rundir import RunDir, read_json, write_json


@dataclass(frozen=True)
class Status:
    """One line of `hpc ls`."""

    run: str
    state: str
    """finished, running, pending, requeued, stopped, failed, cancelled, lost, planned, or damaged."""
    detail: str
    cluster: str
    job: str
    node: str
    attempts: int
    epoch: int
    step: int
    metric: str
    """Name and value of the monitored metric at its best."""
    age_s: float
    """Seconds since the run last changed its state."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Records:
    """What a run's files say, each field of the kind that is expected."""

    submit: dict[str, Any]
    state: dict[str, Any]
    result: dict[str, Any]
    generation: int
    made: float


_NUMBER = (int, float)
_KINDS: dict[str, dict[str, Any]] = {
    "submit": {"cluster": str, "job": str, "time": _NUMBER, "cancelled": _NUMBER},
    "state": {
        "phase": str,
        "pid": int,
        "host": str,
        "time": _NUMBER,
        "started": _NUMBER,
        "step": int,
        "epoch": int,
        "best": dict,
        "job": (str, NoneType),
    },
    "result": {"best": dict},
}
_NEEDED = {"state": ("phase", "pid", "host", "time")}


def _read(run: RunDir) -> _Records | str:
    """The records of a run, or what is damaged about them, in a sentence."""
    try:
        yamlfile.read(run.experiment)
        submit, state, result = (_read_record(getattr(run, name), name) for name in _KINDS)
        return _Records(submit, state, result, run.last_generation(), run.experiment.stat().st_mtime)
    except (UserError, OSError) as error:
        return " ".join(str(error).replace(f"{run.path}{os.sep}", "").split())


def _read_record(path: Path, name: str) -> dict[str, Any]:
    record = read_json(path)
    wrong = [key for key, kind in _KINDS[name].items() if key in record and not isinstance(record[key], kind)]
    missing = [key for key in _NEEDED.get(name, ()) if record and key not in record]
    if name == "submit" and record.get("cluster") == "local" and not str(record.get("job", "")).isdecimal():
        wrong.append("job")
    if "best" not in wrong and not isinstance(record.get("best", {}).get("metrics", {}), dict):
        wrong.append("best")
    if wrong or missing:
        faults = [f"{key!r} is not what belongs there" for key in wrong] + [f"{key!r} is missing" for key in missing]
        raise UserError(f"{path}: damaged ({', '.join(faults)}); remove it or restore it from a copy")
    return record


def statuses(runs: list[RunDir]) -> list[Status]:
    """The state of each run; one squeue for all of them. One whose files are damaged does not hide the others."""
    found = [(run, _read(run)) for run in runs]
    jobs: dict[str, slurm.JobInfo] | None = {}
    if any(isinstance(told, _Records) and _newest(told.submit, told.state)[0] == "slurm" for _, told in found):
        try:
            jobs = slurm.queue()
        except (slurm.SlurmError, OSError):
            jobs = None
    return [_damaged(run, told) if isinstance(told, str) else _status(run, told, jobs) for run, told in found]


def _damaged(run: RunDir, fault: str) -> Status:
    try:
        age = time.time() - run.experiment.stat().st_mtime
    except OSError:
        age = 0.0
    return Status(run.name, "damaged", fault, "", "", "", attempts=0, epoch=0, step=0, metric="", age_s=age)


def status(run: RunDir) -> Status:
    return statuses([run])[0]


def _status(run: RunDir, told: _Records, jobs: dict[str, slurm.JobInfo] | None) -> Status:
    submit, state, result = told.submit, told.state, told.result
    cluster, job = _newest(submit, state)
    name, detail = _state(told, jobs)
    best = result.get("best") or state.get("best") or {}
    monitor = result.get("monitor") or state.get("monitor")
    value = best.get("metrics", {}).get(monitor)
    return Status(
        run=run.name,
        state=name,
        detail=detail,
        cluster=cluster,
        job=job,
        node=str(state.get("node", "")),
        attempts=told.generation,
        epoch=int(state.get("epoch", 0)),
        step=int(state.get("step", 0)),
        metric=f"{monitor} {value:.4f}" if isinstance(value, _NUMBER) else "",
        age_s=time.time() - float(state.get("time") or submit.get("time") or told.made),
    )


def _state(told: _Records, jobs: dict[str, slurm.JobInfo] | None) -> tuple[str, str]:
    """The state's name and what more there is to say. `jobs` is None when SLURM did not answer."""
    submit, state = told.submit, told.state
    if told.result:
        return "finished", ""
    cluster, job = _newest(submit, state)
    info = jobs.get(job) if jobs and cluster == "slurm" else None
    reason = str(state.get("reason", ""))
    if info and info.live:
        if info.state == "PENDING":
            return ("requeued" if told.generation else "pending"), info.reason
        return "running", str(state.get("phase", "starting"))
    if submit.get("cancelled", 0) > state.get("started", 0):
        return "cancelled", reason
    if jobs is None and cluster == "slurm" and state.get("phase") not in ("stopped", "ended"):
        return ("running" if state else "pending"), f"{_heard(state)}SLURM does not answer"
    if not state or (cluster == "local" and submit.get("time", 0) > state["time"]):
        return _unstarted(submit)
    phase = str(state["phase"])
    if state.get("job") is not None:
        ended = {"stopped": ("stopped", reason), "ended": ("failed", reason)}
        return ended.get(phase, ("lost", f"the job ended without a word while {phase}"))
    return _local_state(state, phase, reason)


def _newest(submit: dict[str, Any], state: dict[str, Any]) -> tuple[str, str]:
    """Cluster and job of a run: an attempt that began after the last submission may be a hand-made sbatch or bash."""
    if state.get("started", 0) > submit.get("time", 0):
        if state.get("job"):
            return "slurm", str(state["job"])
        if submit.get("cluster") != "local":
            return "local", str(state["pid"])
    return str(submit.get("cluster", "")), str(submit.get("job", ""))


def _heard(state: dict[str, Any]) -> str:
    age = time.time() - float(state.get("time", 0))
    return f"on {state['host']}, last heard of {age:.0f} s ago; " if state else ""


def _local_state(state: dict[str, Any], phase: str, reason: str) -> tuple[str, str]:
    """Of a run outside SLURM, by the process that holds it."""
    here = state.get("host") == socket.gethostname()
    alive = here and same_process(state["pid"], state.get("process_start"))
    if phase == "stopped":
        return ("requeued" if alive else "stopped"), reason
    if phase == "ended":
        return "failed", reason
    if here and not alive:
        return "lost", f"the job ended without a word while {phase}"
    return "running", phase if here else _heard(state).removesuffix("; ")


def _unstarted(submit: dict[str, Any]) -> tuple[str, str]:
    if not submit:
        return "planned", "not submitted"
    if submit.get("cluster") == "slurm":
        return "lost", "no attempt has started, and the job is gone"
    alive = same_process(int(submit["job"]), submit.get("process_start"))
    return ("pending", "starting") if alive else ("failed", "the batch script ended before its first attempt")


def live(state: str) -> bool:
    return state in ("running", "pending", "requeued")


def cancel(run: RunDir) -> str:
    """End a run for good: scancel, or TERM to its local batch shell. Raises UserError when there is nothing to end."""
    now = status(run)
    if now.state == "damaged":
        raise UserError(f"{run.name} is damaged: {now.detail}")
    if not live(now.state):
        raise UserError(f"{run.name} is {now.state}: nothing to cancel")
    submit, state = read_json(run.submit), read_json(run.state)
    cluster, job = _newest(submit, state)
    if cluster == "slurm":
        slurm.cancel(job)
        _mark_cancelled(run, submit)
        return f"job {job}"
    if now.state == "pending":
        raise UserError(f"{run.name} is just starting: repeat this in a moment")
    if state["host"] != socket.gethostname():
        raise UserError(f"{run.name} runs on {state['host']}; cancel it there")
    if not same_process(state["pid"], state.get("process_start")):
        raise UserError(f"{run.name} has ended just now: nothing to cancel")
    _mark_cancelled(run, submit)
    os.kill(state["pid"], signal.SIGTERM)
    return f"process {state['pid']}"


def _mark_cancelled(run: RunDir, submit: dict[str, Any]) -> None:
    write_json(run.submit, {**submit, "cancelled": round(time.time(), 3)})
    run.event("cancel", "login")
