"""`hpc predict`: new files through trained networks; alone: `python -m jobs.predict FILE... -o DIR --run RUN...`.

Classes and their probabilities go to DIR/predictions.csv; of a segmentation a label map for each file, on its own grid,
and the volumes of the classes to DIR/volumes.csv. A stop loses nothing: the same command goes on.
Exit code 0: done; 1: some files were bad; 2: bad usage or input; 74: storage.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datasets.sources import Source
from hpc.errors import UserError
from hpc.preempt import ExitCode
from hpc.rundir import write_bytes
from jobs import checkpoint
from jobs.inference.centres import AXES, Centres
from jobs.inference.journal import REQUEST, PredictJournal, identity
from jobs.inference.members import Manner, Member, load_members
from jobs.inference.options import Parser, add_options, check_options, device_of, manner_of, runs_of, tell_unfinished
from jobs.inference.places import make_folder, remove_empty
from jobs.inference.predicting import Answer, Predictor
from jobs.inference.tables import as_csv, named, number, probability_head

PROG = "hpc predict"
PREDICTIONS, VOLUMES = "predictions.csv", "volumes.csv"
_LINE_EVERY_S = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = _parser().parse_args(arguments)
        return _predict(options)
    except (UserError, ValueError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    except (checkpoint.StorageError, OSError) as error:
        print(f"{PROG}: failed: {error}; the same command goes on from here", file=sys.stderr)
        return ExitCode.STORAGE
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; the same command goes on from here", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROG, description=__doc__.partition("Exit")[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "files", nargs="+", type=Path, metavar="FILE", help="files, or folders that hold them, as 'hpc pack' reads them"
    )
    add("--run", action="append", required=True, metavar="RUN", help="folder of a run; several are an ensemble")
    add("-o", "--out", type=Path, required=True, metavar="DIR")
    add("--centres", type=Path, metavar="TABLE", help="classifiers of patches: of places (columns id, x, y, z in mm)")
    add("--probabilities", action="store_true", help="of a segmentation, write those of each class and voxel, too")
    add("--force", action="store_true", help="replace what the folder holds")
    add_options(parser)
    return parser


def _predict(options: argparse.Namespace) -> int:
    runs, manner = runs_of(options, options.run), manner_of(options)
    members = load_members(runs, options.checkpoint, device_of(options, runs[0]))
    check_options(members, options, manner)
    centres = Centres.read(options.centres) if options.centres else None
    predictor = Predictor(members, manner, centres)
    if options.probabilities and not predictor.maps:
        raise UserError("--probabilities belongs to a segmentation: those of a classification are in the table anyway")
    found = predictor.replay.find(options.files)
    if centres:
        centres.check(found)
    _protect_inputs(options, predictor, found)
    request = _request(members, options, manner, centres)
    journal = PredictJournal(options.out, request, (PREDICTIONS, VOLUMES), options.force)
    _protect(options, predictor, found, journal)
    made = make_folder(options.out, "name a folder of yours by -o DIR")
    try:
        bad = _work(options, predictor, found, journal)
    finally:
        remove_empty(made)
    paths = _write_tables(options.out, predictor, journal) if journal.lines() else []
    for source, reason in bad:
        print(f"{PROG}: bad: {source.path}: {reason}", file=sys.stderr)
    for note in tell_unfinished(runs):
        print(f"{PROG}: note: {note}", file=sys.stderr)
    who = members[0].run.name if len(members) == 1 else f"{len(members)} runs"
    print(f"{who}: {len(found) - len(bad)} of {len(found)} files predicted")
    print("".join(f"  {path}\n" for path in paths), end="")
    return ExitCode.CRASH if bad else ExitCode.DONE


def _request(
    members: Sequence[Member], options: argparse.Namespace, manner: Manner, centres: Centres | None
) -> dict[str, Any]:
    """What decides the predictions, for the folder and its readers; the key `labels` is what `--classes` reads."""
    facts = members[0].facts
    return {
        "runs": [{"run": member.run.name, "checkpoint": member.checkpoint} for member in members],
        "task": facts.task,
        "labels": {name: number for number, name in enumerate(facts.class_names)},
        **manner.told(),
        **({"centres": centres.digest} if centres else {}),
        "probabilities": options.probabilities,
        "packing": facts.packing,
    }


def _protect_inputs(options: argparse.Namespace, predictor: Predictor, found: dict[str, Source]) -> None:
    """Raises UserError where predictions would replace sources, or be sources the next time."""
    out = options.out.resolve()
    if around := next((path for path in options.files if path.is_dir() and out.is_relative_to(path.resolve())), None):
        raise UserError(f"-o {options.out} lies in {around}, whose files are predicted: name a folder beside it")
    inputs = {file.resolve() for source in found.values() for file in source.files}
    taken: dict[Path, Source] = {}
    for source in found.values():
        for path in predictor.outputs(options.out, source, options.probabilities):
            if path.resolve() in inputs:
                raise UserError(f"the label map of {source.path} would replace an input: name another folder by -o")
            if (other := taken.setdefault(path, source)) is not source:
                raise UserError(f"{other.path} and {source.path} would both give {path}: predict one of them apart")


def _protect(
    options: argparse.Namespace, predictor: Predictor, found: dict[str, Source], journal: PredictJournal
) -> None:
    """Raises UserError before a file is replaced that is of nobody here."""
    for source in found.values() if not options.force else ():
        for path in predictor.outputs(options.out, source, options.probabilities):
            if path.exists() and not journal.owns(path):
                raise UserError(f"{path} is there already, and not of this command: -o another folder, or --force")


def _work(
    options: argparse.Namespace, predictor: Predictor, found: dict[str, Source], journal: PredictJournal
) -> list[tuple[Source, str]]:
    """Ask about all files that are not done; those that could not be."""
    bad: list[tuple[Source, str]] = []
    wide = 0
    seen = {id: identity(source) for id, source in found.items()}
    todo = [source for id, source in found.items() if not journal.finished(id, seen[id])]
    with _progress(len(found), len(found) - len(todo)) as step:
        for told in predictor.answers(todo):
            if isinstance(told, Answer):
                journal.begin(predictor.outputs(options.out, told.source, options.probabilities))
                line: dict[str, Any] = {"id": told.source.id, "identity": seen[told.source.id]}
                if predictor.maps:
                    line |= predictor.save_map(options.out, told, options.probabilities)
                else:
                    line["probabilities"] = told.probabilities.tolist()
                if predictor.centres:
                    line["centres"] = predictor.centres.places_of(told.source.id).tolist()
                journal.add(line)
                wide += predictor.manner.wider(told.sample.data.shape[1:])
            else:
                bad.append(told)
            step()
    if wide:
        print(
            f"{PROG}: note: --window is larger than {wide} files: their edges are repeated around them", file=sys.stderr
        )
    return bad


def _write_tables(folder: Path, predictor: Predictor, journal: PredictJournal) -> list[Path]:
    names, lines = predictor.facts.class_names, journal.lines()
    if predictor.centres:
        return [_write_places(folder, predictor, lines)]
    if not predictor.maps:
        task = predictor.facts.task
        told = [(line["id"], line["probabilities"]) for line in lines]
        rows = ([id, named(task, names, values), *map(number, values)] for id, values in told)
        write_bytes(folder / PREDICTIONS, as_csv(probability_head(names), rows))
        return [folder / PREDICTIONS]
    table = []
    for line in lines:
        for name, voxels in zip(names, line["voxels"], strict=True):
            volume = "" if line["voxel_mm3"] is None else f"{voxels * line['voxel_mm3'] / 1000:.6g}"
            table.append((line["id"], name, voxels, volume, line["files"][0]))
        if line["outside"]:
            share = line["outside"] / sum(line["voxels"])
            print(f"{PROG}: note: {line['id']}: {share:.0%} lies outside of what --size keeps: {names[0]} there")
    write_bytes(folder / VOLUMES, as_csv(("id", "class", "voxels", "ml", "file"), table))
    return [folder / VOLUMES, folder / REQUEST]


def _write_places(folder: Path, predictor: Predictor, lines: Sequence[dict[str, Any]]) -> Path:
    """A line for each place; those without a whole patch in the file are told, and empty."""
    names, task, rows = predictor.facts.class_names, predictor.facts.task, []
    for line in lines:
        told = list(zip(line["centres"], line["probabilities"], strict=True))
        rows += [
            [
                line["id"],
                *map(number, place),
                "" if isnan(values[0]) else named(task, names, values),
                *map(number, values),
            ]
            for place, values in told
        ]
        if empty := sum(isnan(values[0]) for _, values in told):
            print(
                f"{PROG}: note: {line['id']}: {empty} of {len(told)} places have no whole patch in it: no class there"
            )
    head = probability_head(names)
    write_bytes(folder / PREDICTIONS, as_csv(["id", *AXES, *head[1:]], rows))
    return folder / PREDICTIONS


class _Step(Protocol):
    def __call__(self) -> None: ...


@contextmanager
def _progress(total: int, done: int) -> Iterator[_Step]:
    """A bar when somebody is looking; otherwise a line now and then, for a batch job's log."""
    if sys.stderr.isatty():
        columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("predicting", total=total, completed=done)
            yield lambda: bar.update(task, advance=1)
        return
    told, count = time.monotonic(), done

    def step() -> None:
        nonlocal told, count
        count += 1
        if time.monotonic() - told >= _LINE_EVERY_S:
            told = time.monotonic()
            print(f"{PROG}: {count} of {total} files", file=sys.stderr)

    yield step


def _terminate(number: int, frame: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
