"""Why a run has ended without a result: each cause is looked for in turn, the surest first."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

from hpc import evidence, runlogs, usage
from hpc.errors import UserError
from hpc.evidence import Evidence
from hpc.experiment import Experiment
from hpc.instances import Instance, Request
from hpc.ledger import Seen
from hpc.pending import moment
from hpc.preempt import NOTICE, ExitCode
from hpc.records import Records
from hpc.rundir import RunDir
from hpc.slurm import JobInfo
from hpc.states import ended_on_slurm
from hpc.sweepdir import alone, sweep_of
from hpc.units import slurm_time
from hpc.verdict import NO_STEP, TOLD, without_advice

_FULL = re.compile(r"No space left on device|Disk quota exceeded|\[Errno (28|122)\]")
_USED_UP = re.compile(r"(.+?) \((launch\.budgets\.\w+ is \d+)\)")
_GPU_MEMORY = re.compile(r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED|HIP out of memory")
_KILLED = 128 + signal.SIGKILL
_NO_OUTPUT = 53
"""The signal in sacct's exit code (0:53) of a job whose node could not open the files of its output."""
_LAST = 5
"""Lines of a log that are shown."""
_NEAR = 0.9
"""A kill with so much of the memory in use was for memory."""
_LEAST_S = 600
"""Of a time limit that is to be longer than a start."""
_MORE = 1.5
"""So much more is asked for than was not enough."""


@dataclass(frozen=True)
class Cause:
    """Why a run ended, in sentences, and what to type next."""

    name: str
    """The same for runs that ended alike."""
    lines: list[str]
    commands: list[str]
    quote: list[str]
    """Lines of a log."""
    source: str = ""
    """The log that they are from."""


class Case:
    """A run that has ended, and all that is there to judge it by, read when it is asked for."""

    def __init__(self, seen: Seen, records: Records, jobs: Mapping[str, JobInfo]) -> None:
        """`jobs`: in squeue."""
        self.seen, self.records, self.run, self.jobs = seen, records, seen.run, jobs
        self.name, self.status = seen.run.name, seen.status
        self.word = (ended_on_slurm(seen.job, seen.accounted) or ("", ""))[1]

    @property
    def code(self) -> int:
        """The exit code of the last attempt, 0 where none is known; 128 + n for signal n."""
        if "code" in self.records.state and self.status.job in ("", self.records.state.get("job") or self.status.job):
            return int(self.records.state["code"])
        told = self.seen.accounted
        return (128 + told.signal if told.signal else told.exit_code) if told else 0

    @cached_property
    def evidence(self) -> Evidence:
        job = self.status.job if self.status.cluster == "slurm" else None
        return evidence.gather(self.run, job, self.records.began)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Of the last attempt."""
        return [event for event in self.run.read_events() if event.get("generation") == self.records.generation]

    @cached_property
    def asked(self) -> tuple[Experiment, Request, Instance] | None:
        """What the run asked for; None where its experiment or instance cannot be read any more."""
        from hpc.plan import reopen

        try:
            experiment, instance = reopen(self.run)
        except UserError:
            return None
        return experiment, instance.request(experiment.launch), instance

    @cached_property
    def used(self) -> dict[str, Any]:
        """What was sampled of its use of the machine."""
        return usage.summary(self.run)

    @property
    def node(self) -> str:
        return self.status.node or (self.seen.accounted.nodes if self.seen.accounted else "") or "its node"

    @property
    def reason(self) -> str:
        """SLURM's."""
        info, told = self.seen.job, self.seen.accounted
        return (info.reason if info else "") or (told.reason if told else "")

    @property
    def began(self) -> bool:
        """Whether an attempt of its last submission has begun."""
        told = self.records
        if self.status.cluster != "slurm":
            return bool(told.state) and told.submitted <= told.state["time"]
        return bool(told.state) and (told.state.get("job") == self.status.job or told.began >= told.submitted)

    @property
    def kind(self) -> str:
        """What its last attempt ended by, as hpc.requeue has judged it; empty where that was not asked."""
        return str(self.records.state.get("cause", ""))

    @property
    def resume(self) -> str:
        return f"hpc resume {self.name}"

    @property
    def saved(self) -> str:
        return saved(self.run)

    def asking(self, override: str, option: str, offered: bool = True) -> str:
        """The command to go on with another request.

        With sbatch's option where `hpc resume` refuses that: rows of a sweep share theirs, an instance has its limits.
        """
        if self.status.cluster != "slurm":
            return self.resume
        if offered and not self.run.in_sweep:
            return f"{self.resume} {override}"
        single = alone(self.run)
        return f"sbatch {shlex.join([option, *single.options, str(single.script)])}"

    @property
    def said(self) -> dict[str, Any]:
        """The last words of rank 0, for a cause that nothing better tells of."""
        path = self.evidence.last_log
        return {"quote": self.evidence.last, "source": str(path.relative_to(self.run.path.parent)) if path else ""}


