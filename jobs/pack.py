"""`hpc pack`: NIfTI volumes and their labels -> one HDF5 volume file. Run alone: python -m jobs.pack --help

Exit code 0: all packed. 1: some volumes could not be used, the others are packed. 2: bad usage or input, no file.
"""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from datasets.duplicates import ACTIONS
from datasets.packing import PackOptions, PackSummary, pack
from datasets.packing import Progress as Report
from datasets.partition import SPLITS
from datasets.prepare import DTYPES, NORMALISATIONS

PROG = "hpc pack"
EXAMPLES = """examples:
  hpc pack scans/ -o scans.h5 --labels labels.csv --size 192,192,192
  hpc pack t1/*.nii.gz -o patches.h5 --atlas aal.nii.gz --regions regions.csv --patch 24 --per-class 200

Volumes are turned to RAS, so sizes are x,y,z: right, front, up. Labels come from a table with the columns
id,label[,group][,split][,fold] (id: the file's name without .nii.gz), or from an atlas in the same world space, whose
regions are a table with the columns value,label; with an atlas the table has no label. Samples of one group (default:
one volume) stay in one split or fold."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        with _progress() as report:
            summary = pack(options, report)
    except ValueError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{PROG}: failed, nothing was written: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted, nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    for path, reason in summary.bad:
        print(f"{PROG}: skipped {path}: {reason}", file=sys.stderr)
    for note in summary.notes:
        print(f"{PROG}: note: {note}", file=sys.stderr)
    _show(summary)
    if summary.bad:
        print(f"{PROG}: {len(summary.bad)} volume(s) skipped, see above", file=sys.stderr)
    return 1 if summary.bad else 0


def parse(arguments: Sequence[str] | None) -> PackOptions:
    """Options from the command line; argparse leaves with exit code 2 and one line for a bad one."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        return PackOptions(
            sources=tuple(given.sources),
            output=given.output,
            labels=given.labels,
            group=given.group,
            split=parse_split(given.split or ("70/15/15" if given.folds is None else "100/0/0")),
            split_list=given.split_list,
            folds=given.folds,
            seed=given.seed,
            atlas=given.atlas,
            regions=given.regions,
            patch=given.patch and parse_size("--patch", given.patch),
            per_class=given.per_class,
            size=given.size and parse_size("--size", given.size),
            dtype=given.dtype,
            normalise=given.normalise,
            duplicates=given.duplicates,
        )
    except ValueError as error:
        parser.exit(2, f"{PROG}: error: {error}\n")


def parse_split(text: str) -> tuple[float, float, float]:
    """'70/15/15' to (0.7, 0.15, 0.15); ValueError unless three shares add up to 100."""
    try:
        train, validation, test = (float(part) / 100 for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--split {text!r} is not three numbers; write for example 70/15/15") from None
    if min(train, validation, test) < 0 or abs(train + validation + test - 1) > 1e-6:
        raise ValueError(f"--split {text} does not add up to 100; write for example 70/15/15")
    return train, validation, test


def parse_size(option: str, text: str) -> tuple[int, int, int]:
    """'24' or '24,24,24' to three numbers of voxels."""
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} {text!r} is not one or three numbers of voxels; write 24 or 24,24,24")
    x, y, z = (int(part) for part in (parts if len(parts) == 3 else parts * 3))
    return x, y, z


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Packs NIfTI volumes and their labels into one HDF5 file, with splits and checksums.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="SRC", help=".nii or .nii.gz files, or folders that hold them")
    add("-o", "--output", type=Path, required=True, metavar="FILE.h5", help="written complete or not at all")
    add("--labels", type=Path, metavar="TABLE", help="CSV or TSV with the columns id,label[,group][,split][,fold]")
    add("--group", metavar="COL", help="column of the table whose samples stay together (default: group, if any)")
    add("--split", metavar="T/V/T", help="train/validation/test in percent (default: 70/15/15; 100/0/0 with --folds)")
    add("--split-list", type=Path, metavar="JSON", help="ids of each split or fold, as in nnU-Net's splits_final.json")
    add("--folds", type=int, metavar="K", help="for cross-validation: data.fold=0 to K-1 picks the validation of a run")
    add("--seed", type=int, default=0, help="of the split and of the patches drawn (default: 0)")
    add("--atlas", type=Path, metavar="NIFTI", help="label volume that gives the class of each patch's centre")
    add("--regions", type=Path, metavar="TABLE", help="the atlas' classes: value,label; values may share a label")
    add("--patch", metavar="N|X,Y,Z", help="pack patches of this many voxels")
    add("--per-class", type=int, metavar="N", help="patches drawn of each class in each volume")
    add("--size", metavar="N|X,Y,Z", help="crop or pad whole volumes about their centre")
    add("--dtype", choices=DTYPES, default="keep", help="stored numbers (default: keep, the sources' own if they fit)")
    add("--normalise", choices=NORMALISATIONS, default="zscore", help="of each volume's foreground (default: zscore)")
    add(
        "--duplicates",
        choices=ACTIONS,
        help="of equal volumes keep all, drop all but one, or stop (default: keep, but stop where two splits have one)",
    )
    return parser


@contextmanager
def _progress() -> Iterator[Report | None]:
    """A bar with the time left, when somebody is looking."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("packing", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=escape(name))


def _show(summary: PackSummary) -> None:
    console = Console(soft_wrap=True)
    table = Table("class", *SPLITS, "all")
    for name, counts in summary.counts.items():
        table.add_row(escape(name), *(str(counts[split]) for split in SPLITS), str(sum(counts.values())))
    totals = [sum(counts[split] for counts in summary.counts.values()) for split in SPLITS]
    table.add_section()
    table.add_row("all", *map(str, totals), str(summary.num_samples))
    console.print(table)
    shape = "x".join(map(str, summary.shape))
    print(
        f"{summary.path}: {summary.num_samples} samples of {shape} {summary.dtype}, {summary.size_bytes / 1e6:.1f} MB"
    )
    print(f"fingerprint {summary.fingerprint}")


def _terminate(number: int, frame: object) -> None:
    """Leave through the exits that remove the temporary file."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
