"""The state of runs, from squeue, then sacct, then their folders: it outlives the shell that submitted them.

At most two calls of SLURM for any number of runs, and right without the second (no accounting) or both (no answer); a
third asks the cluster's name where a run that it does not know may be on another. A job is a run's by its number and
its comment.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpc import slurm
from hpc.attempt import record_submission, same_process
from hpc.errors import UserError
from hpc.metrics import is_finite, lower_is_better
from hpc.records import Reader, Records
from hpc.rundir import RunDir, all_runs, find_run, write_json
from hpc.states import Place, state_of
from hpc.sweepdir import SweepDir, find_sweep, sweep_of

_ORDER = ("finished", "running", "requeued", "pending", "stopped", "failed", "cancelled", "lost", "planned", "damaged")
_CLOCKS_S = 30
"""So far the clocks of login node and controller may be apart."""
_SUBMITTING_S = 300
"""So long the submission of a sweep may take: its record has the time of the end."""
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
        return self.state in ("running", "pending", "requeued")

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
    elsewhere: str = ""
    """The cluster of SLURM that it is on, if that is not the one that answers here."""


class Scheduler:
    """SLURM's answers: squeue anew after `keep_s`, and sacct then, but once for each job that has ended."""

    def __init__(self, keep_s: float = float("inf")) -> None:
        self._keep_s = keep_s
        self._asked_at = float("-inf")
        self._jobs: dict[str, slurm.JobInfo] | None = {}
        self._accounted: dict[str, slurm.Accounted] = {}
        self._told: set[str] = set()
        """The jobs that sacct need not be asked about again."""
        self._accounting = True
        self._cluster: str | None = None

    def queue(self) -> dict[str, slurm.JobInfo] | None:
        """The jobs in squeue, None where SLURM does not answer."""
        if time.monotonic() - self._asked_at > self._keep_s or self._asked_at < 0:
            try:
                self._jobs = slurm.queue()
            except slurm.SlurmError:
                self._jobs = None
            self._asked_at = time.monotonic()
            self._told = set(self._accounted)
        return self._jobs

    def cluster(self) -> str:
        """SLURM's name of the cluster that answers, empty where none does."""
        if self._cluster is None:
            self._cluster = slurm.cluster_name()
        return self._cluster

    def accounting(self, since: Mapping[str, float]) -> dict[str, slurm.Accounted]:
        """How these jobs, submitted since then, have ended; of those that have not, or that sacct lacks, nothing.

        Once sacct says that there is no accounting, it is not asked again.
        """
        new = [job for job in since if job not in self._told]
        if new and self._accounting and self._jobs is not None:
            try:
                told = slurm.accounting(new, since)
            except slurm.SlurmError:
                self._accounting, told = False, {}
            self._accounted |= {job: known for job, known in told.items() if known.over}
            self._told.update(new)
        return {job: self._accounted[job] for job in since if job in self._accounted}


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
            told = reader.read(runs, thorough)
    whole = [(run, records) for run, records in zip(runs, told, strict=True) if isinstance(records, Records)]
    places = {run.path: _place(run, records, jobs) for run, records in whole}
    since: dict[str, float] = {}
    for run, records in whole:
        place = places[run.path]
        if jobs is not None and _unclear(place, records, account):
            since[place.job] = min(_since(place, records), since.get(place.job, float("inf")))
    accounted = scheduler.accounting(since) if since else {}
    return [
        Seen(run, None, None, None, _damaged(run, records))
        if isinstance(records, str)
        else _seen(run, records, places[run.path], accounted, scheduler, silent=jobs is None)
        for run, records in zip(runs, told, strict=True)
    ]


def _concerns_slurm(records: Records) -> bool:
    """Whether squeue may know more: of a run that is on SLURM, or was made and has no record of a submission."""
    return not records.result and any(cluster in ("slurm", "") for cluster, _ in records.places())


