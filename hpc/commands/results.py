"""Commands on what runs have left: TensorBoard, the journal, the event files."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc.commands.common import AsJson, RunName, Runs, app, expanded, print_json, say, table
from hpc.errors import UserError

if TYPE_CHECKING:
    from hpc.rundir import RunDir


@app.command(rich_help_panel="Results")
def board(
    names: Annotated[
        list[str] | None, typer.Argument(help="Runs and sweeps (all).", metavar="[RUN]...", show_default=False)
    ] = None,
    runs: Runs = None,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 0,
    host: Annotated[str, typer.Option(help="Address to serve on; others need --open-to-others.")] = "127.0.0.1",
    bind_all: Annotated[bool, typer.Option("--bind-all", "--bind_all", help="Serve on every address.")] = False,
    open_to_others: Annotated[
        bool, typer.Option("--open-to-others", help="Allow an address that others can reach: there is no login.")
    ] = False,
) -> None:
    """Open TensorBoard on the runs, on 127.0.0.1, with every confusion matrix and scalar kept."""
    from hpc import board, ledger
    from hpc.rundir import all_runs, runs_folder

    folder = runs_folder(runs)
    targets = [ledger.find(folder, name) for name in names or ()]
    host = board.EVERYWHERE if bind_all else host
    code = board.serve(lambda: expanded(targets) if names else all_runs(folder), folder, port, host, open_to_others)
    raise typer.Exit(code)


@app.command(rich_help_panel="Results")
def report(
    names: Annotated[
        list[str] | None, typer.Argument(help="Runs and sweeps (all).", metavar="[RUN]...", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The run that others are compared with (the first).", metavar="RUN")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of EXPERIMENTS.md and index.html.")] = Path("report"),
    runs: Runs = None,
    as_json: AsJson = False,
) -> None:
    """Write the journal: Markdown, and one self-contained HTML page. Hand-written notes are kept."""
    from hpc import ledger
    from hpc.journal.reading import read
    from hpc.journal.report import plain, write_report
    from hpc.rundir import all_runs, runs_folder

    folder = runs_folder(runs)
    found = expanded([ledger.find(folder, name) for name in names]) if names else list(all_runs(folder))
    first = _run(baseline, runs) if baseline is not None else None
    if first and first.path not in [run.path for run in found]:
        found.insert(0, first)
    if inside := [run.path for run in found if out.resolve().is_relative_to(run.path.resolve())]:
        raise UserError(f"-o {out}: lies in {inside[0]}, whose next report would show this one; choose another folder")
    told = [read(run) for run in found if not run.step.exists()]
    for run in told:
        for fault in run.damage:
            print(f"{run.run}: {fault}", file=sys.stderr)
    written = write_report(told, out, first.name if first else "", partial(print, file=sys.stderr))
    if as_json:
        print_json({"files": list(map(str, written)), "runs": plain(told, first.name if first else "")})
    else:
        say("\n".join(map(str, written)))


def _run(name: str, runs: Path | None) -> RunDir:
    """The one run of this name. Raises UserError."""
    from hpc import ledger
    from hpc.rundir import runs_folder
    from hpc.sweepdir import SweepDir

    target = ledger.find(runs_folder(runs), name)
    if isinstance(target, SweepDir):
        raise UserError(f"{target.name} is a sweep: name one of its rows; 'hpc ls {target.name}' lists them")
    return target


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
    from hpc.logs import readers
    from hpc.logs.repair import repair

    run = _run(name, runs)
    mended = repair(run) if mend and run.tensorboard.is_dir() else []
    for before, kept in mended:
        words = f"repaired, the original is {kept}" if kept else "a link, left as it is: repair what it leads to"
        print(f"{before.file}: {before.sentence}; {words}", file=sys.stderr)
    findings = files.check(run.tensorboard, ledger.status(run).live)
    if not findings and not mended:
        raise UserError(f"{run.name} has no event files yet; see 'hpc show {run.name}'")
    # One whole file is the same to all.
    shown = readers.shown(run.tensorboard) if len(findings) > 1 or files.exit_code(findings) else []
    if as_json:
        told = [asdict(finding) | {"damaged": finding.damaged} for finding in findings]
        print_json({"files": told, "readers": [asdict(one) for one in shown]})
    else:
        table(list(files.TITLES), [list(row) for row in files.rows(findings)])
        if shown:
            say("\nWhat each reader shows of the scalars, opened now:")
            table(list(readers.TITLES), [list(row) for row in readers.rows(shown)])
    raise typer.Exit(files.exit_code(findings))
