"""Hand-written notes: what stands between `<!-- notes: RUN -->` and `<!-- /notes -->` survives each new report.

The block without a run, `<!-- notes -->`, is the journal's own introduction. What a block holds is kept byte for byte.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import quote, unquote

from hpc.errors import UserError

HEADER = "<!-- written by hpc report; only what stands between the notes markers survives the next one -->"
INTRODUCTION = ""
"""Whose notes stand before all runs."""
# Four blanks make it code, as a fence does: text about markers is no marker.
_OPEN = re.compile(r" {0,3}<!--\s*notes(?::\s*(\S+))?\s*-->\s*")
_CLOSE = re.compile(r" {0,3}<!--\s*/notes\s*-->\s*")
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)", re.DOTALL)


def block(run: str, text: str) -> str:
    """The marked block of one run, or of the introduction."""
    whose = f": {quote(run, safe='')}" if run else ""
    if not text:
        text = "\n"
    elif not text.endswith("\n"):
        text += "\n"
    return f"<!-- notes{whose} -->\n{text}<!-- /notes -->"


def sealed(text: str) -> str:
    """A report with a checksum, below its first line, of what is not notes: what a hand changes there is noticed."""
    first, _, rest = text.partition("\n")
    return f"{first}\n{_seal(_parse(text, Path())[1])}\n{rest}"


def edited(own: list[str]) -> bool:
    """Whether the lines that no hand should have written are others than those that were sealed."""
    return len(own) > 1 and own[1] != _seal([own[0], *own[2:]])


def _seal(own: list[str]) -> str:
    told = "\n".join(own).encode(errors="surrogateescape")
    return f"<!-- checksum: {hashlib.sha256(told).hexdigest()[:16]} -->"


def read(path: Path) -> dict[str, str]:
    """The notes in a report by run; empty where there is no report yet. Raises as `split` does."""
    return split(path)[0]


def split(path: Path) -> tuple[dict[str, str], list[str]]:
    """The notes in a report by run, and the lines that no hand has written; empty where there is no report yet.

    Raises UserError for a file that is no report of ours, and where a marker is broken: text could be lost.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return {}, []
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason}); save it as UTF-8 or move it away") from None
    if not text.startswith(HEADER):
        raise UserError(f"{path}: was not written by 'hpc report'; choose another folder with -o, or move it away")
    return _parse(text, path)


def _parse(text: str, path: Path) -> tuple[dict[str, str], list[str]]:
    notes: dict[str, str] = {}
    own: list[str] = []
    run: str | None = None
    lines: list[str] = []
    fence = ""
    for row, line in enumerate(text.split("\n"), start=1):  # no splitlines: it breaks at U+2028 and form feeds, too
        before, fence = fence, _fenced(fence, line) if run is not None else ""
        opened, closed = (None, None) if before or fence else (_OPEN.fullmatch(line), _CLOSE.fullmatch(line))
        if (opened and run is not None) or (closed and run is None):
            raise UserError(f"{path}: line {row}: {line.strip()} stands without its other half; repair the markers")
        if opened:
            run, lines = unquote(opened[1] or INTRODUCTION), []
        elif closed and run is not None:
            notes[run], run = _joined(notes.get(run, ""), "".join(f"{one}\n" for one in lines)), None
        else:
            (own if run is None else lines).append(line)
    if run is not None:
        whose = f"the notes of {run}" if run else "the introduction's notes"
        within = f", or close their {fence} above it" if fence else ""
        raise UserError(f"{path}: {whose} have no <!-- /notes --> line; add it below them{within}")
    return notes, own


def _fenced(fence: str, line: str) -> str:
    """The fence of code that is open after this line: ``` or ~~~, as many as opened it; empty outside of code."""
    found = _FENCE.fullmatch(line)
    if not found:
        return fence
    if not fence:
        return found[1]
    closes = found[1][0] == fence[0] and len(found[1]) >= len(fence) and not found[2].strip()
    return "" if closes else fence


def _joined(first: str, second: str) -> str:
    """Of two blocks of one run both; an empty one is none."""
    kept = [text for text in (first, second) if text.strip("\r\n")]
    return "\n".join(kept) if len(kept) != 1 else kept[0]