def saved(run: RunDir) -> str:
    """Where its next attempt begins."""
    if newest := run.newest_checkpoint():
        return f"It goes on from checkpoint {newest}."
    if run.saved_step() is not None:
        return f"Its checkpoints are gone from {run.checkpoints}: restore one from a copy, or start a new run."
    return "It had saved nothing yet: it starts afresh."


def find(case: Case) -> Cause:
    """The best explanation of a run's end."""
    cause = next(cause for look in _LOOKS for cause in look(case))
    return replace(cause, lines=[*cause.lines, *_given_up(case)])


def _given_up(case: Case) -> Iterator[str]:
    """How often it has failed in a row, where its budget is used up: hpc.verdict has said so."""
    told = _USED_UP.match(str(case.records.state.get("reason", "")))
    if case.records.phase == "ended" and told:
        yield f"It is not started again by itself: {told[1]}, and {told[2]} restarts in a row."


def _never_followed(case: Case) -> Iterator[Cause]:
    """SLURM ends a job whose dependency cannot come true; sacct alone does not tell that from a scancel."""
    sure = case.reason == "DependencyNeverSatisfied"
    if case.records.cancelled or case.began or not (sure or case.reason == "Dependency"):
        return
    leaders = _leaders(case)
    named = f" ({', '.join(leaders)})" if leaders else ""
    line = f"What it was to follow{named} did not finish, so SLURM ended it before its start."
    if not sure:
        line = "It ended before its start: what it was to follow did not finish, or it was cancelled with scancel."
    name = case.records.sweep if "_" in case.status.job else case.name
    first = [f"hpc resume {leader}" for leader in leaders] or ["hpc ls"]
    after = " ".join(f"--after {leader}" for leader in leaders or ["RUN"])
    yield Cause("what it was to follow did not finish", [line], [*first, f"hpc resume {name} {after}"], [])


def _leaders(case: Case) -> list[str]:
    """The runs and sweeps whose jobs kept it from starting, as far as squeue still knows them."""
    info = case.seen.job
    parts = re.findall(r"(\d+)(?:_(\d+|\*))?\((\w+)\)", info.dependency if info else "")
    failed = [number for number, _, state in parts if state == "failed"] or [number for number, _, _ in parts]
    comments = [job.comment for job in case.jobs.values() if job.job.partition("_")[0] in failed]
    return list(dict.fromkeys(name for comment in comments if (name := comment.partition("/")[0])))


def _cancelled(case: Case) -> Iterator[Cause]:
    if case.status.state == "cancelled":
        when = float(case.records.submit.get("cancelled", 0))
        by = (
            f"with 'hpc cancel' at {moment(when)}"
            if case.records.cancelled
            else "with scancel, by you or an administrator"
        )
        yield Cause("cancelled", [f"It was cancelled {by}.", case.saved], [case.resume], [])


def _bad_node(case: Case) -> Iterator[Cause]:
    found = [event for event in case.events if event["event"] == "bad-node"]
    if found and case.code != ExitCode.BAD_INPUT:  # a fault of every node is the instance's
        faults = "; ".join(f"{event['node']}: {event['reason']}" for event in found)
        yield Cause(
            "bad node", [f"It met a bad node: {faults}.", str(case.status.detail)], ["hpc doctor", case.resume], []
        )


