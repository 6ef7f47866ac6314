"""The state of runs, from squeue, then sacct, then their folders: it outlives the shell that submitted them.

At most two calls of SLURM for any number of runs, and right without the second (no accounting) or both (no answer).
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc import slurm
from hpc.attempt import record_submission, same_process
from hpc.errors import UserError
from hpc.records import Reader, Records
from hpc.rundir import RunDir, all_runs, find_run, write_json
from hpc.states import Place, state_of
from hpc.sweepdir import SweepDir, find_sweep, sweep_of

_ORDER = ("finished", "running", "requeued", "pending", "stopped", "failed", "cancelled", "lost", "planned", "damaged")
_CLOCKS_S = 30
"""So far the clocks of login node and controller may be apart."""
_SIGNALLED = 128
"""Exit codes from here on say that something else ended the tasks; what, SLURM may know."""


@dataclass(frozen=True)
class Status:
    """One line of `hpc ls`."""

    run: str
    state: str
    """finished, running, pending, requeued, stopped, failed, cancelled, lost, planned, or damaged."""
    detail: str
    sweep: str
    """The sweep that this run is a row of."""
    cluster: str
    job: str
    node: str
    attempts: int
    epoch: int
    step: int
    steps: int
    """Of the whole training, 0 where that is not known yet."""
    monitor: str
    best: float | None
    """The monitored metric at its best."""
    direction: str
    """Whether a better value of it is higher (max) or lower (min)."""
    age_s: float
    """Seconds since the run last changed its state."""

    @property
    def metric(self) -> str:
        return "" if self.best is None else f"{self.monitor} {self.best:.4f}"

    @property
    def live(self) -> bool:
        return live(self.state)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "metric": self.metric}


@dataclass(frozen=True)
class Seen:
    """A run with all that was asked about it."""

    run: RunDir
    records: Records | None
    """None where they are damaged: `status` says how."""
    job: slurm.JobInfo | None
    """Its job in squeue, ended ones too."""
    accounted: slurm.Accounted | None
    status: Status


class Scheduler:
    """SLURM's answers: squeue anew after `keep_s`, sacct once for each job that has ended."""

    def __init__(self, keep_s: float = float("inf")) -> None:
        self._keep_s = keep_s
        self._asked_at = float("-inf")
        self._jobs: dict[str, slurm.JobInfo] | None = {}
        self._accounted: dict[str, slurm.Accounted] = {}
        self._accounting = True

    def queue(self) -> dict[str, slurm.JobInfo] | None:
        """The jobs in squeue, None where SLURM does not answer."""
        if time.monotonic() - self._asked_at > self._keep_s or self._asked_at < 0:
            try:
                self._jobs = slurm.queue()
            except slurm.SlurmError:
                self._jobs = None
            self._asked_at = time.monotonic()
        return self._jobs

    def accounting(self, jobs: Iterable[str]) -> dict[str, slurm.Accounted]:
        """What sacct knows of these jobs; once it says that there is no accounting, it is not asked again."""
        jobs = list(dict.fromkeys(jobs))
        new = [job for job in jobs if job not in self._accounted]
        if new and self._accounting and self._jobs is not None:
            try:
                self._accounted.update(slurm.accounting(new))
            except slurm.SlurmError:
                self._accounting = False
        return {job: self._accounted[job] for job in jobs if job in self._accounted}

    def forget(self) -> None:
        """Ask squeue again."""
        self._asked_at = float("-inf")


def look(
    runs: Sequence[RunDir],
    scheduler: Scheduler | None = None,
    reader: Reader | None = None,
    *,
    account: bool = False,
    thorough: bool = False,
) -> list[Seen]:
    """What is known of each run. One whose files are damaged does not hide the others.

    A job that carries a run's token and is not recorded (its shell was killed after sbatch) is recorded here.
    `account`: ask sacct also about runs that say themselves how they ended. `thorough`: parse experiment.yaml as well.
    """
    scheduler, reader = scheduler or Scheduler(), reader or Reader()
    told = reader.read(runs, thorough)
    jobs: dict[str, slurm.JobInfo] | None = {}
    if any(isinstance(records, Records) and _concerns_slurm(records) for records in told):
        jobs = scheduler.queue()
        if jobs and _repair(runs, told, jobs):
            told = reader.read(runs)
    places = [_place(records, jobs) if isinstance(records, Records) else None for records in told]
    unclear = [
        place.job
        for place, records in zip(places, told, strict=True)
        if place and isinstance(records, Records) and jobs is not None and _unclear(place, records, account)
    ]
    accounted = scheduler.accounting(unclear) if unclear else {}
    return [
        Seen(run, None, None, None, _damaged(run, records))
        if isinstance(records, str) or place is None
        else _seen(run, records, place, accounted.get(place.job), silent=jobs is None)
        for run, records, place in zip(runs, told, places, strict=True)
    ]


