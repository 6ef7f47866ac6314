"""Start of an attempt, in the batch shell: `python -m hpc.attempt RUN` takes the next generation and the run's lease.

Prints shell assignments for the job: generation, master address and port, end and notice. Leaves with 2 and one line on
stderr when the run is finished, held by another live job, or not ours alone to change: the batch script ends there.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

from hpc import allocation, limits, payload, slurm, trust
from hpc.errors import UserError
from hpc.preempt import ExitCode
from hpc.rundir import RunDir, locked, read_json, write_json
from hpc.sweepdir import alone, sweep_of

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PATIENCE_S, _AGAIN_S = 120.0, 5.0
"""While a disk that refuses is tried again, and how often."""
_SILENT_S = 60
"""A holder that nobody can be asked about is gone when its state.json, written each second, is older than this."""


def begin(run: RunDir, shell_pid: int) -> dict[str, str]:
    """Take the run: a new generation, recorded in state.json. Raises UserError when it cannot be had."""
    if not run.experiment.is_file():
        raise UserError(f"{run.path}: no run folder (experiment.yaml is missing); make one with 'hpc submit'")
    check_trust(run)
    with locked(run.lease):  # between the look at the holder and our own entry
        os.utime(run.lease)  # the file server's time, to compare with that of state.json
        return _begin(run, shell_pid)


def check_trust(run: RunDir) -> None:
    """Raises UserError where somebody else might have put a hand on what is run: folder, script or code."""
    sweep = sweep_of(run)
    parts = [run.experiment, alone(run).script, run.code, *run.code.rglob("*")]
    trust.check(*([sweep.path, run.path] if sweep else [run.path]), *parts)


def _begin_patiently(run: RunDir, shell_pid: int) -> dict[str, str]:
    """A disk that is full or away for a moment costs no run. Raises OSError when it stays so, and as `begin` does."""
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return begin(run, shell_pid)
        except OSError as error:
            if time.monotonic() > end:
                raise
            print(f"{error}; tried again in {_AGAIN_S:g} s", file=sys.stderr)
        time.sleep(_AGAIN_S)


class Finished(UserError):
    """There is a result: nothing is left to do."""


def _begin(run: RunDir, shell_pid: int) -> dict[str, str]:
    if run.result.exists():
        raise Finished(f"{run.name} is finished: {run.result} exists; see 'hpc show {run.name}'")
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
            **_cluster(allocation.cluster_name() if job else ""),
            "host": host,
            "node": allocation.node_name(),
            "restart": allocation.restart_count(),
            "pid": shell_pid,
            "process_start": process_start(shell_pid),
            "phase": "starting",
            "step": state.get("step", 0),
            "epoch": state.get("epoch", 0),
            "started": now,
            "time": now,
        },
    )
    commit = {"commit": name} if (name := payload.commit(run.code)) else {}  # the code does not come home with the logs
    place = {"job": job, "node": allocation.node_name(), "restart": allocation.restart_count()}
    run.event("start", "shell", generation, **place, **commit)
    return {"HPC_GENERATION": str(generation), "HPC_MASTER_ADDR": address, "HPC_MASTER_PORT": str(port)}


def _cluster(name: str) -> dict[str, str]:
    """Which of SLURM's clusters: job numbers are each one's own."""
    return {"slurm_cluster": name} if name else {}


def _take_generation(run: RunDir) -> int:
    """The next free number; the exclusive creation of its event file decides between two that ask at once.

    Above that of every checkpoint, too: where events/ was lost, older saves would else count as the newer ones.
    """
    run.events.mkdir(exist_ok=True)
    newest = run.newest_checkpoint() or "g000-"
    generation = max(run.last_generation(), int(newest[1:].partition("-")[0]))
    while True:
        generation += 1
        try:
            (run.events / f"{generation:03d}-shell.jsonl").touch(exist_ok=False)
        except FileExistsError:
            continue
        return generation


def _mine(state: dict[str, Any], job: str | None, shell_pid: int) -> bool:
    """A requeue of the same job, or the same local shell after its own restart, takes its own lease at once.

    Not a second script inside one allocation (salloc), nor a job of this number on another cluster.
    """
    here = state.get("host") == socket.gethostname()
    itself = here and state.get("pid") == shell_pid and state.get("process_start") == process_start(shell_pid)
    if job is None:
        return state.get("job") is None and itself
    home = state.get("slurm_cluster")
    same = state.get("job") == job and (not home or home == (allocation.cluster_name() or home))
    restarted = state.get("restart") != allocation.restart_count()
    return same and (itself or restarted or not (here and same_process(int(state["pid"]), state.get("process_start"))))


def _alive(run: RunDir, state: dict[str, Any]) -> bool:
    if state.get("phase") in ("ended", "stopped"):
        return False
    if job := state.get("job"):
        home = state.get("slurm_cluster")
        if home and home != slurm.cluster_name():
            return _heard(run)  # a job of this number here is another
        try:
            info = slurm.queue([job]).get(job)
        except (slurm.SlurmError, OSError):
            return _heard(run)  # no controller to ask from here
        return info is not None and info.live and info.state != "PENDING" and run.owns(info.comment)
    if state.get("host") == socket.gethostname():
        return same_process(int(state["pid"]), state.get("process_start"))
    return _heard(run)


def _heard(run: RunDir) -> bool:
    """Whether the holder has written lately; both times are the file server's, so no clock but one is read."""
    return abs(run.lease.stat().st_mtime - run.state.stat().st_mtime) < _SILENT_S  # ahead: the clock was set back


def process_alive(pid: int) -> bool:
    """Whether a process of this host exists (a zombie is none)."""
    return _stat(pid)[:1] not in ([], ["Z"])


def process_start(pid: int) -> str:
    """Boot id and start of a process in clock ticks since then, unchanged by exec; empty where there is no process."""
    fields = _stat(pid)
    return f"{_BOOT_ID.read_text().strip()} {fields[19]}" if fields else ""


def same_process(pid: int, start: str | None) -> bool:
    """Whether the process recorded with its start is still there: its bare number may be another's by now."""
    return bool(start) and process_alive(pid) and process_start(pid) == start


def _stat(pid: int) -> list[str]:
    """Fields 3 (state) and later of /proc/PID/stat, field 22 the start; the name before them may hold blanks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def record_submission(run: RunDir, cluster: str, job: str, when: float | None = None) -> None:
    """submit.json and its event; of a local job, whose number is a pid, with the process's start.

    `when` it was submitted, if that was not now.
    """
    here = {"process_start": process_start(int(job))} if cluster == "local" else _cluster(slurm.cluster_name())
    write_json(run.submit, {"cluster": cluster, "job": job, "time": round(when or time.time(), 3), **here})
    run.event("submit", "login", cluster=cluster, job=job)


def main() -> int:
    try:
        values = _begin_patiently(RunDir(sys.argv[1]), os.getppid()) | limits.of_this_job()
    except Finished as error:  # the script is to leave, and with 0: what waits for this job (afterok) may start
        print(error, file=sys.stderr)
        print(f"exit {ExitCode.DONE:d}")
        return ExitCode.DONE
    except UserError as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_INPUT
    except OSError as error:
        print(f"this attempt could not begin: {error}", file=sys.stderr)
        return ExitCode.STORAGE
    print("export " + " ".join(f"{key}={shlex.quote(value)}" for key, value in values.items()))
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
