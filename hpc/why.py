"""`hpc why`: the state of a run in words, its best explanation first, ending with what to type next."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hpc import causes, pending
from hpc.ledger import Scheduler, Seen, Status, look
from hpc.pending import moment
from hpc.records import Records
from hpc.rundir import RunDir
from hpc.slurm import JobInfo
from hpc.states import early_end
from hpc.sweepdir import SweepDir, spec
from hpc.units import short_time
from hpc.verdict import FAILURES, NO_STEP

_SILENT_S = 600
"""A run that trains writes each second, but for saves and evaluations: after so long without a word it may hang."""
_SHOWN_ATTEMPTS = 5


@dataclass(frozen=True)
class Answer:
    """Why a run is in its state."""

    run: str
    state: str
    cause: str
    """The same for runs that are alike in it."""
    lines: list[str]
    """Sentences."""
    commands: list[str]
    """What to type next."""
    quote: list[str] = field(default_factory=list)
    """Lines of a log."""
    source: str = ""
    """The log that they are from."""
    attempts: list[str] = field(default_factory=list)
    """How earlier attempts ended, the last ones."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def explain(run: RunDir) -> Answer:
    """Why one run is in its state."""
    scheduler = Scheduler()
    (seen,) = look([run], scheduler, account=True, thorough=True)
    return _answer(seen, scheduler)


@dataclass(frozen=True)
class Group:
    """Rows of a sweep that are in one state for one cause."""

    rows: list[int]
    answer: Answer
    """Of the first of them."""

    def as_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, **self.answer.as_dict()}


def explain_sweep(sweep: SweepDir) -> list[Group]:
    """The rows of a sweep by state and cause; what went wrong first, the most rows first."""
    scheduler = Scheduler()
    groups: dict[tuple[str, str], Group] = {}
    for row, seen in enumerate(look(sweep.rows(), scheduler, account=True)):
        answer = _answer(seen, scheduler)
        groups.setdefault((answer.state, answer.cause), Group([], answer)).rows.append(row)
    return sorted(groups.values(), key=lambda group: (_RANK.get(group.answer.state, 0), -len(group.rows)))


_RANK = {"cancelled": 1, "requeued": 2, "pending": 3, "running": 4, "planned": 5, "finished": 6}


def rows_in_words(rows: Sequence[int]) -> str:
    """3 rows (0-1,7)"""
    return f"{len(rows)} row{'s' if len(rows) > 1 else ''} ({spec(rows)})"


def _answer(seen: Seen, scheduler: Scheduler) -> Answer:
    status, told = seen.status, seen.records
    if told is None:
        return Answer(
            status.run, status.state, "damaged", [f"One of its own files is damaged: {status.detail}."], ["hpc ls"]
        )
    if status.state == "planned":
        words = "Its folder was made, and no job was submitted for it."
        return Answer(status.run, status.state, "not submitted", [words], [f"hpc resume {status.run}"])
    if status.state == "finished":
        return _finished(status, told)
    if status.live:
        return _live(seen, told, scheduler)
    cause = causes.find(causes.Case(seen, told, scheduler.queue() or {} if seen.job else {}))
    attempts = _attempts(seen)
    return Answer(
        status.run, status.state, cause.name, cause.lines, cause.commands, cause.quote, cause.source, attempts
    )


def _finished(status: Status, told: Records) -> Answer:
    best = told.result.get("best", {})
    epoch = f" at epoch {best['epoch']}" if "epoch" in best else ""
    lines = [f"It finished at {moment(float(told.state.get('time') or told.submitted))}, in {_times(status.attempts)}."]
    if status.metric:
        lines.append(f"Best {status.metric}{epoch}.")
    if early := early_end(told.result):
        lines.append(f"It {early}.")
    return Answer(status.run, status.state, "finished", lines, [f"hpc show {status.run}", f"hpc report {status.run}"])


def _times(attempts: int) -> str:
    return f"{attempts} attempts" if attempts > 1 else "one attempt"


def _live(seen: Seen, told: Records, scheduler: Scheduler) -> Answer:
    status, info = seen.status, seen.job
    attempts = _attempts(seen)
    if status.state == "running":
        lines, commands = _running(status, told)
        return Answer(status.run, status.state, status.detail, lines, commands, attempts=attempts)
    if info is None:
        return Answer(status.run, status.state, status.detail, *_waits_here(status, told), attempts=attempts)
    lines = _waits(info, scheduler.queue() or {})
    if status.state == "requeued":
        lines += _last_failure(told)
        lines.append(f"It has had {_times(status.attempts)}. {causes.saved(seen.run)}")
    commands = [f"hpc watch {status.run}", f"hpc cancel {status.run}"]
    if pending.hopeless(info.reason):
        commands = [f"hpc cancel {status.run}", f"hpc resume {status.run}"]
    cause = status.state if info.reason in ("", "None") else info.reason
    return Answer(status.run, status.state, cause, lines, commands, attempts=attempts)


