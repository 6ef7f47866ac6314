"""What a run needs of its data file and model, looked at before it queues: `python -m jobs.check FILE` (- for stdin).

Standard input may hold several experiments, a line --- between two; each line of a fault then begins with the number
of its experiment, from 0. The data files are opened first: a missing one is told before torch is imported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import open_volumes
from datasets.layout import SHARD_NAME, VolumeFile
from hpc import yamlfile
from hpc.errors import UserError
from hpc.experiment import Experiment, load, validate
from hpc.preempt import ExitCode
from hpc.rundir import RunDir
from jobs import undefined

_WORDS = {"take care": "cautions", "not checked": "unchecked"}
_MOST_DRAWN = 10**8
"""Samples of an epoch, views and all: their order is held in memory."""


def open_data(experiment: Experiment, files: Sequence[Path] = ()) -> VolumeFile:
    """The data file (`files`: copies of it), compared with the experiment. Raises ValueError or UserError, one line."""
    volumes, fold = open_volumes(files or experiment.data.file), experiment.data.fold
    _require_all_shards(volumes)
    if fold is not None:
        volumes = volumes.fold(fold)
    elif volumes.num_folds:
        last = volumes.num_folds - 1
        raise UserError(
            f"{experiment.data.file} has folds: choose one by data.fold, 0 to {last} "
            f"(all of them: 'hpc sweep FILE data.fold=0:{last + 1}')"
        )
    if volumes.task != experiment.task:
        there = f"{experiment.data.file} was packed for {volumes.task}"
        raise UserError(f"task is {experiment.task}, but {there}; write 'task: {volumes.task}', or pack again")
    classes = len(volumes.class_names)
    asked = experiment.model.num_classes
    if asked is not None and asked != classes:
        names = ", ".join(volumes.class_names)
        raise UserError(f"model.num_classes is {asked}, but {experiment.data.file} has {classes} classes: {names}")
    train, validation = volumes.indices("train"), volumes.indices("validation")
    batch = experiment.data.batch_size
    if len(train) * experiment.data.views < batch:
        raise UserError(f"data.batch_size is {batch}, but the training split has {len(train)} samples")
    if len(train) * experiment.data.views > _MOST_DRAWN:
        most = _MOST_DRAWN // len(train)
        raise UserError(
            f"data.views {experiment.data.views} makes an epoch of {len(train) * experiment.data.views:,} samples: "
            f"use {most:,} or less, and more epochs"
        )
    if not len(validation):
        raise UserError(f"{experiment.data.file} has no validation samples: pack it with --split 70/15/15")
    undefined.refuse(experiment, volumes)
    return volumes


def _require_all_shards(volumes: VolumeFile) -> None:
    """One shard by its own name would train on a part of the data, and nobody would notice."""
    path, part = volumes.paths[0], SHARD_NAME.search(volumes.paths[0].stem)
    if part and int(part[1]) > len(volumes.paths):
        every = SHARD_NAME.sub("-*", path.stem) + path.suffix
        raise UserError(f"{path} is one of {int(part[1])} shards; write 'data.file: {path.with_name(every)}' for all")


def report(source: str, details: bool = False, as_json: bool = False) -> ExitCode:
    """Check the experiment in a file, in a run folder, or each of those on standard input (-); print what was found.

    details: of a single one the largest batch that fits the memory, and which switch buys what.
    """
    texts = sys.stdin.read().split("\n---\n") if source == "-" else [source]
    found: dict[str, Any] = {}
    faults: dict[int, str] = {}
    experiments: dict[int, Experiment] = {}
    for number, text in enumerate(texts):
        try:
            experiments[number] = _read(text, source)
            open_data(experiments[number])
        except (UserError, ValueError) as error:
            faults[number] = str(error)
    if fitting := {number: one for number, one in experiments.items() if number not in faults}:
        from jobs.checked import look_at

        found = look_at(fitting, faults, details and len(texts) == 1)
    for number, fault in sorted(faults.items()):
        for line in fault.splitlines():
            print(f"{number}: {line}" if len(texts) > 1 else line, file=sys.stderr)
    if as_json:
        print(json.dumps(found))
    elif found and not faults:
        told = [f"{word}: {line}" for word, kind in _WORDS.items() for line in found[kind]]
        print("\n".join([*found["passed"], *told]))
    return ExitCode.BAD_INPUT if faults else ExitCode.DONE


def _read(text: str, source: str) -> Experiment:
    if source == "-":
        return validate(yamlfile.parse(text, "experiment"), "experiment")
    path = Path(text)
    return load(RunDir(path).experiment if path.is_dir() else path)[0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.check", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="experiment (YAML) or run folder; - for stdin")
    parser.add_argument("--details", action="store_true", help="what fits the memory, and which switch buys what")
    parser.add_argument("--json", action="store_true", help="what was found as an object")
    arguments = parser.parse_args()
    return report(arguments.file, arguments.details, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
