"""What a report says, once for Markdown and HTML: tables of plain text, figures and notes, run by run."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpc import steptimes
from hpc.experiment import flatten
from hpc.journal import captions
from hpc.journal.compare import difference, is_number, lower_is_better, number, tone
from hpc.journal.rundata import RunData, Values, mapping

_PNG = b"\x89PNG\r\n\x1a\n"
_BAR = 20
_SHOWN = 6  # differences of a run in the overview
_CLASS_COLUMNS = {
    "recall": "Recall",
    "precision": "Precision",
    "f1": "F1",
    "dice": "Dice",
    "iou": "IoU",
    "ap": "AP",
    "auc": "ROC AUC",
    "calibration_error": "Calibration error",
}
INLINED = 1_150_000
"""Bytes of figures in one HTML page; base64 makes them 1.53 MB. What is in no run's share is a file beside the page."""
_MATRIX_FITS = 24  # classes; a wider table of numbers is read by nobody


@dataclass(frozen=True)
class Cell:
    text: str
    change: str = ""
    """The signed difference to the baseline."""
    tone: str = ""
    """better, worse or empty."""
    sort: float | str | None = None
    """What a column is sorted by: a number's full value, else the text; None stands last either way."""


Row = tuple[Cell, ...]


@dataclass(frozen=True)
class Head:
    text: str
    remark: str = ""
    """Direction of a metric, epoch of a column."""


@dataclass(frozen=True)
class Table:
    title: str
    heads: tuple[Head, ...]
    rows: tuple[Row, ...]
    words: tuple[int, ...] = (0,)
    """The columns of text; the others hold numbers and stand at the right."""


@dataclass(frozen=True)
class Figure:
    """A picture of a run; its bytes are read when they are asked for: a report of 200 runs has thousands."""

    name: str
    path: Path
    size: int
    """Bytes; 0 where the file is missing or no PNG."""
    inline: bool = True
    """Whether it stands in the page itself, see INLINED; else the page refers to the file beside."""

    @classmethod
    def of(cls, name: str, path: Path) -> Figure:
        try:
            with path.open("rb") as file:
                whole = file.read(len(_PNG)) == _PNG
                return cls(name, path, os.fstat(file.fileno()).st_size if whole else 0)
        except OSError:
            return cls(name, path, 0)

    @property
    def png(self) -> bytes:
        """Empty where the size is 0."""
        return self.path.read_bytes() if self.size else b""

    @property
    def caption(self) -> str:
        return captions.caption(self.name)

    @property
    def uri(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


CURVE_POINTS = 200
"""A longer curve is thinned out to so many points; its first and last stay."""


@dataclass(frozen=True)
class Curve:
    """A metric of one split over a run; the three sequences have the same length, by step."""

    metric: str
    split: str
    steps: tuple[float, ...]
    epochs: tuple[float, ...]
    values: tuple[float | None, ...]
    """None where it is undefined."""


@dataclass(frozen=True)
class Section:
    run: str
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]
    notes: str
    baseline: bool
    """Whether others are compared with it."""
    task: str = ""
    curves: tuple[Curve, ...] = ()
    """The monitored metric first, the loss next; of a metric the training split first."""
    best_epoch: float | None = None
    best_step: float | None = None
    group: str = ""
    """Name of the runs that differ in their seed alone, as Report.groups has it."""


@dataclass(frozen=True)
class Report:
    overview: Table
    sections: tuple[Section, ...]
    other_notes: Mapping[str, str]
    """Hand-written notes of runs that are not in this report."""
    groups: Table | None = None
    """Runs that differ in their seed alone, as one row each: mean, interval and test; None where no two do."""
    baseline: str = ""
    """The run that was asked for with --baseline; empty: the first of each task."""
    introduction: str = ""
    """The journal's own hand-written words, before all runs."""

    @property
    def title(self) -> str:
        return self.sections[0].run if len(self.sections) == 1 else f"{len(self.sections)} runs"

    @property
    def legend(self) -> str:
        """What the differences refer to; empty for one run."""
        if len(self.sections) == 1:
            return ""
        match [section.run for section in self.sections if section.baseline]:
            case []:
                return "Each run is of another task, so none is compared."
            case [only]:
                return f"Differences in brackets are to the first run of the same task, {only}."
            case several:
                return f"Differences in brackets are to the first run of the same task: {', '.join(several)}."