def _hang(case: Case) -> Iterator[Cause]:
    """What its watchdogs have left."""
    hangs = [event for event in case.events if event["event"] == "hang"]
    if not hangs and case.code != ExitCode.HANG:
        return
    first = hangs[0] if hangs else {}
    behind = [f"rank {one.get('rank')} on {one.get('node')} ({one.get('why')})" for one in first.get("stuck", ())]
    where = f" in {first['phase']} after step {first.get('step')}" if "phase" in first else ""
    silent = f": nothing happened for {first['silent']:.0f} s" if "silent" in first else ""
    lines = [f"It hung{where}{silent}{'; behind: ' + ' and '.join(behind) if behind else ''}."]
    lines.append("Where every thread was is in its logs.")
    yield Cause("hang", [*lines, case.saved], [f"hpc logs {case.name} --tail 200", case.resume], [])


def _in_vain(case: Case) -> Iterator[Cause]:
    """A rank that knew that the next attempt would fail alike."""
    for event in case.events:
        if event["event"] == "failed" and event.get("retry") is False:
            reason = " ".join(str(event.get("reason", "")).split())
            yield Cause(f"failed: {reason}", [f"It would fail again: {reason}", case.saved], [case.resume], [])
            return


def _memory(case: Case) -> Iterator[Cause]:
    told, line = case.seen.accounted, case.evidence.daemons.get("memory")
    peaks = ((told.max_rss_gb if told else None), case.used.get("memory_peak_gb"))
    limits = ((told.req_mem_gb if told else None), (case.asked[1].mem_gb if case.asked else None))
    peak, limit = max(filter(None, peaks), default=0.0), next(filter(None, limits), 0.0)
    near = case.code == _KILLED and limit and peak > _NEAR * limit
    if not (case.word == "out of memory" or line or near):
        return
    asked = f" of {limit:.4g} GB a node" if limit else ""
    measured = f": {peak:.1f} GB when it was last measured" if peak else ""
    lines = [f"It used more than the memory{asked} that it had asked for{measured}."]
    lines.append("Use less (data.batch_size, data.threads), or ask for more (launch.mem).")
    wanted = ceil(_MORE * max(limit, peak))
    offered = not case.asked or wanted <= case.asked[2].mem_gb
    if case.asked and not offered:
        most = f"{case.asked[2].name} offers {case.asked[2].mem_gb:g} GB a node"
        lines.append(f"{most}: for more, 'hpc instances' lists larger ones, if its nodes have no more than that.")
    command = case.asking(f"launch.mem={wanted}GB", f"--mem={wanted}000M", offered) if wanted else case.resume
    yield Cause("out of memory", [*lines, case.saved], [command], [line] if line else [])


def _interrupted(case: Case) -> Iterator[Cause]:
    if case.status.cluster == "local" and case.kind == TOLD:
        words = f"It was told to end (Ctrl-C, or a signal to its script) at step {case.status.step}."
        yield Cause("cancelled or interrupted", [words, case.saved], [case.resume], [])


def _no_step(case: Case) -> Iterator[Cause]:
    if case.kind == NO_STEP and case.records.phase == "ended":
        limit = case.asked[1].time_s if case.asked else 0
        lines = [f"{without_advice(str(case.records.state.get('reason')), case.name)}.", case.saved]
        lines.insert(
            1, "The time to load and build comes before the first step, and the notice is taken off at the end."
        )
        more = f"launch.time={max(_LEAST_S, 2 * limit) // 60}min"
        yield Cause("time limit too short", lines, [f"hpc resume {case.name} {more}"], [])


def _time_limit(case: Case) -> Iterator[Cause]:
    noticed = not case.word and any(
        event["event"] == "signal" and event.get("cause") == NOTICE.name for event in case.events
    )
    if not ("time limit" in case.word or "time limit" in case.evidence.daemons or noticed):
        return
    told = case.seen.accounted
    limit = (told.time_limit_s if told else None) or (case.asked[1].time_s if case.asked else None)
    lines = [f"Its time limit{f' of {slurm_time(limit)}' if limit else ''} was reached at step {case.status.step}."]
    if not noticed:
        lines.append("It did not hear the notice ahead of it, or could not save in time: see train.checkpoint_every.")
    lines += [case.saved]
    most = case.asked[2].time_limit if case.asked else 0
    longer = min(ceil(_MORE * limit), most) if limit else 0
    commands = [case.resume]
    if limit and longer > limit:
        commands.append(case.asking(f"launch.time={slurm_time(longer)}", f"--time={slurm_time(longer)}"))
    yield Cause("time limit", lines, list(dict.fromkeys(commands)), [])


