"""`hpc pack`: volumes or images and their labels -> one HDF5 volume file, or shards. Alone: python -m jobs.pack --help

Exit code 0: packed. 1: some sources cannot be packed (nothing is written without --skip-bad), or a disk failed.
2: bad usage or input. What was read is kept after a stop, and the same command goes on from there.
"""

import argparse
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from datasets.codecs import CODECS
from datasets.duplicates import ACTIONS, TwinsRefused
from datasets.packing.packer import BadSources, PackSummary, pack
from datasets.packing.prepare import DTYPES, NORMALISATIONS
from datasets.packing.recipe import PackOptions, Recipe
from datasets.partition import SPLITS

PROG = "hpc pack"
AS_GIVEN = (
    *("labels", "id", "separator", "no_label", "group", "masks", "by_mask", "classes", "atlas", "regions"),
    *("split_list", "folds", "duplicates", "compress", "ragged", "skip_bad", "workers"),
)
"""options that PackOptions has under the same name"""
LINE_EVERY_S = 30.0
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
EXAMPLES = """examples:
  hpc pack scans/ -o scans.h5 --labels labels.csv --size 192,192,192
  hpc pack photos/ -o photos.h5 --labels folders --resize 256 --size 224 --normalise imagenet
  hpc pack imagesTr/ -o ct.h5 --masks labelsTr/ --classes dataset.json --spacing 1 --window -160,240 --ragged
  hpc pack t1/*.nii.gz -o patches.h5 --atlas aal.nii.gz --regions regions.csv --patch 24 --per-class 200

Sources are NIfTI, DICOM series, NRRD, .npy or .npz, TIFF stacks, PNG or JPEG; folders are searched. Volumes are turned
to RAS, so sizes are x,y,z: right, front, up; those of images are rows,columns. A table of labels is CSV, TSV or Parquet
with the columns id,label[,group][,split][,fold][,mask]; an id is the file's name without its suffix. Samples of one
group (default: one source) stay in one split or fold."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        with _progress() as shown:
            summary = pack(options, shown.step, shown.tell)
    except BadSources as error:
        _tell_bad(error.bad)
        print(
            f"{PROG}: {error}, see above; nothing was written. Mend or remove them, or add --skip-bad: "
            "what was read is not read again",
            file=sys.stderr,
        )
        return 1
    except ValueError as error:
        for pair in error.all[1:] if isinstance(error, TwinsRefused) else ():
            print(f"{PROG}: twins: {pair}", file=sys.stderr)
        print(f"{PROG}: error: {error}{_kept(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{PROG}: failed, {options.output} was not written: {error}{_kept(error)}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, _Ended) as end:
        number = end.number if isinstance(end, _Ended) else signal.SIGINT
        how = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
        print(f"{PROG}: {how}; the same command goes on from here", file=sys.stderr)
        return 128 + number
    _tell_bad(summary.bad)
    for note in summary.notes:
        print(f"{PROG}: note: {note}", file=sys.stderr)
    _show(summary)
    if summary.bad:
        print(f"{PROG}: {len(summary.bad)} source(s) left out, see above", file=sys.stderr)
    return 0


def _kept(error: BaseException) -> str:
    """What the error leaves behind."""
    return "".join(f" ({note})" for note in getattr(error, "__notes__", []))


def parse(arguments: Sequence[str] | None) -> PackOptions:
    """Options from the command line; argparse leaves with exit code 2 and one line for a bad one."""
    parser = _parser()
    given = parser.parse_args(_join_negative(sys.argv[1:] if arguments is None else list(arguments)))
    try:
        return _options(given)
    except ValueError as error:
        parser.exit(2, f"{PROG}: error: {error}\n")


def _options(given: argparse.Namespace) -> PackOptions:
    plain = {name: getattr(given, name) for name in AS_GIVEN}
    recipe = Recipe(
        nan=given.nan,
        spacing=_numbers("--spacing", given.spacing, float),
        resize=_numbers("--resize", given.resize),
        window=_numbers("--window", given.window, float, (2,)),
        size=_numbers("--size", given.size),
        patch=_numbers("--patch", given.patch),
        per_class=given.per_class,
        seed=given.seed,
        dtype=given.dtype,
        normalise=given.normalise,
    )
    return PackOptions(
        sources=tuple(given.sources),
        output=given.output,
        recipe=recipe,
        channels=tuple(given.channels.split(",")) if given.channels else (),
        label=tuple(given.label.split(",")),
        split=parse_split(given.split or ("70/15/15" if given.folds is None else "100/0/0")),
        chunk=_numbers("--chunk", given.chunk),
        shard_bytes=_bytes(given.shard_size),
        **plain,
    )


def parse_split(text: str) -> tuple[float, float, float]:
    """'70/15/15' to (0.7, 0.15, 0.15); ValueError unless three shares add up to 100."""
    try:
        train, validation, test = (float(part) / 100 for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--split {text!r} is not three numbers; write for example 70/15/15") from None
    if min(train, validation, test) < 0 or abs(train + validation + test - 1) > 1e-6:
        raise ValueError(f"--split {text} does not add up to 100; write for example 70/15/15")
    return train, validation, test


def _numbers(option: str, text: str | None, kind: Any = int, counts: Sequence[int] = (1, 2, 3)) -> Any:
    """'24' or '24,24,24' to numbers, all above 0 but for a window's."""
    if text is None:
        return None
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in counts or (2 not in counts[:1] and min(numbers) <= 0):
        what = "two numbers; write -160,240" if counts == (2,) else "one, two or three numbers; write 24 or 24,24,24"
        raise ValueError(f"{option} {text!r} is not {what}")
    return numbers


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)(i?B)?", text)
    try:
        return int(float(found[1]) * UNITS[found[2]]) if found else int(text)
    except ValueError:
        raise ValueError(f"--shard-size {text!r} is no size; write for example 2GiB") from None


