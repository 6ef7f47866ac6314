"""What the file system of a folder can do: `python -m hpc.fsprobe FOLDER` prints JSON, in a process that may hang.

Space, inodes, the time of a small file that is written as a run writes its own, the speed of a large one, and whether
a lock of one process keeps out another. What it writes is in a folder of its own, and removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hpc.rundir import write_bytes

_SMALL, _TIMES = 4096, 5
_LARGE_MB = 16
_FREE, _HELD, _NO_LOCKS = range(3)


def probe(folder: Path) -> dict[str, Any]:
    """Facts by name; `error` where nothing can be written. A folder that is not there yet stands for its parent."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    kind, mount = mounted(there)
    space = os.statvfs(there)
    facts: dict[str, Any] = {
        "folder": str(there),
        "type": kind,
        "mount": mount,
        "free_gb": space.f_bavail * space.f_frsize / 1e9,
        "free_inodes": space.f_favail if space.f_files else None,  # some file systems count none
    }
    try:
        with tempfile.TemporaryDirectory(prefix=".hpc-doctor-", dir=there) as own:
            facts["small_ms"] = _small_ms(Path(own))
            facts["mb_per_s"] = _mb_per_s(Path(own) / "large")
            facts["locks"] = _locks(Path(own) / "lock")
    except OSError as error:
        facts["error"] = error.strerror or str(error)
    return facts


def mounted(folder: Path, table: Path = Path("/proc/self/mounts")) -> tuple[str, str]:
    """Type and mount point of the file system that holds a folder."""
    best = ("unknown", "")
    for line in table.read_text(errors="replace").splitlines():
        point, kind = line.split()[1:3]
        point = point.encode().decode("unicode_escape")  # a blank is written \040
        if folder.resolve().is_relative_to(point) and len(point) >= len(best[1]):
            best = (kind, point)
    return best


def _small_ms(folder: Path) -> float:
    """Median of some: written aside, fsync, renamed, fsync of the folder."""
    took = []
    for number in range(_TIMES):
        began = time.monotonic()
        write_bytes(folder / f"small{number}", b"x" * _SMALL)
        took.append(time.monotonic() - began)
    return round(statistics.median(took) * 1000, 2)


def _mb_per_s(path: Path) -> float:
    block = os.urandom(1 << 20)  # some file systems compress
    began = time.monotonic()
    with path.open("wb") as file:
        for _ in range(_LARGE_MB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return round(_LARGE_MB * 1.048576 / (time.monotonic() - began), 1)


def _locks(path: Path) -> bool:
    """Whether a second process is kept out while this one holds the lock, and let in after."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            return False
        if _second(path) != _HELD:
            return False
        fcntl.flock(file, fcntl.LOCK_UN)
    return _second(path) == _FREE


def _second(path: Path) -> int:
    """What another process finds."""
    child = os.fork()
    if child == 0:
        code = _NO_LOCKS
        try:
            with path.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                code = _FREE
        except BlockingIOError:
            code = _HELD
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    print(json.dumps(probe(Path(sys.argv[1]).absolute())))
