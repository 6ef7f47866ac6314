"""Files that are on the disk when they are said to be, and are read only if they are what was written.

Every file has a CRC-32 (zlib) for each block, made and compared beside the writing and the reading, which leave the
interpreter free. All storage calls are plain `os.` functions: the fault tests make each of them fail in turn.
"""
# ruff: noqa: PTH102, PTH106, PTH108, PTH116, PTH208

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from datasets.checksum import crc32
from hpc import trust
from hpc.errors import UserError
from hpc.rundir import fsync_folder

BLOCK = 4 << 20
"""Bytes under one sum."""
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READERS = min(4, len(os.sched_getaffinity(0)))
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODATA, errno.EUCLEAN)
_REMEDIES = {
    errno.ENOSPC: "free some space there, or files where 'df -i' says that there are too many",
    errno.EDQUOT: "your quota there is used up: delete what you no longer need, or ask for more",
    errno.EFBIG: "a file may not be so large: raise 'ulimit -f'",
    errno.EROFS: "the file system has become read-only: tell its administrators",
    errno.EIO: "the storage is failing: tell its administrators",
}


class StorageError(OSError):
    """A checkpoint could not be written or read; the older ones are as they were. (errno, the whole line)"""

    def __str__(self) -> str:
        return str(self.strerror)


class Damaged(ValueError):
    """A checkpoint whose bytes are not those that were written; the message says which file and how."""


def make_folder(folder: Path) -> None:
    """A folder of our own that lasts, unless there is one. Raises UserError where others can write to it."""
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        refuse_foreign(folder, os.stat(folder))
        return
    try:
        fsync_folder(folder.parent)
    except OSError:
        with suppress(OSError):
            os.rmdir(folder)
        raise


def write(path: Path, content: memoryview) -> dict[str, Any]:
    """Size and sums of a new file that is on the disk: they are made beside the writing, of the same memory."""
    sums: list[int] = [0] * len(range(0, len(content), BLOCK))

    def add_up() -> None:
        for number in range(len(sums)):
            sums[number] = crc32(content[number * BLOCK : (number + 1) * BLOCK])

    descriptor = os.open(path, _NEW_FILE, 0o600)
    adding = threading.Thread(target=add_up, name="checkpoint-sums", daemon=True)
    adding.start()
    try:
        done = 0
        while done < len(content):
            written = os.write(descriptor, content[done : done + BLOCK])
            if not written:
                raise OSError(errno.EIO, "nothing was written", str(path))
            done += written
        os.fsync(descriptor)
    finally:
        adding.join()
        os.close(descriptor)
    return {"size": len(content), "crc32": sums}


@contextmanager
def opened(path: Path, name: str) -> Iterator[int]:
    """A regular file that only we write, never one behind a link. Raises Damaged, UserError or StorageError."""
    try:
        descriptor = os.open(path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise fault(path, name, error) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{path.name}: {name} is no file")
        refuse_foreign(path / name, status)
        yield descriptor
    finally:
        os.close(descriptor)


def fault(path: Path, name: str, error: OSError) -> Damaged | StorageError:
    """What is not there or cannot be read is damage; what is busy, stale or forbidden may be well elsewhere."""
    if error.errno in _DAMAGE:
        return Damaged(f"{path.name}: {name} cannot be read ({error.strerror})")
    return storage_error(f"{path / name} cannot be read", error)


def storage_error(what: str, error: OSError) -> StorageError:
    """One line: what failed, the system's words, and what to do."""
    number = error.errno or errno.EIO
    remedy = _REMEDIES.get(number)
    words = f"{error.strerror or error} ({errno.errorcode.get(number, number)})"
    return StorageError(number, f"{what}: {words}{f': {remedy}' if remedy else ''}")


def check_size(path: Path, name: str, claimed: dict[str, Any], descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    if size != claimed["size"]:
        raise Damaged(f"{path.name}: {name} has {size} bytes, not {claimed['size']}")


def compare(
    path: Path,
    name: str,
    claimed: dict[str, Any],
    descriptor: int,
    target: memoryview | None,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Read a file into `target` (or nowhere) and compare its blocks, several at a time. Raises Damaged."""
    size, sums = claimed["size"], claimed["crc32"]
    faults: list[Exception] = []
    threads = min(_READERS, len(sums))

    def read(first: int) -> None:
        spare = memoryview(bytearray(min(BLOCK, size))) if target is None else target
        for number in range(first, len(sums), threads):
            start, end = number * BLOCK, min((number + 1) * BLOCK, size)
            block = spare[: end - start] if target is None else target[start:end]
            if faults or cancelled():
                return
            try:
                fill(block, descriptor, start)
                if crc32(block) != sums[number]:
                    where = f"CRC-32 of bytes {start} to {end}"
                    faults.append(Damaged(f"{path.name}: {name} has changed since it was written ({where})"))
            except OSError as error:
                faults.append(fault(path, name, error))

    others = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(1, threads)]
    for thread in others:
        thread.start()
    read(0)
    for thread in others:
        thread.join()
    if faults:
        raise faults[0]


def fill(target: memoryview, descriptor: int, offset: int) -> None:
    while len(target):
        count = os.preadv(descriptor, [target], offset)
        if not count:
            raise OSError(errno.ENODATA, "it ends before its end")
        target, offset = target[count:], offset + count


def refuse_foreign(path: Path, status: os.stat_result) -> None:
    """Raises UserError for what somebody else owns or may write: sums protect from disks, not from people."""
    if stat.S_ISLNK(status.st_mode):
        raise UserError(f"{path} is a link, and a checkpoint is never loaded through one: copy the folder (cp -rL)")
    trust.refuse(path, status, f"if you trust its content: chmod -R go-w {path}", "loaded")


def remove_all(folder: Path, wanted: Callable[[str], object]) -> None:
    """What bears a name that is wanted; tries all of it before it raises the last fault."""
    last: OSError | None = None
    try:
        names = [name for name in os.listdir(folder) if wanted(name)]
    except FileNotFoundError:
        return
    for name in sorted(names):
        try:
            remove(folder / name)
        except OSError as error:
            last = error
    if last:
        raise last


def remove(path: Path) -> None:
    """A folder and all in it; links are removed, never followed."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        os.unlink(path)
        return
    for name in os.listdir(path):
        remove(path / name)
    os.rmdir(path)


def remove_quietly(path: Path) -> None:
    with suppress(OSError):
        remove(path)
