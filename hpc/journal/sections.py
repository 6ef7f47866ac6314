"""The section of one run: its facts, what it does otherwise than the baseline, its scores, classes and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc import steptimes, usage
from hpc.experiment import flatten
from hpc.journal import captions
from hpc.journal.cells import cell, cells, direction, falls, heads, versus
from hpc.journal.changes import changes, from_base, listed, spelt
from hpc.journal.compare import is_number, number
from hpc.journal.content import Cell, Figure, Head, Section, Table
from hpc.journal.rundata import RunData, Values, mapping, sequence
from hpc.units import short_time

_BAR = 20
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
_CLASSES = "Classes, the most difficult first"
_MATRIX_FITS = 24  # classes; a wider table of numbers is read by nobody


def section(run: RunData, first: RunData, notes: str) -> Section:
    figures = tuple(Figure.of(name, run.figures[name]) for name in sorted(run.figures, key=captions.place))
    drawn = any("confusion" in figure.name and figure.size for figure in figures)
    settings = _settings(run) if run is first else _changes(run, first)
    scores = [_scores(run, first), _per_class(run, first, run.result, first.result, _CLASSES)]
    tables = [_facts(run), settings, *scores, None if drawn else _confusion(run)]
    tables += [table for name in run.evaluations for table in _evaluation(run, first, name)]
    tables.append(_timing(run))
    epoch, step = (found if is_number(found := run.best.get(key)) else None for key in ("epoch", "step"))
    shown = tuple(table for table in tables if table)
    return Section(run.run, shown, figures, notes, False, run.task, run.curves, epoch, step)


def compared(run: RunData, first: RunData, name: str) -> Cell:
    """A metric of the best evaluation, or `test METRIC`."""
    return versus(run.scores.get(name), first.scores.get(name), falls(name, run), same=run is first)


def _facts(run: RunData) -> Table:
    best = run.best
    share, seconds = run.waiting_share, run.wall_seconds
    pairs = [
        ("State", run.state),
        ("Damaged", "; ".join(run.damage) or None),
        ("Differs from its base in", listed(from_base(run))),
        ("Task", run.task or None),
        ("Model", spelt(name) if (name := mapping(run.experiment.get("model")).get("name")) else None),
        ("Parameters", f"{run.parameters:,}" if run.parameters else None),
        ("Data", _data(run)),
        ("Best", f"epoch {number(best.get('epoch'))}, step {number(best.get('step'))}" if best else None),
        ("Checkpoint", best.get("checkpoint")),
        ("Trained", _progress(run)),
        ("Chosen by", f"{run.monitor} ({direction(run.lower)})"),
        ("Commonest class alone", _baseline(run)),
        ("Train samples/s", run.speed.get("train")),
        ("Validation samples/s", run.speed.get("validation")),
        ("Waiting for data", f"{share:.1%} of the training time" if share is not None else None),
        ("Computing", steptimes.compute(run.timing)),
        ("Seconds per epoch", run.epoch_seconds),
        ("Wall time", short_time(seconds) if seconds is not None else None),
        ("Used", "; ".join(_card(run)) or None),
        *_place(run),
    ]
    rows = tuple(cells(*pair) for pair in pairs if pair[1] is not None)
    return Table("Facts", heads("Fact", "Value"), rows, words=(0, 1))


def _place(run: RunData) -> list[tuple[str, Any]]:
    """Where it ran, as what, and how often it had to begin again."""
    launch = mapping(run.experiment.get("launch"))
    return [
        ("Attempts", f"{run.attempts} ({run.preemptions} stopped by a signal, {run.requeues} requeued)"),
        ("Jobs", ", ".join(run.jobs) or None),
        ("Instance", launch.get("instance")),
        ("Nodes", launch.get("nodes")),
        ("First nodes of the attempts", ", ".join(run.hosts) or None),
        ("Tasks", run.tasks),
        ("Sweep", run.sweep or None),
        ("Commit", run.commit or _without_commit(run)),
    ]


def _without_commit(run: RunData) -> str | None:
    """What to do where the code knows it and the logs do not, as those of older runs."""
    return "not in these logs; 'hpc sync --with code' brings it" if run.attempts and not run.with_code else None


def _card(run: RunData) -> list[str]:
    """The card of the usage, of which a record of another version may lack a part."""
    try:
        return usage.lines(dict(run.used))
    except (LookupError, TypeError, ValueError):
        return []


def _changes(run: RunData, first: RunData) -> Table | None:
    """Both values of each setting that is not the baseline's."""
    if not (found := changes(run, first)):
        return None
    rows = tuple(cells(key, theirs, mine) for key, (theirs, mine) in found.items())
    title = "Changed from the baseline" if run.experiment and first.experiment else "Differs from its base in"
    return Table(title, heads("Setting", first.run, "This run"), rows, words=(0, 1, 2))


def _settings(run: RunData) -> Table | None:
    """The whole experiment of whom others are compared with, a section in a row; what is null is left out."""
    parts: dict[str, list[str]] = {}
    for key, value in flatten(run.experiment).items():
        section, _, name = key.partition(".")
        if name and value is not None and value != {} and value != []:
            parts.setdefault(section, []).append(f"{name}={spelt(value)}")
    rows = tuple(cells(section, ", ".join(words)) for section, words in parts.items())
    return Table("Settings", heads("Section", "Values"), rows, words=(0, 1)) if rows else None


