"""Node check at the start of an attempt, before torch is imported: GPUs and scratch space; faults as sentences.

A node with a fault is left with exit code 77, excluded for a day (hpc/badnodes.py), and the job is requeued.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hpc import nvidia
from hpc.errors import UserError

TIMEOUT_S = 20.0
"""For all that is asked of nvidia-smi, and for the scratch space."""
PATIENCE_S = 15.0
"""So long the memory of a GPU may take to be freed after the job before us."""
_RETRY_S = 3.0
_LEFTOVER_MB, _LEFTOVER_SHARE = 1024.0, 0.05
"""What a GPU may have in use before the job begins: drivers and ECC take some hundred MB of each."""

_PLACE = ("index", "uuid", "memory.used", "memory.total")
_ERRORS = ("index", "uuid", "ecc.errors.uncorrected.volatile.total", "retired_pages.pending")
_ROWS = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")
_NO_FOLDER = re.compile(
    rf"scratch space .*: ({'|'.join(os.strerror(number) for number in (errno.ENOENT, errno.ENOTDIR, errno.EACCES))})"
)
_BROKEN = re.compile(r"err!|error|lost|reset", re.I)


@dataclass
class Report:
    """What was found on this node."""

    faults: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def check(gpus: int, exclusive: bool, environ: Mapping[str, str] = os.environ) -> Report:
    """Look at this node: `gpus` are due here (0: none is looked for); `exclusive`: nobody else may use them.

    Raises UserError where the scratch space is not named rightly: that is no node's fault.
    """
    report = Report()
    if gpus and not nvidia.available():
        report.unchecked.append("no nvidia-smi here: GPUs are not checked")
    elif gpus:
        try:
            report.faults += _gpu_faults(gpus, exclusive, nvidia.visible(environ))
        except nvidia.Silent as silence:
            report.faults.append(f"{silence} within {TIMEOUT_S:g} s")
    if "HPC_SCRATCH" in environ:
        needed = environ.get("HPC_SCRATCH_GB")
        report.faults += _scratch_faults(environ["HPC_SCRATCH"], float(needed) if needed else None, environ)
    return report


def _gpu_faults(due: int, exclusive: bool, names: list[str] | None) -> list[str]:
    end = time.monotonic() + TIMEOUT_S
    rows, words = nvidia.query("gpu", _PLACE, TIMEOUT_S)
    mine = nvidia.pick(rows, names)
    if names and names[0].startswith("MIG"):  # slices have neither a line nor counters of their own
        listed = nvidia.ask("-L", timeout_s=end - time.monotonic())
        lost = [name for name in names if name not in listed]
        return [f"nvidia-smi does not list {name}" for name in lost]
    # A task may be bound to fewer GPUs than the job has here: those that it was given must be there.
    due = due if names is None else len(names)
    if due == 0:
        return ["the job has a GPU here, but CUDA_VISIBLE_DEVICES names none"]
    if len(mine) < due:
        return [f"nvidia-smi shows {len(mine)} of {due} GPUs" + (f" ({words})" if words else "")]
    faults = _broken(mine)
    errors, _ = nvidia.query("gpu", _ERRORS, end - time.monotonic())
    remapped, _ = nvidia.query("remapped-rows", _ROWS, end - time.monotonic())  # an old nvidia-smi does not know it
    own = {row["uuid"]: row["index"] for row in mine}
    for row in nvidia.pick(errors, names):
        faults += _memory_errors(row)
    for row in remapped:
        if index := own.get(row["gpu_uuid"]):
            faults += _remapping(index, row)
    return faults or (_leftovers(mine, names) if exclusive else [])


def _broken(rows: list[dict[str, str]]) -> list[str]:
    return [
        f"GPU {row['index']}: {key} reads {value}"
        for row in rows
        for key, value in row.items()
        if key not in ("index", "uuid") and _BROKEN.search(value)
    ]


def _memory_errors(row: dict[str, str]) -> list[str]:
    faults = _broken([row])
    if count := nvidia.number(row["ecc.errors.uncorrected.volatile.total"]):
        faults.append(f"GPU {row['index']}: {count:.0f} uncorrected memory errors (ECC) since its driver was loaded")
    if row["retired_pages.pending"] in ("Yes", "1"):
        faults.append(f"GPU {row['index']}: memory pages wait to be retired, it needs a reset")
    return faults


def _remapping(index: str, row: dict[str, str]) -> list[str]:
    faults = []
    if row["remapped_rows.pending"] in ("Yes", "1"):
        faults.append(f"GPU {index}: memory rows wait to be remapped, it needs a reset")
    if row["remapped_rows.failure"] in ("Yes", "1"):
        faults.append(f"GPU {index}: its bad memory rows could not be remapped")
    return faults


def _leftovers(rows: list[dict[str, str]], names: list[str] | None) -> list[str]:
    """Memory in use before we begin; the last job's may be a few seconds in going."""
    end = time.monotonic() + PATIENCE_S
    while (found := [words for row in rows if (words := _leftover(row))]) and time.monotonic() < end:
        time.sleep(_RETRY_S)
        rows = nvidia.pick(nvidia.query("gpu", _PLACE, TIMEOUT_S)[0], names)
    return found


def _leftover(row: dict[str, str]) -> str:
    used, total = nvidia.number(row["memory.used"]), nvidia.number(row["memory.total"])
    if used is None or total is None or used <= max(_LEFTOVER_MB, _LEFTOVER_SHARE * total):
        return ""
    of = f"{used / 1024:.1f} of {total / 1024:.0f} GB"
    return f"GPU {row['index']}: {of} are in use before the job begins (a process left over?)"


def _scratch_faults(given: str, needed_gb: float | None, environ: Mapping[str, str]) -> list[str]:
    path = _expand(given, environ)
    if not Path(path).is_absolute():
        raise UserError(
            f"the instance's scratch {given!r} is {path!r} on this node, not a path: "
            f"a variable of it is not set here; name a folder, or leave scratch out"
        )
    faults: list[str] = [f"scratch space {path} has not answered for {TIMEOUT_S:g} s"]

    def look() -> None:
        faults[:] = _look_at(path, needed_gb)

    thread = threading.Thread(target=look, daemon=True)  # a broken disk answers never
    thread.start()
    thread.join(TIMEOUT_S)
    return list(faults)


def scratch_everywhere(found: Mapping[str, str]) -> bool:
    """Whether two nodes or more (name to fault) lack the same scratch folder: then it is named wrongly.

    A folder that bears the node's name is the same on each.
    """
    same = {fault.replace(node, "") for node, fault in found.items()}
    return len(found) > 1 and len(same) == 1 and all(map(_NO_FOLDER.fullmatch, found.values()))


def _expand(text: str, environ: Mapping[str, str]) -> str:
    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", lambda match: environ.get(match[1] or match[2], ""), text)


def _look_at(path: str, needed_gb: float | None) -> list[str]:
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free_gb = shutil.disk_usage(path).free / 1e9
    except OSError as error:
        return [f"scratch space {path}: {error.strerror}"]
    if needed_gb is not None and free_gb < needed_gb:
        return [f"scratch space {path}: {free_gb:.3g} of the {needed_gb:g} GB needed are free"]
    return []
