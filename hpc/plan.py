"""From an experiment file to a run folder: what plan shows, submit and train make, byte for byte."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc import instances, payload, template, yamlfile
from hpc.errors import UserError
from hpc.experiment import Experiment, load
from hpc.instances import Instance
from hpc.rundir import RunDir, fsync_folder, next_run, write_text


@dataclass(frozen=True)
class Plan:
    """A run that is not made yet."""

    experiment: Experiment
    delta: dict[str, Any]
    instance: Instance
    run: RunDir
    script: str


def make(file: Path, overrides: list[str], runs: Path) -> Plan:
    """Resolve the experiment and render its script. Raises UserError."""
    experiment, delta = load(file, overrides)
    instance = instances.find(experiment.launch.instance)
    run = next_run(runs, experiment.name, experiment.as_dict())
    return Plan(experiment, delta, instance, run, template.render(experiment, instance, run, sys.executable))


def create(plan: Plan) -> RunDir:
    """The run folder, with the snapshot of the code; made under a temporary name: it is there whole or not at all."""
    final = plan.run.path
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{final.parent}: no folder for runs can be made ({error.strerror}); choose one with --runs or HPC_RUNS"
        ) from None
    aside = RunDir(final.with_name(f".{final.name}.{os.getpid()}"))
    try:
        aside.path.mkdir()
        write_text(aside.experiment, yamlfile.dump(plan.experiment.as_dict()))
        write_text(aside.delta, yamlfile.dump(plan.delta))
        write_text(aside.script, plan.script)
        aside.events.mkdir()
        aside.logs.mkdir()
        payload.snapshot(aside.code)
        _rename(aside.path, final)
    except BaseException:
        shutil.rmtree(aside.path, ignore_errors=True)
        raise
    fsync_folder(final.parent)
    return plan.run


def _rename(aside: Path, final: Path) -> None:
    try:
        aside.rename(final)
    except OSError:
        if not final.exists():
            raise
        raise UserError(f"{final}: made by another command just now; for an equal run of its own repeat this") from None


def reopen(run: RunDir) -> tuple[Experiment, Instance]:
    """The experiment and instance of a run that exists. Raises UserError."""
    experiment, _ = load(run.experiment)
    return experiment, instances.find(experiment.launch.instance)
