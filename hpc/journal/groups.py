"""Runs that differ in their seed alone, as one row each: the mean over seeds, its interval, and a test."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpc.journal import cells
from hpc.journal import statistics as tests
from hpc.journal.changes import SEED, changes, listed, settings
from hpc.journal.compare import better, is_number, number
from hpc.journal.content import Cell, Head, Row, Table
from hpc.journal.rundata import RunData

_SHOWN = 6  # seeds or differences in a cell
_TITLE = "Over seeds: mean ± half of its 95 % t interval; in brackets the difference to the baseline and p of one test"


@dataclass(frozen=True)
class Group:
    """At least one run; all with the same experiment but for the seed."""

    name: str
    runs: tuple[RunData, ...]

    @property
    def first(self) -> RunData:
        return self.runs[0]

    def values(self, metric: str) -> dict[object, float]:
        """Of the best evaluation, by seed, of the finished runs; of two runs of one seed the later counts."""
        found = {}
        for run in self.runs:
            value = run.scores.get(metric)
            if run.finished and is_number(value):
                found[_seed(run)] = float(value)
        return found


def grouped(runs: Sequence[RunData], firsts: Mapping[str, RunData]) -> list[Group]:
    """In the order of their first runs; `firsts`: the baseline of each task, after whom the others are named."""
    found: dict[str, list[RunData]] = {}
    for run in runs:
        found.setdefault(_key(run), []).append(run)
    plain = [_plain(several[0]) for several in found.values()]
    named: dict[str, tuple[RunData, ...]] = {}
    for name, several in zip(plain, found.values(), strict=True):
        if plain.count(name) > 1 and (apart := _differences(several[0], firsts)):
            name = f"{name}, {listed(apart, at_most=_SHOWN)}"
        same = sum(other == name or other.startswith(f"{name} #") for other in named)
        named[f"{name} #{same + 1}" if same else name] = tuple(several)
    return [Group(name, several) for name, several in named.items()]


def table(groups: Sequence[Group], firsts: Mapping[str, RunData], metrics: Sequence[str]) -> Table | None:
    """None where no two runs differ in their seed alone."""
    if all(len(group.runs) == 1 for group in groups):
        return None
    of_run = {run.run: group for group in groups for run in group.runs}
    rows = [_row(group, of_run[firsts[group.first.task].run], metrics) for group in groups]
    titles = [Head(name, cells.direction(cells.falls(name, groups[0].first))) for name in metrics]
    heads = (*cells.heads("Group", "Seeds", "Finished"), *titles, *cells.heads("Test", "Differs in"))
    words, tasks = (0, 1, len(heads) - 2, len(heads) - 1), tuple(group.first.task for group in groups)
    return Table(_TITLE, heads, tuple(rows), words, tasks)


def _row(group: Group, baseline: Group, metrics: Sequence[str]) -> Row:
    scores = [_score(group, baseline, name) for name in metrics]
    finished = sum(run.finished for run in group.runs)
    count = Cell(f"{finished} of {len(group.runs)}", sort=finished)
    apart = "the baseline" if group is baseline else listed(_differences(group.first, baseline.first), _SHOWN)
    words = compared(group, baseline, group.first.monitor)[0]
    return (*cells.cells(group.name, _seeds(group)), count, *scores, *cells.cells(words, apart))


def _score(group: Group, baseline: Group, metric: str) -> Cell:
    values = [*group.values(metric).values()]
    if not values:
        return cells.cell(None)
    mean = statistics.fmean(values)
    half = tests.interval(values)
    text = number(mean) + (f" ± {number(half, digits=2)}" if half is not None else "")
    _, found = compared(group, baseline, metric)
    if found is None:
        return Cell(text, sort=mean)
    lower = cells.falls(metric, group.first)
    sign = "+" if found.change > 0 else ""
    change = f"{sign}{number(found.change, digits=3)}" if found.change else "="
    words = "" if not found.change else "better" if better(found.change, 0.0, lower) else "worse"
    return Cell(text, change + (f", {_spelt(found.p)}" if found.p is not None else ""), words, mean)


def compared(group: Group, baseline: Group, metric: str) -> tuple[str, tests.Test | None]:
    """What was tested, in words, and what came of it: pairs where one side's seeds are all the other's, else Welch.

    Without two values on each side there is no test, but the difference of the means; None: nothing to compare.
    """
    if group is baseline:
        return "", None
    mine, theirs = group.values(metric), baseline.values(metric)
    if not mine or not theirs:
        return "no test: no finished run", None
    if min(len(mine), len(theirs)) < 2:
        change = statistics.fmean(mine.values()) - statistics.fmean(theirs.values())
        return "no test: 1 seed", tests.Test(change, None, 0)
    both = sorted(mine.keys() & theirs.keys(), key=str)
    if len(both) == min(len(mine), len(theirs)):
        found = tests.paired([mine[seed] for seed in both], [theirs[seed] for seed in both])
        return _told(f"paired t-test, n = {len(both)} seeds", found), found
    found = tests.welch([*mine.values()], [*theirs.values()])
    return _told(f"Welch's t-test, n = {len(mine)} and {len(theirs)} seeds", found), found


def _told(words: str, found: tests.Test) -> str:
    return words if found.p is not None else f"{words}: none, nothing scatters"


def _spelt(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {number(p, digits=2)}"


def _key(run: RunData) -> str:
    if not run.experiment:
        return run.run
    return json.dumps({key: value for key, value in settings(run).items() if key != SEED}, sort_keys=True)


def _differences(run: RunData, firsts: Mapping[str, RunData] | RunData) -> dict[str, tuple[str, str]]:
    first = firsts if isinstance(firsts, RunData) else firsts[run.task]
    return {key: pair for key, pair in changes(run, first).items() if key != SEED}


def _plain(run: RunData) -> str:
    """The experiment's name."""
    return str(run.experiment.get("name") or re.sub(r"-[0-9a-f]{8}$", "", run.run))


def _seed(run: RunData) -> object:
    """Of a run that does not tell it, one of its own."""
    return run.run if run.seed is None else run.seed


def _seeds(group: Group) -> str:
    seeds = [str(run.seed) for run in group.runs if run.seed is not None]
    return ", ".join(dict.fromkeys(seeds[:_SHOWN])) + (", ..." if len(seeds) > _SHOWN else "")
