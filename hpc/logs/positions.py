"""What a sink (a folder, host:path, mlflow:URI) has confirmed of each run, kept beside the runs: for status and prune.

<runs>/.hpc-sinks/<8 hex digits of the sink's name>/<the run's path inside the runs folder, / as %2F>.json
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hpc.errors import UserError
from hpc.rundir import read_json, write_json

FOLDER = ".hpc-sinks"
"""In a runs folder; a dot in front, so it is taken for no run."""
_LONGEST = 200  # bytes; file systems take 255, and endings come behind it


@dataclass(frozen=True)
class Position:
    """What one sink has confirmed of one run."""

    sink: str
    """As shown to people, without credentials: /data/runs, me@host:runs, mlflow:http://127.0.0.1:5000."""
    run: str
    """The run's path inside the runs folder: tiny-1a2b3c4d, or sweep-.../row-... for a row."""
    files: dict[str, int]
    """Bytes confirmed of each event file, by its path inside the run folder (tb/events.out...)."""
    records: int
    """Whole records among them."""
    last_step: int | None
    """Highest step of a record among them; None without any."""
    confirmed: float
    """When, in seconds since 1970."""
    complete: bool
    """The run has ended and everything of it is confirmed."""

    @property
    def size(self) -> int:
        """Bytes confirmed."""
        return sum(self.files.values())


def folder_of(runs: Path, sink: str) -> Path:
    """Where the positions of one sink are kept."""
    return runs / FOLDER / digits(sink)


def path_of(runs: Path, sink: str, run: str) -> Path:
    """Where one position is kept."""
    return folder_of(runs, sink) / f"{quoted(run)}.json"


def digits(name: str) -> str:
    """8 hex digits that stand for a sink or a source."""
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8]


def carried_path(runs: Path, sink: str, run: str) -> Path:
    """Where the sizes of a complete run's other files are kept, as a folder confirmed them: {path: [size, time]}."""
    return path_of(runs, sink, run).with_suffix(".carried")


def quoted(run: str) -> str:
    """A run's path as the name of one file, of a long one its beginning and its digits."""
    name = run.replace("%", "%25").replace("/", "%2F")
    return name if len(os.fsencode(name)) <= _LONGEST else f"{name[: _LONGEST // 4]}-{digits(run)}"


def write(runs: Path, position: Position) -> None:
    """Keep a position, written aside and renamed. Raises OSError."""
    write_json(path_of(runs, position.sink, position.run), asdict(position))


def read(runs: Path, run: str | None = None) -> list[Position]:
    """All positions, or those of one run, by sink and run; a damaged one counts as none: its sink is asked again."""
    wanted = None if run is None else quoted(run)
    paths = (path for path in runs.glob(f"{FOLDER}/*/*.json") if wanted in (None, path.stem))
    found = [position for path in paths for position in _load(path)]
    return sorted(found, key=lambda one: (one.sink, one.run))


def withdraw(runs: Path, sink: str, run: str) -> None:
    """This sink has nothing of a run any more, as far as is known. Raises OSError."""
    for position in read(runs, run):
        if position.sink == sink:
            write(runs, replace(position, files={}, records=0, last_step=None, complete=False))


def forget(runs: Path, sink: str) -> int:
    """Take away what a sink has confirmed; of how many runs. Raises OSError."""
    mine = [position for position in read(runs) if position.sink == sink]
    for position in mine:
        carried_path(runs, sink, position.run).unlink(missing_ok=True)
        path_of(runs, sink, position.run).unlink()
    return len(mine)


def _load(path: Path) -> Iterator[Position]:
    with suppress(UserError, OSError, TypeError, ValueError, KeyError):
        told = read_json(path)
        last, files = told["last_step"], dict(told["files"])
        yield Position(
            sink=str(told["sink"]),
            run=str(told["run"]),
            files={str(name): int(size) for name, size in files.items()},
            records=int(told["records"]),
            last_step=None if last is None else int(last),
            confirmed=float(told["confirmed"]),
            complete=told["complete"] is True,
        )
