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

from hpc import slurm, yamlfile
from hpc.errors import UserError
from hpc.rundir import ROWS, RunDir, is_sweep, read_json, refuse_empty, row_names, rows, write_json


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
        """Raises UserError where rows.txt names none."""
        try:
            found = rows(self.path)
        except OSError as error:
            raise UserError(f"{self.rows_file}: {error.strerror}") from None
        if not found:
            raise _damaged(self.rows_file, "it names no row")
        return found

    def number(self, run: RunDir) -> int:
        """Of a row. Raises UserError for a folder that is none."""
        names = row_names(self.path)
        if run.name not in names:
            raise _damaged(self.rows_file, f"{run.name} is not named")
        return names.index(run.name)

    def axes(self) -> dict[str, list[Any]]:
        """Key to values. Raises UserError where sweep.yaml is damaged."""
        axes = yamlfile.read(self.file).get("axes", {})
        if not isinstance(axes, dict) or not all(isinstance(values, list) for values in axes.values()):
            raise _damaged(self.file, "'axes' is not what belongs there")
        return axes

    def chunks(self) -> list[Chunk]:
        """Raises UserError where sweep.yaml is damaged."""
        try:
            chunks = [Chunk(**values) for values in yamlfile.read(self.file)["chunks"]]
        except (KeyError, TypeError) as error:
            raise _damaged(self.file, str(error)) from None
        kinds = [(chunk.number, chunk.first, chunk.count, chunk.parallel or 0, chunk.after or 0) for chunk in chunks]
        if not chunks or not all(isinstance(value, int) for values in kinds for value in values):
            raise _damaged(self.file, "'chunks' is not what belongs there")
        return chunks

    def place(self, run: RunDir) -> tuple[Chunk, int]:
        """The chunk of a row, and its index in that chunk's array. Raises UserError."""
        row = self.number(run)
        for chunk in self.chunks():
            if chunk.first <= row < chunk.first + chunk.count:
                return chunk, row - chunk.first
        raise _damaged(self.file, f"row {row} is in no chunk")

    def write_chunks(self, chunks: Iterable[Chunk], **more: Any) -> None:
        self.file.write_text(yamlfile.dump({**more, "chunks": [asdict(chunk) for chunk in chunks]}))

    def record(self, cluster: str, jobs: dict[int, tuple[str, list[int]]], **more: Any) -> None:
        """Append a submission: chunk number -> (job, rows). `more` of a local one: its process's start."""
        chunks = [{"chunk": number, "job": job, "rows": spec(of)} for number, (job, of) in jobs.items()]
        name = slurm.cluster_name() if cluster == "slurm" else ""
        where = {"slurm_cluster": name} if name else {}
        line = {"cluster": cluster, **where, "time": round(time.time(), 3), "chunks": chunks, **more}
        write_json(self.submit, {"submissions": [*self._recorded(), line]})

    def count_submissions(self) -> int:
        """Raises UserError where submit.json is damaged."""
        return len(self._recorded())

    def mark_cancelled(self) -> None:
        """Of every submission: rows of an earlier one may have run still."""
        now = round(time.time(), 3)
        write_json(self.submit, {"submissions": [{**told, "cancelled": now} for told in self._recorded()]})

    def submissions(self) -> dict[int, dict[str, Any]]:
        """Row number to its last submission, in the form of a run's submit.json. Raises UserError for damaged files."""
        chunks = {chunk.number: chunk for chunk in self.chunks()}
        found: dict[int, dict[str, Any]] = {}
        for submission in self._recorded():
            common = {key: value for key, value in submission.items() if key != "chunks"}
            for part in submission["chunks"]:
                chunk = chunks.get(part["chunk"])
                if chunk is None:
                    raise _damaged(self.submit, f"there is no chunk {part['chunk']}")
                for row in self._rows_of(part, chunk):
                    task = f"_{row - chunk.first}" if common["cluster"] == "slurm" else ""
                    found[row] = {**common, "job": f"{part['job']}{task}"}
        return found

    def _recorded(self) -> list[dict[str, Any]]:
        """The submissions in submit.json, each field of the kind that is expected. Raises UserError."""
        told = read_json(self.submit).get("submissions", [])
        if not _alike(told, _SUBMISSION) or not all(_alike(one["chunks"], _PART) for one in told):
            raise _damaged(self.submit, "'submissions' is not what belongs there")
        return list(told)

    def _rows_of(self, part: dict[str, Any], chunk: Chunk) -> list[int]:
        try:
            found = numbers(part["rows"])
        except UserError as error:
            raise _damaged(self.submit, str(error)) from None
        if min(found) < chunk.first or max(found) >= chunk.first + chunk.count:
            raise _damaged(self.submit, f"rows {part['rows']} are not of chunk {chunk.number}")
        return found


_SUBMISSION = {"cluster": str, "time": (int, float), "chunks": list}
_PART = {"chunk": int, "job": str, "rows": str}


def _alike(values: Any, kinds: dict[str, Any]) -> bool:
    """Whether this is a list of objects that all have fields of these kinds."""
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        return False
    return all(isinstance(value.get(key), kind) for value in values for key, kind in kinds.items())


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged ({what}); restore it from a copy")


def sweep_of(run: RunDir) -> SweepDir | None:
    """The sweep that a run is a row of."""
    return SweepDir(run.path.parent) if run.in_sweep else None


def all_sweeps(runs: Path) -> list[SweepDir]:
    return [SweepDir(path) for path in sorted(runs.glob("[!.]*")) if is_sweep(path)] if runs.is_dir() else []


def find_sweep(runs: Path, name: str) -> SweepDir | None:
    """A sweep by its path, its folder's name, or any unique beginning or id of it; None where there is none."""
    refuse_empty(name)
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
    return newer(own, sweep.submissions().get(sweep.number(run), {}))


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
