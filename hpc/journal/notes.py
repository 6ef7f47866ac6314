"""Hand-written notes: what stands between `<!-- notes: RUN -->` and `<!-- /notes -->` survives each new report."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote, unquote

from hpc.errors import UserError

HEADER = "<!-- written by hpc report; only what stands between the notes markers survives the next one -->"
_OPEN = re.compile(r"\s*<!--\s*notes:\s*(\S+)\s*-->\s*")
_CLOSE = re.compile(r"\s*<!--\s*/notes\s*-->\s*")


def block(run: str, text: str) -> str:
    """The marked block of one run."""
    body = f"{text}\n" if text else "\n"
    return f"<!-- notes: {quote(run, safe='')} -->\n{body}<!-- /notes -->"


def read(path: Path) -> dict[str, str]:
    """The notes in a report by run; empty where there is no report yet.

    Raises UserError for a file that is no report of ours, and where a marker is broken: text could be lost.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason}); save it as UTF-8 or move it away") from None
    if not text.startswith(HEADER):
        raise UserError(f"{path}: was not written by 'hpc report'; choose another folder with -o, or move it away")
    return _parse(text, path)


def _parse(text: str, path: Path) -> dict[str, str]:
    notes: dict[str, str] = {}
    run: str | None = None
    lines: list[str] = []
    for row, line in enumerate(text.split("\n"), start=1):
        opened, closed = _OPEN.fullmatch(line), _CLOSE.fullmatch(line)
        if (opened and run is not None) or (closed and run is None):
            raise UserError(f"{path}: line {row}: {line.strip()} stands without its other half; repair the markers")
        if opened:
            run, lines = unquote(opened[1]), []
        elif closed and run is not None:
            both = (notes.get(run, ""), "\n".join(lines).strip("\n"))
            notes[run], run = "\n\n".join(part for part in both if part), None
        else:
            lines.append(line)
    if run is not None:
        raise UserError(f"{path}: the notes of {run} have no <!-- /notes --> line; add it below them")
    return notes
