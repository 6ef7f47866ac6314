"""`hpc bench`: what this machine does with an experiment."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from hpc.commands.common import AsJson, ExperimentFile, Overrides, Tiny, app


class What(StrEnum):
    """What is measured."""

    step = "step"
    loader = "loader"
    all = "all"


@app.command(rich_help_panel="Machine")
def bench(
    what: Annotated[What, typer.Argument(help="The model's step, the loader, or which one waits.", show_default=False)],
    file: ExperimentFile,
    overrides: Overrides = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="For each of step and loader.")] = 10.0,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the model, at most.")] = 200,
    tiny: Tiny = False,
    as_json: AsJson = False,
) -> None:
    """Measure an experiment here, alone or in an allocation (srun hpc bench all ...); hpc plan compares the rates."""
    from hpc import payload, recipes, yamlfile
    from hpc.experiment import load

    experiment, _ = load(file, overrides or [], tiny)
    recipes.fetch([experiment])
    words = [what.value, f"--seconds={seconds}", f"--steps={steps}", *(["--json"] if as_json else [])]
    raise typer.Exit(payload.child("jobs.bench", words, yamlfile.dump(experiment.as_dict())))
