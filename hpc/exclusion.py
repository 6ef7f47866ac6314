"""Which nodes a run is to keep off after an attempt that met bad ones, and whether it can run elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hpc import allocation, badnodes, health, slurm
from hpc.ending import stuck_nodes
from hpc.errors import UserError
from hpc.rundir import RunDir
from hpc.sweepdir import alone

Events = Sequence[Mapping[str, Any]]
_IMPOSSIBLE = re.compile("node configuration is not available", re.I)
_AWAY = re.compile(r"DOWN|DRAIN|FAIL|MAINT|NOT_RESPONDING|UNKNOWN|REBOOT|POWER")
"""States of nodes that may come back."""
_HUNG_TWICE = "a run hung twice on it within a day"


def bad_nodes(events: Events, generation: int) -> dict[str, str]:
    """Nodes that ranks of this attempt have left as bad, and why."""
    found = [event for event in events if event["event"] == "bad-node" and event["generation"] == generation]
    return {event["node"]: event["reason"] for event in found}


def hung_again(events: Events, generation: int) -> dict[str, str]:
    """Nodes on which this attempt hung, and an earlier one within a day: the second time it may be the node."""
    since = time.time() - badnodes.KEPT_S
    recent = [event for event in events if event["time"] > since]
    now = stuck_nodes([event for event in recent if event["generation"] == generation])
    before = stuck_nodes([event for event in recent if event["generation"] < generation])
    return dict.fromkeys(sorted(now & before), _HUNG_TWICE)


def obstacle(run: RunDir, events: Events, bad: Mapping[str, str], out: Sequence[str]) -> str:
    """Why a run that met bad nodes cannot be tried on others; empty where it can. `out`: all that it is to keep off."""
    job = allocation.job_id()
    if job is None:
        return f"once that is mended, 'hpc resume {run.name}' goes on"
    if again := sorted(bad.keys() & _left_out(events)):
        return f"the run was to keep off {', '.join(again)} and came there again"
    if not has_room(run, job, out):
        mended = f"once they are mended, take them out of {badnodes.file(run.runs)} and 'hpc resume {run.name}'"
        return f"without {', '.join(out)} no nodes are left that could run it: {mended}"
    return ""


def _left_out(events: Events) -> set[str]:
    """The nodes that requeues of this run have left out within a day."""
    since = time.time() - badnodes.KEPT_S
    left = [event for event in events if event["event"] == "requeue" and "out" in event and event["time"] > since]
    return {node for event in left for node in event["out"]}


def has_room(run: RunDir, job: str, out: Sequence[str]) -> bool:
    """Whether the job can ever start without these nodes. SLURM's verdict, which is no also while others are down."""
    try:
        single, info = alone(run), slurm.queue([job])[job]
        shape = [f"--partition={info.partition}", f"--nodes={info.nodes}"]
        fits, words = slurm.test_only(single.script, f"--exclude={','.join(out)}", *shape, *single.options)
        if fits or not _IMPOSSIBLE.search(words):
            return True
        there = [node for node in slurm.nodes() if info.partition in node.get("Partitions", "").split(",")]
    except (slurm.SlurmError, UserError, KeyError):
        return True  # nobody knows: rather wait in the queue than give up
    left = [node for node in there if node["NodeName"] not in out]
    return len(left) >= info.nodes and any(_AWAY.search(node["State"]) for node in left)


def leave_out(run: RunDir, bad: Mapping[str, str]) -> list[str]:
    """Remember bad nodes for other runs, too; all nodes that are to be left out now."""
    cluster = slurm.cluster_name()
    try:
        badnodes.remember(run.runs, cluster, run.name, bad)
    except OSError as error:
        print(f"{run.name}: bad nodes are not remembered for other runs ({error})", file=sys.stderr)
    return sorted({*bad, *badnodes.known(run.runs, cluster)})


def let_in(run: RunDir, met: Mapping[str, str]) -> None:
    """Take the nodes off the list that are there for the folder which these lack, too."""
    cluster = slurm.cluster_name()
    known = badnodes.known(run.runs, cluster)
    alike = {node: reason for node, reason in known.items() if health.scratch_everywhere({**met, node: reason})}
    try:
        badnodes.forget(run.runs, cluster, alike)
    except OSError as error:
        print(f"{run.name}: {', '.join(alike)} stay left out ({error})", file=sys.stderr)


def excluded_by_user(job: str) -> list[str]:
    """What the user excluded: SLURM replaces the whole list."""
    try:
        info = slurm.queue([job]).get(job)
    except slurm.SlurmError:
        return []
    return [info.excluded] if info and info.excluded else []