def _join_negative(arguments: list[str]) -> list[str]:
    """argparse takes -160,240 for an option."""
    joined: list[str] = []
    for word in arguments:
        if joined and joined[-1] == "--window" and re.match(r"-[0-9.]", word):
            joined[-1] = f"--window={word}"
        else:
            joined.append(word)
    return joined


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Packs volumes or images and their labels into HDF5, with splits and checksums.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="SRC", help="files, or folders that hold them")
    add("-o", "--output", type=Path, required=True, metavar="FILE.h5", help="written complete or not at all")
    add("--channels", metavar="A,B", help="endings of the names that are channels of one sample: t1,t2 or 0000,0001")
    add("--skip-bad", action="store_true", help="leave out what cannot be packed, and write the rest")
    add("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    _add_labels(parser.add_argument_group("labels").add_argument)
    _add_parts(parser.add_argument_group("splits").add_argument)
    _add_recipe(parser.add_argument_group("voxels").add_argument)
    _add_layout(parser.add_argument_group("layout").add_argument)
    return parser


def _add_labels(add: Any) -> None:
    add("--labels", type=Path, metavar="TABLE", help="CSV, TSV or Parquet; or 'folders': a file's folder is its class")
    add("--id", default="id", metavar="COL", help="column of the file's name (default: id)")
    add("--label", default="label", metavar="COL", help="column of the class (default: label); A,B: columns of 0 and 1")
    add("--separator", metavar="SIGN", help="between several classes in one cell, such as '|'")
    add("--no-label", metavar="NAME", help="stands for no class in such a cell, such as 'No Finding'")
    add("--group", metavar="COL", help="column whose samples stay together (default: group, if any)")
    add("--masks", type=Path, metavar="FOLDER", help="label maps with the names of the sources: segmentation")
    add("--by-mask", action="store_true", help="label maps that the table's column mask names: segmentation")
    add("--classes", metavar="A,B|FILE", help="names of their values from 0 on, or a dataset.json or table value,label")
    add("--atlas", type=Path, metavar="NIFTI", help="label volume that gives the class of each patch's centre")
    add("--regions", type=Path, metavar="TABLE", help="the atlas' classes: value,label; values may share a label")


def _add_parts(add: Any) -> None:
    add("--split", metavar="T/V/T", help="train/validation/test in percent (default: 70/15/15; 100/0/0 with --folds)")
    add("--split-list", type=Path, metavar="JSON", help="ids of each split or fold, as in nnU-Net's splits_final.json")
    add("--folds", type=int, metavar="K", help="for cross-validation: data.fold=0 to K-1 picks the validation of a run")
    add("--seed", type=int, default=0, help="of the split and of the patches drawn (default: 0)")
    add(
        "--duplicates",
        choices=ACTIONS,
        help="of equal sources keep all, drop all but one, or stop (default: keep, but stop where two splits have one)",
    )


def _add_recipe(add: Any) -> None:
    add("--nan", type=float, metavar="VALUE", help="takes the place of NaN (default: a file with NaN is a bad one)")
    add("--spacing", metavar="MM|X,Y,Z", help="resample to voxels of this size")
    add("--resize", metavar="N|X,Y,Z", help="resample to this shape; N: the shorter side, the others follow")
    add("--window", metavar="LOW,HIGH", help="clip intensities, such as -160,240 for CT")
    add("--size", metavar="N|X,Y,Z", help="crop or pad about the centre")
    add("--patch", metavar="N|X,Y,Z", help="pack patches of this many voxels")
    add("--per-class", type=int, metavar="N", help="patches drawn of each class in each volume")
    add("--dtype", choices=DTYPES, default="keep", help="stored numbers (default: keep, the sources' own if they fit)")
    add("--normalise", choices=NORMALISATIONS, default="zscore", help="zscore of the foreground (default), 0 to 1, ...")


def _add_layout(add: Any) -> None:
    add("--compress", choices=tuple(CODECS), help="samples as compressed chunks (reading needs hdf5plugin)")
    add("--chunk", metavar="N|X,Y,Z", help="voxels of a chunk, for training on patches (default: a whole sample)")
    add("--ragged", action="store_true", help="keep each volume's shape, for training on patches")
    add("--shard-size", metavar="SIZE", help="write several files of at most this size, such as 2GiB")


@contextmanager
def _progress() -> Iterator["_Lines"]:
    """A bar with the time left when somebody is looking; otherwise a line now and then, for a batch job's log."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, soft_wrap=True), transient=True) as bar:
        yield _Bar(bar)


class _Lines:
    """Says every half minute how far the pack has come."""

    def __init__(self) -> None:
        self._began = self._told = time.monotonic()
        self._what = ""

    def step(self, done: int, total: int, items: int, all_items: int, what: str) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._began = what, now
        if now - self._told >= LINE_EVERY_S:
            self._told = now
            left = (now - self._began) * (total - done) / max(done, 1)
            size = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB"
            self.tell(f"{items} of {all_items} {what}, {size}, about {left / 60:.0f} min left")

    def tell(self, text: str) -> None:
        print(f"{PROG}: {text}", file=sys.stderr, flush=True)


class _Bar(_Lines):
    """One bar after the other: masks, sources, samples."""

    def __init__(self, bar: Progress) -> None:
        super().__init__()
        self._bar, self._task = bar, bar.add_task("reading headers", total=None)

    def step(self, done: int, total: int, items: int, all_items: int, what: str) -> None:
        if what != self._what:
            self._what = what
            self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what)
        self._bar.update(self._task, completed=done, total=total, description=f"{items}/{all_items} {what}")

    def tell(self, text: str) -> None:
        self._bar.console.print(escape(f"{PROG}: {text}"), highlight=False)


def _tell_bad(bad: Sequence[tuple[Path, str]]) -> None:
    for path, reason in bad:
        print(f"{PROG}: bad: {path}: {reason}", file=sys.stderr)


def _show(summary: PackSummary) -> None:
    console = Console(soft_wrap=True)
    table = Table("class", *SPLITS, "all")
    for name, counts in summary.counts.items():
        table.add_row(escape(name), *(str(counts[split]) for split in SPLITS), str(sum(counts.values())))
    table.add_section()
    table.add_row("samples", *(str(summary.splits[split]) for split in SPLITS), str(summary.num_samples))
    console.print(table)
    if summary.folds:
        print(f"folds: {', '.join(map(str, summary.folds))} samples")
    shape = "different shapes" if summary.shape is None else "x".join(map(str, summary.shape))
    names = str(summary.paths[0]) if len(summary.paths) == 1 else f"{summary.paths[0]} ... {summary.paths[-1].name}"
    size = f"{summary.size_bytes / 1e6:.1f} MB"
    print(f"{names}: {summary.num_samples} samples of {shape} {summary.dtype}, {summary.task}, {size}")
    print(f"fingerprint {summary.fingerprint}")


class _Ended(BaseException):
    """A signal asks the pack to end; it leaves through the exits that end the other processes."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


def _terminate(number: int, frame: object) -> None:
    raise _Ended(number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
