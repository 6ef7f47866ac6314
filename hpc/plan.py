"""From an experiment file to a run folder: what plan shows, submit and train make, byte for byte."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc import instances, payload, template, yamlfile
from hpc.errors import UserError
from hpc.experiment import Experiment, load
from hpc.instances import Instance
from hpc.rundir import RunDir, fsync_folder, next_run, write_text

_TRIES = 3


class Taken(UserError):
    """Another command has made the run of this name meanwhile."""


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
    return _place(experiment, delta, instance, runs)


def _place(experiment: Experiment, delta: dict[str, Any], instance: Instance, runs: Path) -> Plan:
    try:
        run = next_run(runs, experiment.name, experiment.as_dict())
    except OSError as error:
        raise _refusal(runs, error) from None
    return Plan(experiment, delta, instance, run, template.render(experiment, instance, run, sys.executable))


def create_next(plan: Plan) -> RunDir:
    """`create`, under the next free name where an equal run has been made since the plan."""
    for _ in range(_TRIES - 1):
        try:
            return create(plan)
        except Taken:
            plan = _place(plan.experiment, plan.delta, plan.instance, plan.run.path.parent)
    return create(plan)


def create(plan: Plan) -> RunDir:
    """The run folder, with the snapshot of the code; made under a temporary name: it is there whole or not at all.

    Raises Taken where it is there already, UserError where it cannot be written.
    """
    final = plan.run.path
    missing = [folder for folder in final.parents if not folder.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _fill(plan, RunDir(final.with_name(f".{final.name}.{os.getpid()}")))
        fsync_folder(final.parent)
    except OSError as error:
        for folder in missing:
            with suppress(OSError):  # never made, or another command's run is in it
                folder.rmdir()
        raise _refusal(final.parent, error) from None
    return plan.run


def _refusal(runs: Path, error: OSError) -> UserError:
    reason = error.strerror
    if isinstance(error, shutil.Error):  # copytree's list of (source, target, words)
        reason = str(error.args[0][0][2])
    return UserError(f"{runs}: no folder for runs can be made ({reason}); choose one with --runs or HPC_RUNS")


def _fill(plan: Plan, aside: RunDir) -> None:
    try:
        aside.path.mkdir()
        payload.snapshot(aside.code)
        write_text(aside.experiment, yamlfile.dump(_carry_model(plan, aside)))
        write_text(aside.delta, yamlfile.dump(plan.delta))
        write_text(aside.script, plan.script)
        aside.events.mkdir()
        aside.logs.mkdir()
        _rename(aside.path, plan.run.path)
    except BaseException:
        shutil.rmtree(aside.path, ignore_errors=True)
        raise


def _carry_model(plan: Plan, aside: RunDir) -> dict[str, Any]:
    """The experiment as the run has it: a model from the user's own file comes from a copy of that file's folder."""
    values = plan.experiment.as_dict()
    source = plan.experiment.model.source
    if source is not None:
        path, attribute = source
        folder = aside.code / "own"
        folder.mkdir()
        for module in path.parent.glob("*.py"):
            shutil.copy2(module, folder / module.name)
        values["model"]["name"] = f"file:{plan.run.code / folder.name / path.name}:{attribute}"
    return values


def _rename(aside: Path, final: Path) -> None:
    try:
        aside.rename(final)
    except OSError:
        if not final.exists():
            raise
        raise Taken(f"{final}: made by another command just now; for an equal run of its own repeat this") from None


def reopen(run: RunDir) -> tuple[Experiment, Instance]:
    """The experiment and instance of a run that exists. Raises UserError."""
    experiment, _ = load(run.experiment)
    return experiment, instances.find(experiment.launch.instance)
