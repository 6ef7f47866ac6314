"""`hpc evaluate`: trained networks on labelled samples. Alone: `python -m jobs.evaluate RUN... [--split test]`.

One run as it is, several as an ensemble; the folds of a cross-validation score each sample by those that have not seen
it. Exit code 0: done; 2: bad usage or input; 74: storage.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets.partition import SPLITS
from hpc.errors import UserError
from hpc.metrics import by_difficulty, decimals
from hpc.preempt import ExitCode
from hpc.rundir import RunDir, dumps, write_bytes, write_json
from jobs import checkpoint
from jobs.inference import bootstrap
from jobs.inference.bootstrap import Intervals
from jobs.inference.members import Manner, Member, load_members
from jobs.inference.options import Parser, add_options, check_options, device_of, manner_of, runs_of, tell_unfinished
from jobs.inference.places import make_folder, remove_empty
from jobs.inference.scoring import ALL, Scored, at_home, score
from jobs.inference.tables import scored_arrays, scored_table

_RESAMPLES, _CONFIDENCE = 1000, 0.95


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = _parser().parse_args(arguments)
        made = _make_folders(options)
        try:
            members, manner, found, bounds = _evaluate(options)
            files = _write(options, members, manner, found, bounds)
        finally:
            remove_empty(made)
    except (UserError, ValueError) as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_INPUT
    except (checkpoint.StorageError, OSError) as error:
        print(error, file=sys.stderr)
        return ExitCode.STORAGE
    except KeyboardInterrupt:
        print("hpc evaluate: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    if options.json:
        print(dumps(summary(options.split, members, manner, found, bounds), indent=1))
        return ExitCode.DONE
    _show(_title(members, options, found), found, bounds)
    told = [f"{path}\n" for path in files[:3]] + [f"{len(files) - 3} figures in {path.parent}\n" for path in files[3:4]]
    print("".join(f"  {line}" for line in told) or "  nothing is written of several runs without -o DIR\n", end="")
    return ExitCode.DONE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="hpc evaluate", description=__doc__.partition("Alone")[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run; several are an ensemble")
    add("--split", choices=(*SPLITS, ALL), help="default: validation; with --data of other samples: all")
    add("--data", metavar="FILE.h5", help="another volume file than the training's, packed alike")
    add("-o", "--out", type=Path, metavar="DIR", help="for predictions and figures (default: the run's own folder)")
    add_options(parser)
    add("--bootstrap", type=int, default=_RESAMPLES, metavar="N", help=f"resamples (default: {_RESAMPLES}; 0: none)")
    add("--confidence", type=float, metavar="SHARE", help=f"of the intervals (default: {_CONFIDENCE})")
    add("--seed", type=int, help="of the resamples (default: 0)")
    add("--json", action="store_true")
    return parser


def _make_folders(options: argparse.Namespace) -> list[Path]:
    """Where the evaluation goes; the folders that were made for it. Raises UserError before hours are spent."""
    if options.out is not None:
        return make_folder(options.out, "name a folder of yours by -o DIR")
    if len(options.runs) > 1 or not RunDir(options.runs[0]).experiment.is_file():  # the latter is told in a moment
        return []
    run = RunDir(options.runs[0])
    return [path for place in (run.predictions, run.figures) for path in make_folder(place, "add -o DIR")]


def _evaluate(options: argparse.Namespace) -> tuple[list[Member], Manner, Scored, Intervals | None]:
    """Raises UserError, ValueError, OSError."""
    _check_bootstrap(options)
    runs, manner = runs_of(options, options.runs), manner_of(options)
    members = load_members(runs, options.checkpoint, device_of(options, runs[0]))
    check_options(members, options, manner)
    members, options.data = at_home(members, options.data)
    options.split = options.split or (ALL if options.data else "validation")
    found = score(members, options.split, manner, options.data)
    found = replace(found, notes=(*tell_unfinished(runs), *found.notes))
    if not options.bootstrap:
        return members, manner, found, None
    if len(set(found.groups)) < 2:  # every resample would be the same: an interval of no width
        alone = "no intervals: there is one group of samples, and one tells nothing of others"
        return members, manner, replace(found, notes=(*found.notes, alone)), None
    confidence = _CONFIDENCE if options.confidence is None else options.confidence
    draws = (options.bootstrap, options.seed or 0, confidence)
    known = bootstrap.intervals(found.scores.task, found.stored, found.groups, found.counting, *draws)
    return members, manner, found, known


def _check_bootstrap(options: argparse.Namespace) -> None:
    if options.bootstrap < 0:
        raise UserError(f"--bootstrap {options.bootstrap} counts resamples; 1000 are usual, 0 for none")
    if options.bootstrap == 0 and (options.confidence, options.seed) != (None, None):
        raise UserError("--confidence and --seed have no effect with --bootstrap 0")
    if options.confidence is not None and not 0 < options.confidence < 1:
        raise UserError(f"--confidence {options.confidence:g} is a share between 0 and 1, such as 0.95")
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise UserError(f"--seed {options.seed} is out of range; use 0 to 2**63 - 1")


def summary(
    split: str, members: Sequence[Member], manner: Manner, found: Scored, bounds: Intervals | None
) -> dict[str, Any]:
    """All that was found, as plain data."""
    told: dict[str, Any] = {
        "runs": [{"run": member.run.name, "checkpoint": member.checkpoint} for member in members],
        "checkpoint": members[0].checkpoint,
        **manner.told(),
        "split": split,
        "data": found.volumes.name,
        "samples": len(found.stored),
        "notes": list(found.notes),
        "baseline": found.scores.baseline,
        "metrics": found.scores.metrics(),
        "per_class": found.scores.per_class(),
        "confusion_matrix": found.scores.matrix.tolist(),
    }
    told["metrics"] |= _extra(found)
    if bounds is not None:
        told["intervals"] = {name: list(pair) for name, pair in bounds.bounds.items()}
        told["bootstrap"] = {
            "resamples": bounds.resamples,
            "units": bounds.units,
            "of": "groups" if bounds.grouped else "samples",
            "confidence": bounds.confidence,
            "seed": bounds.seed,
            "left_out": list(bounds.left_out),
        }
    return told


def _extra(found: Scored) -> dict[str, float]:
    """Of a segmentation the Dice that papers report."""
    if found.counting is None:
        return {}
    return {bootstrap.PER_SAMPLE: bootstrap.per_sample_dice(found.stored, found.counting[1])}


def _title(members: Sequence[Member], options: argparse.Namespace, found: Scored) -> str:
    one = members[0]
    who = f"{one.run.name} {one.checkpoint}" if len(members) == 1 else f"{len(members)} runs, {one.run.name} ..."
    return f"{who} on {options.split}: {found.scores.samples} samples"


def _show(title: str, found: Scored, bounds: Intervals | None) -> None:
    print(title)
    for note in found.notes:
        print(f"  {note}")
    if bounds is not None:
        print(f"  in brackets {bounds.confidence:.4g} intervals: {bounds.resamples} resamples of {bounds.drawn}")
        if bounds.left_out:
            print(f"  none for {' and '.join(bounds.left_out)}: too many samples for so many resamples")
    scores, known = found.scores, bounds.bounds if bounds else {}
    for key, value in {**scores.metrics(), **_extra(found)}.items():
        alone, bracket = scores.baseline.get(key), ""
        if key in known:
            bracket = "  [{:.4f}, {:.4f}]".format(*known[key])
        told = "" if alone is None else f"   (commonest class alone {decimals(alone)})"
        print(f"  {key:<20}{decimals(value)}{bracket}{told}")
    _show_classes(scores.task, scores.per_class())


def _show_classes(task: str, table: list[dict[str, Any]]) -> None:
    """The hardest class first."""
    columns = [name for name in ("precision", "recall", "f1", "dice", "iou", "ap", "auc") if name in table[0]]
    print(f"  {'class':<20}{'support':>8}" + "".join(f"{name:>11}" for name in columns))
    for row in [table[place] for place in by_difficulty(task, table)]:
        print(f"  {row['name']:<20}{row['support']:>8}" + "".join(f"{decimals(row[name], 3):>11}" for name in columns))


def _write(
    options: argparse.Namespace, members: Sequence[Member], manner: Manner, found: Scored, bounds: Intervals | None
) -> list[Path]:
    """Predictions and figures, in the run's own folder or in --out; the paths."""
    if len(members) > 1 and options.out is None:
        return []
    name = _name(options, manner)
    place = RunDir(options.out) if options.out else members[0].run
    folders = (options.out, options.out) if options.out else (place.predictions, place.figures)
    table, arrays, facts = (folders[0] / f"{name}{suffix}" for suffix in (".csv", ".npz", ".json"))
    write_bytes(arrays, scored_arrays(found))
    write_bytes(table, scored_table(found))
    write_json(facts, summary(options.split, members, manner, found, bounds))
    return [facts, table, arrays, *_draw(folders[1], name, members, found)]


