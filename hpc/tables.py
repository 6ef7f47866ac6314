"""Tables of one line a row, fitted to the terminal: columns are left out in a given order, and long texts are cut."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

NARROW = 100
"""Columns of a terminal that shows less."""
_NAME, _DETAIL, _GAP = 32, 12, 2
"""Widths of a name and of a detail where there is little room, and between two columns."""


def print_rows(rows: Sequence[dict[str, str]], width: int, drop: Sequence[str]) -> None:
    """Print rows under their titles, one line each. See `fitted`."""
    if not rows:
        return
    titles, body = fitted(rows, width, drop)
    bold = sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    head, *lines = _lines([titles, *body])
    print(f"\033[1m{head}\033[0m" if bold else head)
    print("\n".join(lines))


def _lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Faster than rich for a thousand rows of plain text."""
    room = [max(_cells(text) for text in column) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (text + " " * (size - _cells(text)) for text, size in zip(row, room, strict=True))
        yield (" " * _GAP).join(padded).rstrip()


def _cells(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def fitted(rows: Sequence[dict[str, str]], width: int, drop: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows that fit `width`; all rows have the same keys, the titles.

    `drop`: columns to leave out, the first one first. The first column is a name that keeps its end; the last one, a
    detail without a title or not, is cut to what is left.
    """
    rows = [{title: printable(text) for title, text in row.items()} for row in rows]
    name, *_, detail = titles = list(rows[0])
    sizes = {title: max(_cells(title), *(_cells(row[title]) for row in rows)) for title in titles}
    if sum(sizes.values()) + _GAP * len(sizes) > width:
        sizes[name] = min(sizes[name], _NAME)
    shown = list(titles)
    for title in drop:
        least = min(sizes[detail], _DETAIL) if detail in shown else 0
        if sum(sizes[t] for t in shown if t != detail) + least + _GAP * (len(shown) - 1) > width and title in shown:
            shown.remove(title)
    room = {title: sizes[title] for title in shown}
    for title, shorten in ((detail, cut), (name, cut_middle)):
        if title in room:
            taken = sum(room[t] for t in shown if t != title) + _GAP * (len(shown) - 1)
            room[title] = min(room[title], max(width - taken, 0))
            rows = [{**row, title: shorten(row[title], room[title])} for row in rows]
    return [cut(title, max(room[title], 1)) for title in shown], [[row[title] for title in shown] for row in rows]


def printable(text: str) -> str:
    """On one line, and without a hold on the terminal: what has no sign of its own is escaped as in Python."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)


def cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(room - 3, 0)] + "..."[:room]


def cut_middle(name: str, room: int) -> str:
    """A run's name with its id, by which it is found."""
    return name if len(name) <= room else f"{name[: max(room - 11, 0)]}..{name[-9:]}"[-max(room, 9) :]
