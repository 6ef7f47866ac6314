"""What the logs of a run tell of its end: tracebacks, which rank failed first, and the words of SLURM's daemons."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc.rundir import RunDir
from hpc.runlogs import files, last_lines

_TAIL = 1 << 18
"""Bytes that are looked at, at the end of each file."""
_LONGEST = 40
"""Lines of a traceback that are shown."""
_WORDS = 5
_CLOCKS_S = 5
"""So far the clocks of a node and of the file server may be apart."""
_PREFIX = re.compile(r"^\[rank\d+\]: ?")
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(:|$)")
# What ranks say that only lost the one that failed.
_SECONDARY = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|remote process (has )?(exited|been terminated)|Socket Timeout"
    r"|NCCL (communicator|timeout)|ncclRemoteError|Watchdog caught|DistStoreError|[Tt]imed out waiting|[Ww]ait timeout"
)
_SRUN_TASK = re.compile(
    r"srun: error: \S+: tasks? (?P<first>\d+)[\d,-]*: (Exited|Killed|Out Of Memory|Segmentation|Abort)"
)
_SLURMD = {
    "memory": re.compile(r"oom[-_]kill|out of memory:|exceeded (\w+ )?memory limit|Memory cgroup out of memory", re.I),
    "time limit": re.compile(r"DUE TO TIME LIMIT"),
    "node failure": re.compile(r"DUE TO NODE FAILURE|error: Node failure on"),
    "preemption": re.compile(r"DUE TO PREEMPTION"),
}
_SPEAKER = re.compile(r"(slurmstepd|srun|kernel)[-\w.]*: ")
"""With several nodes on one host a daemon adds its node's name."""


@dataclass(frozen=True)
class Traceback:
    """The last traceback of one rank."""

    log: Path
    rank: int | None
    lines: list[str]
    modified: float

    @property
    def error(self) -> str:
        """Its last line: the exception and its message."""
        return self.lines[-1]

    @property
    def secondary(self) -> bool:
        """Whether the rank only lost another one."""
        return bool(_SECONDARY.search(self.error))


@dataclass(frozen=True)
class Evidence:
    """What the last attempt left in its logs."""

    tracebacks: list[Traceback]
    """The rank that failed first is the first."""
    daemons: dict[str, str]
    """Of `memory`, `time limit`, `node failure` and `preemption`, the line that says so."""
    last: list[str]
    """The last lines of rank 0 before the script's own."""
    last_log: Path | None


def gather(run: RunDir, job: str | None, began: float) -> Evidence:
    """Read the ends of the logs of the attempt that began at this time (bounded, whatever their size).

    `job`: on SLURM. Local outputs carry the number of what started the ranks, and are told by their age.
    """
    tracebacks: list[Traceback] = []
    daemons: dict[str, str] = {}
    tasks: list[int] = []
    last: list[str] = []
    last_log = None
    for log in files(run):
        if log.path.stat().st_mtime < began - _CLOCKS_S or (job and log.job != job):
            continue
        lines = _last_attempt([_PREFIX.sub("", line) for line in last_lines(log.path, _TAIL)], run.name)
        if found := last_traceback(lines):
            tracebacks.append(Traceback(log.path, log.rank, found, log.path.stat().st_mtime))
        daemons = dict(_daemons(lines)) | daemons
        tasks += [int(match["first"]) for line in lines if (match := _SRUN_TASK.search(line))]
        if log.rank in (0, None) and (words := _own_words(lines, run.name)) and (log.stream == "err" or not last):
            last, last_log = words, log.path
    first = tasks[0] if tasks else None
    tracebacks.sort(key=lambda found: (found.secondary, found.rank != first, found.modified))
    return Evidence(tracebacks, daemons, last, last_log)


def _last_attempt(lines: list[str], name: str) -> list[str]:
    """What follows the end of the attempt before: the script ends each with a line that begins with the run's name."""
    ends = [
        number
        for number, line in enumerate(lines)
        if line.startswith(f"{name}: ") and line.endswith(("started again", "starting again"))
    ]
    if ends and not _own_words(lines[ends[-1] + 1 :], name):  # it ends the last attempt itself
        ends.pop()
    return lines[ends[-1] + 1 :] if ends else lines


def last_traceback(lines: Sequence[str]) -> list[str]:
    """The last Python traceback in these lines, from its head to its exception; [] where there is none."""
    heads = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    for head in reversed(heads):
        for end in range(head + 1, len(lines)):
            if _EXCEPTION.match(lines[end]):
                found = list(lines[head : end + 1])
                return found if len(found) <= _LONGEST else [*found[:3], "  ...", *found[3 - _LONGEST :]]
            if lines[end] and not lines[end].startswith((" ", "\t")):
                break
    return []


def _daemons(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Kind and line, the first line of a kind last."""
    for line in reversed(lines):
        if _SPEAKER.match(line):
            yield from ((kind, line.strip()) for kind, pattern in _SLURMD.items() if pattern.search(line))


def _own_words(lines: Sequence[str], name: str) -> list[str]:
    """The last lines that say something, less what srun, its daemons and the script's end add."""
    own = (line.rstrip() for line in lines if not _SPEAKER.match(line) and not line.startswith(f"{name}: "))
    return [line for line in own if line][-_WORDS:]
