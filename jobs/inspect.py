"""`hpc inspect`: what is in a volume file, and is it sound. Run alone: python -m jobs.inspect --help

Exit code 0: sound as far as looked. 1: samples are damaged. 2: not a volume file, or bad usage. 130: interrupted.
"""

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datasets.description import describe
from datasets.layout import open_volumes
from datasets.survey import Report
from jobs.inspect_view import show
from jobs.montage import draw_montage, require_png

PROG = "hpc inspect"
MOST_NAMED = 100
"""damaged samples that are named on the terminal; --json names all"""
NARROWEST = 72
"""characters of a line; a narrower terminal breaks it rather than the tables their numbers"""
EXAMPLES = """examples:
  hpc inspect scans.h5                              counts, intensities, duplicates, weights
  hpc inspect 'scans-*.h5' --verify                 all checksums of all shards
  hpc inspect scans.h5 --png slices.png             what the network will see
  hpc inspect scans.h5 --all --json > facts.json    every voxel, for a program"""


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        return _inspect(given)
    except BrokenPipeError:
        raise  # nobody reads on: see jobs/__init__.py
    except (ValueError, OSError, ImportError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _inspect(given: argparse.Namespace) -> int:
    if given.png:
        require_png(given.png)
    volumes = open_volumes(given.files)
    with _progress("comparing checksums" if given.verify else "reading samples") as report:
        facts = describe(volumes, everything=given.all, verify=given.verify, report=report)
    if given.png:
        with _progress("drawing") as report:
            draw_montage(volumes, given.png, report, {one["sample"] for one in facts["damaged"]})
    if given.json:
        print(json.dumps(facts, indent=2, allow_nan=False))
    else:
        console = Console(highlight=False, markup=False)
        console.width = max(console.width, NARROWEST)
        with console.capture() as text:
            show(facts, console)
        print(text.get(), end="")
    _name_damaged(facts["damaged"])
    return 1 if facts["damaged"] else 0


def _name_damaged(damaged: Sequence[dict[str, Any]]) -> None:
    for one in damaged[:MOST_NAMED]:
        where = f"{one['id']} (number {one['sample']}) of {one['file']}"
        print(f"{PROG}: damaged: {where}: {one['reason']}", file=sys.stderr)
    if len(damaged) > MOST_NAMED:
        print(f"{PROG}: {len(damaged) - MOST_NAMED} more are damaged; --json names all", file=sys.stderr)
    if damaged:
        print(f"{PROG}: {len(damaged)} damaged sample(s); copy the file again, or pack it again", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Says what is in a volume file and whether it is sound.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE.h5", help="a volume file, or its shards, or a pattern that they match")
    add("--verify", action="store_true", help="read every sample and compare its checksum")
    add("--all", action="store_true", help="look at the voxels of all samples (default: of up to 2000, or 256 MB)")
    add("--png", type=Path, metavar="OUT", help="draw the middle slices of some samples of each class")
    add("--json", action="store_true", help="print the facts as JSON")
    return parser


@contextmanager
def _progress(what: str) -> Iterator[Report | None]:
    """A bar with the time left, when somebody is looking."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
