"""Folders that answers are written to: made and tried before a network is asked, and gone again where nothing came."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from hpc.errors import UserError


def make_folder(folder: Path, remedy: str) -> list[Path]:
    """The folders that were made for it, the innermost first.

    Raises UserError with the reason and the `remedy` where it cannot be made, or nothing can be written in it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if there := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise UserError(f"{folder} cannot be made: {there} is a file; {remedy}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remove_empty(made)
        raise UserError(f"{folder} cannot be made ({error.strerror or error}); {remedy}") from None
    try:
        with tempfile.TemporaryFile(dir=folder):  # rights alone do not tell
            pass
    except OSError as error:
        remove_empty(made)
        raise UserError(f"nothing can be written in {folder} ({error.strerror or error}); {remedy}") from None
    return made


def remove_empty(folders: list[Path]) -> None:
    """Those of `make_folder`, where they are still empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
