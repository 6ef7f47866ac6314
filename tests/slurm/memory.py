"""The memory limit of jobs in a test cluster: by the kernel, as on real clusters, or by sampling, which works anywhere.

`kernel` needs cgroups of version 1. Each node has a cgroup of its own, which it sees as the root of them all, so that
clusters side by side do not meet there.
"""

import os
import time
from pathlib import Path

KINDS = ("kernel", "sampled")
ROOT = Path("/sys/fs/cgroup/memory")
CONF = "CgroupPlugin=cgroup/v1\nCgroupMountpoint={}/cgroup\nConstrainRAMSpace=yes\n"


def obstacle(kind: str) -> str | None:
    """Says why this kind of limit cannot be had here; None when it can."""
    if kind not in ("", *KINDS):
        raise ValueError(f"memory_limit={kind!r}: one of {', '.join(KINDS)}, or none")
    if kind == "kernel" and not ((ROOT / "memory.limit_in_bytes").exists() and os.access(ROOT, os.W_OK)):
        return f"no memory cgroups of version 1 that root may write at {ROOT}"
    return None


def configure(kind: str, folder: Path, nodes: tuple[str, ...]) -> list[str]:
    """Lines for slurm.conf; makes the nodes' cgroups."""
    if kind == "sampled":
        return ["JobAcctGatherParams=OverMemoryKill"]
    if kind == "kernel":
        for node in nodes:
            (ROOT / folder.name / node).mkdir(parents=True)
        (folder / "cgroup" / "memory").mkdir(parents=True)
        with (folder / "cgroup.conf").open("a") as conf:
            conf.write(CONF.format(folder))
        return ["TaskPlugin=task/cgroup"]
    return []


def mounts(kind: str, folder: Path, node: str) -> dict[Path, Path]:
    """What slurmd shall see where, by the place where it sees it."""
    return {folder / "cgroup" / "memory": ROOT / folder.name / node} if kind == "kernel" else {}


def remove(folder: Path) -> None:
    """Removes the cgroups of a cluster whose processes have been killed; they may need a moment to be gone."""
    top = ROOT / folder.name
    end = time.monotonic() + 5
    while top.exists() and time.monotonic() < end:
        for path, _, _ in os.walk(top, topdown=False):
            try:
                Path(path).rmdir()
            except OSError:
                time.sleep(0.02)
