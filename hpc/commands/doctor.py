"""`hpc doctor`: is this machine fit, what is wrong and what to do."""

from __future__ import annotations

import typer

from hpc.commands.common import AsJson, Runs, app, print_json
from hpc.preempt import ExitCode


@app.command(rich_help_panel="Machine")
def doctor(runs: Runs = None, as_json: AsJson = False) -> None:
    """Examine Python, torch, GPUs, Slurm and the file system: what is wrong and what to do. Exit code 1 on a fault."""
    from rich.console import Console

    from hpc import doctor
    from hpc.rundir import runs_folder

    lines = doctor.examine(runs_folder(runs))
    if as_json:
        print_json([line.as_dict() for line in lines])
    else:
        out = Console(soft_wrap=True, highlight=False)
        colors = {"ok": "green", "note": "yellow", "bad": "red"}
        for line in lines:
            out.print(f"[{colors[line.verdict]}]{line.verdict:4}[/]  ", end="")
            out.print(f"{line.name:11}  {line.words}", markup=False)
            if line.remedy:
                out.print(f"{'':19}-> {line.remedy}", markup=False)
    raise typer.Exit(ExitCode.CRASH if any(line.verdict == "bad" for line in lines) else ExitCode.DONE)