def compose(runs: Sequence[RunData], notes: Mapping[str, str]) -> Report:
    """The report of the runs, each compared with the first of its task; `notes` are the hand-written ones by run."""
    firsts = _firsts(runs)
    sections = _within(INLINED, [_section(run, firsts[run.task], notes.get(run.run, "")) for run in runs])
    tasks = [run.task for run in runs]
    sections = [
        replace(section, baseline=run is firsts[run.task] and tasks.count(run.task) > 1)
        for section, run in zip(sections, runs, strict=True)
    ]
    present = {run.run for run in runs}
    others = {run: text for run, text in notes.items() if run not in present and text.strip()}
    return Report(_overview(runs), tuple(sections), others)


def _firsts(runs: Sequence[RunData]) -> dict[str, RunData]:
    """The baseline of each task."""
    return {run.task: run for run in reversed(runs)}


def _cells(*texts: Any) -> Row:
    return tuple(Cell(number(text)) for text in texts)


def _heads(*texts: str) -> tuple[Head, ...]:
    return tuple(Head(text) for text in texts)


def _overview(runs: Sequence[RunData]) -> Table:
    firsts = _firsts(runs)
    names = _metric_names(runs)
    scores = [Head(name, _direction(_lower(name, runs[0]))) for name in names]
    heads = (*_heads("Run", "State", "Best epoch", "Step"), *scores, *_heads("Train samples/s", "Differs in"))
    rows = []
    for run in runs:
        first = firsts[run.task]
        compared = [_compared(run, first, name) for name in names]
        words = _cells(run.run, run.state, run.best.get("epoch"), run.best.get("step"))
        speed = _versus(run.speed.get("train"), first.speed.get("train"), lower=False, same=run is first)
        rows.append((*words, *compared, speed, Cell(_delta(run, at_most=_SHOWN))))
    return Table("Runs", heads, tuple(rows), words=(0, 1, len(heads) - 1))


def _section(run: RunData, first: RunData, notes: str) -> Section:
    figures = tuple(Figure.of(name, run.figures[name]) for name in sorted(run.figures, key=captions.place))
    drawn = any("confusion" in figure.name and figure.size for figure in figures)
    scores = [_metrics(run, first), _per_class(run, first), None if drawn else _confusion(run)]
    tables = [_facts(run), *scores, _timing(run)]
    return Section(run.run, tuple(table for table in tables if table), figures, notes, baseline=False)


def _within(most: int, sections: Sequence[Section]) -> list[Section]:
    """All runs have the same figures in the page: the foremost ones for which there is room in all."""
    sizes: dict[str, int] = {}
    for section in sections:
        for figure in section.figures:
            sizes[figure.name] = sizes.get(figure.name, 0) + figure.size
    chosen, used = set(), 0
    for name in sorted(sizes, key=captions.place):
        if used + sizes[name] <= most:
            chosen.add(name)
            used += sizes[name]
    return [
        replace(section, figures=tuple(replace(figure, inline=figure.name in chosen) for figure in section.figures))
        for section in sections
    ]


def _facts(run: RunData) -> Table:
    launch = mapping(run.experiment.get("launch"))
    best = run.best
    share = run.waiting_share
    pairs = [
        ("State", run.state),
        ("Differs in", _delta(run)),
        ("Task", run.task or None),
        ("Model", mapping(run.experiment.get("model")).get("name")),
        ("Best", f"epoch {number(best.get('epoch'))}, step {number(best.get('step'))}" if best else None),
        ("Checkpoint", best.get("checkpoint")),
        ("Trained", _progress(run)),
        ("Chosen by", f"{run.monitor} ({_direction(run.lower)})"),
        ("Commonest class alone", _baseline(run)),
        ("Train samples/s", run.speed.get("train")),
        ("Validation samples/s", run.speed.get("validation")),
        ("Waiting for data", f"{share:.1%} of the training time" if share is not None else None),
        ("Computing", steptimes.compute(run.timing)),
        ("Attempts", f"{run.attempts} ({run.preemptions} stopped by a signal, {run.requeues} requeued)"),
        ("Instance", launch.get("instance")),
        ("Nodes", launch.get("nodes")),
        ("Tasks", run.tasks),
    ]
    rows = tuple(_cells(*pair) for pair in pairs if pair[1] is not None)
    return Table("Facts", _heads("Fact", "Value"), rows, words=(0, 1))


def _baseline(run: RunData) -> str | None:
    """The monitored metric of an answer that does not look at the input; of older results the majority's accuracy."""
    given, majority = mapping(run.result.get("baseline")), run.result.get("majority")
    if is_number(given.get(run.monitor)):
        return f"{run.monitor} {number(given[run.monitor])}"
    return f"accuracy {number(majority)}" if is_number(majority) else None


def _progress(run: RunData) -> str | None:
    steps, epochs = run.result.get("steps"), run.result.get("epochs")
    last = run.last
    if steps is None and not last:
        return None
    return f"{number(epochs or last.get('epoch'))} epochs, {number(steps or last.get('step'))} steps"


