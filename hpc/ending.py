"""How an attempt has ended, read from its exit code, stop.json, its events and the words of SLURM's daemons.

stop.json and the events decide before srun's code: under --kill-on-bad-exit a skew of 0.2 s between ranks makes srun
return 143 for a clean stop, and the code of a hang or of a full disk may be that of another rank.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hpc import allocation, evidence, instances, usage
from hpc.errors import UserError
from hpc.experiment import Experiment, load
from hpc.preempt import NOTICE, ExitCode
from hpc.rundir import RunDir, read_json
from hpc.settings import Budgets
from hpc.verdict import (
    BAD_INPUT,
    CRASH,
    FINISHED,
    HANG,
    IN_VAIN,
    MEMORY,
    NO_STEP,
    NODE,
    STOPPED,
    STORAGE,
    TOLD,
    Ending,
    last_step,
)

Events = Sequence[Mapping[str, Any]]
_KILLED = 128 + signal.SIGKILL
_NEAR = 0.9
"""A kill with so much of the memory in use was for memory."""
_EARLY_S = 240.0
"""With more time left, and more than is over, the notice came from a preemption (preempt_send_user_signal)."""
_AT_END_S = 2.0
"""TERM so shortly before the end, or after it, is that of the time limit."""
_LONGEST = 200
"""Characters of an exception that are told."""


def of(run: RunDir, generation: int, events: Events, code: int, told: bool) -> Ending:
    """`events`: of this attempt. `told`: the batch shell was sent TERM."""
    stop = read_json(run.stop)
    if run.result.exists():
        return Ending(FINISHED, "finished")
    if told and allocation.job_id() is None:
        return Ending(TOLD, f"cancelled or interrupted; 'hpc resume {run.name}' goes on")
    if told and (end := allocation.Allocation.current().end_time) is not None and time.time() >= end - _AT_END_S:
        return Ending(TOLD, f"the time limit came before the step at hand was saved; 'hpc resume {run.name}' goes on")
    if told:
        return Ending(TOLD, "the batch shell was told to end: SLURM requeued the job, or it was cancelled")
    if stop.get("generation") == generation:
        return Ending(STOPPED, f"stopped by {stop['cause']} at step {stop['step']}")
    return _failure(run, events, code)


def at_the_limit(run: RunDir, generation: int, events: Events, ended: Ending) -> Ending:
    """The same, or that this clean stop was at the time limit and before the first step. `events`: of all attempts."""
    stop = read_json(run.stop)
    if ended.kind != STOPPED or stop["cause"] != NOTICE.name or stop["step"] != last_step(events, generation):
        return ended
    end, now = allocation.Allocation.current().end_time, time.time()
    over = now - float(read_json(run.state).get("started", 0))
    early = end is not None and end - now > max(_EARLY_S, over)
    return ended if early else Ending(NO_STEP, ended.words)


def code_of(events: Events, code: int) -> int:
    """The exit code of the rank that failed by itself, where it left word: `code` may be that of another one."""
    if any(event["event"] == "bad-node" for event in events):
        return ExitCode.BAD_NODE
    if any(event["event"] == "hang" for event in events):
        return ExitCode.HANG
    own = [event["code"] for event in events if event["event"] == "failed" and isinstance(event.get("code"), int)]
    return own[0] if own else code


def exit_code(kind: str, events: Events, code: int, stopped: bool) -> int:
    """What the batch script leaves with: 0 only where the run is finished, whatever code the ranks have left with.

    `stopped`: stop.json is of this attempt.
    """
    if kind == FINISHED:
        return int(ExitCode.DONE)
    if kind == BAD_INPUT:
        return int(ExitCode.BAD_INPUT)
    if stopped:
        return int(ExitCode.STOPPED)
    return int(code_of(events, code)) or int(ExitCode.CRASH)


def _failure(run: RunDir, events: Events, code: int) -> Ending:
    bad = [event for event in events if event["event"] == "bad-node"]
    if bad:
        return Ending(NODE, "; ".join(dict.fromkeys(f"bad node {e['node']}: {e['reason']}" for e in bad)))
    code = code_of(events, code)
    said = [event for event in events if event["event"] == "failed"]
    reason = " ".join(str(said[0].get("reason", "")).split()) if said else ""
    if any(event.get("retry") is False for event in said):
        return Ending(IN_VAIN, f"failed, and would fail again: {reason}")
    if code == ExitCode.BAD_INPUT:
        return Ending(BAD_INPUT, f"bad input: {reason or 'it would fail again'}")
    told = f": {reason}" if reason else ""
    if code == ExitCode.HANG:
        where = ", ".join(sorted(stuck_nodes(events)))
        return Ending(HANG, f"hung{f' on {where}' if where else ''}{told}")
    found = evidence.gather(run, allocation.job_id(), float(read_json(run.state).get("started", 0)))
    if line := found.daemons.get("node failure"):  # srun may leave with 0 then
        return Ending(NODE, f"a node failed: {line}")
    if _memory(run, code, found):
        return Ending(MEMORY, f"out of memory{told}")
    if code == ExitCode.STORAGE:
        return Ending(STORAGE, f"storage fault{told}")
    first = found.tracebacks[0] if found.tracebacks else None
    error = first.error if first else ""
    if first and first.secondary:
        error = f"a rank left without a word, and rank {first.rank} lost it: {error}"
    return Ending(CRASH, f"{_how(code)}{told or (f': {error[:_LONGEST]}' if error else '')}")


def _how(code: int) -> str:
    if code == 0:
        return "left with exit code 0 and without a result"
    if code <= 128:
        return f"failed with exit code {code}"
    try:
        return f"ended by {signal.Signals(code - 128).name}"
    except ValueError:
        return f"failed with exit code {code}"


def stuck_nodes(events: Events) -> set[str]:
    """The nodes that watchdogs name: those of whom all stuck ranks are on one. With ranks of several nobody knows."""
    named = [{str(rank["node"]) for rank in event.get("stuck", ())} for event in events if event["event"] == "hang"]
    return set().union(*(nodes for nodes in named if len(nodes) == 1)) - {"unknown"}


def _memory(run: RunDir, code: int, found: evidence.Evidence) -> bool:
    """Whether SLURM or the kernel says so in a log, or the sampler saw a task killed near the limit."""
    if code and "memory" in found.daemons:
        return True
    if code != _KILLED:
        return False
    peak = float(usage.summary(run).get("memory_peak_gb") or 0)
    try:
        launch = load(run.experiment)[0].launch
        return peak > _NEAR * instances.find(launch.instance).request(launch).mem_gb
    except UserError:
        return False


def budgets_of(run: RunDir) -> Budgets:
    """Of its experiment; the defaults where that cannot be read any more."""
    try:
        experiment: Experiment = load(run.experiment)[0]
    except UserError:
        return Budgets()
    return experiment.launch.budgets
