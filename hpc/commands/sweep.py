"""`hpc sweep`: many runs as one job array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hpc.commands.common import After, AsJson, ExperimentFile, Runs, Tiny, app, print_json, report, say, table
from hpc.errors import UserError

if TYPE_CHECKING:
    from hpc.preflight import Findings
    from hpc.sweep import SweepPlan

_SHOWN = 10


@app.command(rich_help_panel="Run")
def sweep(
    file: ExperimentFile,
    axes: Annotated[
        list[str],
        typer.Argument(help="train.seed=0:5 train.optimizer.lr=1e-3,3e-4", metavar="AXIS", show_default=False),
    ],
    zipped: Annotated[bool, typer.Option("--zip/--grid", help="Pair the values, or take all combinations.")] = False,
    parallel: Annotated[
        int | None, typer.Option("--max-parallel", min=1, help="At most so many rows at a time.", metavar="K")
    ] = None,
    tiny: Tiny = False,
    after: After = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the rows and the script only.")] = False,
    runs: Runs = None,
    as_json: AsJson = False,
) -> None:
    """Submit one run per combination of values as one job array; rows finished or under way already are left out."""
    from hpc import arrays, recipes
    from hpc import sweep as sweeps
    from hpc.after import options
    from hpc.plan import removed_if
    from hpc.rundir import runs_folder
    from hpc.submission import Refused

    planned = sweeps.make(file, axes, runs_folder(runs), zipped, parallel, tiny)
    recipes.fetch(row.experiment for row in planned.rows)
    cluster = planned.cluster
    waits = options(after or [], planned.sweep.path.parent, cluster)
    if dry_run:
        _print_json(planned, []) if as_json else _show(planned)
        report(_checked(planned))
        return
    made = sweeps.create(planned, lambda: report(_checked(planned)))
    with removed_if(Refused, made.path):
        jobs = arrays.submit(made, cluster, after=waits)
    if as_json:
        _print_json(planned, jobs)
        return
    _show_left_out(planned)
    say(f"{made.name}  {_rows(len(planned.rows))}  job {', '.join(jobs)} ({cluster})  {made.path}")
    say(f"follow it: hpc ls {made.name}")


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count > 1)}"


def _print_json(planned: SweepPlan, jobs: list[str]) -> None:
    """`jobs` is empty where nothing is submitted."""
    sweep, rows = planned.sweep, [row.name for row in planned.rows]
    told = {"sweep": sweep.name, "path": str(sweep.path), "cluster": planned.cluster, "jobs": jobs, "rows": rows}
    print_json({**told, "left_out": planned.left_out})


def _checked(planned: SweepPlan) -> Findings:
    from hpc import preflight

    experiments = [row.experiment for row in planned.rows]
    runs = planned.sweep.path.parent
    findings = preflight.check_many(experiments, planned.instance, planned.cluster, planned.scripts[0], runs)
    if findings.refusals:
        raise UserError("\n".join(findings.refusals))
    return findings


def _show(planned: SweepPlan) -> None:
    rows = [[str(number), row.name, " ".join(row.overrides)] for number, row in enumerate(planned.rows)]
    hidden = len(rows) - 2 * _SHOWN
    if hidden > 0:
        rows = [*rows[:_SHOWN], ["...", "...", f"{hidden} more"], *rows[-_SHOWN:]]
    table(["row", "run", "values"], rows)
    _show_left_out(planned)
    say(f"\n# {planned.sweep.script(0)}, byte for byte\n")
    say(planned.scripts[0])
    for chunk in planned.chunks[1:]:
        of = f"rows {chunk.first}-{chunk.first + chunk.count - 1}"
        say(f"# {planned.sweep.script(chunk.number)}: the same for {of}")


def _show_left_out(planned: SweepPlan) -> None:
    names = list(planned.left_out)
    for name in names[:_SHOWN]:
        say(f"{name}  {planned.left_out[name]} already: left out")
    if len(names) > _SHOWN:
        say(f"... and {len(names) - _SHOWN} more left out")
