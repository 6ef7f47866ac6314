"""Commands on what runs have left: TensorBoard, the journal, the event files."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc.commands.common import AsJson, RunName, Runs, app, expanded, print_json, say, table
from hpc.errors import UserError

if TYPE_CHECKING:
    from hpc.journal.report import RunData
    from hpc.rundir import RunDir


@app.command(rich_help_panel="Results")
def board(
    runs: Runs = None,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 0,
) -> None:
    """Open TensorBoard on the runs, on 127.0.0.1, with every confusion matrix kept."""
    from hpc import board
    from hpc.rundir import runs_folder

    board.serve(runs_folder(runs), port)


@app.command(rich_help_panel="Results")
def report(
    names: Annotated[
        list[str] | None, typer.Argument(help="Runs, the baseline first, and sweeps (all).", metavar="[RUN]...")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of report.md and report.html.")] = Path("report"),
    runs: Runs = None,
) -> None:
    """Write the journal: Markdown, and one self-contained HTML page. Hand-written notes are kept."""
    from hpc import ledger
    from hpc.journal.report import write_report
    from hpc.rundir import all_runs, runs_folder

    folder = runs_folder(runs)
    found = expanded([ledger.find(folder, name) for name in names]) if names else list(all_runs(folder))
    for path in write_report([data for run in found if (data := _run_data(run))], out):
        say(str(path))


def _run(name: str, runs: Path | None) -> RunDir:
    """The one run of this name. Raises UserError."""
    from hpc import ledger
    from hpc.rundir import runs_folder
    from hpc.sweepdir import SweepDir

    target = ledger.find(runs_folder(runs), name)
    if isinstance(target, SweepDir):
        raise UserError(f"{target.name} is a sweep: name one of its rows; 'hpc ls {target.name}' lists them")
    return target


def _run_data(run: RunDir) -> RunData | None:
    """What the journal needs of a run; None of a step that does not train, and of one whose files are damaged."""
    from hpc import ledger, yamlfile
    from hpc.journal.report import RunData
    from hpc.rundir import read_json

    if run.step.exists():
        return None
    status = ledger.status(run)
    if status.state == "damaged":
        print(f"{run.name} is left out: {status.detail}", file=sys.stderr)
        return None
    figures = {path.stem: path for path in sorted(run.figures.glob("*.png"))}
    delta = yamlfile.read(run.delta) if run.delta.exists() else {}
    metrics, events = run.read_metrics(), run.read_events()
    return RunData(run.name, yamlfile.read(run.experiment), delta, read_json(run.result), metrics, events, figures)


@app.command(rich_help_panel="Results")
def fsck(
    name: RunName,
    runs: Runs = None,
    mend: Annotated[bool, typer.Option("--repair", help="Keep whole records; damaged files move away.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a run's event files record by record; exit code 1 when any is damaged (and not repaired)."""
    from hpc import ledger
    from hpc.logs import fsck as files
    from hpc.logs.repair import repair

    run = _run(name, runs)
    if mend and run.tensorboard.is_dir():
        for before, kept in repair(run):
            print(f"{before.file}: {before.sentence}; repaired, the original is {kept}", file=sys.stderr)
    findings = files.check(run.tensorboard, ledger.status(run).live)
    if not findings:
        raise UserError(f"{run.name} has no event files yet; see 'hpc show {run.name}'")
    if as_json:
        print_json([asdict(finding) | {"damaged": finding.damaged} for finding in findings])
    else:
        table(list(files.TITLES), [list(row) for row in files.rows(findings)])
    raise typer.Exit(files.exit_code(findings))
