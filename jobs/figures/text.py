"""Names and numbers as figures print them: short, distinct, in signs that the font has, never taken for formulas."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

_LOG = logging.getLogger(__name__)
LONGEST = 26
"""characters of a class name in a figure"""


def labels(names: Sequence[str], longest: int = LONGEST) -> list[str]:
    """One text per class: cut in the middle where long, numbered where two would look alike or signs are missing."""
    shown = [cut(_left(printable(name)), longest) for name in names]
    _tell_missing(tuple(names))
    often = {text for text in shown if shown.count(text) > 1} if len(set(shown)) < len(shown) else set()
    return [
        literal(_numbered(number, text, longest) if text in often or _lacking(name) or not text.strip() else text)
        for number, (text, name) in enumerate(zip(shown, names, strict=True))
    ]


def label(name: str, longest: int = LONGEST) -> str:
    """One name on its own."""
    return literal(cut(_left(printable(name)), longest))


def readable(names: Sequence[str]) -> list[str]:
    """For pictures, whose text knows no formulas: signs that the font has; the number where there is no name."""
    _tell_missing(tuple(names))
    return [
        shown if (shown := _left(printable(name))).strip() else f"class {number}" for number, name in enumerate(names)
    ]


def _left(shown: str) -> str:
    """Nothing of a name of which no letter or digit can be printed."""
    return shown if any(sign.isalnum() for sign in shown) else shown.replace(MISSING, " ")


@cache
def _tell_missing(names: tuple[str, ...]) -> None:
    """Once of the same classes."""
    lost = [f"{number} is {name}" for number, name in enumerate(names) if _lacking(name)]
    if lost:
        _LOG.warning("the figures' font lacks signs of these class names, shown by number: %s", ", ".join(lost))


def _lacking(name: str) -> bool:
    known = _known_signs()
    return any(sign.isprintable() and ord(sign) not in known for sign in name)


def _numbered(number: int, text: str, longest: int) -> str:
    return f"{number}: {cut(text, longest - len(str(number)) - 2)}" if text.strip() else f"class {number}"


def cut(text: str, longest: int) -> str:
    """At most `longest` characters; names tend to differ at both ends."""
    if len(text) <= longest:
        return text
    head = longest // 2
    return text[:head].rstrip() + "…" + text[len(text) - (longest - 1 - head) :].lstrip()


def printable(text: str) -> str:
    """Spaces for control characters and line ends, MISSING for signs that the font does not have."""
    known = _known_signs()
    signs = (sign if sign.isprintable() else " " for sign in text)
    return "".join(sign if ord(sign) in known else MISSING for sign in signs)


def printable_lines(text: str) -> str:
    """As `printable`, line by line."""
    return "\n".join(printable(line) for line in text.split("\n"))


def literal(text: str) -> str:
    """As matplotlib prints it as it stands: no formula between dollars, no entry that legends leave out."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


MISSING = "?"
"""In place of a sign that the font does not have: never its box."""


@cache
def _known_signs() -> frozenset[int]:
    """Of DejaVu Sans, which matplotlib brings along: Latin, Greek, Cyrillic, Arabic, signs; no Chinese or Japanese."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())


def compact(value: float) -> str:
    """A count in at most five characters: 950, 12k, 3.4M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 10 * size or (value >= size and size > 1e3):
            return f"{value / size:.1f}{unit}" if value < 10 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def share(value: float) -> str:
    """A number of 0 to 1, or a dash where it is none."""
    return f"{value:.2f}" if value == value else "–"
