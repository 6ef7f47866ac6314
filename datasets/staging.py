"""Copies of volume files on a node's own disk, made once for all of its ranks and gone with the last of them.

    with stage(volumes, ["/scratch"]) as staged: Loader(open_volumes(staged.paths), ...)

A folder `hpc-data-UID` of mode 0700 holds, for each data set, a folder of copies and beside it a lock. Who copies holds
it alone, who reads holds it shared: a process that is gone holds nothing, so what nobody holds is removed by the next
staging. A marker, written last, says that the copies are whole; without it they are made anew.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from datasets.layout import VolumeFile, open_volumes
from datasets.trust import VolumeFileError

_LOG = logging.getLogger(__name__)
_MARKER = "whole.json"
_PART_BYTES = 8 << 20
_AGAIN_S = 0.05
"""Until the copies are looked at again, where another process was about to make or to remove them."""
COMPARED_SAMPLES = 16
"""Samples of a copy whose checksum is compared before it is used."""


class StagingError(OSError):
    """The data cannot be copied to scratch space; the message is one line with the reason."""


class Staged:
    """The copies, of all shards in order, held until `close`."""

    def __init__(self, paths: list[Path], folder: Path, lock: int) -> None:
        self.paths, self._folder, self._lock = paths, folder, lock

    def close(self) -> None:
        """Leave the copies; the last one to leave removes them."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            fcntl.flock(lock, fcntl.LOCK_UN)  # first: of two that leave at once, one must find nobody there
            _remove_unused(self._folder, lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StagingStopped(Exception):
    """`stopped` came true while the data were copied; nothing of it is left."""


def stage(
    volumes: VolumeFile, scratch: Sequence[str | os.PathLike[str]], stopped: Callable[[], object] = lambda: False
) -> Staged:
    """Copy all shards to the first of the scratch folders that is there, unless they are; waits for who is at it.

    Raises StagingError where there is no folder, or not enough room in it, and StagingStopped soon after `stopped()`
    is true: a copy of many GB outlasts the notice of a preemption.
    """
    base = _private_folder(scratch)
    folder = base / _digest(volumes)
    _remove_stale(base, folder)
    while True:
        lock = _open_lock(folder)
        try:
            _wait_for_copier(lock, stopped)
            if not _is_whole(folder, volumes) and _alone(lock) and _is_current(lock, folder):
                _copy(volumes, folder, stopped)
                fcntl.flock(lock, fcntl.LOCK_SH)
            elif _is_whole(folder, volumes):
                _compare(volumes, folder)
            if _is_current(lock, folder) and _is_whole(folder, volumes):
                return Staged(_copies(volumes, folder), folder, lock)
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        time.sleep(_AGAIN_S)


def _wait_for_copier(lock: int, stopped: Callable[[], object]) -> None:
    """Hold the lock shared."""
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if stopped():
                raise StagingStopped from None
            time.sleep(_AGAIN_S)


def _private_folder(scratch: Sequence[str | os.PathLike[str]]) -> Path:
    """Ours alone, whatever others may have put in its place."""
    places = [Path(place) for place in scratch]
    parent = next((place for place in places if place.is_dir() and os.access(place, os.W_OK | os.X_OK)), None)
    if parent is None:
        raise StagingError(f"data.stage: no folder to copy to among {', '.join(map(str, places))}; leave stage out")
    folder = parent / f"hpc-data-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if folder.is_symlink() or not folder.is_dir() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise StagingError(f"data.stage: {folder} is not a folder of yours alone (mode 0700): remove it")
    return folder


def _digest(volumes: VolumeFile) -> str:
    sources = [(str(shard.path.resolve()), *shard.identity) for shard in volumes.shards]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:32]


def _lock_path(folder: Path) -> Path:
    return folder.with_suffix(".lock")