def _delta(run: RunData, at_most: int | None = None) -> str:
    """As overrides on the command line are written."""
    flat = flatten(run.delta)
    shown = [f"{key}={value if isinstance(value, str) else _yaml(value)}" for key, value in flat.items()][:at_most]
    more = [f"{len(flat) - len(shown)} more below"] if len(flat) > len(shown) else []
    return ", ".join(shown + more) or "nothing"


def _yaml(value: Any) -> str:
    return json.dumps(value, default=str)


def _metrics(run: RunData, first: RunData) -> Table | None:
    names = _metric_names([run])
    last = mapping(run.last.get("metrics"))
    rows = [
        (Cell(name), Cell(_direction(_lower(name, run))), _compared(run, first, name), Cell(number(last.get(name))))
        for name in names
    ]
    heads = (*_heads("Metric", "Direction"), _moment("Best", run.best), _moment("Last", run.last))
    return Table("Validation", heads, tuple(rows), words=(0, 1)) if rows else None


def _moment(word: str, evaluation: Values) -> Head:
    return Head(word, f"epoch {number(evaluation.get('epoch'))}")


def _per_class(run: RunData, first: RunData) -> Table | None:
    others = {str(row.get("name")): row for row in first.per_class}
    keys = [key for key in _CLASS_COLUMNS if any(is_number(row.get(key)) for row in run.per_class)]
    rows = []
    for row in run.per_class:
        other = others.get(str(row.get("name")), {})
        scores = [_versus(row.get(key), other.get(key), _lower(key, run), same=run is first) for key in keys]
        rows.append((*_cells(row.get("name"), row.get("support")), *scores))
    heads = _heads("Class", "Support", *(_CLASS_COLUMNS[key] for key in keys))
    return Table("Classes, the most difficult first", heads, tuple(rows)) if rows else None


def _confusion(run: RunData) -> Table | None:
    matrix = [row for row in run.result.get("confusion_matrix") or () if isinstance(row, Sequence)]
    if not matrix or len(matrix) > _MATRIX_FITS:
        return None
    if all(isinstance(cell, Sequence) for cell in matrix[0]):
        return _label_counts(matrix, run.class_names)
    names = run.class_names if len(run.class_names) == len(matrix) else [str(k) for k in range(len(matrix))]
    rows = tuple(_cells(name, *counts) for name, counts in zip(names, matrix, strict=True))
    return Table("Confusion matrix", _heads("True class / predicted", *names), rows)


def _label_counts(matrices: Sequence[Sequence[Any]], names: Sequence[str]) -> Table | None:
    """Of several labels: each one's counts."""
    if len(names) != len(matrices):
        return None
    rows = tuple(_cells(name, tp, fp, fn, tn) for name, ((tn, fp), (fn, tp)) in zip(names, matrices, strict=True))
    return Table("Labels, counted apart", _heads("Label", "Found", "False alarms", "Missed", "Rightly not named"), rows)


def _timing(run: RunData) -> Table | None:
    """The parts of a step, with a bar of 20 signs for all of it."""
    rows = [
        _cells(part, "#" * round(_BAR * share), steptimes.milliseconds(seconds), f"{share:.1%}")
        for part, seconds, share in steptimes.rows(run.timing)
    ]
    title = "Where the time of a training step goes"
    return Table(title, _heads("Part", "", "Time", "Share"), tuple(rows), words=(0, 1)) if rows else None


def _metric_names(runs: Iterable[RunData]) -> list[str]:
    """All metrics of the runs that are numbers or undefined, the monitored one first."""
    names: dict[str, None] = {}
    for run in runs:
        seen = {**mapping(run.best.get("metrics")), **mapping(run.last.get("metrics"))}
        told = [name for name, value in seen.items() if value is None or is_number(value)]
        names |= dict.fromkeys(sorted(told, key=lambda name: name != run.monitor))
    return list(names)


def _best(run: RunData, name: str) -> Any:
    return mapping(run.best.get("metrics")).get(name)


def _compared(run: RunData, first: RunData, name: str) -> Cell:
    return _versus(_best(run, name), _best(first, name), _lower(name, run), same=run is first)


def _versus(value: Any, baseline: Any, lower: bool, same: bool) -> Cell:
    """A number with its difference to the baseline's, which has none to itself."""
    if same:
        return Cell(number(value))
    return Cell(number(value), difference(value, baseline), tone(value, baseline, lower))


def _lower(name: str, run: RunData) -> bool:
    return run.lower if name == run.monitor else lower_is_better(name)


def _direction(lower: bool) -> str:
    return "lower is better" if lower else "higher is better"
