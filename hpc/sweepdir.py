"""A sweep's folder: its rows are run folders in it, with one snapshot of the code and one array script per chunk.

runs/<name>-sweep-<id>/
  sweep.yaml    the axes and the chunks          rows.txt      line i: the folder of row i
  job.sbatch    chunk 0; job-1.sbatch, ...       submit.json   every submission, with its rows
  code/         shared by the rows               logs/         of batch shells that do not know their row yet
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc import yamlfile
from hpc.errors import UserError
from hpc.rundir import ROWS, RunDir, is_sweep, read_json, rows, write_json


@dataclass(frozen=True)
class Chunk:
    """The rows first, first + 1, ... of a sweep that are one job array, with indices from 0."""

    number: int
    first: int
    count: int
    parallel: int | None = None
    """At most so many of its tasks at a time."""
    after: int | None = None
    """The chunk that must have ended before."""


class SweepDir:
    """The folder of one sweep."""

    def __init__(self, path: Path | str) -> None:
        as_run = RunDir(path)  # what both have is called the same
        self.path, self.code, self.logs, self.submit = as_run.path, as_run.code, as_run.logs, as_run.submit
        self.file = self.path / "sweep.yaml"
        self.rows_file = self.path / ROWS

    @property
    def name(self) -> str:
        return self.path.name

    def script(self, number: int) -> Path:
        """The array script of a chunk."""
        first = RunDir(self.path).script
        return first.with_stem(f"{first.stem}-{number}") if number else first

    def token(self, chunk: int, submission: int = 0) -> str:
        """What a chunk's job carries as its comment: nth submission of the sweep."""
        return f"{self.name}/{chunk}" + (f".{submission}" if submission else "")

    def rows(self) -> list[RunDir]:
        return rows(self.path)

    def chunks(self) -> list[Chunk]:
        """Raises UserError where sweep.yaml is damaged."""
        try:
            return [Chunk(**values) for values in yamlfile.read(self.file)["chunks"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.file}: damaged ({error}); restore it from a copy") from None

    def place(self, run: RunDir) -> tuple[Chunk, int]:
        """The chunk of a row, and its index in that chunk's array."""
        index = [row.name for row in self.rows()].index(run.name)
        return self.place_of(index)

    def place_of(self, row: int) -> tuple[Chunk, int]:
        chunk = next(chunk for chunk in self.chunks() if chunk.first <= row < chunk.first + chunk.count)
        return chunk, row - chunk.first

    def write_chunks(self, chunks: Iterable[Chunk], **more: Any) -> None:
        self.file.write_text(yamlfile.dump({**more, "chunks": [asdict(chunk) for chunk in chunks]}))

    def record(self, cluster: str, jobs: dict[int, tuple[str, list[int]]], **more: Any) -> None:
        """Append a submission: chunk number -> (job, rows). `more` of a local one: its process's start."""
        told = read_json(self.submit)
        chunks = [{"chunk": number, "job": job, "rows": spec(of)} for number, (job, of) in jobs.items()]
        line = {"cluster": cluster, "time": round(time.time(), 3), "chunks": chunks, **more}
        write_json(self.submit, {"submissions": [*told.get("submissions", []), line]})

    def count_submissions(self) -> int:
        return len(read_json(self.submit).get("submissions", []))

    def mark_cancelled(self) -> None:
        submissions = read_json(self.submit).get("submissions", [])
        submissions[-1]["cancelled"] = round(time.time(), 3)
        write_json(self.submit, {"submissions": submissions})

    def submissions(self) -> dict[int, dict[str, Any]]:
        """Row number to its last submission, in the form of a run's submit.json."""
        first = {chunk.number: chunk.first for chunk in self.chunks()}
        found: dict[int, dict[str, Any]] = {}
        for submission in read_json(self.submit).get("submissions", []):
            common = {key: value for key, value in submission.items() if key != "chunks"}
            for chunk in submission["chunks"]:
                for row in numbers(chunk["rows"]):
                    task = f"_{row - first[chunk['chunk']]}" if common["cluster"] == "slurm" else ""
                    found[row] = {**common, "job": f"{chunk['job']}{task}"}
        return found


def sweep_of(run: RunDir) -> SweepDir | None:
    """The sweep that a run is a row of."""
    return SweepDir(run.path.parent) if run.in_sweep else None


def all_sweeps(runs: Path) -> list[SweepDir]:
    return [SweepDir(path) for path in sorted(runs.glob("[!.]*")) if is_sweep(path)] if runs.is_dir() else []


def find_sweep(runs: Path, name: str) -> SweepDir | None:
    """A sweep by its path, its folder's name, or any unique beginning or id of it; None where there is none."""
    if is_sweep(Path(name)):
        return SweepDir(name)
    known = all_sweeps(runs)
    found = [sweep for sweep in known if sweep.name == name] or [
        sweep for sweep in known if sweep.name.startswith(name) or sweep.name.endswith(f"-{name}")
    ]
    if len(found) > 1:
        raise UserError(f"{name!r} names {len(found)} sweeps: {', '.join(sweep.name for sweep in found)}")
    return found[0] if found else None


def submission_of(run: RunDir) -> dict[str, Any]:
    """submit.json of a run; of a row the newer of its own (submitted or cancelled alone) and the sweep's."""
    own = read_json(run.submit)
    sweep = sweep_of(run)
    if sweep is None:
        return own
    index = [row.name for row in sweep.rows()].index(run.name)
    return newer(own, sweep.submissions().get(index, {}))


@dataclass(frozen=True)
class Alone:
    """How one run is submitted by itself: a row of a sweep is one task of its chunk's array."""

    script: Path
    token: str
    index: int | None

    @property
    def options(self) -> list[str]:
        """For sbatch's command line."""
        return [] if self.index is None else [f"--array={self.index}", f"--comment={self.token}"]

    def job(self, number: str) -> str:
        """What SLURM calls the job that sbatch gave this number."""
        return number if self.index is None else f"{number}_{self.index}"


def alone(run: RunDir) -> Alone:
    sweep = sweep_of(run)
    if sweep is None:
        return Alone(run.script, run.name, None)
    chunk, index = sweep.place(run)
    return Alone(sweep.script(chunk.number), f"{sweep.token(chunk.number)}/{index}", index)


def newer(own: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    return own if own.get("time", 0) >= shared.get("time", 0) else shared


def spec(of: Iterable[int]) -> str:
    """Numbers as `sbatch --array` takes them: 0-3,7."""
    parts: list[list[int]] = []
    for number in sorted(of):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def numbers(text: str) -> list[int]:
    """The inverse of `spec`."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise UserError(f"{text!r} is no list of rows; write 0-3,7")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found
