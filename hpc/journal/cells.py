"""Cells and heads of a report's tables: numbers as they are written, and what they are sorted by."""

from __future__ import annotations

from typing import Any

from hpc.journal.compare import difference, is_number, lower_is_better, number, tone
from hpc.journal.content import Cell, Head, Row
from hpc.journal.rundata import RunData


def cell(value: Any) -> Cell:
    """A number with four digits, a text as it is, a dash for what is missing."""
    if value is None or (isinstance(value, float) and value != value):
        return Cell(number(value))
    return Cell(number(value), sort=value if is_number(value) else str(value))


def cells(*values: Any) -> Row:
    return tuple(map(cell, values))


def heads(*texts: str) -> tuple[Head, ...]:
    return tuple(map(Head, texts))


def versus(value: Any, baseline: Any, lower: bool, same: bool) -> Cell:
    """A number with its difference to the baseline's, which has none to itself."""
    plain = cell(value)
    if same:
        return plain
    return Cell(plain.text, difference(value, baseline), tone(value, baseline, lower), plain.sort)


def falls(name: str, run: RunData) -> bool:
    """Whether less is better of a metric of this run."""
    name = name.removeprefix("test ")
    return run.lower if name == run.monitor else lower_is_better(name)


def direction(lower: bool) -> str:
    return "lower is better" if lower else "higher is better"
