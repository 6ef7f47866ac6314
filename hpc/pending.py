"""SLURM's reasons why a job waits, in words, each with what to do about it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from hpc.slurm import JobInfo

_WAIT = "Nothing to do: it starts by itself."
_NEVER = "It will never start like this: "


@dataclass(frozen=True)
class Reason:
    """One reason: what it means, and what helps."""

    words: str
    remedy: str = _WAIT


_REASONS = {
    "None": Reason("SLURM has not looked at it yet"),
    "Priority": Reason(
        "jobs of higher priority are ahead of it", f"{_WAIT} A shorter launch.time may start it earlier."
    ),
    "Resources": Reason("it is next, and waits for nodes to become free"),
    "Dependency": Reason("it waits for another job"),
    "DependencyNeverSatisfied": Reason(
        "the job that it was to follow did not succeed", f"{_NEVER}resume that one, then cancel and resume this one."
    ),
    "BeginTime": Reason("it may not start before its time; SLURM makes every requeued job wait two minutes"),
    "JobHeldUser": Reason("it is held by its user", "Let it go with 'scontrol release {job}'."),
    "JobHeldAdmin": Reason(
        "an administrator holds it", "Ask the cluster's support; a job may be held for its account."
    ),
    "JobArrayTaskLimit": Reason("the sweep runs as many rows at a time as --max-parallel allows"),
    "Licenses": Reason("it waits for a licence that other jobs use"),
    "Reservation": Reason("its reservation has not begun"),
    "ReservationDeleted": Reason("its reservation is gone", f"{_NEVER}leave launch.reservation out."),
    "BadConstraints": Reason("no node can satisfy its constraint", f"{_NEVER}see 'hpc plan' and launch.constraint."),
    "PartitionTimeLimit": Reason(
        "it asks for more time than its partition allows",
        f"{_NEVER}ask for less with launch.time, or another partition.",
    ),
    "PartitionNodeLimit": Reason(
        "it asks for more nodes than its partition allows, or for some that are down", f"{_NEVER}see 'hpc plan'."
    ),
    "PartitionDown": Reason(
        "its partition starts no jobs now", "It starts when the administrators open the partition."
    ),
    "PartitionInactive": Reason("its partition is closed", f"{_NEVER}choose another with launch.partition."),
    "AccountNotAllowed": Reason(
        "its account may not use this partition", f"{_NEVER}see launch.account, launch.partition."
    ),
    "QOSNotAllowed": Reason(
        "its QOS may not be used on this partition", f"{_NEVER}see launch.qos and launch.partition."
    ),
    "InvalidAccount": Reason("SLURM knows no such account", f"{_NEVER}see launch.account."),
    "InvalidQOS": Reason("SLURM knows no such QOS", f"{_NEVER}see launch.qos."),
    "ReqNodeNotAvail": Reason(
        "nodes that it needs are down, drained or reserved", "It starts when they are back: 'sinfo -R' tells why."
    ),
    "NodeDown": Reason("a node that it needs is down", "It starts when the node is back: 'sinfo -R' tells why."),
    "JobLaunchFailure": Reason(
        "its start failed on a node, and SLURM holds it now",
        "Let it go with 'scontrol release {job}'; its log may tell more.",
    ),
    "JobHoldMaxRequeue": Reason(
        "SLURM has requeued it too often and holds it now", "See 'hpc logs {run}', then 'scontrol release {job}'."
    ),
    "DeadLine": Reason("it cannot end before its deadline", f"{_NEVER}leave the deadline out."),
    "Cleaning": Reason("its last attempt is still being cleaned up"),
    "Prolog": Reason("the cluster's own start-up script runs on its nodes"),
    "MaxMemPerLimit": Reason("it asks for more memory per core than allowed", f"{_NEVER}lower launch.mem."),
    "MaxRequeue": Reason("SLURM has requeued it too often", "See 'hpc logs {run}', then 'scontrol release {job}'."),
    "SystemFailure": Reason("SLURM itself failed at starting it", "Tell the cluster's support; cancel and resume it."),
    "BurstBufferResources": Reason("it waits for burst buffer space"),
    "PowerNotAvail": Reason("the cluster's power budget is used up"),
    "NonZeroExitCode": Reason("its last attempt failed", "See 'hpc logs {run}'."),
}
# Of SLURM's sentences, where it shows no single word.
_SENTENCES = (
    ("launch failed requeued held", "JobLaunchFailure"),
    ("requeued in held state", "JobHeldUser"),
    ("Nodes required for job are DOWN", "ReqNodeNotAvail"),
    ("ReqNodeNotAvail", "ReqNodeNotAvail"),
)
_THINGS = {
    "cpu": "cores",
    "gres": "GPUs or other devices",
    "mem": "memory",
    "node": "nodes",
    "job": "running jobs",
    "submitjob": "submitted jobs",
    "wall": "time",
    "walldur": "time",
    "billing": "billed resources",
    "bb": "burst buffer",
    "license": "licences",
}
_LIMIT = re.compile(
    r"(?P<whose>QOS|Assoc)(?P<kind>Grp|Max|Min)(?P<thing>CPU|GRES|Mem|Node|SubmitJob|Job|WallDur|Wall|Billing|BB|License)\w*",
    re.I,
)


def in_words(reason: str) -> Reason:
    """SLURM's reason of a pending job, as squeue shows it."""
    for part, name in _SENTENCES:
        if part.lower() in reason.lower():
            nodes = re.search(r"UnavailableNodes:(\S+)", reason)
            known = _REASONS[name]
            return Reason(f"{known.words} ({nodes[1].rstrip(')')})", known.remedy) if nodes else known
    name = reason.split(",", maxsplit=1)[0].strip("() ") or "None"
    return _REASONS.get(name) or _limit(name) or Reason(f"SLURM says {reason!r}", "'man squeue' lists its reasons.")


def _limit(name: str) -> Reason | None:
    """A limit of accounting: QOSMaxGRESPerUser, AssocGrpCPUMinutesLimit and some seventy more."""
    match = _LIMIT.match(name)
    if not match:
        return None
    whose = "the QOS" if match["whose"].upper() == "QOS" else "the account"
    thing = _THINGS[match["thing"].lower()]
    if match["kind"].lower() == "min":
        return Reason(f"it asks for less than {whose} demands of {thing} ({name})", f"{_NEVER}ask for more.")
    if "minutes" in name.lower():
        return Reason(
            f"{whose} has used up its budget of {thing} x minutes ({name})",
            "Ask for less with launch.time, or for a new budget.",
        )
    if match["kind"].lower() == "grp":
        return Reason(f"all jobs of {whose} together have reached its limit on {thing} ({name})")
    if "perjob" in name.lower() or match["thing"].lower().startswith("wall"):
        return Reason(f"one job of {whose} may not have so much: {thing} ({name})", f"{_NEVER}ask for less.")
    return Reason(
        f"you have reached the limit of {whose} on {thing} ({name})", "It starts when jobs of yours have ended."
    )


def moment(when: float) -> str:
    """A time for people: 14:20 today, else with its date."""
    day, today = time.strftime("%Y-%m-%d", time.localtime(when)), time.strftime("%Y-%m-%d")
    return time.strftime("%H:%M" if day == today else "%Y-%m-%d %H:%M", time.localtime(when))


def hopeless(reason: str) -> bool:
    """Whether a job with this reason never starts."""
    return in_words(reason).remedy.startswith(_NEVER)


def remedy(info: JobInfo, run: str) -> str:
    """What to do about a pending job, in a sentence."""
    return in_words(info.reason).remedy.format(job=info.job, run=run)
