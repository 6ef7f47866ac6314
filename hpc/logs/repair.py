"""`hpc fsck --repair`: a damaged event file's whole records under its name, the damaged original out of all views."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from hpc import ledger
from hpc.errors import UserError
from hpc.logs.fsck import Finding, check, check_file
from hpc.logs.salvage import survey
from hpc.rundir import RunDir, fsync_folder, locked

_BLOCK = 1 << 20
_ASIDE = re.compile(r".*/\.[0-9a-f]{8}")
"""What `_aside` names."""


def repair(run: RunDir) -> list[tuple[Finding, Path | None]]:
    """Repairs every damaged event file of a run; what was found, and where the original is now: None of a link, which
    stays, as what it leads to is not the run's alone. A file without one whole record leaves none under its name.

    The name in tb/ is replaced in one step, so it keeps its place in order; a kill leaves the old file or the new one,
    and the command may be given again. Raises UserError while an attempt may still write, OSError.
    """
    with locked(run.lease):  # no attempt begins meanwhile
        status = ledger.status(run)
        if status.live:
            raise UserError(
                f"{run.name} is {status.state}: a writer's files are not repaired; "
                f"wait for its end or 'hpc cancel {run.name}', then 'hpc fsck {run.name} --repair'"
            )
        for left in filter(_ASIDE.fullmatch, map(str, run.damaged_events.glob(".*"))):  # by one that was killed
            Path(left).unlink()
        damaged = [one for one in check(run.tensorboard) if one.damaged]
        return [(one, _repair_file(run, run.tensorboard / one.file)) for one in damaged]


def _repair_file(run: RunDir, path: Path) -> Path | None:
    if path.is_symlink():
        return None
    run.damaged_events.mkdir(parents=True, exist_ok=True)
    # TensorBoard takes every name with "tfevents" in it, wherever it lies.
    name = str(path.relative_to(run.tensorboard)).replace("tfevents", "events").replace("/", "__")
    aside = _aside(run.damaged_events)
    try:
        _copy_whole(path, aside)
        if check_file(aside, aside.parent).damaged:
            raise OSError(f"{aside}: what was written is not what was read")
        kept = _keep(path, run.damaged_events, name)
        if aside.stat().st_size:
            aside.replace(path)
        else:
            path.unlink()
    finally:
        aside.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return kept


def _aside(folder: Path) -> Path:
    return folder / f".{secrets.token_hex(4)}"


def _copy_whole(path: Path, target: Path) -> None:
    with path.open("rb") as source, target.open("xb") as file:
        for begin, end in survey(path).kept:
            source.seek(begin)
            while begin < end and (block := source.read(min(_BLOCK, end - begin))):
                file.write(block)
                begin += len(block)
        file.flush()
        os.fsync(file.fileno())


def _keep(path: Path, folder: Path, name: str) -> Path:
    """The original under a second name; one that a killed repair has left already is taken."""
    number = 0
    while (kept := folder / (f"{name}.{number}" if number else name)).exists():
        if kept.samefile(path):
            return kept
        number += 1
    try:
        os.link(path, kept)
    except OSError:  # a file system without hard links
        part = _aside(folder)
        shutil.copyfile(path, part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(kept)
    fsync_folder(folder)
    return kept
