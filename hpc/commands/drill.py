"""`hpc drill`: is it safe to be stopped here?"""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from hpc.commands.common import AsJson, ExperimentFile, Overrides, Runs, app, print_json, report, say, width
from hpc.preempt import ExitCode

if TYPE_CHECKING:
    from hpc.drillproof import Report, Rules
    from hpc.drilltable import Verdict

_WIDEST = 110


@app.command(rich_help_panel="Machine")
def drill(
    file: ExperimentFile,
    overrides: Overrides = None,
    kills: Annotated[int, typer.Option("--kills", min=0, max=100, help="So often a rank is killed.")] = 5,
    steps: Annotated[int, typer.Option("--steps", min=2, help="About so long a run is; an epoch at least.")] = 60,
    seed: Annotated[int, typer.Option("--seed", help="Of the steps at which runs are stopped.")] = 0,
    clean: Annotated[bool, typer.Option("--clean", help="Remove the runs if all is as promised.")] = False,
    runs: Runs = None,
    as_json: AsJson = False,
) -> None:
    """Stop, requeue and kill a short form of an experiment here: what is lost, and is the result equal? 1 if not."""
    from hpc import drill as drills
    from hpc import drilltable
    from hpc.rundir import runs_folder

    planned = drills.make(file, overrides or [], runs_folder(runs), kills, steps, seed)
    report(planned.findings)
    print(f"drill on {planned.cluster}: {planned.folder}", file=sys.stderr)
    reports, verdict = drills.run(planned)
    if as_json:
        print_json(drilltable.as_dict(reports, planned.rules, verdict))
    else:
        _show(reports, planned.rules, verdict)
    if clean and verdict.good:
        drills.remove(planned)
    raise typer.Exit(ExitCode.DONE if verdict.good else ExitCode.CRASH)


def _show(reports: list[Report], rules: Rules, verdict: Verdict) -> None:
    from hpc import drilltable, tables

    tables.print_rows(drilltable.rows(reports, rules), width(), drilltable.DROP)
    say()
    wrap = textwrap.TextWrapper(min(width(), _WIDEST), break_long_words=False, break_on_hyphens=False)
    say(wrap.fill(verdict.words))
    say(f"\nnext\n    {verdict.command}")
