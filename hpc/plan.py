"""From an experiment file to a run folder: what plan shows, submit and train make, byte for byte."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc import filling, instances, payload, template, trust, yamlfile
from hpc.errors import UserError
from hpc.experiment import Experiment, load
from hpc.instances import Instance
from hpc.records import read_delta
from hpc.rundir import RunDir, fsync_folder, next_run, write_bytes, write_text

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


def make(file: Path, overrides: list[str], runs: Path, tiny: bool = False) -> Plan:
    """Resolve the experiment (`tiny`: a recipe's tiny form) and render its script. Raises UserError."""
    experiment, delta = load(file, overrides, tiny)
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
    """The run folder, with the snapshot of the code. Raises Taken where it is there already, and UserError."""
    make_whole(plan.run.path, lambda aside: _fill(plan, RunDir(aside)))
    return plan.run


def _fill(plan: Plan, aside: RunDir) -> None:
    payload.snapshot(aside.code)
    _write(aside, Carrier(aside.code, plan.run.code).carry(plan.experiment), plan)
    aside.events.mkdir()
    aside.logs.mkdir()


def _write(run: RunDir, experiment: dict[str, Any], plan: Plan) -> None:
    """The files of a plan, the script last: what it asks for is in the experiment by then."""
    write_text(run.delta, yamlfile.dump(plan.delta))
    write_text(run.experiment, yamlfile.dump(experiment))
    write_text(run.script, plan.script)


def make_whole(final: Path, fill: Callable[[Path], None]) -> None:
    """A folder that `fill` makes under a temporary name: it is there whole or not at all, and its owner's alone.

    Raises Taken where it is there already, UserError where it cannot be written.
    """
    missing = [folder for folder in final.parents if not folder.exists()]
    aside = final.with_name(f".{final.name}.{secrets.token_hex(4)}")
    made = False
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with trust.private():
            aside.mkdir()
            made = True
            fill(aside)
        for copied in RunDir(aside).code.rglob("*"):  # with the modes of what they were copied from
            copied.chmod(copied.stat().st_mode & ~0o022)
        _rename(aside, final)
        fsync_folder(final.parent)
    except BaseException as error:
        if made:
            shutil.rmtree(aside, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):  # never made, or another command's run is in it
                folder.rmdir()
        if isinstance(error, OSError):
            raise _refusal(final.parent, error) from None
        raise


@contextmanager
def removed_if(refusal: type[UserError], made: Path) -> Iterator[None]:
    """A folder that was made for a submission which is refused is removed again."""
    try:
        yield
    except refusal:
        shutil.rmtree(made, ignore_errors=True)
        with suppress(OSError):  # other runs are in it
            made.parent.rmdir()
        raise


def _refusal(runs: Path, error: OSError) -> UserError:
    reason = error.strerror
    if isinstance(error, shutil.Error):  # copytree's list of (source, target, words), words being str(OSError)
        reason = re.sub(r"^\[Errno \d+\] |: '.*", "", str(error.args[0][0][2]))
    return UserError(f"{runs}: no folder for runs can be made ({reason}); choose one with --runs or HPC_RUNS")


class Carrier:
    """Takes models from the user's own files into a snapshot, each folder of them once."""

    def __init__(self, aside: Path, final: Path) -> None:
        """`aside`: where the snapshot is made; `final`: where it will be."""
        self._aside, self._final = aside, final
        self._folders: dict[Path, str] = {}

    def carry(self, experiment: Experiment) -> dict[str, Any]:
        """The experiment as its run has it: file: names the copy, which has the other modules of its folder beside."""
        values = experiment.as_dict()
        source = experiment.model.source
        if source is not None:
            path, attribute = source
            values["model"]["name"] = f"file:{self._final / self._copied(path.parent) / path.name}:{attribute}"
        return values

    def _copied(self, folder: Path) -> str:
        if folder not in self._folders:
            name = f"own{len(self._folders) or ''}"
            (self._aside / name).mkdir()
            for module in folder.glob("*.py"):
                shutil.copy2(module, self._aside / name / module.name)
            self._folders[folder] = name
        return self._folders[folder]


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


def anew(run: RunDir, overrides: Sequence[str]) -> tuple[Plan, dict[str, Any]]:
    """A run that exists as these overrides would have it, and what they change, {dotted key: value}. Raises UserError.

    Its delta names every key that was ever changed: its base is not known any more.
    """
    _refuse_other_template(run)
    experiment, changes = load(run.experiment, overrides)
    instance = instances.find(experiment.launch.instance)
    delta = dict(sorted({**read_delta(run), **changes}.items()))
    return Plan(experiment, delta, instance, run, template.render(experiment, instance, run, sys.executable)), changes


def _refuse_other_template(run: RunDir) -> None:
    """The text calls the run's own copy of the code: one of another version may call what is not there."""
    own = run.code / filling.FOLDER.name / filling.JOB
    if not own.is_file() or own.read_bytes() != (filling.FOLDER / filling.JOB).read_bytes():
        raise UserError(
            f"{run.name} was made by another version of hpc, whose batch script is another: use that one, "
            f"'PYTHONPATH={run.code} hpc resume ...', or submit {run.experiment} anew"
        )


@contextmanager
def replaced(plan: Plan, refusal: type[UserError]) -> Iterator[None]:
    """The files of a run that exists are those of this plan from here on; as before where this ends with `refusal`.

    The run keeps its age, and so its place in `hpc ls`. For the holder of its lease.
    """
    run = plan.run
    made = run.experiment.stat()
    before = {file: file.read_bytes() for file in (run.script, run.experiment, run.delta) if file.exists()}
    with trust.private():
        _write(run, plan.experiment.as_dict(), plan)
        os.utime(run.experiment, ns=(made.st_atime_ns, made.st_mtime_ns))
    try:
        yield
    except refusal:
        with trust.private():
            for file, content in before.items():
                write_bytes(file, content)
        os.utime(run.experiment, ns=(made.st_atime_ns, made.st_mtime_ns))
        raise
