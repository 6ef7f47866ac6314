"""Whether a file may be run: nothing that somebody else owns or may write is run, imported or unpickled.

Only the thing itself is looked at, not the folders above it: a group may share a folder of runs.
"""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hpc.errors import UserError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Untrusted(UserError):
    """Somebody else owns it, or may write it."""


@contextmanager
def private() -> Iterator[None]:
    """What is made in this block is its owner's alone (folders 0700, files 0600), whatever the umask."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def check(whole: Path, *parts: Path) -> None:
    """Raises Untrusted where this folder or file, or one of its parts that are there, is not ours alone to change."""
    for path in (whole, *parts):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        refuse(path, found, f"chmod -R go-w {whole}")


def check_open(file: IO[bytes], path: Path) -> None:
    """The same of a file that is open already: nobody can put another one in its place. Raises Untrusted."""
    refuse(path, os.fstat(file.fileno()), f"chmod go-w {path}")


def refuse(path: Path, found: os.stat_result, remedy: str, used: str = "run") -> None:
    """Raises Untrusted where `found`, the state of `path`, is not ours alone to change; `remedy` is for its mode."""
    if found.st_uid not in (os.geteuid(), 0):
        raise Untrusted(
            f"{path} belongs to {_name(found.st_uid)}: nothing of it is {used}; read it, and copy it to have your own"
        )
    if found.st_mode & _OTHERS_WRITE and not _without_modes(path.parent):
        mode = stat.S_IMODE(found.st_mode)
        raise Untrusted(f"{path} can be written by others (mode {mode:04o}): nothing of it is {used}; {remedy}")


def _without_modes(folder: Path) -> bool:
    """Whether this file system shows every file as everybody's (FAT, a Windows drive): modes tell nothing there."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as probe:  # made with mode 0600
            return bool(os.fstat(probe.fileno()).st_mode & _OTHERS_WRITE)
    except OSError:
        return False


def _name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
