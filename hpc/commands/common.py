"""What all commands share: the Typer app, options that stand on several commands, tables and JSON."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hpc.preflight import Findings
    from hpc.rundir import RunDir
    from hpc.sweepdir import SweepDir

app = typer.Typer(
    help="SLURM batch jobs for 3D networks: checked before they queue, preempted without losing a step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Runs = Annotated[Path | None, typer.Option("--runs", help="Folder of the runs (HPC_RUNS; default: runs).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: train.epochs=20 ...", show_default=False)]
ExperimentFile = Annotated[
    Path, typer.Argument(help="A YAML file, or a name of 'hpc recipes'.", metavar="EXPERIMENT", show_default=False)
]
Tiny = Annotated[bool, typer.Option("--tiny", help="A recipe's tiny form: a small model on real data, a minute.")]
RunName = Annotated[str, typer.Argument(help="A run: its name, id, or path.", metavar="RUN", show_default=False)]


RunNames = Annotated[
    list[str] | None, typer.Argument(help="Runs or sweeps: name, id, or path.", metavar="RUN...", show_default=False)
]
After = Annotated[
    list[str] | None, typer.Option("--after", help="Start when this run or sweep has finished.", metavar="RUN")
]


def say(text: str = "") -> None:
    print(text)


def print_json(value: Any) -> None:
    from hpc.rundir import dumps

    print(dumps(value, indent=1))


def table(columns: list[str], rows: list[list[str]]) -> None:
    """The first column names the rows; of the others the last but one is left out first where there is no room."""
    from hpc import tables

    cells = [dict(zip(columns, [*row, *[""] * len(columns)], strict=False)) for row in rows]
    tables.print_rows(cells, width(), columns[-2:0:-1])


def width() -> int:
    """Columns of the terminal (COLUMNS first), or 200 where the output is none."""
    return shutil.get_terminal_size((200, 24)).columns


def expanded(targets: Iterable[RunDir | SweepDir]) -> list[RunDir]:
    """Runs, and the rows of sweeps."""
    from hpc.rundir import RunDir

    return [run for one in targets for run in ([one] if isinstance(one, RunDir) else one.rows())]


def report(findings: Findings) -> None:
    """What preflight found, to stderr."""
    from rich.console import Console

    out = Console(stderr=True, soft_wrap=True, highlight=False)
    for color, word, lines in (
        ("green", "ok", findings.passed),
        ("yellow", "waits", findings.warnings),
        ("yellow", "take care", findings.cautions),
        ("yellow", "not checked", findings.unchecked),
        ("red", "refused", findings.refusals),
    ):
        for line in lines:
            out.print(f"[{color}]{word}[/]  ", end="")
            out.print(line, markup=False)
