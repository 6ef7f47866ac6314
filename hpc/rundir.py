"""The run folder, where login node and compute node meet: its names, spelt once, and how its files are written."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from hpc import errors


class RunDir:
    """One run. Readable files only; a file that others may read while it is written is renamed into place."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).resolve()
        self.experiment = self.path / "experiment.yaml"
        self.data = self.path / "data.json"
        self.delta = self.path / "delta.yaml"
        self.step = self.path / "step.yaml"
        self.script = self.path / "job.sbatch"
        self.code = self.path / "code"
        self.submit = self.path / "submit.json"
        self.state = self.path / "state.json"
        self.lease = self.path / ".lease"
        self.stop = self.path / "stop.json"
        self.events = self.path / "events"
        self.logs = self.path / "logs"
        self.checkpoints = self.path / "checkpoints"
        self.quarantine = self.path / "quarantine"
        self.damaged_events = self.quarantine / "events"
        self.tensorboard = self.path / "tb"
        self.metrics = self.path / "metrics.jsonl"
        self.figures = self.path / "figures"
        self.predictions = self.path / "predictions"
        self.usage = self.path / "usage"
        self.ledger = self.path / "ledger"
        self.result = self.path / "result.json"
        self.autotune = self.path / "autotune.json"
        self.compiled = self.path / "compiled"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def in_sweep(self) -> bool:
        """Whether this run is a row of a sweep, in whose folder it is."""
        return is_sweep(self.path.parent)

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        return self.path.parent.parent if self.in_sweep else self.path.parent

    def owns(self, comment: str) -> bool:
        """Whether a job with this comment is of this run, or of the sweep that it is a row of.

        A job's number alone tells nothing: each cluster counts for itself, and may begin anew.
        """
        return comment == self.name or comment.startswith(f"{self.path.parent.name}/")

    def output(self, job: str = "%j", task: str = "%t", stream: str = "out") -> Path:
        """Output of one task, submitit's name for it; attempts of a job follow each other in it."""
        return self.logs / f"{job}_{task}_log.{stream}"

    def figure(self, name: str) -> Path:
        return self.figures / f"{name}.png"

    def trace(self, generation: int, first: int, end: int) -> Path:
        """A profiler trace of steps [first, end), where TensorBoard's plugin looks and under a name that it knows."""
        return self.tensorboard / f"g{generation:03d}-s{first:08d}-{end:08d}.pt.trace.json"

    def prediction(self, split: str, suffix: str = ".npz") -> Path:
        return self.predictions / f"{split}{suffix}"

    def event(self, kind: str, writer: str, generation: int = 0, **fields: Any) -> None:
        """Append one line to this writer's own event file (one writer per file; generation 0 is the login node)."""
        self.events.mkdir(exist_ok=True)
        line = {"time": round(time.time(), 3), "event": kind, "generation": generation, **fields}
        append_line(self.events / f"{generation:03d}-{writer}.jsonl", line)

    def read_events(self) -> list[dict[str, Any]]:
        """All events of all writers, by time."""
        lines = [line for path in sorted(self.events.glob("*.jsonl")) for line in read_lines(path)]
        whole = [line for line in lines if _is_event(line)]
        return sorted(whole, key=lambda line: float(line["time"]))

    def last_generation(self) -> int:
        """The highest generation that any attempt has taken; 0 before the first."""
        return max((int(path.name.split("-")[0]) for path in self.events.glob("[0-9][0-9][0-9]*-*.jsonl")), default=0)

    def newest_checkpoint(self) -> str | None:
        """Name of the last checkpoint that was saved; its sums are compared by the job alone."""
        found = [re.fullmatch(r"g(\d+)-s(\d+)", path.name) for path in self.checkpoints.glob("g*-s*")]
        return max((m for m in found if m), key=lambda m: (int(m[1]), int(m[2])), default=[None])[0]

    def saved_step(self) -> int | None:
        """The last step that was ever saved, by the events; its checkpoint may be gone since."""
        return max(
            (event.get("step", 0) for event in self.read_events() if event["event"] == "checkpoint"), default=None
        )

    def read_metrics(self) -> list[dict[str, Any]]:
        """One line per evaluated step, by step; lines that are no evaluation are passed over."""
        return taken_back(line for line in read_lines(self.metrics) if _is_evaluation(line))


Evaluation = TypeVar("Evaluation", bound=Mapping[str, Any])


def taken_back(lines: Iterable[Evaluation]) -> list[Evaluation]:
    """What counts of the lines of metrics.jsonl, by step.

    A later generation takes back the steps from its first line on, a rollback those after the step that it tells next;
    an older generation that still writes is not heard.
    """
    kept: dict[tuple[int, str], Evaluation] = {}
    newest = 0
    for line in lines:
        generation, step = line["generation"], line["step"]
        if generation < newest:
            continue
        last = step - (generation > newest)
        newest = generation
        while kept and next(reversed(kept))[0] > last:  # their steps rise
            kept.popitem()
        kept[step, line["split"]] = line
    return [kept[key] for key in sorted(kept)]


def _is_evaluation(line: dict[str, Any]) -> bool:
    generation, step, split = (line.get(key) for key in ("generation", "step", "split"))
    return isinstance(generation, int) and isinstance(step, int) and isinstance(split, str)


def _is_event(line: dict[str, Any]) -> bool:
    when, kind, generation = (line.get(key) for key in ("time", "event", "generation"))
    return isinstance(when, int | float) and isinstance(kind, str) and isinstance(generation, int)


