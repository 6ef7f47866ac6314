"""The state of a run and what more there is to say of it, from its records and SLURM's answers about its job."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from hpc.attempt import same_process
from hpc.records import Records
from hpc.slurm import Accounted, JobInfo
from hpc.verdict import FAILURES, MEMORY, NO_STEP

_WAITING = frozenset(["PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"])
_MISPLACED = {"SUSPENDED": "suspended by SLURM", "STOPPED": "stopped by SLURM", "CONFIGURING": "its node boots"}
_ENDINGS = {
    "BOOT_FAIL": ("lost", "its node did not boot"),
    "CANCELLED": ("cancelled", "cancelled by scancel"),
    "DEADLINE": ("failed", "its deadline passed"),
    "NODE_FAIL": ("lost", "its node failed"),
    "OUT_OF_MEMORY": ("failed", "out of memory"),
    "PREEMPTED": ("lost", "preempted"),
    "TIMEOUT": ("lost", "the time limit was reached"),
}


@dataclass(frozen=True)
class Place:
    """Where a run is: cluster, job or process number, and the job's line in squeue."""

    cluster: str
    job: str
    info: JobInfo | None
    elsewhere: str = ""
    """SLURM's name of the cluster that it is on, if that is not the one that answers here."""


def state_of(told: Records, place: Place, accounted: Accounted | None, silent: bool) -> tuple[str, str]:
    """The state's name and what more there is to say. `silent`: SLURM was asked and did not answer."""
    if told.result:
        return "finished", early_end(told.result)
    if place.info and place.info.live:
        return _live(told, place.info)
    reason = str(told.state.get("reason", ""))
    if told.cancelled:
        ends = place.cluster == "local" and told.phase not in ("stopped", "ended") and _held_here(told.state)
        return ("running", "being cancelled") if ends else ("cancelled", reason)
    if place.cluster == "slurm":
        if silent and told.phase not in ("stopped", "ended"):
            return ("running" if told.state else "pending"), f"{_heard(told.state)}SLURM does not answer"
        if place.elsewhere and (word := _elsewhere(told, place)):
            return word
        if _unstarted(told, place):
            return ended_unstarted(place.info, accounted)
        return _ended(told, ended_on_slurm(place.info, accounted), reason)
    if not told.state or told.submitted > told.state["time"]:
        return _unstarted_here(told)
    return _here(told.state, told.phase, reason)


def early_end(result: dict[str, Any]) -> str:
    """Of a finished run that early stopping ended, in words; empty of others."""
    told = result.get("stopped_early")
    if not isinstance(told, dict):
        return ""
    waited, epochs = told.get("epochs_without_gain"), f"{result.get('epochs')} of {told.get('planned_epochs')} epochs"
    return f"stopped early, after {epochs}: {told.get('metric')} got no better for {waited}"


def _elsewhere(told: Records, place: Place) -> tuple[str, str] | None:
    """What its files say of a run on another cluster; None where they say that it has ended."""
    begun = told.state.get("job") == place.job
    if begun and told.phase == "ended":
        return None
    state = "pending" if not begun else "requeued" if told.phase == "stopped" else "running"
    heard = f", last heard of {_age(told.state):.0f} s ago" if begun else ""
    return state, f"on cluster {place.elsewhere}{heard}"


def _live(told: Records, info: JobInfo) -> tuple[str, str]:
    if info.state in _WAITING:
        counted = told.phase == "stopped" and told.state.get("cause") in (*FAILURES, NO_STEP)
        waits = info.reason
        if counted and info.reason == "BeginTime":
            waits = str(told.state.get("reason"))  # how often, and for how long
        return ("requeued" if told.generation else "pending"), waits
    if info.state in _MISPLACED:
        return "running", _MISPLACED[info.state]
    if told.state.get("job") != info.job:
        return "running", "starting"
    return "running", "ending" if told.phase in ("stopped", "ended") else told.phase


def _unstarted(told: Records, place: Place) -> bool:
    """Whether the job is newer than the last attempt."""
    return not told.state or (told.state.get("job") != place.job and told.submitted > told.began)


def _ended(told: Records, word: tuple[str, str] | None, reason: str) -> tuple[str, str]:
    """Of an attempt on SLURM that is over: the run's own word, and SLURM's where it has one."""
    if told.phase == "stopped":
        state, words = word or ("stopped", "")
        return ("stopped" if state == "lost" else state), "; ".join(filter(None, (words, reason)))
    if word and told.phase == "ended" and told.state.get("cause") == MEMORY:
        return word[0], reason  # the same word, and how often
    if word:
        where = "" if told.phase == "ended" else f" while {told.phase}"
        return word[0], f"{word[1]}{where}"
    if told.phase == "ended":
        return "failed", reason
    return "lost", f"the job ended without a word while {told.phase}"


def _heard(state: dict[str, Any]) -> str:
    return f"on {state['host']}, last heard of {_age(state):.0f} s ago; " if state else ""


def _age(state: dict[str, Any]) -> float:
    return time.time() - float(state.get("time", 0))


def _here(state: dict[str, Any], phase: str, reason: str) -> tuple[str, str]:
    """Of a run outside SLURM, by the process that holds it."""
    here, alive = state.get("host") == os.uname().nodename, _held_here(state)
    if phase == "stopped":
        return ("requeued" if alive else "stopped"), reason
    if phase == "ended":
        return "failed", reason
    if here and not alive:
        return "lost", f"the job ended without a word while {phase}"
    return "running", phase if here else _heard(state).removesuffix("; ")


def _held_here(state: dict[str, Any]) -> bool:
    """Whether the process that holds the run is one of this machine, and alive."""
    here = state.get("host") == os.uname().nodename
    return here and same_process(state["pid"], state.get("process_start"))


def _unstarted_here(told: Records) -> tuple[str, str]:
    if not told.submit:
        return "planned", "not submitted"
    if same_process(int(told.submit["job"]), told.submit.get("process_start")):
        return "pending", "waits for its turn" if told.sweep else "starting"
    if told.sweep:
        return "lost", "its sweep ended before its turn"
    return "failed", "the batch script ended before its first attempt"


def ended_on_slurm(info: JobInfo | None, accounted: Accounted | None) -> tuple[str, str] | None:
    """State and words of an end that SLURM alone knows; None where it left that to the job's exit code."""
    states = [info.state if info else "", accounted.state if accounted else "", *(accounted.steps if accounted else ())]
    if "OUT_OF_MEMORY" in states:  # a step may be, where the job is only FAILED
        return _ENDINGS["OUT_OF_MEMORY"]
    return next((_ENDINGS[state] for state in states[:2] if state in _ENDINGS), None)


def ended_unstarted(info: JobInfo | None, accounted: Accounted | None) -> tuple[str, str]:
    """Of a job that is over and whose attempt never began."""
    if info and info.reason == "DependencyNeverSatisfied":
        return "lost", "what it was to follow did not finish"
    if word := ended_on_slurm(info, accounted):
        return word[0], f"{word[1]} before its first attempt"
    if "FAILED" in (info.state if info else "", accounted.state if accounted else ""):
        return "failed", "the batch script ended before its first attempt"
    return "lost", "no attempt has started, and the job is gone"
