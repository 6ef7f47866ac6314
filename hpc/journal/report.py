"""`hpc report`: the journal of one or several runs, EXPERIMENTS.md and one self-contained index.html."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpc.errors import UserError
from hpc.journal import markdown, notes, page
from hpc.journal.changes import changes
from hpc.journal.compose import baselines, compose
from hpc.journal.content import Figure, Report
from hpc.journal.rundata import RunData
from hpc.rundir import write_bytes

__all__ = ["RunData", "write_report"]

MARKDOWN, PAGE, FIGURES = "EXPERIMENTS.md", "index.html", "figures"


def write_report(
    runs: Sequence[RunData], out: Path, baseline: str = "", tell: Callable[[str], None] = print
) -> tuple[Path, Path]:
    """Writes `out`/EXPERIMENTS.md, its figures/ and `out`/index.html; returns the two pages' paths.

    Each run is compared with `baseline` if that is of its task, else with the first of its task. Hand-written text
    between the notes markers of an existing EXPERIMENTS.md is kept byte for byte, that of runs which are not in this
    report too; the same runs and notes give the same bytes. Figures of the report before that this one does not show
    are removed. Text beside the notes that somebody has changed is replaced; the file as it was is kept, and told.
    Raises UserError without runs, for a run given twice, a baseline that is none of them, for an EXPERIMENTS.md that it
    must not overwrite, and a folder that cannot be written.
    """
    names = [run.run for run in runs]
    if not names:
        raise UserError("no run to report; 'hpc ls' lists the runs, 'hpc submit EXPERIMENT.yaml' starts one")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{', '.join(twice)}: given more than once; name each run once")
    if baseline and baseline not in names:
        raise UserError(f"--baseline {baseline}: not among the runs of the report; use one of {', '.join(names)}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; -o takes a folder")
    try:
        return _write(runs, out, baseline, tell)
    except OSError as error:
        raise UserError(
            f"{error.filename2 or error.filename or out}: {error.strerror}; choose another folder with -o"
        ) from None


def _write(runs: Sequence[RunData], out: Path, baseline: str, tell: Callable[[str], None]) -> tuple[Path, Path]:
    text, web = out / MARKDOWN, out / PAGE
    if web.exists() and not text.exists():
        raise UserError(f"{web}: is there without {MARKDOWN}, so it may be somebody's; choose another folder with -o")
    written, before = notes.split(text)
    report = compose(runs, written, baseline)
    shown = notes.sealed(markdown.render(report))
    if notes.edited(before):
        kept = text.with_name(f"{MARKDOWN}.bak")
        write_bytes(kept, text.read_bytes())
        tell(f"{text}: what was written outside of the notes markers is gone; the file as it was: {kept}")
    _write_figures(report, out)
    write_bytes(web, page.render(report).encode())
    # Before the names of what is left over are gone with the old text; where notes show it, it stays.
    for name in markdown.figure_files(before):
        if name not in shown:
            (out / FIGURES / name).unlink(missing_ok=True)
    write_bytes(text, shown.encode())
    return text, web


def plain(runs: Sequence[RunData], baseline: str = "") -> list[dict[str, Any]]:
    """The report for scripts: what each run came to, and with whom it is compared."""
    firsts = baselines(runs, baseline)
    return [
        {
            "run": run.run,
            "state": run.state,
            "task": run.task,
            "baseline": firsts[run.task].run,
            "changes": {key: mine for key, (_, mine) in changes(run, firsts[run.task]).items()},
            "monitor": run.monitor,
            "direction": "min" if run.lower else "max",
            "best": dict(run.best),
            "last": {key: run.last.get(key) for key in ("epoch", "step", "metrics") if run.last},
            "evaluations": {name: dict(told["metrics"]) for name, told in run.evaluations.items()},
            "samples_per_second": dict(run.speed),
            "parameters": run.parameters,
            "epoch_seconds": run.epoch_seconds,
            "wall_seconds": run.wall_seconds,
            "jobs": run.jobs,
            "commit": run.commit,
        }
        for run in runs
    ]


def _write_figures(report: Report, out: Path) -> None:
    """Copies beside the Markdown, so that the folder can be moved without the runs; what is the same stays."""
    for section in report.sections:
        for figure in section.figures:
            if figure.size:
                _copy(figure, out / FIGURES / markdown.figure_file(section.run, figure))


def _copy(figure: Figure, target: Path) -> None:
    content = figure.png
    if not (target.is_file() and target.stat().st_size == len(content) and target.read_bytes() == content):
        write_bytes(target, content, durable=False)
