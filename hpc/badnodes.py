"""Nodes that failed the check at the start of an attempt, kept for a day beside the runs: .bad-nodes.json.

New submissions and requeued jobs leave them out. To let a repaired node in again, take its entry out of the file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc import slurm
from hpc.errors import UserError
from hpc.rundir import locked, read_json, write_json

KEPT_S = 24 * 3600


@dataclass(frozen=True)
class _Entry:
    node: str
    cluster: str
    reason: str
    run: str
    """That met it."""
    until: float
    """Seconds since 1970."""


def current(runs: Path) -> dict[str, str]:
    """The nodes to leave out now and why, of the cluster that answers here; SLURM is asked only where there are any."""
    return known(runs, slurm.cluster_name()) if _entries(runs) else {}


def exclusion(runs: Path) -> list[str]:
    """sbatch's option that keeps a job off these nodes."""
    nodes = sorted(current(runs))
    return [f"--exclude={','.join(nodes)}"] if nodes else []


def known(runs: Path, cluster: str) -> dict[str, str]:
    """The nodes of a cluster that are still left out, and why."""
    return {entry.node: entry.reason for entry in _entries(runs) if entry.cluster == cluster}


def remember(runs: Path, cluster: str, run: str, found: Mapping[str, str]) -> None:
    """Leave these nodes (name to reason) out from now on, for a day. Raises OSError."""
    until = round(time.time()) + KEPT_S
    with locked(runs / ".bad-nodes.lock"):
        others = [entry for entry in _entries(runs) if entry.cluster != cluster or entry.node not in found]
        new = [_Entry(node, cluster, reason, run, until) for node, reason in found.items()]
        write_json(file(runs), {"nodes": [asdict(entry) for entry in (*others, *new)]})


def forget(runs: Path, cluster: str, found: Mapping[str, str]) -> None:
    """Let these nodes in again where they are left out for these reasons (name to reason). Raises OSError."""
    with locked(runs / ".bad-nodes.lock"):
        kept = [entry for entry in _entries(runs) if entry.cluster != cluster or found.get(entry.node) != entry.reason]
        write_json(file(runs), {"nodes": [asdict(entry) for entry in kept]})


def file(runs: Path) -> Path:
    """Where they are kept."""
    return runs / ".bad-nodes.json"


def _entries(runs: Path) -> list[_Entry]:
    """Those that have not expired. A damaged file is not heeded: a node that is still bad is found again."""
    try:
        entries = [_Entry(**values) for values in read_json(file(runs)).get("nodes", [])]
        return [entry for entry in entries if entry.until > time.time()]
    except (UserError, TypeError) as error:
        print(f"{file(runs)} is not heeded: {error}", file=sys.stderr)
        return []
