"""Commands that start and end runs; submitit and jinja2 are imported only where they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from hpc.commands.common import AsJson, ExperimentFile, Overrides, RunName, Runs, app, print_json, say
from hpc.errors import UserError
from hpc.preempt import ExitCode


@app.command(rich_help_panel="Run")
def plan(file: ExperimentFile, overrides: Overrides = None, runs: Runs = None) -> None:
    """Print the resolved experiment and the exact batch script, then every refusal. Exit code 2 on a refusal."""
    from hpc import plan, preflight, submission, yamlfile
    from hpc.rundir import runs_folder

    planned = plan.make(file, overrides or [], runs_folder(runs))
    cluster = submission.choose_cluster(planned.experiment.launch.cluster)
    say(f"# {planned.run.path} on {cluster}: the experiment as resolved\n")
    say(yamlfile.dump(planned.experiment.as_dict()))
    say("# the batch script, byte for byte\n")
    say(planned.script)
    findings = preflight.check(planned.experiment, planned.instance, cluster, planned.script)
    _report(findings)
    raise typer.Exit(ExitCode.BAD_INPUT if findings.refusals else ExitCode.DONE)


def _report(findings: Any) -> None:
    from rich.console import Console

    out = Console(stderr=True, soft_wrap=True, highlight=False)
    for color, word, lines in (
        ("green", "ok", findings.passed),
        ("yellow", "not checked", findings.unchecked),
        ("red", "refused", findings.refusals),
    ):
        for line in lines:
            out.print(f"[{color}]{word}[/]  ", end="")
            out.print(line, markup=False)


def _prepare(file: Path, overrides: list[str] | None, runs: Path | None, cluster: str | None) -> tuple[Any, str]:
    """Plan, check, and make the run folder; refusals end the command with exit code 2 and nothing made."""
    from hpc import plan, preflight, submission
    from hpc.rundir import runs_folder

    planned = plan.make(file, overrides or [], runs_folder(runs))
    where = cluster or submission.choose_cluster(planned.experiment.launch.cluster)
    findings = preflight.check(planned.experiment, planned.instance, where, planned.script)
    if findings.refusals:
        raise UserError("\n".join(findings.refusals))
    _report(findings)
    return plan.create_next(planned), where


@app.command(rich_help_panel="Run")
def submit(file: ExperimentFile, overrides: Overrides = None, runs: Runs = None, as_json: AsJson = False) -> None:
    """Check, then submit one job: SLURM where sbatch answers, else submitit's local executor."""
    from hpc import submission

    run, cluster = _prepare(file, overrides, runs, None)
    job = submission.submit(run, cluster)
    if as_json:
        print_json({"run": run.name, "path": str(run.path), "cluster": cluster, "job": job.job_id})
    else:
        say(f"{run.name}  job {job.job_id} ({cluster})  {run.path}")
        say(f"follow it: hpc logs {run.name} -f")


@app.command(rich_help_panel="Run")
def train(file: ExperimentFile, overrides: Overrides = None, runs: Runs = None) -> None:
    """Train here, in the foreground: the same batch script under bash. Ctrl-C stops it cleanly."""
    from hpc import foreground

    run, _ = _prepare(file, overrides, runs, "local")
    raise typer.Exit(foreground.train(run))


@app.command(rich_help_panel="Run")
def resume(name: RunName, runs: Runs = None) -> None:
    """Submit a stopped, failed or cancelled run again; it goes on from its newest good checkpoint."""
    from hpc import ledger, plan, submission
    from hpc.rundir import find_run, runs_folder

    run = find_run(runs_folder(runs), name)
    now = ledger.status(run)
    if now.state == "damaged":
        raise UserError(f"{run.name} is damaged: {now.detail}")
    if ledger.live(now.state) or now.state == "finished":
        raise UserError(f"{run.name} is {now.state}: nothing to resume")
    experiment, _ = plan.reopen(run)
    cluster = submission.choose_cluster(experiment.launch.cluster)
    newest = run.newest_checkpoint()
    job = submission.submit(run, cluster)
    whence = f"goes on from checkpoint {newest}" if newest else "from the start: it has no checkpoint yet"
    say(f"{run.name}  job {job.job_id} ({cluster})  {whence}")


@app.command(rich_help_panel="Run")
def cancel(name: RunName, runs: Runs = None) -> None:
    """End a run; it saves what it has, and is not requeued."""
    from hpc import ledger
    from hpc.rundir import find_run, runs_folder

    run = find_run(runs_folder(runs), name)
    say(f"{run.name}: cancelled {ledger.cancel(run)}")
