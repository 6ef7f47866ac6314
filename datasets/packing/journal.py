"""The work folder of a pack that can be killed at any time: what is finished is not done again.

`.NAME.packing/` beside the output holds data files, one journal and a lock. A line of the journal says where the bytes
of a source's samples lie; it is written after them. Lines are believed up to the last mark after a sync, and all of
them while the machine has not been started anew: a killed process loses no write, a machine without power may.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from datasets.drafts import sync

JOURNAL, LOCK, NOW = "done.jsonl", "lock", "now-"
_SYNC_EVERY = 20.0
"""seconds between syncs of all that was written"""

Piece = tuple[int, int]
"""offset in a data file, bytes"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample whose bytes are in the work folder."""

    file: str
    inputs: tuple[Piece, ...]
    """one piece, or one for each chunk"""
    maps: tuple[Piece, ...]
    drawn: tuple[str, int, int] | None
    """of label maps: data file, offset and bytes of the voxels drawn of each class, int32 (K, M)"""
    checksum: int
    """CRC-32 of the input bytes, then the label map's"""
    written: int
    """CRC-32 of all pieces as they are in the work folder"""
    shape: tuple[int, ...]
    """(C, *spatial)"""
    affine: tuple[float, ...]
    """4 x 4, row by row"""
    label: int | None = None
    """of a patch: the atlas' class at its centre"""


@dataclass(frozen=True, slots=True)
class Finished:
    """All samples of one source."""

    id: str
    identity: str
    """sizes and times of its files"""
    samples: tuple[Entry, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    source_shape: tuple[int, ...]
    digest: str
    hash: str
    num_bits: int
    """of the perceptual hash, in hex digits"""
    counts: tuple[int, ...]
    """voxels of each value of the label map, up to the last that occurs"""
    manifest: tuple[dict[str, Any], ...]
    filled: int
    """voxels that were NaN: --nan"""

    @classmethod
    def from_line(cls, plain: dict[str, Any]) -> Self:
        samples = tuple(Entry(**{name: _nested(value) for name, value in entry.items()}) for entry in plain["samples"])
        return cls(**{name: _nested(value) for name, value in plain.items()} | {"samples": samples})


def _nested(value: Any) -> Any:
    return tuple(map(_nested, value)) if isinstance(value, list) else value


def work_folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.packing")


class Busy(ValueError):
    """Another process packs into the same file."""


class Workshop:
    """A context manager that holds the folder's lock; `finished` are the sources that need not be read again.

    `key` says what the bytes depend on: with another one everything begins anew. The folder stays after an error if
    there is something in it worth keeping, and `remove` removes it. OSError where the disk is full.
    """

    def __init__(self, output: Path, key: str) -> None:
        self.folder = work_folder(output)
        self._key = key
        self.finished: dict[str, Finished] = {}

    def __enter__(self) -> Self:
        if self.folder.exists() and not self.folder.is_dir():
            raise Busy(f"{self.folder} is in the way: the work folder has this name; move it")
        self.folder.mkdir(exist_ok=True)
        self._lock = (self.folder / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise Busy(f"{self.folder} is in use: another 'hpc pack' writes this file; wait for it") from None
            raise
        try:
            self._open()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()
        if not self.finished:
            self.remove()
        elif error is not None:
            error.add_note(f"what was read is kept in {self.folder} for the next time")
        self._lock.close()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, done: Finished) -> None:
        """Note a source whose bytes are all written."""
        self.finished[done.id] = done
        self._write(asdict(done))
        if time.monotonic() - self._synced > _SYNC_EVERY:
            self.sync()

    def sync(self) -> None:
        """Bring all data files to the disk, then say so in the journal."""
        for path in self.folder.glob("*.dat"):
            sync(path)
        self._write({"synced": True})
        os.fsync(self._journal.fileno())
        self._synced = time.monotonic()

    def forget(self, ids: set[str]) -> None:
        """These are to be read again."""
        self.finished = {id: done for id, done in self.finished.items() if id not in ids}

    def suspects(self) -> list[str]:
        """What the workers were reading when one of them died."""
        return sorted(path.read_text() for path in self.folder.glob(f"{NOW}*"))

    def _open(self) -> None:
        path = self.folder / JOURNAL
        lines = _believed(path, self._key)
        self.finished = {line["id"]: Finished.from_line(line) for line in lines}
        entries = [entry for done in self.finished.values() for entry in done.samples]
        used = {entry.file for entry in entries} | {entry.drawn[0] for entry in entries if entry.drawn}
        for other in self.folder.iterdir():
            if other.name not in {LOCK, *used}:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
        temporary = path.with_suffix(".tmp")
        self._journal: TextIO = temporary.open("w")
        self._write({"key": self._key, "boot": boot()})
        for line in lines:
            self._write(line)
        self.sync()
        temporary.replace(path)

    def _write(self, plain: dict[str, Any]) -> None:
        self._journal.write(json.dumps(plain) + "\n")
        self._journal.flush()


def key_of(output: Path) -> str:
    """The key of what an earlier pack has left; empty where there is nothing."""
    try:
        with (work_folder(output) / JOURNAL).open() as file:
            return str(json.loads(file.readline()).get("key", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def boot() -> str:
    """Another string after each start of the machine."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _believed(path: Path, key: str) -> list[dict[str, Any]]:
    """The lines of an earlier run that hold; none when it had another key."""
    try:
        raw = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end was torn
    except FileNotFoundError:
        return []
    try:
        head, *lines = [json.loads(line) for line in raw] or [{}]
    except ValueError:
        return []
    if head.get("key") != key:
        return []
    if not head["boot"] or head["boot"] != boot():
        last = max((number for number, line in enumerate(lines, 1) if "synced" in line), default=0)
        lines = lines[:last]
    return [line for line in lines if "id" in line]
