"""What the files of runs say, each field of the kind that is expected; a sweep's are read once for all its rows."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

from hpc import yamlfile
from hpc.errors import UserError
from hpc.rundir import RunDir, is_sweep, read_json, row_names
from hpc.sweepdir import SweepDir, newer


@dataclass(frozen=True)
class Records:
    """The files of one run. Of a row of a sweep, `submit` is the newer of its own submission and the sweep's."""

    submit: dict[str, Any]
    state: dict[str, Any]
    result: dict[str, Any]
    made: float
    """When the run was made, 0 where something newer is known."""
    token: str
    """The comment of a job that was submitted for this run alone."""
    sweep: str
    cancelled: bool
    """Whether it was cancelled, and has not started or ended by itself since."""

    @property
    def generation(self) -> int:
        return int(self.state.get("generation", 0))

    @property
    def phase(self) -> str:
        return str(self.state.get("phase", ""))

    def places(self) -> list[tuple[str, str]]:
        """Cluster and job, the newest first: an attempt after the last submission may be a hand-made sbatch or bash."""
        submitted = (str(self.submit.get("cluster", "")), str(self.submit.get("job", "")))
        if self.state.get("job"):
            held = ("slurm", str(self.state["job"]))
        else:
            held = ("local", str(self.state.get("pid", "")))
        if not self.state or (held[0] == submitted[0] == "local"):
            return [submitted]
        newest_first = [held, submitted] if self.began > self.submitted else [submitted, held]
        return list(dict.fromkeys(place for place in newest_first if place[1]))

    def slurm_cluster(self, job: str) -> str:
        """SLURM's name of the cluster of this job, empty where it is not recorded."""
        record = self.state if self.state.get("job") == job else self.submit
        return str(record.get("slurm_cluster", ""))

    @property
    def began(self) -> float:
        return float(self.state.get("started", 0))

    @property
    def submitted(self) -> float:
        return float(self.submit.get("time", 0))


_NUMBER = (int, float)
_KINDS: dict[str, dict[str, Any]] = {
    "submit": {"cluster": str, "slurm_cluster": str, "job": str, "time": _NUMBER, "cancelled": _NUMBER},
    "state": {
        "phase": str,
        "pid": int,
        "host": str,
        "slurm_cluster": str,
        "generation": int,
        "code": int,
        "time": _NUMBER,
        "started": _NUMBER,
        "step": int,
        "steps": int,
        "epoch": int,
        "best": dict,
        "job": (str, NoneType),
    },
    "result": {"best": dict},
}
_MANY, _AT_ONCE = 50, 16
"""Of so many runs several are read at once: a shared file system takes its time for each file, not for several."""
_NEEDED = {"state": ("phase", "pid", "host", "time")}


class Reader:
    """Reads records; with `keep`, a file that has not changed since is not read again."""

    def __init__(self, keep: bool = False) -> None:
        self._kept: dict[Path, tuple[tuple[int, int, int], Any]] | None = {} if keep else None

    def read(self, runs: Iterable[RunDir], thorough: bool = False) -> list[Records | str]:
        """The records of each run, or what is damaged about it, in a sentence.

        `thorough` parses experiment.yaml as well: that takes longer than all the rest.
        """
        runs = list(runs)
        sweeps = {folder: self._shared(folder) for folder in dict.fromkeys(run.path.parent for run in runs)}

        def read(run: RunDir) -> Records | str:
            return self._read(run, sweeps[run.path.parent], thorough)

        if len(runs) < _MANY:
            return list(map(read, runs))
        shares = [runs[first::_AT_ONCE] for first in range(_AT_ONCE)]
        found: list[Records | str] = [""] * len(runs)
        with ThreadPoolExecutor(_AT_ONCE) as readers:
            for first, share in enumerate(readers.map(lambda share: list(map(read, share)), shares)):
                found[first::_AT_ONCE] = share
        return found

    def _shared(self, folder: Path) -> _Shared | UserError | None:
        if not is_sweep(folder):
            return None
        sweep = SweepDir(folder)
        try:
            stamps = tuple(_stamp(path) for path in (sweep.submit, sweep.file, sweep.rows_file))
            shared: _Shared = self._load(sweep.submit, lambda _: _Shared(sweep), (hash(stamps), 0, 0))
            return shared
        except (UserError, OSError) as error:
            return UserError(str(error))

    def _read(self, run: RunDir, shared: _Shared | UserError | None, thorough: bool) -> Records | str:
        try:
            if isinstance(shared, UserError):
                raise shared
            if thorough:
                yamlfile.read(run.experiment)
            own, state, result = (self._record(getattr(run, name), name) for name in _KINDS)
            made = 0.0 if own or state else _made(run)
        except (UserError, OSError) as error:
            return " ".join(str(error).replace(f"{run.path}{os.sep}", "").split())
        common = shared.submission(run.name) if shared else {}
        submit = newer(own, common) if common else own
        token = shared.token(run.name) if shared else run.name
        cancelled = _cancelled(submit, state, alone="cancelled" in own)
        return Records(submit, state, result, made, token, shared.name if shared else "", cancelled)

    def _record(self, path: Path, name: str) -> dict[str, Any]:
        return dict(self._load(path, partial(_checked, name=name), None))

    def _load(self, path: Path, load: Any, stamp: tuple[int, int, int] | None) -> Any:
        if self._kept is None:
            return load(path)
        stamp = stamp or _stamp(path)
        if path not in self._kept or self._kept[path][0] != stamp:
            self._kept[path] = (stamp, load(path))
        return self._kept[path][1]


