"""Processes of a test cluster: ports, munge, and how all that belongs to one folder is found and ended, by pid."""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.slurm import memory

PREFIX = "slurm-cluster-"
SBIN = "/usr/sbin:/sbin"


class ClusterError(RuntimeError):
    """The cluster did not do what it was asked; the message ends with the tails of queue and logs."""


def search_path() -> str:
    """PATH with the folders of the daemons, which are root's and not always in it."""
    return f"{os.environ.get('PATH', os.defpath)}:{SBIN}"


def new_folder() -> Path:
    """A private folder that names its owner, this process: see `reap`."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    (folder / "owner").write_text(f"{os.getpid()} {_start_time(os.getpid())}\n")
    return folder


def reap() -> list[Path]:
    """Stops the clusters of sessions that are no more, and returns the folders it removed."""
    found = [folder for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*") if not _owner_lives(folder)]
    for folder in found:
        sweep(folder)
    return found


def sweep(folder: Path) -> None:
    """Kills by pid all that belongs to the cluster in this folder, daemons first, and removes the folder."""
    pids = folder / "pids"
    for line in pids.read_text().splitlines() if pids.exists() else []:
        pid = int(line)
        if str(folder).encode() in _read(pid, "cmdline") or _is_client_of(folder, pid):
            kill(pid)
    while left := list(_descendants(folder)):
        for pid in left:
            kill(pid)
        time.sleep(0.02)
    memory.remove(folder)
    shutil.rmtree(folder, ignore_errors=True)


def kill(pid: int) -> None:
    """SIGKILL; no error when the process is gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def kill_child(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a daemon that we started, and its end."""
    process.kill()
    process.wait()


def kill_mount_namespace(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a daemon that has a mount namespace of its own, and to all else that lives in it."""
    namespace = _namespace(process.pid)
    if namespace in ("", _namespace(os.getpid())):
        raise ClusterError(f"process {process.pid} has ended, or shares our mounts: nothing is killed")
    process.kill()
    while left := [pid for pid in _all_pids() if pid != process.pid and _namespace(pid) == namespace]:
        for pid in left:
            kill(pid)
        time.sleep(0.02)
    process.wait()


def munge_answers(own: Path | None = None) -> bool:
    """Whether a munged (the system's, or the one at this socket) makes and reads credentials."""
    at = f"--socket={own}" if own else ""
    command = f"munge -n {at} | unmunge {at}"
    return subprocess.run(["sh", "-c", command], capture_output=True, env={"PATH": search_path()}).returncode == 0


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens, below the range that the kernel gives to outgoing connections."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(17000, 32000), 1000):
        if not listens(port):
            found.append(port)
        if len(found) == count:
            return found
    raise ClusterError("no free ports between 17000 and 32000")


def listens(address: int | Path) -> bool:
    """Whether somebody listens on this port of the machine, or on this Unix socket."""
    family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
    with socket.socket(family) as probe:
        return probe.connect_ex(str(address) if isinstance(address, Path) else ("127.0.0.1", address)) == 0


def _owner_lives(folder: Path) -> bool:
    try:
        pid, started = (folder / "owner").read_text().split()
    except (OSError, ValueError):
        # Being made by another session just now, unless it is old.
        return time.time() - folder.stat().st_mtime < 60
    return _start_time(int(pid)) == started


def _descendants(folder: Path) -> Iterator[int]:
    """Living processes of the cluster: its daemons' children (by name), and those of its jobs (by SLURM_JOB_ID)."""
    for pid in _all_pids():
        if pid == os.getpid() or not _is_client_of(folder, pid):
            continue
        if _read(pid, "comm").startswith(b"slurm") or b"\0SLURM_JOB_ID=" in b"\0" + _read(pid, "environ"):
            yield pid


def _is_client_of(folder: Path, pid: int) -> bool:
    """Whether the process was started with this cluster's SLURM_CONF; not for a zombie, which has no variables."""
    return f"SLURM_CONF={folder}/slurm.conf".encode() in _read(pid, "environ").split(b"\0")


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _namespace(pid: int) -> str:
    """The mount namespace of a process; empty for a process that ended."""
    try:
        return str(Path(f"/proc/{pid}/ns/mnt").readlink())
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Field 22 of /proc/PID/stat: with the pid it names a process for good. Empty when there is none."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return fields[19].decode() if fields else ""
