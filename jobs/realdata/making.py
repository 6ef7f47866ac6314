"""A data set's sources as files, and their HDF5 file, complete or not at all; what is there stays."""

from __future__ import annotations

import fcntl
import os
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpc.errors import UserError, nearest
from jobs.realdata.catalogue import DATA, WEIGHTS, DataSet


def make(name: str, folder: Path) -> Path:
    """The file of a data set or of weights, made where it is missing. Raises UserError, Unavailable, OSError."""
    if name not in DATA | WEIGHTS:
        raise UserError(f"{name!r} is no data set of ours: {nearest(name, DATA | WEIGHTS)}")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        return _data(name, folder) if name in DATA else _weights(name, folder)


def _data(name: str, folder: Path) -> Path:
    target = folder / f"{name}.h5"
    if not target.exists():
        _pack(DATA[name], _sources(name, folder), target)
    return target


def _weights(name: str, folder: Path) -> Path:
    wanted, target = WEIGHTS[name], folder / f"{name}.safetensors"
    if not target.exists():
        if wanted.data:
            _data(wanted.data, folder)
        aside = target.with_name(f".{name}.{secrets.token_hex(4)}")
        try:
            wanted.make(aside)
            aside.rename(target)
        finally:
            aside.unlink(missing_ok=True)
    return target


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two commands at once: the second waits, and finds what the first has made."""
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _sources(name: str, folder: Path) -> Path:
    """Complete or not there."""
    of = DATA[name].sources or name
    target = folder / of
    if not target.exists():
        aside = folder / f".{of}.{secrets.token_hex(4)}"
        aside.mkdir()
        try:
            DATA[of].fetch(aside)
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def _pack(data: DataSet, sources: Path, target: Path) -> None:
    """By the user's own command, printed as it would be typed."""
    arguments = [*data.pack(sources), "-o", str(target)]
    print(f"$ {shlex.join(['hpc', 'pack', *arguments])}", flush=True)
    done = subprocess.run([sys.executable, "-m", "jobs.pack", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise OSError(f"{target} was not packed: hpc pack left with {done.returncode}, see above")
    print("\n".join(done.stdout.splitlines()[-2:]), flush=True)