def _concerns_slurm(records: Records) -> bool:
    """Whether squeue may know more: of a run that is on SLURM, or was made and has no record of a submission."""
    return not records.result and any(cluster in ("slurm", "") for cluster, _ in records.places())


def _place(records: Records, jobs: dict[str, slurm.JobInfo] | None) -> Place:
    """Where the run is: the newest of its jobs that is alive, or the newest."""
    places = records.places()
    known = [Place(cluster, job, jobs.get(job) if jobs and cluster == "slurm" else None) for cluster, job in places]
    return next((place for place in known if place.info and place.info.live), known[0])


def _repair(runs: Sequence[RunDir], told: Sequence[Records | str], jobs: dict[str, slurm.JobInfo]) -> bool:
    """Record jobs that are nobody's by their tokens; whether there were any."""
    alive = {info.comment: info for info in jobs.values() if info.live}
    changed = False
    for run, records in zip(runs, told, strict=True):
        if isinstance(records, str) or records.result or (info := alive.get(records.token)) is None:
            continue
        place = _place(records, jobs)
        if not (place.info and place.info.live) and _later(info, records):
            with suppress(OSError):  # somebody else's run
                record_submission(run, "slurm", info.job)
                changed = True
    rows = zip(runs, told, strict=True)
    sweeps = {records.sweep: run.path.parent for run, records in rows if isinstance(records, Records) and records.sweep}
    named = {comment.partition("/")[0] for comment in alive}
    repaired = [_repair_sweep(SweepDir(path), jobs) for name, path in sweeps.items() if name in named]
    return changed or any(repaired)


def _later(info: slurm.JobInfo, records: Records) -> bool:
    """Whether the job is newer than what is recorded: an older one is of an equal run in another folder of runs."""
    return info.submitted is None or info.submitted > max(records.made, records.submitted) - _CLOCKS_S


def _repair_sweep(sweep: SweepDir, jobs: dict[str, slurm.JobInfo]) -> bool:
    with suppress(UserError, slurm.SlurmError, OSError):
        unrecorded = {sweep.token(chunk.number, sweep.count_submissions()) for chunk in sweep.chunks()}
        if unrecorded & {info.comment for info in jobs.values() if info.live}:
            from hpc import arrays

            return arrays.repair(sweep, jobs)
    return False


def _unclear(place: Place, records: Records, account: bool) -> bool:
    """Whether only sacct may know how the run ended."""
    if place.cluster != "slurm" or records.result or (place.info and place.info.live):
        return False
    if account:
        return True
    says_itself = records.phase == "ended" and records.state.get("code", 0) < _SIGNALLED
    return not (place.info or records.cancelled or says_itself)


def statuses(runs: Sequence[RunDir]) -> list[Status]:
    """The state of each run, in their order."""
    return [seen.status for seen in look(runs)]


def status(run: RunDir) -> Status:
    return look([run], thorough=True)[0].status


def _damaged(run: RunDir, fault: Any) -> Status:
    try:
        age = time.time() - run.experiment.stat().st_mtime
    except OSError:
        age = 0.0
    return Status(run.name, "damaged", str(fault), "", "", "", "", 0, 0, 0, 0, "", None, "max", age)


def _seen(run: RunDir, told: Records, place: Place, accounted: slurm.Accounted | None, silent: bool) -> Seen:
    name, detail = state_of(told, place, accounted, silent)
    best = told.result.get("best") or told.state.get("best") or {}
    monitor = str(told.result.get("monitor") or told.state.get("monitor") or "")
    value = best.get("metrics", {}).get(monitor)
    status = Status(
        run=run.name,
        state=name,
        detail=detail,
        sweep=told.sweep,
        cluster=place.cluster,
        job=place.job,
        node=str(told.state.get("node", "")),
        attempts=told.generation,
        epoch=int(told.state.get("epoch", 0)),
        step=int(told.state.get("step", 0)),
        steps=int(told.state.get("steps") or 0),
        monitor=monitor,
        best=float(value) if isinstance(value, int | float) else None,
        direction=str(told.result.get("direction") or ("min" if "loss" in monitor else "max")),
        age_s=time.time() - float(told.state.get("time") or told.submitted or told.made),
    )
    return Seen(run, told, place.info, accounted, status)


def find(runs: Path, name: str) -> RunDir | SweepDir:
    """A run or sweep by its path, name, id, unique beginning, or job (123, 123_4). Raises UserError."""
    if (sweep := find_sweep(runs, name)) is not None:
        if sweep.name.startswith(name) and sweep.name != name:
            others = [r.name for r in all_runs(runs) if r.name.startswith(name) and r.path.parent != sweep.path]
            if others:
                raise UserError(f"{name!r} names {len(others) + 1}: {', '.join([sweep.name, *others])}")
        return sweep
    try:
        return find_run(runs, name)
    except UserError:
        if re.fullmatch(r"\d+(_\d+)?", name) and (found := _of_job(runs, name)):
            return found
        raise


