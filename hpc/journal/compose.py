"""Makes the report of runs: who is compared with whom, the overview, the groups over seeds, a section of each run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from hpc.journal import captions, cells, groups, notes, sections
from hpc.journal.changes import changes, listed
from hpc.journal.compare import is_number
from hpc.journal.content import INLINED, Cell, Head, Report, Row, Section, Table
from hpc.journal.rundata import RunData, mapping
from hpc.units import short_time

_SHOWN = 6  # differences of a run in the overview


def compose(runs: Sequence[RunData], written: Mapping[str, str], baseline: str = "") -> Report:
    """The report of the runs, each compared with the baseline of its task: the named run, else the first of the task.

    `written` are the hand-written notes by run, see hpc.journal.notes.
    """
    firsts = baselines(runs, baseline)
    several = groups.grouped(runs, firsts)
    of_run = {run.run: group.name for group in several for run in group.runs if len(group.runs) > 1}
    tasks = [run.task for run in runs]
    made = [
        replace(
            sections.section(run, firsts[run.task], written.get(run.run, "")),
            baseline=run is firsts[run.task] and tasks.count(run.task) > 1,
            group=of_run.get(run.run, ""),
        )
        for run in runs
    ]
    present = {run.run for run in runs} | {notes.INTRODUCTION}
    return Report(
        overview=_overview(runs, firsts),
        sections=tuple(_within(INLINED, made)),
        other_notes={run: text for run, text in written.items() if run not in present and text},
        groups=groups.table(several, firsts, metric_names(runs)),
        baseline=baseline,
        introduction=written.get(notes.INTRODUCTION, ""),
    )


def baselines(runs: Sequence[RunData], named: str) -> dict[str, RunData]:
    """The baseline of each task."""
    firsts = {run.task: run for run in reversed(runs)}
    return firsts | {run.task: run for run in runs if run.run == named}


def metric_names(runs: Iterable[RunData]) -> list[str]:
    """All metrics of the runs that are numbers or undefined; first those monitored, each on the test split next."""
    first: dict[str, None] = {}
    others: dict[str, None] = {}
    for run in runs:
        seen = {**mapping(run.best.get("metrics")), **mapping(run.last.get("metrics"))}
        told = [name for name, value in seen.items() if value is None or is_number(value)]
        monitored = (run.monitor, f"test {run.monitor}")
        first |= dict.fromkeys(name for name in monitored if name in told or name in run.scores)
        others |= dict.fromkeys(told)
    return list(first | others)


def _overview(runs: Sequence[RunData], firsts: Mapping[str, RunData]) -> Table:
    """A metric that only runs of other tasks have is a dash; so is one that is undefined."""
    names = metric_names(runs)
    task = cells.heads("Task") if len({run.task for run in runs}) > 1 else ()
    way = {name: cells.direction(cells.falls(name, next(run for run in runs if _has(run, name)))) for name in names}
    heads = (
        *cells.heads("Run", "State"),
        *task,
        *cells.heads("Best epoch", "Step"),
        *(Head(name, way[name]) for name in names),
        *cells.heads("Train samples/s", "Wall time", "Differs in"),
    )
    rows = [_row(run, firsts[run.task], names, bool(task)) for run in runs]
    words = (0, 1, *range(2, 2 + len(task)), len(heads) - 1)
    return Table("Runs", heads, tuple(rows), words, tuple(run.task for run in runs))


def _row(run: RunData, first: RunData, names: Sequence[str], with_task: bool) -> Row:
    same = run is first
    scores = [sections.compared(run, first, name) for name in names]
    speed = cells.versus(run.speed.get("train"), first.speed.get("train"), lower=False, same=same)
    task = cells.cells(run.task or None) if with_task else ()
    words = (*cells.cells(run.run, run.short_state), *task, *cells.cells(run.best.get("epoch"), run.best.get("step")))
    apart = "the baseline" if same else listed(changes(run, first), at_most=_SHOWN)
    return (*words, *scores, speed, wall_time(run), cells.cell(apart))


def wall_time(run: RunData) -> Cell:
    seconds = run.wall_seconds
    return cells.cell(None) if seconds is None else Cell(short_time(seconds), sort=seconds)


def _has(run: RunData, name: str) -> bool:
    return name in run.scores or name in mapping(run.last.get("metrics"))


def _within(most: int, made: Sequence[Section]) -> list[Section]:
    """All runs have the same figures in the page: the foremost ones for which there is room in all."""
    sizes: dict[str, int] = {}
    for section in made:
        for figure in section.figures:
            sizes[figure.name] = sizes.get(figure.name, 0) + figure.size
    chosen, used = set(), 0
    for name in sorted(sizes, key=captions.place):
        if used + sizes[name] <= most:
            chosen.add(name)
            used += sizes[name]
    return [
        replace(section, figures=tuple(replace(figure, inline=figure.name in chosen) for figure in section.figures))
        for section in made
    ]
