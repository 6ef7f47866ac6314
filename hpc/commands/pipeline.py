"""`hpc pipeline`: pack, train and evaluate as one command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hpc.commands.common import AsJson, ExperimentFile, Overrides, Runs, app, print_json, report, say
from hpc.errors import UserError


@app.command(rich_help_panel="Run")
def pipeline(
    file: ExperimentFile,
    overrides: Overrides = None,
    pack: Annotated[
        str | None,
        typer.Option("--pack", help="Sources and options of 'hpc pack', in quotes; skipped if data.file is there."),
    ] = None,
    pack_instance: Annotated[str, typer.Option("--pack-instance", help="Where it is packed.")] = "cedia-cpu",
    split: Annotated[str, typer.Option("--split", help="What is evaluated in the end.")] = "test",
    runs: Runs = None,
    as_json: AsJson = False,
) -> None:
    """Submit pack, train and evaluate; each starts when the one before has finished."""
    from hpc import pipeline as pipelines
    from hpc.rundir import runs_folder

    planned = pipelines.make(file, overrides or [], runs_folder(runs), pack, pack_instance, split)
    findings = pipelines.check(planned)
    refusals = [f"{name}: {line}" for name, found in findings.items() for line in found.refusals]
    if refusals:
        raise UserError("\n".join(refusals))
    for name, found in findings.items():
        print(f"# {name}", file=sys.stderr)
        report(found)
    done = pipelines.submit(planned)
    if as_json:
        print_json([{"run": run.name, "path": str(run.path), "job": job} for run, job in done])
        return
    for run, job in done:
        say(f"{run.name}  job {job} ({planned.cluster})")
    say(f"follow it: hpc logs {done[0][0].name} -f")