def _place(run: RunDir, records: Records, jobs: dict[str, slurm.JobInfo] | None) -> Place:
    """Where the run is: the newest of its jobs that is alive, or the newest."""

    def info(cluster: str, job: str) -> slurm.JobInfo | None:
        found = jobs.get(job) if jobs and cluster == "slurm" else None
        return found if found and run.owns(found.comment) else None

    known = [Place(cluster, job, info(cluster, job)) for cluster, job in records.places()]
    return next((place for place in known if place.info and place.info.live), known[0])


def _since(place: Place, records: Records) -> float:
    """The earliest time at which this job can have been submitted."""
    return records.submitted - _SUBMITTING_S if place.job == records.submit.get("job") else 0.0


def _ours(run: RunDir, place: Place, records: Records, told: slurm.Accounted) -> bool:
    """Whether sacct's line is of this run's job: by its comment, or where that is not kept by the time."""
    home = records.slurm_cluster(place.job)
    if home and told.cluster and home != told.cluster:
        return False
    if told.comment:
        return run.owns(told.comment)
    latest = records.submitted if place.job == records.submit.get("job") else records.began
    return told.submitted is None or told.submitted <= latest + _CLOCKS_S


def _repair(runs: Sequence[RunDir], told: Sequence[Records | str], jobs: dict[str, slurm.JobInfo]) -> bool:
    """Record jobs that are nobody's by their tokens; whether there were any."""
    alive = {info.comment: info for info in jobs.values() if info.live}
    changed = False
    for run, records in zip(runs, told, strict=True):
        if isinstance(records, str) or records.result or (info := alive.get(records.token)) is None:
            continue
        place = _place(run, records, jobs)
        if not (place.info and place.info.live) and _later(info, records):
            with suppress(OSError):  # somebody else's run
                record_submission(run, "slurm", info.job, info.submitted)
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
    sweep = run.path.parent.name if run.in_sweep else ""
    return Status(run.name, "damaged", str(fault), sweep, "", "", "", 0, 0, 0, 0, "", None, "max", age)


def _seen(
    run: RunDir,
    told: Records,
    place: Place,
    known: Mapping[str, slurm.Accounted],
    scheduler: Scheduler,
    silent: bool,
) -> Seen:
    accounted = known.get(place.job)
    accounted = accounted if accounted and _ours(run, place, told, accounted) else None
    home = told.slurm_cluster(place.job)
    if place.cluster == "slurm" and home and not (told.result or place.info or accounted or silent):
        here = scheduler.cluster()
        place = replace(place, elsewhere=home if here and here != home else "")
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
        best=float(value) if is_finite(value) else None,
        direction=str(told.result.get("direction") or ("min" if lower_is_better(monitor) else "max")),
        age_s=time.time() - float(told.state.get("time") or told.submitted or told.made),
    )
    return Seen(run, told, place.info, accounted, status, place.elsewhere)


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
    """The run of this job; of an array as a whole its sweep. Raises UserError where several have had this number."""
    known = all_runs(runs)
    found: dict[Path, RunDir | SweepDir] = {}
    for run, records in zip(known, Reader().read(known), strict=True):
        jobs = [number for _, number in records.places()] if isinstance(records, Records) else []
        if job in jobs:
            found[run.path] = run
        elif job in [number.partition("_")[0] for number in jobs] and (sweep := sweep_of(run)):
            found[sweep.path] = sweep
    if len(found) > 1:
        names = ", ".join(one.name for one in found.values())
        raise UserError(f"job {job} is of {len(found)} runs, job numbers came again: {names}; name one")
    return next(iter(found.values()), None)


def cancel_all(targets: Sequence[RunDir | SweepDir]) -> list[str]:
    """End runs and sweeps for good, with one scancel for all of them; the jobs that were ended, of each target.

    Here TERM goes to a run's batch shell, or to a sweep's controller. Raises UserError when there is nothing to end of
    one of them, before any is ended.
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
        for one in alive:
            if one.elsewhere:
                raise UserError(f"{one.run.name} is on cluster {one.elsewhere}; cancel it there")
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
