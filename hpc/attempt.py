"""Start of an attempt, in the batch shell: `python -m hpc.attempt RUN` takes the next generation and the run's lease.

Prints shell assignments for the job (generation, master address and port). Leaves with 2 and one line on stderr when
the run is finished or held by another live job: the batch script ends there.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc import allocation, slurm
from hpc.errors import UserError
from hpc.preempt import ExitCode
from hpc.rundir import RunDir, read_json, write_json

_SILENT_S = 60
"""A holder that nobody can be asked about is gone when its state.json, written each second, is older than this."""


def begin(run: RunDir, shell_pid: int) -> dict[str, str]:
    """Take the run: a new generation, recorded in state.json. Raises UserError when it cannot be had."""
    if not run.experiment.is_file():
        raise UserError(f"{run.path}: no run folder (experiment.yaml is missing); make one with 'hpc submit'")
    with _alone(run):
        return _begin(run, shell_pid)


@contextmanager
def _alone(run: RunDir) -> Iterator[None]:
    """One starter at a time between its look at the holder and its own entry, where the file system has locks."""
    with run.lease.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            print(f"{run.lease}: this file system has no locks", file=sys.stderr)
        os.utime(run.lease)  # the file server's time, to compare with that of state.json
        yield


def _begin(run: RunDir, shell_pid: int) -> dict[str, str]:
    if run.result.exists():
        raise UserError(f"{run.name} is finished: {run.result} exists; see 'hpc show {run.name}'")
    job = allocation.job_id()
    state = read_json(run.state)
    if state and not _mine(state, job, shell_pid) and _alive(run, state):
        holder = f"job {state['job']}" if state.get("job") else f"process {state['pid']}"
        raise UserError(f"{run.name} is held by {holder} on {state['host']}: end that first ('hpc cancel {run.name}')")
    generation = _take_generation(run)
    host = socket.gethostname()
    address, port = allocation.master()
    now = round(time.time(), 3)
    write_json(
        run.state,
        {
            "generation": generation,
            "job": job,
            "host": host,
            "node": allocation.node_name(),
            "pid": shell_pid,
            "phase": "starting",
            "step": state.get("step", 0),
            "epoch": state.get("epoch", 0),
            "started": now,
            "time": now,
        },
    )
    run.event("start", "shell", generation, job=job, node=allocation.node_name(), restart=allocation.restart_count())
    return {"HPC_GENERATION": str(generation), "HPC_MASTER_ADDR": address, "HPC_MASTER_PORT": str(port)}


def _take_generation(run: RunDir) -> int:
    """The next free number; the exclusive creation of its event file decides between two that ask at once."""
    run.events.mkdir(exist_ok=True)
    generation = run.last_generation()
    while True:
        generation += 1
        try:
            (run.events / f"{generation:03d}-shell.jsonl").touch(exist_ok=False)
        except FileExistsError:
            continue
        return generation


def _mine(state: dict[str, Any], job: str | None, shell_pid: int) -> bool:
    """A requeue of the same job, or the same local shell after its own restart, takes its own lease at once."""
    if job is not None:
        return bool(state.get("job") == job)
    return state.get("job") is None and state.get("host") == socket.gethostname() and state.get("pid") == shell_pid


def _alive(run: RunDir, state: dict[str, Any]) -> bool:
    if state.get("phase") in ("ended", "stopped"):
        return False
    if job := state.get("job"):
        try:
            info = slurm.queue([job]).get(job)
        except (slurm.SlurmError, OSError):
            return _heard(run)  # no controller to ask from here
        return info is not None and info.live and info.state != "PENDING"
    return process_alive(int(state["pid"])) if state.get("host") == socket.gethostname() else _heard(run)


def _heard(run: RunDir) -> bool:
    """Whether the holder has written lately; both times are the file server's, so no clock but one is read."""
    return run.lease.stat().st_mtime - run.state.stat().st_mtime < _SILENT_S


def process_alive(pid: int) -> bool:
    """Whether a process of this host exists (a zombie is none)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main() -> int:
    try:
        values = begin(RunDir(sys.argv[1]), os.getppid())
    except UserError as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_INPUT
    print("export " + " ".join(f"{key}={shlex.quote(value)}" for key, value in values.items()))
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
