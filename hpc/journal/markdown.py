"""The report as Markdown, for a repository or a wiki: tables as GitHub reads them, figures as files beside it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from hpc.journal import notes
from hpc.journal.content import Figure, Report, Section, Table
from hpc.tables import printable

_LONGEST = 90  # characters of a name in a file name, of which there are two
_SPECIAL = re.compile(r"([\\`*\[\]|~$])")
_EDGE_UNDERSCORE = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_PICTURE = re.compile(r"!\[.*\]\(figures/([A-Za-z0-9._-]+--[A-Za-z0-9._-]+\.png)\)")
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def render(report: Report) -> str:
    """The text of EXPERIMENTS.md."""
    parts = [notes.HEADER, f"# Experiments: {escape(report.title)}"]
    parts += [notes.block(notes.INTRODUCTION, report.introduction), escape(report.legend)]
    if report.legend:
        parts += _by_task(report.overview)
    if report.groups:
        parts += [f"### {escape(report.groups.title)}", *_by_task(report.groups)]
    parts += [part for section in report.sections for part in _section(section)]
    if report.other_notes:
        parts.append("## Notes of runs that are not in this report")
        parts += [f"### {escape(run)}\n\n{notes.block(run, text)}" for run, text in report.other_notes.items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Text that Markdown and the HTML in it take literally, on one line."""
    marked = _SPECIAL.sub(r"\\\1", printable(text).translate(_HTML))
    return _EDGE_UNDERSCORE.sub(r"\\_", marked)


def figure_file(run: str, figure: Figure) -> str:
    """File name of a figure in the report's folder of figures: no two are alike, none leaves the folder."""
    return f"{_plain(run)}--{_plain(figure.name)}.png"


def figure_files(lines: Iterable[str]) -> set[str]:
    """Names of the figures' files in the lines of a report that no hand has written."""
    return {found[1] for line in lines if (found := _PICTURE.fullmatch(line))}


def _plain(name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:_LONGEST]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _section(section: Section) -> list[str]:
    heading = f"## {escape(section.run)}{' (baseline)' if section.baseline else ''}"
    tables = [_titled(table) for table in section.tables]
    figures = [_figure(section.run, figure) for figure in section.figures]
    return [heading, *tables, *(["### Figures", *figures] if figures else []), "### Notes", _notes(section)]


def _notes(section: Section) -> str:
    return notes.block(section.run, section.notes)


def _figure(run: str, figure: Figure) -> str:
    if not figure.size:
        return f"Figure {escape(figure.name)}: the file is missing or no PNG."
    picture = f"![{escape(figure.name)}](figures/{figure_file(run, figure)})"
    return picture if figure.caption == figure.name else f"{picture}\n\n{escape(figure.caption)}"


def _by_task(table: Table) -> list[str]:
    """Of several tasks each with its own metrics."""
    several = table.by_task()
    if len(several) == 1:
        return [_table(table)]
    return [f"Task {escape(task or 'unknown')}:\n\n{_table(one)}" for task, one in several]


def _titled(table: Table) -> str:
    return f"### {escape(table.title)}\n\n{_table(table)}"


def _table(table: Table) -> str:
    rules = ["---" if column in table.words else "---:" for column in range(len(table.heads))]
    lines = [
        [_bracketed(head.text, head.remark) for head in table.heads],
        rules,
        *([_bracketed(cell.text, cell.change) for cell in row] for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bracketed(text: str, remark: str) -> str:
    return f"{escape(text)} ({escape(remark)})" if remark else escape(text)