def _of_job(runs: Path, job: str) -> RunDir | SweepDir | None:
    """The run of this job; of an array as a whole its sweep."""
    known = all_runs(runs)
    for run, records in zip(known, Reader().read(known), strict=True):
        jobs = [number for _, number in records.places()] if isinstance(records, Records) else []
        if job in jobs:
            return run
        if run.in_sweep and job in [number.partition("_")[0] for number in jobs]:
            return sweep_of(run)
    return None


def live(state: str) -> bool:
    return state in ("running", "pending", "requeued")


def cancel(run: RunDir) -> str:
    """End a run for good: scancel, or TERM to its local batch shell; the job that was ended.

    Raises UserError when there is nothing to end.
    """
    return cancel_all([run])[0]


def cancel_sweep(sweep: SweepDir) -> str:
    """End all rows of a sweep with one scancel, or its local controller. Raises UserError when no row is alive."""
    return cancel_all([sweep])[0]


def cancel_all(targets: Sequence[RunDir | SweepDir]) -> list[str]:
    """End runs and sweeps for good, with one scancel for all of them; the jobs that were ended, of each target.

    Raises UserError when there is nothing to end of one of them, before any is ended.
    """
    found = [_Cancelled.of(target) for target in targets]
    if jobs := list(dict.fromkeys(job for one in found for job in one.jobs)):
        slurm.cancel(*jobs)
    for one in found:
        one.mark()
        for pid, start in one.processes:
            if same_process(pid, start):
                os.kill(pid, signal.SIGTERM)
    return [one.told for one in found]


@dataclass(frozen=True)
class _Cancelled:
    """What is to be ended of one target."""

    target: RunDir | SweepDir
    seen: list[Seen]
    jobs: list[str]
    processes: list[tuple[int, str]]
    """Process numbers with the starts that belong to them."""

    @staticmethod
    def of(target: RunDir | SweepDir) -> _Cancelled:
        several = isinstance(target, SweepDir)
        seen = look(target.rows() if isinstance(target, SweepDir) else [target])
        alive = [one for one in seen if one.status.live]
        if not alive:
            raise UserError(_nothing(target.name, [one.status for one in seen]))
        on_slurm = [one.status.job for one in alive if one.status.cluster == "slurm"]
        # Of a sweep the arrays as a whole: their ids are few.
        jobs = [job.partition("_")[0] for job in on_slurm] if several else on_slurm
        here = [_process(one, several) for one in alive if one.status.cluster != "slurm"]
        return _Cancelled(target, alive, list(dict.fromkeys(jobs)), list(dict.fromkeys(here)))

    @property
    def told(self) -> str:
        return ", ".join([*(f"job {job}" for job in self.jobs), *(f"process {pid}" for pid, _ in self.processes)])

    def mark(self) -> None:
        """Before the signal: a row that is ended by it finds the mark."""
        if isinstance(self.target, SweepDir) and self.target.count_submissions():
            self.target.mark_cancelled()
        runs = [one.run for one in self.seen]
        for run, records in zip(runs, Reader().read(runs), strict=True):
            if isinstance(records, Records) and not records.cancelled:  # submitted alone, or by an earlier submission
                write_json(run.submit, {**records.submit, "cancelled": round(time.time(), 3)})
                run.event("cancel", "login")


def _nothing(name: str, statuses: list[Status]) -> str:
    if len(statuses) == 1:
        state, detail = statuses[0].state, statuses[0].detail
        return f"{name} is damaged: {detail}" if state == "damaged" else f"{name} is {state}: nothing to cancel"
    return f"{name}: nothing to cancel ({count_states(statuses)})"


def count_states(statuses: Sequence[Status]) -> str:
    """12 finished, 3 running, 25 pending"""
    counts = Counter(status.state for status in statuses)
    return ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])


def _process(one: Seen, whole_sweep: bool) -> tuple[int, str]:
    """The process to end: the sweep's controller or the run's own batch shell. Raises UserError."""
    assert one.records is not None
    submit, state = one.records.submit, one.records.state
    controller = int(submit["job"]) if submit.get("cluster") == "local" else 0
    if whole_sweep and same_process(controller, submit.get("process_start")):
        return controller, str(submit["process_start"])
    if one.status.state == "pending":
        if one.records.sweep:
            raise UserError(f"{one.run.name} waits for its turn: cancel the sweep, {one.records.sweep}")
        raise UserError(f"{one.run.name} is just starting: repeat this in a moment")
    if state["host"] != os.uname().nodename:
        raise UserError(f"{one.run.name} runs on {state['host']}; cancel it there")
    if not same_process(state["pid"], state.get("process_start")):
        raise UserError(f"{one.run.name} has ended just now: nothing to cancel")
    return int(state["pid"]), str(state["process_start"])
