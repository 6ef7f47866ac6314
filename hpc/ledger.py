"""The state of runs, from their folders and squeue: it outlives the shell that submitted them and needs no sacct."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any

from hpc import slurm
from hpc.attempt import process_alive
from hpc.errors import UserError
from hpc.rundir import RunDir, read_json, write_json


@dataclass(frozen=True)
class Status:
    """One line of `hpc ls`."""

    run: str
    state: str
    """finished, running, pending, requeued, stopped, failed, cancelled, lost, or planned."""
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


def statuses(runs: list[RunDir]) -> list[Status]:
    """The state of each run; one squeue for all of them."""
    jobs: dict[str, slurm.JobInfo] | None = {}
    if any(_newest(read_json(run.submit), read_json(run.state))[0] == "slurm" for run in runs):
        try:
            jobs = slurm.queue()
        except (slurm.SlurmError, OSError):
            jobs = None
    return [_status(run, jobs) for run in runs]


def status(run: RunDir) -> Status:
    return statuses([run])[0]


def _status(run: RunDir, jobs: dict[str, slurm.JobInfo] | None) -> Status:
    submit, state, result = read_json(run.submit), read_json(run.state), read_json(run.result)
    cluster, job = _newest(submit, state)
    name, detail = _state(run, submit, state, result, jobs)
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
        attempts=run.last_generation(),
        epoch=int(state.get("epoch", 0)),
        step=int(state.get("step", 0)),
        metric=f"{monitor} {value:.4f}" if value is not None else "",
        age_s=time.time() - float(state.get("time") or submit.get("time") or run.experiment.stat().st_mtime),
    )


def _state(
    run: RunDir,
    submit: dict[str, Any],
    state: dict[str, Any],
    result: dict[str, Any],
    jobs: dict[str, slurm.JobInfo] | None,
) -> tuple[str, str]:
    """The state's name and what more there is to say. `jobs` is None when SLURM did not answer."""
    if result:
        return "finished", ""
    cluster, job = _newest(submit, state)
    info = jobs.get(job) if jobs and cluster == "slurm" else None
    reason = str(state.get("reason", ""))
    if info and info.live:
        if info.state == "PENDING":
            return ("requeued" if run.last_generation() else "pending"), info.reason
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
    alive = here and process_alive(int(state["pid"]))
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
    alive = process_alive(int(submit["job"]))
    return ("pending", "starting") if alive else ("failed", "the batch script ended before its first attempt")


def live(state: str) -> bool:
    return state in ("running", "pending", "requeued")


def cancel(run: RunDir) -> str:
    """End a run for good: scancel, or TERM to its local batch shell. Raises UserError when there is nothing to end."""
    now = status(run)
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
    _mark_cancelled(run, submit)
    os.kill(int(state["pid"]), signal.SIGTERM)
    return f"process {state['pid']}"


def _mark_cancelled(run: RunDir, submit: dict[str, Any]) -> None:
    write_json(run.submit, {**submit, "cancelled": round(time.time(), 3)})
    run.event("cancel", "login")
