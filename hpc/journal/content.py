"""What a report says, once for Markdown and HTML: tables of plain text, figures and notes, run by run."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc.journal import captions
from hpc.metrics import UNDEFINED

_PNG = b"\x89PNG\r\n\x1a\n"
INLINED = 1_050_000
"""Bytes of figures in one HTML page; base64 makes them 1.40 MB. What is in no run's share is a file beside the page."""


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
    tasks: tuple[str, ...] = ()
    """Of each row, in a table of several runs."""

    def by_task(self) -> list[tuple[str, Table]]:
        """A table of each task, without the columns in which none of its rows has anything; the first column stays."""
        found = []
        for task in dict.fromkeys(self.tasks):
            rows = [row for row, of in zip(self.rows, self.tasks, strict=True) if of == task]
            kept = [k for k in range(len(self.heads)) if not k or any(row[k].text != UNDEFINED for row in rows)]
            heads = tuple(self.heads[k] for k in kept)
            words = tuple(place for place, k in enumerate(kept) if k in self.words)
            some = tuple(tuple(row[k] for k in kept) for row in rows)
            found.append((task, Table(self.title, heads, some, words, (task,) * len(rows))))
        return found


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
"""A longer curve is thinned out to so many points; its first, last and best stay."""


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


def evenly(count: int, most: int) -> set[int]:
    """Places of `most` of `count` points, with the first and the last; of all where they are no more."""
    return set(range(count)) if count <= most else {round(k * (count - 1) / (most - 1)) for k in range(most)}


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
            case [only] if only == self.baseline:
                return f"Differences in brackets are to the baseline, {only}."
            case [only]:
                return f"Differences in brackets are to the first run of the same task, {only}."
            case several:
                return f"Differences in brackets are to the baseline of the same task: {', '.join(several)}."