def _open_lock(folder: Path) -> int:
    try:
        return os.open(_lock_path(folder), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StagingError(f"data.stage: {_lock_path(folder)} is no lock ({error.strerror}): remove it") from error


def _alone(lock: int) -> bool:
    """Hold the lock alone, if nobody else holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_current(lock: int, folder: Path) -> bool:
    """Whether this is still the lock that others open: who removes the copies removes it, too."""
    try:
        return os.path.samestat(os.fstat(lock), os.lstat(_lock_path(folder)))
    except FileNotFoundError:
        return False


def _remove_unused(folder: Path, lock: int) -> None:
    """Remove the copies if nobody holds them; closes the descriptor."""
    if _alone(lock) and _is_current(lock, folder):
        shutil.rmtree(folder, ignore_errors=True)
        _lock_path(folder).unlink(missing_ok=True)
    os.close(lock)


def _remove_stale(base: Path, own: Path) -> None:
    """Copies whose readers were all killed."""
    for path in base.glob("*.lock"):
        if path != _lock_path(own):
            with suppress(OSError):  # gone meanwhile, or no lock of ours
                _remove_unused(path.with_suffix(""), os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC))


def _copies(volumes: VolumeFile, folder: Path) -> list[Path]:
    return [folder / f"{number}-{path.name}" for number, path in enumerate(volumes.paths)]


def _is_whole(folder: Path, volumes: VolumeFile) -> bool:
    try:
        sizes = json.loads((folder / _MARKER).read_text())
        return bool(sizes == [path.stat().st_size for path in _copies(volumes, folder)])
    except (OSError, ValueError):
        return False


def _copy(volumes: VolumeFile, folder: Path, stopped: Callable[[], object]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    needed = sum(shard.identity[1] for shard in volumes.shards)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise StagingError(
            f"data.stage: {folder.parent} has {free / 1e9:.3g} GB free, but {volumes.name} needs "
            f"{needed / 1e9:.3g} GB; leave stage out, or set the instance's scratch to a larger disk"
        )
    _LOG.info("copying %.3g GB of %s to %s", needed / 1e9, volumes.name, folder)
    try:
        folder.mkdir(mode=0o700)
        for source, copy in zip(volumes.paths, _copies(volumes, folder), strict=True):
            _copy_file(source, copy, stopped)
        _compare(volumes, folder)
        _write_marker(volumes, folder)
    except (OSError, StagingStopped) as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, (StagingError, StagingStopped)):
            raise
        raise StagingError(f"data.stage: {volumes.name} cannot be copied to {folder}: {error}") from error


def _copy_file(source: Path, copy: Path, stopped: Callable[[], object]) -> None:
    with source.open("rb", buffering=0) as read, copy.open("xb", buffering=0) as write:
        buffer = memoryview(bytearray(_PART_BYTES))
        while count := read.readinto(buffer):
            if stopped():
                raise StagingStopped
            done = 0
            while done < count:
                done += write.write(buffer[done:count])
        os.fsync(write.fileno())


def _compare(volumes: VolumeFile, folder: Path) -> None:
    """The sources are still those that were opened; sizes, and the checksums of some samples, are right."""
    for shard, copy in zip(volumes.shards, _copies(volumes, folder), strict=True):
        status = shard.path.stat()
        if (status.st_ino, status.st_size, status.st_mtime_ns) != shard.identity:
            raise StagingError(f"{shard.path} was exchanged since it was opened; start again")
        if copy.stat().st_size != status.st_size:
            raise StagingError(f"data.stage: {copy} has {copy.stat().st_size} bytes, not {status.st_size}")
    samples = np.unique(np.linspace(0, len(volumes) - 1, COMPARED_SAMPLES).astype(int))
    try:
        damaged = open_volumes(_copies(volumes, folder)).verify(samples.tolist())
    except VolumeFileError as error:
        raise StagingError(f"data.stage: a copy cannot be read: {error}") from error
    if damaged and damaged != volumes.verify(damaged):  # a sample that is damaged at the source is the loader's to tell
        raise StagingError(f"data.stage: the copy of sample {volumes.ids[damaged[0]]!r} in {folder} differs")


def _write_marker(volumes: VolumeFile, folder: Path) -> None:
    sizes = [path.stat().st_size for path in _copies(volumes, folder)]
    part = folder / f"{_MARKER}.part"
    with part.open("x") as file:
        json.dump(sizes, file)
        file.flush()
        os.fsync(file.fileno())
    part.rename(folder / _MARKER)
