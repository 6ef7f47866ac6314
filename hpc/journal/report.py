"""`hpc report`: the journal of one or several runs, EXPERIMENTS.md and one self-contained index.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpc.errors import UserError
from hpc.journal import markdown, notes, page
from hpc.journal.content import Report, compose
from hpc.journal.rundata import RunData
from hpc.rundir import write_bytes

__all__ = ["RunData", "write_report"]


def write_report(runs: Sequence[RunData], out: Path) -> tuple[Path, Path]:
    """Writes `out`/EXPERIMENTS.md, its figures/ and `out`/index.html; returns the two pages' paths.

    The first run is the baseline of all differences. Hand-written text between the notes markers of an existing
    EXPERIMENTS.md is kept, that of runs which are not in this report too; the same runs and notes give the same bytes.
    Raises UserError without runs, for a run given twice, and for a EXPERIMENTS.md that it must not overwrite.
    """
    names = [run.run for run in runs]
    if not names:
        raise UserError("no run to report; 'hpc ls' lists the runs, 'hpc submit EXPERIMENT.yaml' starts one")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{', '.join(twice)}: given more than once; name each run once")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; -o takes a folder")
    text, web = out / "EXPERIMENTS.md", out / "index.html"
    report = compose(runs, notes.read(text))
    _write_figures(report, out)
    write_bytes(web, page.render(report).encode())
    write_bytes(text, markdown.render(report).encode())
    return text, web


def _write_figures(report: Report, out: Path) -> None:
    """Copies beside the Markdown, so that the folder can be moved without the runs."""
    for section in report.sections:
        for figure in section.figures:
            if figure.size:
                write_bytes(out / "figures" / markdown.figure_file(section.run, figure), figure.png)
