"""The output of a run's tasks: its files, printed and followed in bounded memory."""

from __future__ import annotations

import codecs
import os
import re
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hpc.errors import UserError
from hpc.rundir import RunDir
from hpc.sweepdir import SweepDir, submission_of, sweep_of

_PIECE = 1 << 16
"""Bytes read at a time."""
_TAIL_MOST = 1 << 23
"""Bytes that the last N lines of a file may have."""
_NAME = re.compile(r"(?P<job>\w+?)_(?P<task>\d+|controller)_log\.(?P<stream>out|err)")
_SHELL_NAME = re.compile(r"(?P<job>\d+_\d+)_log\.out")


@dataclass(frozen=True)
class Log:
    """One output file of a run."""

    path: Path
    job: str
    """123, 123_4, a process number, or `local`."""
    rank: int | None
    """None: of what started the ranks."""
    stream: str

    @property
    def order(self) -> tuple[list[int], int, str]:
        """By job, then by rank."""
        return (
            [int(number) for number in re.findall(r"\d+", self.job)],
            -1 if self.rank is None else self.rank,
            self.stream,
        )


def files(run: RunDir, rank: int | None = None) -> list[Log]:
    """The regular files among a run's outputs, by job and rank; those of one rank where that is given.

    Of a row, also what the sweep has of its tasks, written before they knew their row.
    Raises UserError for a rank that has none, with those that have.
    """
    found = [log for path in run.logs.glob("*_log.*") if (log := _log(path))]
    if sweep := sweep_of(run):
        found += _before_the_row(run, sweep, {log.job for log in found})
    found = sorted((log for log in found if log.path.is_file()), key=lambda log: log.order)
    if rank is None:
        return found
    chosen = [log for log in found if log.rank == rank]
    if found and not chosen:
        ranks = sorted({log.rank for log in found if log.rank is not None})
        raise UserError(f"{run.name} has no output of rank {rank}; there are ranks {', '.join(map(str, ranks))}")
    return chosen


def _log(path: Path) -> Log | None:
    match = _NAME.fullmatch(path.name)
    if not match:
        return None
    rank = int(match["task"]) if match["task"].isdecimal() else None
    return Log(path, match["job"], rank, match["stream"])


def _before_the_row(run: RunDir, sweep: SweepDir, known: set[str]) -> list[Log]:
    jobs = {*known, str(submission_of(run).get("job", ""))}
    shells = [
        (path, match["job"]) for path in sweep.logs.glob("*_log.out") if (match := _SHELL_NAME.fullmatch(path.name))
    ]
    return [Log(path, job, None, "out") for path, job in shells if job in jobs]


class Printer:
    """Prints what files have beyond what was printed of them, each under its name."""

    def __init__(self, tail: int | None = None) -> None:
        """`tail`: begin with so many lines at the end of each file."""
        self._tail = tail
        self._offsets: dict[Path, int] = {}
        self._decoders: dict[Path, codecs.IncrementalDecoder] = {}
        self._last: Path | None = None

    @property
    def empty(self) -> bool:
        return self._last is None

    def print_new(self, logs: Iterable[Log]) -> None:
        for log in logs:
            try:
                self._print(log.path)
            except OSError as error:  # pruned meanwhile, or not ours to read
                print(f"{log.path}: {error.strerror}", file=sys.stderr)

    def _print(self, path: Path) -> None:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = self._offsets.get(path)
            if start is None:
                start = 0 if self._tail is None else tail_start(file.fileno(), size, self._tail)
            file.seek(start if start <= size else 0)  # it became shorter: another file
            while piece := file.read(_PIECE):
                self._write(path, piece)
            self._offsets[path] = file.tell()

    def _write(self, path: Path, piece: bytes) -> None:
        if self._last != path:
            print(f"==> {path.name} <==")
            self._last = path
        decoder = self._decoders.setdefault(path, codecs.getincrementaldecoder("utf-8")("replace"))
        sys.stdout.write(decoder.decode(piece))
        sys.stdout.flush()


def _open(path: Path) -> BinaryIO:
    """A regular file for reading: a FIFO would block for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "is no regular file")
    return os.fdopen(descriptor, "rb")


def tail_start(descriptor: int, size: int, lines: int) -> int:
    """Where the last `lines` lines begin, looking at the last 8 MiB at most."""
    if lines <= 0:
        return size
    position, seen = size, 0
    while position > max(0, size - _TAIL_MOST):
        begin = max(0, position - _PIECE)
        piece = os.pread(descriptor, position - begin, begin)
        if position == size and piece.endswith(b"\n"):
            piece = piece[:-1]
        count = piece.count(b"\n")
        if seen + count >= lines:
            for _ in range(lines - seen):
                cut = piece.rfind(b"\n")
                piece = piece[:cut]
            return begin + cut + 1
        seen, position = seen + count, begin
    return position


def last_lines(path: Path, most_bytes: int) -> list[str]:
    """The lines in the last `most_bytes` of a file; [] where it cannot be read."""
    try:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - most_bytes))
            lines = file.read(most_bytes).decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[1:] if size > most_bytes else lines
