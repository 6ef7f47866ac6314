"""`hpc evaluate` and `hpc predict`: trained networks on labelled samples, and on new files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc.commands.common import AsJson, Runs, app, expanded
from hpc.errors import UserError

if TYPE_CHECKING:
    from hpc.rundir import RunDir

_PANEL = "Results"
Checkpoint = Annotated[str | None, typer.Option(help="best (default), last, or a folder's name.", metavar="NAME")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda (default: as the training).")]
Flips = Annotated[
    str | None, typer.Option(help="Ask mirror images along these axes, too: 0,1,2 are x,y,z.", metavar="A,B")
]
Window = Annotated[
    str | None, typer.Option(help="Size of sliding windows (default: of the training's).", metavar="X,Y,Z")
]
Windows = Annotated[bool, typer.Option("--windows", help="Classifiers: the mean over windows of the volume.")]
Overlap = Annotated[str | None, typer.Option(help="Of neighbouring windows (default: 0.5).", metavar="SHARE")]
Batch = Annotated[str | None, typer.Option(help="Windows, or samples, in one forward pass.", metavar="N")]


SkipUnfinished = Annotated[
    bool, typer.Option("--skip-unfinished", help="Of several runs, leave out those that have not finished.")
]


@app.command(rich_help_panel=_PANEL)
def evaluate(
    names: Annotated[list[str], typer.Argument(help="Runs; several, or a sweep, are an ensemble.", metavar="RUN...")],
    split: Annotated[
        str | None, typer.Option(help="validation (default), test, train, or all (default with --data).")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Another volume file, packed alike.", metavar="FILE.h5")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="For predictions and figures (default: the run).", metavar="DIR")
    ] = None,
    checkpoint: Checkpoint = None,
    flips: Flips = None,
    window: Window = None,
    windows: Windows = False,
    overlap: Overlap = None,
    batch: Batch = None,
    bootstrap: Annotated[str | None, typer.Option(help="Resamples for the intervals (1000; 0: none).")] = None,
    confidence: Annotated[str | None, typer.Option(help="Of the intervals (0.95).", metavar="SHARE")] = None,
    seed: Annotated[str | None, typer.Option(help="Of the resamples (0).")] = None,
    device: Device = None,
    skip_unfinished: SkipUnfinished = False,
    runs: Runs = None,
    as_json: AsJson = False,
) -> None:
    """Score runs on a split: metrics with confidence intervals, and the prediction of each sample.

    The folds of a cross-validation score each validation sample by the runs that have not seen it.
    """
    from hpc import payload

    given = {"split": split, "data": data, "out": out, "checkpoint": checkpoint, "flips": flips, "window": window}
    given |= {"overlap": overlap, "batch": batch, "bootstrap": bootstrap, "confidence": confidence, "seed": seed}
    flags = {"windows": windows, "json": as_json, "skip-unfinished": skip_unfinished}
    words = _words({**given, "device": device}, flags)
    raise typer.Exit(payload.child("jobs.evaluate", [*(str(run.path) for run in _runs(names, runs)), *words]))


@app.command(rich_help_panel=_PANEL)
def predict(
    names: Annotated[
        list[str], typer.Argument(help="Runs or a sweep, and files or folders of them.", metavar="RUN... FILE...")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of tables and label maps.", metavar="DIR")],
    centres: Annotated[
        Path | None,
        typer.Option(help="Classifiers of patches: of these places (columns id, x, y, z in mm).", metavar="TABLE"),
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Of a segmentation, those of each voxel, too.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what the folder holds.")] = False,
    checkpoint: Checkpoint = None,
    flips: Flips = None,
    window: Window = None,
    windows: Windows = False,
    overlap: Overlap = None,
    batch: Batch = None,
    device: Device = None,
    skip_unfinished: SkipUnfinished = False,
    runs: Runs = None,
) -> None:
    """Predict new files, prepared as the training data were: a table, or label maps on the files' own grids.

    A name is a file or a folder of files where there is one, and else a run; a run's own folder is the run.
    """
    from hpc import payload

    mine, files = _apart(names, runs)
    given: dict[str, object] = {
        "checkpoint": checkpoint,
        "flips": flips,
        "window": window,
        "overlap": overlap,
        "batch": batch,
    }
    given |= {"centres": centres, "device": device}
    flags = {"windows": windows, "probabilities": probabilities, "force": force, "skip-unfinished": skip_unfinished}
    words = _words({"out": out, **given}, flags)
    chosen = [word for run in mine for word in ("--run", str(run.path))]
    raise typer.Exit(payload.child("jobs.predict", [*chosen, *words, "--", *files]))


def _words(given: dict[str, object], flags: dict[str, bool]) -> list[str]:
    """The payload's command line; it says what is wrong with a value."""
    pairs = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return pairs + [f"--{name}" for name, on in flags.items() if on]


def _runs(names: Sequence[str], runs: Path | None) -> list[RunDir]:
    """The runs of these names, and the rows of sweeps, each once. Raises UserError."""
    from hpc import ledger
    from hpc.rundir import runs_folder

    folder = runs_folder(runs)
    found = {run.path: run for run in expanded([ledger.find(folder, name) for name in names])}
    return list(found.values())


def _apart(names: Sequence[str], runs: Path | None) -> tuple[list[RunDir], list[str]]:
    """The runs and the files among the names. Raises UserError where one is neither, or either is missing."""
    files = [name for name in names if _is_file(name)]
    mine = []
    for name in [name for name in names if name not in files]:
        try:
            mine += _runs([name], runs)
        except UserError as error:
            raise UserError(f"{name!r} is no file, and no run either: {error}") from None
    if not mine:  # a run and a folder of the user's may share a name: the first word is the run's
        with suppress(UserError):
            mine, files = _runs(names[:1], runs), files[1:]
    if not mine:
        raise UserError(f"which run predicts {files[0]}? name it first: hpc predict RUN FILE... -o DIR; see 'hpc ls'")
    if not files:
        raise UserError(
            f"which files does {mine[0].name} predict? name files or folders: hpc predict RUN FILE... -o DIR"
        )
    return list({run.path: run for run in mine}.values()), files


def _is_file(name: str) -> bool:
    """Whether it names a file, or a folder that is neither a run's nor a sweep's."""
    from hpc.rundir import RunDir, is_sweep

    try:
        path = Path(name)
        return path.exists() and not RunDir(path).experiment.is_file() and not is_sweep(path)
    except OSError:  # longer than a name can be
        return False