def _node_failure(case: Case) -> Iterator[Cause]:
    if "node" in case.word or "node failure" in case.evidence.daemons:
        lines = [f"{case.node} failed while it ran ({case.word or 'node failure'}).", case.saved]
        yield Cause("node failure", lines, [case.resume], [])


def _preempted(case: Case) -> Iterator[Cause]:
    if case.word == "preempted" or "preemption" in case.evidence.daemons:
        words = "A job of higher priority took its place, and this cluster does not requeue what it preempts."
        yield Cause("preempted", [words, case.saved], ["hpc resume --all"], [])


def _storage(case: Case) -> Iterator[Cause]:
    texts = [*(found.error for found in case.evidence.tracebacks), *case.evidence.last]
    full = next((text for text in texts if _FULL.search(text)), None)
    if full or case.code == ExitCode.STORAGE:
        words = "The disk is full or over its quota" if full else "A file could not be written or read"
        said: dict[str, Any] = {"quote": [full]} if full else case.said
        yield Cause("storage", [f"{words}.", case.saved], [f"df -h {case.run.runs}", case.resume], **said)


def _gpu_memory(case: Case) -> Iterator[Cause]:
    for found in case.evidence.tracebacks:
        if _GPU_MEMORY.search(found.error):
            parts = 2 * (case.asked[0].train.accumulate if case.asked else 1)
            lines = [
                f"GPU memory ran out on rank {found.rank}: {found.error.partition(': ')[2] or found.error}",
                f"The same step in less memory: train.accumulate={parts} (the batch in parts), train.precision=bf16.",
                "Or a smaller data.batch_size or model; 'hpc models NAME --input ... --batch N' tells their memory.",
            ]
            command = f"hpc submit {shlex.quote(str(case.run.experiment))} train.accumulate={parts}"
            yield Cause("GPU out of memory", lines, [command], found.lines, _source(case, found))
            return


def _exception(case: Case) -> Iterator[Cause]:
    if not case.evidence.tracebacks or case.evidence.tracebacks[0].secondary:
        return
    first, *others = case.evidence.tracebacks
    rank = f"Rank {first.rank}" if first.rank is not None else "The batch script"
    lost = f"; {len(others)} more ended with it" if others else ""
    commands = [f"hpc logs {case.name} --tail 100" + (f" --rank {first.rank}" if first.rank else ""), case.resume]
    lines = [f"{rank} failed first{lost}: {first.error}" if others else f"{rank} failed: {first.error}", case.saved]
    yield Cause(f"exception: {first.error}", lines, commands, first.lines, _source(case, first))


def _source(case: Case, found: evidence.Traceback) -> str:
    return str(found.log.relative_to(case.run.path.parent))


def _bad_input(case: Case) -> Iterator[Cause]:
    if case.code == ExitCode.BAD_INPUT:
        words = "The job refused its input: it would fail again, so it was not started again."
        if case.run.newest_checkpoint():
            lines, commands = [words, f"Mend that first. {case.saved}"], [case.resume, f"hpc logs {case.name}"]
        else:
            lines, commands = [words], [f"hpc plan {shlex.quote(str(case.run.experiment))}", f"hpc logs {case.name}"]
        name = f"bad input: {case.evidence.last[-1]}" if case.evidence.last else "bad input"
        yield Cause(name, lines, commands, **case.said)


def _no_turn(case: Case) -> Iterator[Cause]:
    """Of a row here whose sweep's controller is gone: its script would have opened its output."""
    sweep, job = sweep_of(case.run), case.status.job
    if not sweep or case.status.cluster != "local" or case.began or case.run.output(job, "0").exists():
        return
    words = "Its sweep's controller ended before its turn"
    log = sweep.logs / case.run.output(job, "0", "err").name
    quote = runlogs.last_lines(log, 1 << 12)[-_LAST:]
    lines = [f"{words}." if quote else f"{words}: its computer went down, or somebody ended that process."]
    source = str(log.relative_to(case.run.runs)) if quote else ""
    yield Cause("its sweep's controller ended before its turn", lines, [f"hpc resume {sweep.name}"], quote, source)