class _Shared:
    """What the rows of a sweep have in common."""

    def __init__(self, sweep: SweepDir) -> None:
        self.name = sweep.name
        self._number = {row: number for number, row in enumerate(row_names(sweep.path))}
        self._submissions = sweep.submissions()
        self._tokens = {
            chunk.first + index: f"{sweep.token(chunk.number)}/{index}"
            for chunk in sweep.chunks()
            for index in range(chunk.count)
        }

    def submission(self, row: str) -> dict[str, Any]:
        return self._submissions.get(self._number.get(row, -1), {})

    def token(self, row: str) -> str:
        return self._tokens.get(self._number.get(row, -1), row)


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_size, found.st_ino)


def _made(run: RunDir) -> float:
    try:
        found = run.experiment.stat()
    except FileNotFoundError:
        raise UserError(f"{run.experiment}: is missing; restore it from a copy") from None
    if not found.st_size:
        raise UserError(f"{run.experiment}: is empty; restore it from a copy")
    return found.st_mtime


def _cancelled(submit: dict[str, Any], state: dict[str, Any], alone: bool) -> bool:
    """A whole sweep's cancellation does not concern the rows that had ended by themselves."""
    when = submit.get("cancelled", 0)
    ended_before = state.get("phase") == "ended" and state["time"] < when
    return bool(when > state.get("started", 0) and (alone or not ended_before))


def _checked(path: Path, name: str) -> dict[str, Any]:
    record = read_json(path)
    wrong = [key for key, kind in _KINDS[name].items() if key in record and not isinstance(record[key], kind)]
    missing = [key for key in _NEEDED.get(name, ()) if record and key not in record]
    if name == "submit" and record.get("cluster") == "local" and not str(record.get("job", "")).isdecimal():
        wrong.append("job")
    if "best" not in wrong and not isinstance(record.get("best", {}).get("metrics", {}), dict):
        wrong.append("best")
    if wrong or missing:
        faults = [f"{key!r} is not what belongs there" for key in wrong] + [f"{key!r} is missing" for key in missing]
        raise UserError(f"{path}: damaged ({', '.join(faults)}); remove it or restore it from a copy")
    return record


def read_delta(run: RunDir) -> dict[str, Any]:
    """What makes this run differ from its base, {dotted key: value}; {} where that is not written or damaged."""
    import yaml

    # libyaml where it is there: 1000 runs are listed within a second.
    try:
        value = yaml.load(run.delta.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def between_rows(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the deltas of a sweep's rows, what differs between the rows."""
    keys = dict.fromkeys(key for delta in deltas for key in delta)
    varied = [key for key in keys if any(delta.get(key) != deltas[0].get(key) for delta in deltas)]
    return [{key: delta.get(key) for key in varied} for delta in deltas]
