"""Commands that start and end runs; submitit and jinja2 are imported only where they are needed."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpc.commands.common import (
    After,
    AsJson,
    ExperimentFile,
    Overrides,
    Runs,
    Tiny,
    app,
    print_json,
    report,
    say,
    table,
)
from hpc.errors import UserError
from hpc.preempt import ExitCode

if TYPE_CHECKING:
    from hpc.plan import Plan
    from hpc.preflight import Findings
    from hpc.rundir import RunDir


@app.command(rich_help_panel="Run")
def plan(
    file: ExperimentFile,
    overrides: Overrides = None,
    tiny: Tiny = False,
    runs: Runs = None,
    as_json: AsJson = False,
) -> None:
    """Print the resolved experiment, the exact batch script, memory, then every refusal. Exit code 2 on a refusal."""
    from hpc import plan, preflight, recipes, submission, yamlfile
    from hpc.rundir import runs_folder

    planned = plan.make(file, overrides or [], runs_folder(runs), tiny)
    recipes.fetch([planned.experiment])
    cluster = submission.choose_cluster(planned.experiment.launch.cluster)
    if not as_json:
        say(f"# {planned.run.path} on {cluster}: the experiment as resolved\n")
        say(yamlfile.dump(planned.experiment.as_dict()))
        say("# the batch script, byte for byte\n")
        say(planned.script)
    findings = preflight.check(
        planned.experiment, planned.instance, cluster, planned.script, planned.run.runs, details=True
    )
    if as_json:
        print_json(_as_dict(planned, cluster, findings))
    else:
        _show_switches(findings.memory)
        report(findings)
    raise typer.Exit(ExitCode.BAD_INPUT if findings.refusals else ExitCode.DONE)


def _as_dict(planned: Plan, cluster: str, findings: Findings) -> dict[str, Any]:
    run = {"run": planned.run.name, "path": str(planned.run.path), "cluster": cluster}
    return {**run, "experiment": planned.experiment.as_dict(), "script": planned.script, **asdict(findings)}


def _show_switches(memory: dict[str, Any] | None) -> None:
    """What the peak of a training step would be with one key changed."""
    if memory is None or not memory["switches"]:
        return
    say("# the peak of a training step with one more key, predicted\n")
    rows = [["as it stands", memory["peak"]], *([one["keys"], one["peak"]] for one in memory["switches"])]
    table(
        ["", "GB", "of what is there"], [[name, f"{n / 1e9:.2f}", f"{n / memory['capacity']:.0%}"] for name, n in rows]
    )
    say()


def _check(
    file: Path, overrides: list[str] | None, tiny: bool, runs: Path | None, cluster: str | None
) -> tuple[Plan, str]:
    """Plan and check; a refusal ends the command with exit code 2 and nothing made."""
    from hpc import plan, preflight, recipes, submission
    from hpc.rundir import runs_folder

    planned = plan.make(file, overrides or [], runs_folder(runs), tiny)
    recipes.fetch([planned.experiment])
    where = cluster or submission.choose_cluster(planned.experiment.launch.cluster)
    findings = preflight.check(planned.experiment, planned.instance, where, planned.script, planned.run.runs)
    if findings.refusals:
        raise UserError("\n".join(findings.refusals))
    report(findings)
    return planned, where


def _create(planned: Plan) -> RunDir:
    from hpc import plan

    return plan.create_next(planned)


@app.command(rich_help_panel="Run")
def submit(
    file: ExperimentFile,
    overrides: Overrides = None,
    tiny: Tiny = False,
    after: After = None,
    runs: Runs = None,
    as_json: AsJson = False,
) -> None:
    """Check, then submit one job: SLURM where sbatch answers, else submitit's local executor."""
    from hpc import submission
    from hpc.after import options
    from hpc.plan import removed_if
    from hpc.rundir import runs_folder

    planned, cluster = _check(file, overrides, tiny, runs, None)
    waits = options(after or [], runs_folder(runs), cluster)
    run = _create(planned)
    with removed_if(submission.Refused, run.path):
        job = submission.submit(run, cluster, waits)
    if as_json:
        print_json({"run": run.name, "path": str(run.path), "cluster": cluster, "job": job.job_id})
    else:
        say(f"{run.name}  job {job.job_id} ({cluster})  {run.path}")
        say(f"follow it: hpc logs {run.name} -f")


@app.command(rich_help_panel="Run")
def train(file: ExperimentFile, overrides: Overrides = None, tiny: Tiny = False, runs: Runs = None) -> None:
    """Train here, in the foreground: the same batch script under bash. Ctrl-C stops it cleanly."""
    from hpc import foreground

    planned, _ = _check(file, overrides, tiny, runs, "local")
    raise typer.Exit(foreground.train(_create(planned)))


@app.command(rich_help_panel="Run")
def resume(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="Runs or sweeps: name, id, or path. Of single runs another request: launch.nodes=2 ...",
            metavar="RUN... [launch.KEY=VALUE...]",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All runs that were stopped or lost; not those that failed or were cancelled.")
    ] = False,
    after: After = None,
    accept_data: Annotated[
        bool, typer.Option("--accept-data-change", help="Go on although the data file is not the one it began with.")
    ] = False,
    runs: Runs = None,
) -> None:
    """Submit stopped, failed or cancelled runs again; each goes on from its newest good checkpoint.

    Of a sweep, the rows that are neither finished nor under way. A single run may ask for something else from now on:
    nodes, gpus, tasks_per_node, mem, time, partition, instance, budgets, all that is under launch.
    """
    from hpc import resumption
    from hpc.rundir import runs_folder

    overrides = [word for word in words or [] if re.match(r"[\w.]+=", word)]  # no name of a run has '='
    names = [word for word in words or [] if word not in overrides]
    if everything and overrides:
        raise UserError(f"{overrides[0]} is for single runs that you name: 'hpc resume RUN {overrides[0]}'")
    if bool(names) == everything:
        raise UserError("name the runs or sweeps to resume, or give --all; 'hpc ls' lists them")
    if everything and accept_data:
        raise UserError("--accept-data-change is for runs that you name: 'hpc resume RUN --accept-data-change'")
    folder = runs_folder(runs)
    follow = after or []
    several = resumption.stopped(folder, follow) if everything else None
    for line in several or resumption.named(names, folder, follow, accept_data, overrides, report):
        say(line)


@app.command(rich_help_panel="Run")
def cancel(
    names: Annotated[
        list[str], typer.Argument(help="Runs or sweeps: name, id, or path.", metavar="RUN", show_default=False)
    ],
    runs: Runs = None,
) -> None:
    """End runs or sweeps, all with one scancel; each saves what it has, and is not requeued."""
    from hpc import ledger
    from hpc.rundir import runs_folder

    folder = runs_folder(runs)
    targets = [ledger.find(folder, name) for name in names]
    for target, told in zip(targets, ledger.cancel_all(targets), strict=True):
        say(f"{target.name}: cancelled {told}")