def _not_launched(case: Case) -> Iterator[Cause]:
    """SLURM gives the reason also where a batch shell was killed: that one had opened its output."""
    told = case.seen.accounted
    silent = not case.began and not any(log.job == case.status.job for log in runlogs.files(case.run))
    if not (told.signal == _NO_OUTPUT if told else case.reason == "JobLaunchFailure" and silent):
        return
    node = (case.seen.job.node if case.seen.job else "") or (told.nodes if told else "") or "its node"
    sweep = sweep_of(case.run) if "_" in case.status.job else None
    logs = sweep.logs if sweep else case.run.logs
    lines = [
        f"SLURM could not start its script on {node}: mostly that node does not see the folder of its output, {logs}.",
        "The file system must be mounted there, at the same path, and you must be allowed to write.",
    ]
    look = [f"srun --nodelist={node} ls -ld {shlex.quote(str(logs))}"] if node != "its node" else []
    yield Cause("its node could not open its output", lines, [*look, case.resume], [])


def _never_began(case: Case) -> Iterator[Cause]:
    if not case.began:
        words = f"No attempt has begun: {_shell_end(case)}."
        yield Cause("no attempt began", [words], [f"hpc logs {case.name}", case.resume], **case.said)


def _shell_end(case: Case) -> str:
    """How a batch script ended before its first attempt."""
    told = case.seen.accounted
    if told and told.signal:
        return f"the batch script was ended by {_signal_name(told.signal)} before that"
    if told:
        return f"the batch script left with exit code {told.exit_code} before that (its prologue, or a refusal)"
    if case.reason == "NonZeroExitCode" or case.status.cluster == "local":
        return "the batch script ended by itself before that (its prologue, or a refusal)"
    if case.reason not in ("", "None"):
        return f"SLURM says {case.reason!r} of its job"
    return f"nothing more is known of job {case.status.job}"


def _signalled(case: Case) -> Iterator[Cause]:
    if case.code <= 128 or case.status.state == "stopped":
        return
    name = _signal_name(case.code - 128)
    words = {
        "SIGKILL": "Mostly that is the kernel, for memory; else somebody's kill -9, or the time limit of a local run.",
        "SIGSEGV": "That is a fault in native code: a driver, a library, or a wrong version of one.",
        "SIGBUS": "That is often a file that was cut short while it was read, or a full /dev/shm.",
    }.get(name, "Nobody has said why.")
    lines = [f"The tasks were ended by {name}. {words}", case.saved]
    yield Cause(f"ended by {name}", lines, [f"hpc logs {case.name} --tail 50", case.resume], **case.said)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _lost_peer(case: Case) -> Iterator[Cause]:
    """Of ranks that only lost one that has left no word."""
    for found in case.evidence.tracebacks[:1]:
        lines = [
            f"A rank left without a word, and rank {found.rank} lost it: {found.error}",
            "Mostly something called exit there, or the kernel or somebody killed it.",
        ]
        commands = [f"hpc logs {case.name} --tail 50", case.resume]
        yield Cause("a rank left without a word", [*lines, case.saved], commands, found.lines, _source(case, found))


def _stopped(case: Case) -> Iterator[Cause]:
    if case.status.state == "stopped":
        words = case.status.detail or "It stopped cleanly"
        lines = [
            f"It saved and stopped: {words}.",
            "It was not requeued, or its job has been removed since.",
            case.saved,
        ]
        yield Cause("stopped", lines, [case.resume], [])


def _unknown(case: Case) -> Iterator[Cause]:
    detail = without_advice(case.status.detail, case.name)
    lines = [f"{detail[:1].upper()}{detail[1:]}."]
    if case.status.state == "lost":
        lines.append(f"Neither its files nor SLURM say why: a kill -9, or {case.node} went down or was restarted.")
    yield Cause(detail, [*lines, case.saved], [f"hpc logs {case.name} --tail 50", case.resume], **case.said)


_LOOKS: tuple[Callable[[Case], Iterator[Cause]], ...] = (
    _never_followed,
    _cancelled,
    _no_turn,
    _not_launched,
    _bad_node,
    _in_vain,
    _memory,
    _interrupted,
    _no_step,
    _time_limit,
    _node_failure,
    _preempted,
    _hang,
    _storage,
    _gpu_memory,
    _exception,
    _bad_input,
    _never_began,
    _signalled,
    _lost_peer,
    _stopped,
    _unknown,
)
