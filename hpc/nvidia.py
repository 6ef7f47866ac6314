"""The one door to nvidia-smi: what it says of the GPUs that this job may use on this node.

nvidia-smi lists every GPU of a node unless SLURM hides the others (cgroups), so a job's own are picked by
CUDA_VISIBLE_DEVICES. On a sick node it hangs in the kernel, deaf to KILL: nothing here waits for its end.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence

_NONE = ("NoDevFiles", "-1", "none", "void")


class Silent(RuntimeError):
    """No answer in time."""


def available() -> bool:
    return shutil.which("nvidia-smi") is not None


def query(kind: str, fields: Sequence[str], timeout_s: float) -> tuple[list[dict[str, str]], str]:
    """`--query-KIND=FIELDS`: one dict per line it prints, and what else it said. Raises Silent."""
    said = ask(*command(kind, fields)[1:], timeout_s=timeout_s)
    return parse(said.splitlines(), fields)


def command(kind: str, fields: Sequence[str]) -> list[str]:
    return ["nvidia-smi", f"--query-{kind}={','.join(fields)}", "--format=csv,noheader,nounits"]


def parse(lines: Iterable[str], fields: Sequence[str]) -> tuple[list[dict[str, str]], str]:
    """Lines of as many values as fields, by field; the others are words of complaint."""
    found, words = [], []
    for line in lines:
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(fields) and re.match(r"\d+$|GPU-", values[0]):
            found.append(dict(zip(fields, values, strict=True)))
        elif line.strip():
            words.append(line.strip())
    return found, "; ".join(words)


def ask(*arguments: str, timeout_s: float) -> str:
    """What nvidia-smi prints, on both streams; its exit code says little. Raises Silent after `timeout_s`."""
    process = subprocess.Popen(
        ["nvidia-smi", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )
    try:
        return process.communicate(timeout=max(timeout_s, 0))[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise Silent("nvidia-smi does not answer") from None


def visible(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """Indices or UUIDs in CUDA_VISIBLE_DEVICES; None where it is not set: all that there are."""
    given = environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return None
    names = [name.strip() for name in given.split(",") if name.strip()]
    return [] if any(name in _NONE for name in names) else names


def pick(rows: Sequence[dict[str, str]], names: Sequence[str] | None) -> list[dict[str, str]]:
    """The rows (with index and uuid) of these devices; a UUID may be shortened, as CUDA has it."""
    if names is None:
        return list(rows)
    return [row for row in rows if any(name == row["index"] or row["uuid"].startswith(name) for name in names)]


def number(text: str) -> float | None:
    """None for [N/A], [Not Supported], ERR! and the like."""
    try:
        return float(text)
    except ValueError:
        return None