def _name(options: argparse.Namespace, manner: Manner) -> str:
    """SPLIT, DATA-SPLIT; what was asked beside the default follows behind a +, so that it replaces nothing else."""
    about = "" if options.data is None else re.sub(r"[^\w.-]", "_", Path(options.data).stem) + "-"
    named = [] if options.checkpoint == "best" else [options.checkpoint]
    return "+".join([f"{about}{options.split}", *named, *manner.words()])


def _draw(folder: Path, name: str, members: Sequence[Member], found: Scored) -> list[Path]:
    """All figures of the evaluation as FIGURE_NAME.png: what cannot be drawn is left out, and told."""
    from jobs import figures  # matplotlib: only where something is drawn

    stored, volumes, names = found.stored, found.volumes, list(found.volumes.class_names)
    maps = found.counting is not None

    def called(sample: int) -> Any:
        return found.ask(sample).argmax(0).numpy().astype("uint8")

    most = figures.MOST_MAPS if maps else figures.MOST
    chosen = [figures.spread(stored, len(names), most), figures.worst(stored, most)]
    shown = figures.Shown(*(figures.read_examples(volumes, stored, some, called if maps else None) for some in chosen))
    title = f"{name}, {members[0].checkpoint}"
    made = figures.drawings(volumes.task, found.scores, stored, names, title, shown=shown)
    for figure, drawn in made.items():
        write_bytes(folder / f"{figure}_{name}.png", figures.png(drawn))
    return [folder / f"{figure}_{name}.png" for figure in made]


if __name__ == "__main__":
    sys.exit(main())
