"""`hpc sweep`: many runs as one job array."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hpc.commands.common import After, AsJson, ExperimentFile, Runs, app, print_json, report, say, table
from hpc.errors import UserError

_SHOWN = 10


@app.command(rich_help_panel="Run")
def sweep(
    file: ExperimentFile,
    axes: Annotated[list[str], typer.Argument(help="train.seed=0:5 train.optimizer.lr=1e-3,3e-4", show_default=False)],
    zipped: Annotated[bool, typer.Option("--zip/--grid", help="Pair the values, or take all combinations.")] = False,
    parallel: Annotated[
        int | None, typer.Option("--max-parallel", min=1, help="At most so many rows at a time.", metavar="K")
    ] = None,
    after: After = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the rows and the script only.")] = False,
    runs: Runs = None,
    as_json: AsJson = False,
) -> None:
    """Submit one run per combination of values as one job array; rows that are finished already are left out."""
    from hpc import arrays
    from hpc import sweep as sweeps
    from hpc.after import options
    from hpc.plan import removed_if
    from hpc.rundir import runs_folder
    from hpc.submission import Refused

    folder = runs_folder(runs)
    planned = sweeps.make(file, axes, folder, zipped, parallel)
    cluster = planned.cluster
    waits = options(after or [], folder, cluster)
    if dry_run:
        _show(planned)
        report(_checked(planned))
        return
    made = sweeps.create(planned, lambda: report(_checked(planned)))
    with removed_if(Refused, made.path):
        jobs = arrays.submit(made, cluster, after=waits)
    if as_json:
        rows = [row.name for row in planned.rows]
        print_json({"sweep": made.name, "path": str(made.path), "cluster": cluster, "jobs": jobs, "rows": rows})
        return
    for run in planned.finished:
        say(f"{run.name}  finished already: left out")
    say(f"{made.name}  {len(planned.rows)} rows  job {', '.join(jobs)} ({cluster})  {made.path}")
    say(f"follow it: hpc ls {made.name}")


def _checked(planned: Any) -> Any:
    from hpc import preflight

    experiments = [row.experiment for row in planned.rows]
    runs = planned.sweep.path.parent
    findings = preflight.check_many(experiments, planned.instance, planned.cluster, planned.scripts[0], runs)
    if findings.refusals:
        raise UserError("\n".join(findings.refusals))
    return findings


def _show(planned: Any) -> None:
    rows = [[row.name, " ".join(row.overrides)] for row in planned.rows]
    hidden = len(rows) - 2 * _SHOWN
    if hidden > 0:
        rows = [*rows[:_SHOWN], ["...", f"{hidden} more"], *rows[-_SHOWN:]]
    table(["row", "values"], rows)
    for run in planned.finished:
        say(f"{run.name}  finished already: left out")
    for chunk, text in zip(planned.chunks, planned.scripts, strict=True):
        say(f"\n# {planned.sweep.script(chunk.number)}, byte for byte\n")
        say(text)