ACCEPT_DATA_CHANGE, DATA_CHANGED = "accept-data-change", "data-changed"
"""Events: a user agrees to go on with other data; an attempt has done so."""

ROWS = "rows.txt"
"""In a sweep's folder, one line per row: the name of the row's run folder."""


def is_sweep(path: Path) -> bool:
    return _is_file(path / ROWS)


def _is_file(path: Path) -> bool:
    """False, too, where the name is too long, or the folder may not be entered."""
    try:
        return path.is_file()
    except OSError:
        return False


def run_id(resolved: dict[str, Any], count: int) -> str:
    """8 hex digits of (resolved experiment, number of equal runs before)."""
    text = json.dumps([resolved, count], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def next_run(runs: Path, name: str, resolved: dict[str, Any]) -> RunDir:
    """The folder that the next run of this experiment will have, so that plan and submit render the same bytes."""
    taken = {run.name for run in all_runs(runs) if run.in_sweep}
    count = 0
    while (path := runs / f"{name}-{run_id(resolved, count)}").exists() or path.name in taken:
        count += 1
    return RunDir(path)


def runs_folder(given: Path | None) -> Path:
    """--runs, else HPC_RUNS, else runs/ of the working folder. Raises UserError for a path that cannot be one."""
    path = Path(given or os.environ.get("HPC_RUNS") or "runs").resolve()
    choose = "choose another with --runs or HPC_RUNS"
    if re.search("%[jtaA]", str(path)):
        raise errors.UserError(f"{path}: %j, %t, %a and %A stand for numbers of a job in names of files; {choose}")
    if path.exists() and not path.is_dir():
        raise errors.UserError(f"{path}: no folder for runs, but a file; {choose}")
    return path


def all_runs(runs: Path) -> list[RunDir]:
    """Every run in the folder, oldest first; the rows of a sweep follow each other in its order."""
    found: list[tuple[float, list[RunDir]]] = []
    for path in runs.glob("[!.]*") if runs.is_dir() else []:  # a dot: not whole yet
        with suppress(OSError):  # a folder of something else, or of somebody else
            found.append(((path / "experiment.yaml").stat().st_mtime, [RunDir(path)]))
            continue
        with suppress(OSError):
            found.append(((path / ROWS).stat().st_mtime, rows(path)))
    return [run for _, several in sorted(found, key=lambda pair: pair[0]) for run in several]


def rows(sweep: Path) -> list[RunDir]:
    """The runs of a sweep, in its order. Raises OSError."""
    return [RunDir(sweep / name) for name in row_names(sweep)]


def row_names(sweep: Path) -> list[str]:
    """The folders of its rows; what can be no folder's name stands for one that is not there. Raises OSError."""
    names = (sweep / ROWS).read_text(errors="replace").split()
    return [name if _ROW.fullmatch(name) else re.sub(r"\W", "_", name) for name in names]


_ROW = re.compile(r"(?!\.{1,2}$)[^/\0]+")


def find_run(runs: Path, name: str) -> RunDir:
    """A run by its path, its folder's name, or any unique beginning or id of it. Raises UserError."""
    refuse_empty(name)
    direct = RunDir(name)
    if _is_file(direct.experiment):
        return direct
    known = all_runs(runs)
    found = [run for run in known if run.name == name] or [
        run for run in known if run.name.startswith(name) or run.name.endswith(f"-{name}")
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise errors.UserError(f"{name!r} names {len(found)} runs: {', '.join(run.name for run in found)}")
    if not known:
        raise errors.UserError(
            f"no run {name!r}: {runs} holds no runs yet; start one with 'hpc submit EXPERIMENT.yaml'"
        )
    raise errors.UserError(f"no run {name!r} in {runs}; {errors.nearest(name, [run.name for run in known])}")


def refuse_empty(name: str) -> None:
    """An empty name, of a variable that is not set, begins every other. Raises UserError."""
    if not name.strip():
        raise errors.UserError(f"{name!r} is no name of a run; 'hpc ls' lists them")


def write_text(path: Path, text: str) -> None:
    """Write aside, fsync, rename, fsync the folder: a reader sees the old file or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """Not `durable`: without the fsyncs, for thousands of files that can be written anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # a name that nobody can plant a link under
    try:
        with aside.open("xb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if durable:
        fsync_folder(path.parent)


@contextmanager
def locked(path: Path, wait: bool = True, without: bool = True) -> Iterator[bool]:
    """One process at a time holds this file's lock; False where another has it and we do not wait.

    `without`: what is said where the file system has no locks; stderr tells that, too.
    """
    # In a folder that others may write to, a link of this name could be planted.
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            print(f"{path}: this file system has no locks", file=sys.stderr)
            yield without
            return
        yield True


def fsync_folder(path: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    write_text(path, dumps(value, indent=1) + "\n")


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: null for what is no finite number, as an undefined metric."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is none. Raises UserError for a file that is no JSON object."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise errors.UserError(f"{path}: damaged ({error}); remove it or restore it from a copy") from None
    if not isinstance(value, dict):
        raise errors.UserError(f"{path}: holds {type(value).__name__}, not an object")
    return value


def append_line(path: Path, value: dict[str, Any]) -> None:
    """One JSON line in one write, fsync'd; a torn last line of a killed writer stays a line of its own."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, ("\n" * torn + dumps(value) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a .jsonl file; a torn last line (a writer was killed), and what is no object, is left out."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]