def _data(run: RunData) -> str | None:
    """As data.json tells it."""
    told = run.data
    shape, classes = told.get("shape"), told.get("class_names")
    words = [
        str(told.get("file") or ""),
        "x".join(map(str, shape)) if isinstance(shape, list) else "",
        f"{len(classes)} classes" if isinstance(classes, list) else "",
        f"fingerprint {str(told['fingerprint'])[:12]}" if told.get("fingerprint") else "",
    ]
    return ", ".join(filter(None, words)) or None


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


def _scores(run: RunData, first: RunData) -> Table | None:
    """Both splits at the best epoch and at the last; those of the training are of the batches as they were trained."""
    moments = (run.best, run.last)
    trained = [mapping(run.validation(moment).get("train")) for moment in moments]
    last = mapping(run.last.get("metrics"))
    found = {**mapping(run.best.get("metrics")), **last, **trained[0], **trained[1]}
    names = [name for name, value in found.items() if value is None or is_number(value)]
    rows = [
        (
            *cells(name, direction(falls(name, run)), trained[0].get(name)),
            compared(run, first, name),
            *cells(trained[1].get(name), last.get(name)),
        )
        for name in sorted(names, key=lambda name: (name != run.monitor, name != "loss"))
    ]
    titles = [
        _moment(f"{word} {split}", at) for word, at in zip(("Best", "Last"), moments, strict=True) for split in _SPLITS
    ]
    return (
        Table("Training and validation", (*heads("Metric", "Direction"), *titles), tuple(rows), (0, 1))
        if rows
        else None
    )


_SPLITS = ("train", "validation")


def _moment(word: str, evaluation: Values) -> Head:
    return Head(word, f"epoch {number(evaluation.get('epoch'))}")


def _per_class(run: RunData, first: RunData, told: Values, of_first: Values, title: str) -> Table | None:
    """Of a result, or of an evaluation, beside the baseline's."""
    mine = run.sorted_classes(told)
    others = {str(row.get("name")): row for row in first.sorted_classes(of_first)}
    keys = [key for key in _CLASS_COLUMNS if any(is_number(row.get(key)) for row in mine)]
    rows = []
    for row in mine:
        other = others.get(str(row.get("name")), {})
        scores = [versus(row.get(key), other.get(key), falls(key, run), same=run is first) for key in keys]
        rows.append((*cells(row.get("name"), row.get("support")), *scores))
    return (
        Table(title, heads("Class", "Support", *(_CLASS_COLUMNS[key] for key in keys)), tuple(rows)) if rows else None
    )


def _evaluation(run: RunData, first: RunData, name: str) -> list[Table | None]:
    """What `hpc evaluate` found, with its intervals, beside the baseline's of the same name."""
    told, other = run.evaluations[name], mapping(first.evaluations.get(name))
    scores, bounds = mapping(told.get("metrics")), mapping(told.get("intervals"))
    rows = []
    for metric, value in scores.items():
        lower = falls(metric, run)
        found = versus(value, mapping(other.get("metrics")).get(metric), lower, same=run is first)
        rows.append((*cells(metric, direction(lower)), found, cell(_bracket(bounds.get(metric)))))
    share = mapping(told.get("bootstrap")).get("confidence")
    interval = f"{share:.4g} interval" if is_number(share) else "Interval"
    title = f"Evaluation {name}: {number(told.get('samples'))} samples, {number(told.get('checkpoint'))}"
    table = Table(title, heads("Metric", "Direction", "Value", interval), tuple(rows), words=(0, 1)) if rows else None
    return [table, _per_class(run, first, told, other, f"Classes of {name}, the most difficult first")]


def _bracket(pair: Any) -> str | None:
    return f"{number(pair[0])} to {number(pair[1])}" if isinstance(pair, Sequence) and len(pair) == 2 else None


def _confusion(run: RunData) -> Table | None:
    matrix = sequence(run.result.get("confusion_matrix"))
    if not matrix or len(matrix) > _MATRIX_FITS or not all(isinstance(row, list) for row in matrix):
        return None
    if any(isinstance(entry, list) for entry in matrix[0]):
        return _label_counts(matrix, run.class_names)
    names = run.class_names if len(run.class_names) == len(matrix) else [str(k) for k in range(len(matrix))]
    rows = tuple(cells(name, *counts) for name, counts in zip(names, matrix, strict=True))
    return Table("Confusion matrix", heads("True class / predicted", *names), rows)


def _label_counts(matrices: Sequence[Sequence[Any]], names: Sequence[str]) -> Table | None:
    """Of several labels: each one's counts."""
    if len(names) != len(matrices) or not all(_two_by_two(matrix) for matrix in matrices):
        return None
    rows = tuple(cells(name, tp, fp, fn, tn) for name, ((tn, fp), (fn, tp)) in zip(names, matrices, strict=True))
    return Table("Labels, counted apart", heads("Label", "Found", "False alarms", "Missed", "Rightly not named"), rows)


def _two_by_two(matrix: Sequence[Any]) -> bool:
    return len(matrix) == 2 and all(isinstance(row, list) and len(row) == 2 for row in matrix)


def _timing(run: RunData) -> Table | None:
    """The parts of a step, with a bar of 20 signs for all of it."""
    rows = [
        (*cells(part, "#" * round(_BAR * share)), Cell(steptimes.milliseconds(seconds), sort=seconds), _share(share))
        for part, seconds, share in steptimes.rows(run.timing)
    ]
    title = "Where the time of a training step goes"
    return Table(title, heads("Part", "", "Time", "Share"), tuple(rows), words=(0, 1)) if rows else None


def _share(share: float) -> Cell:
    return Cell(f"{share:.1%}", sort=share)