def _last_failure(told: Records) -> list[str]:
    """Of a run that is started again after one."""
    failed = told.phase == "stopped" and told.state.get("cause") in (*FAILURES, NO_STEP)
    return [f"Of its last attempt: {told.state.get('reason')}."] if failed else []


def _waits(info: JobInfo, jobs: Mapping[str, JobInfo]) -> list[str]:
    """A pending job: the reason in words, what to do, and SLURM's estimate."""
    reason = pending.in_words(info.reason)
    lines = [f"Job {info.job} waits in partition {info.partition}: {reason.words}."]
    if info.dependency:
        lines[0] = f"{lines[0].removesuffix('.')}: {_dependency(info.dependency, jobs)}."
    if info.start and not pending.hopeless(info.reason):
        away = info.start - time.time()
        soon = f" (in {short_time(away)})" if away > 0 else ""
        when = "It may start at" if info.reason == "BeginTime" else "SLURM expects it to start at"
        lines.append(f"{when} {moment(info.start)}{soon}.")
    elif not pending.hopeless(info.reason):
        lines.append("SLURM has no estimate of its start yet.")
    return [*lines, pending.remedy(info, info.comment)]


def _dependency(text: str, jobs: Mapping[str, JobInfo]) -> str:
    """afterok:12(unfulfilled), with the names and states of those that are ours."""
    numbers = [part.split("(")[0].split("_*")[0] for part in text.replace(",", ":").split(":") if part[:1].isdigit()]
    names = []
    for number in numbers:
        info = jobs.get(number) or next((job for job in jobs.values() if job.job.split("_")[0] == number), None)
        names.append(f"{number} ({info.comment}, {info.state.lower()})" if info else number)
    return f"{text.split(':', maxsplit=1)[0]} {', '.join(names)}" if names else text


def _waits_here(status: Status, told: Records) -> tuple[list[str], list[str]]:
    if status.state == "requeued":
        last = _last_failure(told) or ["It stopped."]
        return [*last, "Its script is starting it again."], [f"hpc logs {status.run} -f"]
    if "SLURM" in status.detail:
        return [f"{status.detail}: what its job waits for cannot be told now."], ["hpc doctor"]
    if told.sweep:
        return ["It waits for its turn among the rows of its sweep."], [f"hpc watch {told.sweep}"]
    return ["Its process is there, and its first attempt is about to begin."], [f"hpc logs {status.run} -f"]


def _running(status: Status, told: Records) -> tuple[list[str], list[str]]:
    where = f" on {status.node}" if status.node else ""
    began = f" since {moment(told.began)} ({short_time(time.time() - told.began)})" if told.began else ""
    lines = [f"Nothing is wrong: it is {status.detail}{where}, attempt {max(status.attempts, 1)}{began}."]
    if "does not answer" in status.detail:
        lines = [f"It was running when it was last heard of: {status.detail}."]
    if status.steps:
        share = f"{100 * status.step / status.steps:.0f} %"
        lines.append(f"Step {status.step} of {status.steps} ({share}), epoch {status.epoch}.")
    if status.metric:
        lines.append(f"Best so far: {status.metric}.")
    silence = time.time() - float(told.state.get("time", time.time()))
    if silence > _SILENT_S:
        lines.insert(0, f"It has written nothing for {short_time(silence)}: it may hang.")
        return lines, [f"hpc logs {status.run} --tail 50", f"hpc cancel {status.run}"]
    return lines, [f"hpc watch {status.run}", f"hpc logs {status.run} -f"]


def _attempts(seen: Seen) -> list[str]:
    """How the attempts have ended that another follows, or is to follow."""
    last = seen.status.attempts + (seen.status.state == "requeued")
    if last < 2:
        return []
    starts: dict[int, dict[str, Any]] = {}
    ends: dict[int, str] = {}
    for event in seen.run.read_events():
        number = int(event.get("generation", 0))
        if event["event"] == "start":
            starts[number] = event
        elif event["event"] == "bad-node":
            ends[number] = f"bad node {event.get('node', '')}: {event.get('reason')}"
        elif event["event"] == "end":
            ends.setdefault(number, str(event.get("reason")))
    earlier = [number for number in sorted(starts) if number < last]
    told = seen.accounted.earlier if seen.accounted else ()
    words = dict(zip(earlier, told, strict=True)) if len(told) == len(earlier) else {}
    lines = [
        f"attempt {number}, {moment(float(starts[number]['time']))}, {starts[number].get('node', '')}: "
        + "; ".join(filter(None, (words.get(number, "").lower(), ends.get(number, "ended without a word"))))
        for number in earlier[-_SHOWN_ATTEMPTS:]
    ]
    left = len(earlier) - len(lines)
    return [*([f"{left} attempts before"] if left else []), *lines]
