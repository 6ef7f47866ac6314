"""A disk that misbehaves on purpose: storage calls under one folder are counted, recorded, killed at, failed, slowed.

    with Shim(folder, KillAt(17)):
        save()  # the process gets a real SIGKILL in place of its 17th storage call

The functions of `os` are replaced, so only code that writes by them is seen; the power cut (storage_powercut.py)
replays a record and compares it with the folder, and so proves that nothing was written by other ways.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WRITES = ("write", "pwrite")
SYNCS = ("fsync", "fdatasync")
BY_DESCRIPTOR = (*WRITES, *SYNCS, "ftruncate", "close")
BY_PATH = ("open", "mkdir", "unlink", "remove", "rmdir")
BETWEEN_PATHS = ("rename", "replace")
UNKNOWN = ("writev", "pwritev", "sendfile", "copy_file_range", "truncate", "link", "symlink", "posix_fallocate")
"""Not modelled: whoever uses one of these under the folder is told so."""


@dataclass(frozen=True)
class Call:
    """One storage call, before it is made."""

    number: int
    """From 1."""
    name: str
    path: Path
    """Of a descriptor: what was opened, under the name it had then."""
    target: Path | None = None
    """Of a rename."""
    handle: int = 0
    """Which opening a descriptor is of: descriptors are used again."""
    offset: int = 0
    content: bytes = b""
    flags: int = 0
    length: int = 0
    """Of ftruncate."""


Before = Callable[[Call], int | None]
"""Asked before each call. It may raise OSError, sleep or kill; a number is how many bytes a write takes at most."""
After = Callable[[Call, OSError | None], None]
"""Told after each call how it ended; `content` is what was taken."""


@dataclass
class Shim:
    """Replaces the functions of `os` while it is entered. Thread-safe; one at a time in a process."""

    root: Path
    before: Before = lambda call: None
    after: After = lambda call, error: None
    calls: int = 0
    _open: dict[int, tuple[int, Path, bool]] = field(default_factory=dict)
    _real: dict[str, Callable[..., Any]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _handles: int = 0

    def __enter__(self) -> Shim:
        self.root = self.root.resolve()
        for name in (*BY_DESCRIPTOR, *BY_PATH, *BETWEEN_PATHS, *UNKNOWN):
            self._real[name] = getattr(os, name)
            setattr(os, name, self._replacement(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)

    def _replacement(self, name: str) -> Callable[..., Any]:
        real = self._real[name]
        if name in UNKNOWN:
            return lambda *args, **named: self._refuse(name, args, real, named)
        kind = self._descriptor if name in BY_DESCRIPTOR else self._opening if name == "open" else self._naming
        return lambda *args, **named: kind(name, real, args, named)

    def _refuse(self, name: str, args: tuple[Any, ...], real: Callable[..., Any], named: dict[str, Any]) -> Any:
        ours = args[0] in self._open if isinstance(args[0], int) else self._place(args[0], None) is not None
        assert not ours, f"os.{name} under {self.root}: tests/faults/shim.py does not know what it does to a disk"
        return real(*args, **named)

    def _place(self, path: Any, folder: int | None) -> Path | None:
        """The full path, links of the last part not followed; None outside the folder."""
        if isinstance(path, int):
            return None
        base = Path.cwd() if folder is None else Path(f"/proc/self/fd/{folder}").readlink()
        full = Path(os.path.normpath(base / os.fsdecode(path)))
        return full if full.is_relative_to(self.root) else None

    def _call(self, name: str, path: Path, make: Callable[[int | None], Any], **facts: Any) -> Any:
        """Number it, ask, make it, tell."""
        with self._lock:
            self.calls += 1
            call = Call(self.calls, name, path, **facts)
        try:
            result = make(self.before(call))
        except OSError as error:
            self.after(call, error)
            raise
        if name in WRITES:
            call = Call(**{**call.__dict__, "content": call.content[:result]})
        self.after(call, None)
        return result

    def _opening(self, name: str, real: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> int:
        place, flags = self._place(args[0], named.get("dir_fd")), args[1] if len(args) > 1 else named["flags"]
        if place is None:
            descriptor = real(*args, **named)
            self._open.pop(descriptor, None)  # ours was closed without os.close
            return int(descriptor)
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        with self._lock:
            self._handles += 1
            handle = self._handles
        if writes:
            descriptor = self._call(name, place, lambda _: real(*args, **named), handle=handle, flags=flags)
        else:  # a read changes nothing; an opened folder may be synced
            descriptor = real(*args, **named)
            self.after(Call(0, name, place, handle=handle, flags=flags), None)
        self._open[descriptor] = handle, place, writes
        return int(descriptor)

    def _descriptor(self, name: str, real: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        descriptor = args[0]
        known = self._open.get(descriptor)
        if known is None:
            return real(*args, **named)
        handle, place, writes = known
        if name == "close":
            del self._open[descriptor]
            try:  # Linux closes it whatever the answer is
                return self._call(name, place, lambda _: None, handle=handle) if writes else None
            finally:
                real(descriptor)
        facts: dict[str, Any] = {"handle": handle}
        if name == "ftruncate":
            facts["length"] = args[1]
        if name not in WRITES:
            return self._call(name, place, lambda _: real(*args, **named), **facts)
        content = bytes(args[1])
        facts |= {"content": content, "offset": args[2] if name == "pwrite" else os.lseek(descriptor, 0, os.SEEK_CUR)}
        return self._call(name, place, lambda most: real(descriptor, content[:most], *args[2:]), **facts)

    def _naming(self, name: str, real: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        folder = named.get("src_dir_fd" if name in BETWEEN_PATHS else "dir_fd")
        place = self._place(args[0], folder)
        if place is None:
            return real(*args, **named)
        target = self._place(args[1], named.get("dst_dir_fd")) if name in BETWEEN_PATHS else None
        return self._call(name, place, lambda _: real(*args, **named), target=target)


def die() -> None:
    """A real SIGKILL, from whichever thread."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@dataclass
class KillAt:
    """SIGKILL in place of the n-th call; `torn`: half of that write is done, and the kill comes with the next call."""

    number: int
    torn: bool = False

    def __call__(self, call: Call) -> int | None:
        if self.torn and call.number == self.number and call.name in WRITES:
            return len(call.content) // 2
        if call.number == self.number + self.torn:
            die()
        return None


@dataclass
class FailAt:
    """An error in place of the n-th call; `forever`: of every later one, too, as far as that error can meet it."""

    number: int
    code: int
    forever: bool = False
    failed: list[Call] = field(default_factory=list)

    def __call__(self, call: Call) -> None:
        hit = call.number >= self.number if self.forever else call.number == self.number
        if not hit or (self.forever and call.name not in MEETS[self.code]):
            return
        self.failed.append(call)
        raise OSError(self.code, os.strerror(self.code), str(call.path))


_GROWS = ("open", "mkdir", *WRITES, *SYNCS, "close")
MEETS = {
    errno.ENOSPC: _GROWS,
    errno.EDQUOT: _GROWS,
    errno.EIO: (*BY_DESCRIPTOR, *BY_PATH, *BETWEEN_PATHS),
    errno.EROFS: (*BY_PATH, *BETWEEN_PATHS, *WRITES, *SYNCS),
}
"""A full disk still deletes; one that is read-only does not."""
