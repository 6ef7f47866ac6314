"""Reads a run's folder for the journal: what it lacks, what is damaged, and what only TensorBoard's events say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hpc import payload, usage, yamlfile
from hpc.errors import UserError
from hpc.journal.evaluations import Evaluated
from hpc.journal.rundata import RunData, Values, mapping
from hpc.logs import series
from hpc.rundir import RunDir, read_json
from hpc.sweepdir import sweep_of

Kind = TypeVar("Kind")


Lines = list[dict[str, Any]]


class _Attempts:
    """Reads what may be damaged, and keeps what was."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.damage: list[str] = []

    def __call__(self, read: Callable[[], Kind], missing: Kind, name: str) -> Kind:
        try:
            return read()
        except (UserError, OSError, ValueError, LookupError, TypeError) as error:
            told = " ".join(str(error).replace(f"{self._folder}/", "").split())
            self.damage.append(told if name in told else f"{name}: {told}")
            return missing

    def json(self, path: Path) -> dict[str, Any]:
        return self(lambda: read_json(path), {}, path.name)


def read(folder: RunDir) -> RunData:
    """All that a report needs of a run, and no more; a file that is damaged counts as missing, and is named."""
    run, sweep = Evaluated(folder.path), sweep_of(folder)
    code = sweep.code if sweep else run.code  # a row's link to it does not come home
    attempted = _Attempts(run.path)
    load, damage = attempted.json, attempted.damage
    nothing: dict[str, Any] = {}
    experiment = attempted(lambda: yamlfile.read(run.experiment), nothing, run.experiment.name)
    model = str(mapping(experiment.get("model")).get("name"))
    result = load(run.result)
    state = load(run.state)
    parameters = result.get("parameters", state.get("parameters"))
    none: Sequence[Values] = []
    lines = attempted(lambda: run.lines, none, run.metrics.name)
    if not lines and run.tensorboard.is_dir():
        lines = attempted(lambda: _lines_of_events(run), none, run.tensorboard.name)
    events = attempted(run.read_events, none, run.events.name)
    told = RunData(
        run=run.name,
        experiment=experiment,
        delta=attempted(lambda: yamlfile.read(run.delta), {}, run.delta.name) if run.delta.exists() else {},
        result=result,
        metrics=lines,
        events=events,
        figures={path.stem: path for path in sorted(run.figures.glob("*.png"))},
        evaluations=_evaluations(run, load),
        data=load(run.data),
        parameters=parameters if isinstance(parameters, int) else None,
        used=attempted(lambda: mapping(result.get("usage")) or usage.summary(run), {}, run.usage.name),
        sweep=sweep.name if sweep else "",
        commit=payload.commit(code, events),
        with_code=code.is_dir(),
        own_code=attempted(lambda: payload.own_code(code, model), "", run.code.name),
        damage=damage,
    ).slim()
    damage += run.faults  # of what was asked for
    return told


def _evaluations(run: RunDir, load: Callable[[Path], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What `hpc evaluate` has left in the run's own folder."""
    told = {path.stem: load(path) for path in sorted(run.predictions.glob("*.json"))}
    return {name: one for name, one in told.items() if isinstance(one.get("metrics"), dict)}


_SECTIONS = {"train": "train", "validation": "metrics"}
_RATE, _WAITING = "_samples_per_second", "waiting_share"


def _lines_of_events(run: RunDir) -> Lines:
    """The evaluations as metrics.jsonl would have them, of a run of whose logs only the event files are here."""
    lines: dict[int, dict[str, Any]] = {}
    for tag, points in series.scalars(run.tensorboard).items():
        for step, when, value in points:
            line = lines.setdefault(step, {"generation": 1, "step": step, "split": "validation", "metrics": {}})
            line["time"] = when
            _enter(line, tag, value)
    return [lines[step] for step in sorted(lines) if lines[step]["metrics"]]


def _enter(line: dict[str, Any], tag: str, value: float) -> None:
    group, _, name = tag.partition("/")
    if tag == "epoch":
        line["epoch"] = round(value)
    elif group == "speed" and name == _WAITING:
        line[_WAITING] = value
    elif group == "speed" and name.endswith(_RATE):
        line.setdefault("samples_per_second", {})[name.removesuffix(_RATE)] = value
    elif group in _SECTIONS:
        line.setdefault(_SECTIONS[group], {})[name] = value
