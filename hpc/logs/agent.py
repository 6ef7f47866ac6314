"""The far end of `hpc sync`: requests about one runs folder, answered here or over ssh; Python 3.6, nothing else.

Its source is sent over ssh and run by the other machine's python3, so it imports nothing of ours, and what is newer
than Python 3.6 is not used. A frame is two numbers (u32, big endian), then as many bytes of JSON and of payload.
Every path is relative to the folder and stays in it; links are not followed.
"""

import errno
import hashlib
import json
import os
import signal
import socket
import stat
import struct
import time
import zlib
from typing import Any, Callable, Dict, List, Optional, Tuple

EDGE = 4096  # bytes at either end of a prefix that make its fingerprint
MARK = b"\nhpc-sync-agent\n"  # a login script may have printed something before
_SUM_BLOCK = 1 << 20
_MARKS = 3

Fields = Dict[str, Any]
Answer = Tuple[Fields, bytes]


class Refused(Exception):
    """A request for what lies outside the folder, or for something unknown."""


class Store:
    """One runs folder. `names` are the run folder's names that matter here, spelt by the one who asks."""

    def __init__(self, root: str, names: Dict[str, str], create: bool = False) -> None:
        self.root = os.path.realpath(os.path.expanduser(root))
        if create:
            os.makedirs(self.root, exist_ok=True)
        if not os.path.isdir(self.root):
            raise OSError(errno.ENOENT, "no such folder of runs", self.root)
        self.names = names
        self.lock_file: Optional[int] = None

    def answer(self, request: Fields, payload: bytes = b"") -> Answer:
        """(fields, payload) of the answer to one request. Raises OSError and Refused."""
        call: Optional[Callable[[Fields, bytes], Answer]] = getattr(self, "do_" + str(request.get("op")), None)
        if call is None:
            raise Refused(f"unknown request {request.get('op')!r}")
        return call(request, payload)

    def path(self, relative: str) -> str:
        """The absolute path; its folder must lie in the root when all links are followed."""
        parts = relative.split("/")
        if not relative or relative.startswith("/") or "\0" in relative or {"", ".", ".."} & set(parts):
            raise Refused(f"no path inside the folder: {relative!r}")
        folder = os.path.realpath(os.path.join(self.root, *parts[:-1]))
        if folder != self.root and not folder.startswith(self.root.rstrip("/") + "/"):
            raise Refused(f"leads out of the folder: {relative!r}")
        return os.path.join(folder, parts[-1])

    def do_hello(self, request: Fields, payload: bytes) -> Answer:
        """Who answers, and the folder as an absolute path."""
        login = os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())
        return {"root": self.root, "host": socket.gethostname(), "user": login}, b""

    def do_lock(self, request: Fields, payload: bytes) -> Answer:
        """One writer at a time until this process ends; taken: false where another has it, None without locks."""
        import fcntl

        path = self.path(request["path"])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
            os.close(handle)
            return {"taken": False, "holder": holder}, b""
        except OSError:
            os.close(handle)
            return {"taken": None}, b""
        self.lock_file = handle
        os.ftruncate(handle, 0)
        os.pwrite(handle, request["holder"].encode("utf-8", "surrogateescape"), 0)
        return {"taken": True}, b""

    def do_unlock(self, request: Fields, payload: bytes) -> Answer:
        if self.lock_file is not None:
            os.close(self.lock_file)
            self.lock_file = None
        return {}, b""

    # --- looking ----------------------------------------------------------------------------------------------------

    def do_list(self, request: Fields, payload: bytes) -> Answer:
        """Every run and sweep with its event files and the other files that are carried, compressed JSON."""
        found: List[Fields] = []
        denied: List[Any] = []
        links: List[str] = []
        for name in self._names(self.root, denied):
            if name.startswith("."):
                continue
            folder = os.path.join(self.root, name)
            if os.path.islink(folder):
                links.append(name)
                continue
            if os.path.isfile(os.path.join(folder, self.names["experiment"])):
                found.append(self._run(name, request, denied))
            elif os.path.isfile(os.path.join(folder, self.names["rows"])):
                found.append(self._run(name, request, denied, events=False))
                for row in self._names(folder, denied):
                    if os.path.isfile(os.path.join(folder, row, self.names["experiment"])):
                        found.append(self._run(name + "/" + row, request, denied))
        answer = {"now": time.time(), "runs": found, "denied": denied, "links": links}
        alone = os.path.isfile(os.path.join(self.root, self.names["experiment"]))
        return {"run": alone}, zlib.compress(json.dumps(answer).encode(), 6)

    def do_look(self, request: Fields, payload: bytes) -> Answer:
        """Every file under the folder of event files of one run: [path in the run, size]."""
        run = self.path(request["run"])
        files = self._walk(run, [self.names["tb"]], [], hidden=True)
        return {}, json.dumps([[name, info.st_size] for name, info in files]).encode()

    def _run(self, run: str, request: Fields, denied: List[Any], events: bool = True) -> Fields:
        folder = os.path.join(self.root, run)
        mine: List[Any] = []
        carried = sorted(set(request["carried"]) | set(request["more"]))
        files = self._walk(folder, carried if events else self._of_sweep(folder, request), mine)
        event_files: List[Any] = []
        others: List[Any] = []
        big: List[Any] = []
        for name, info in files:
            if events and name.startswith(self.names["tb"] + "/") and "tfevents" in os.path.basename(name):
                event_files.append([name, info.st_size, info.st_mtime_ns, info.st_ino])
            elif "tfevents" in name:  # TensorBoard would take it for an event file of a run of its own
                continue
            elif info.st_size > request["most"] and name.split("/")[0] not in request["more"]:
                big.append([name, info.st_size])
            else:
                others.append([name, info.st_size, info.st_mtime_ns])
        denied.extend([[run + "/" + name, why] for name, why in mine])
        ended, phase = self._ended(folder)
        told = {"run": run, "sweep": not events, "events": event_files, "others": others, "big": big}
        told.update(ended=ended, phase=phase)
        return told

    def _of_sweep(self, folder: str, request: Fields) -> List[str]:
        """What a sweep has beside its rows."""
        names = [name for name in self._names(folder, []) if os.path.isfile(os.path.join(folder, name))]
        return sorted(
            [name for name in names if not name.startswith(".")] + [self.names["logs"]] + list(request["more"])
        )

    def _ended(self, folder: str) -> Tuple[bool, str]:
        """Whether the run has ended, and its phase."""
        if os.path.exists(os.path.join(folder, self.names["result"])):
            return True, "finished"
        try:
            with open(os.path.join(folder, self.names["state"]), "rb") as file:
                phase = json.loads(file.read().decode("utf-8", "replace")).get("phase", "")
        except (OSError, ValueError, AttributeError):
            return False, ""
        return phase == "ended", str(phase)

    def _walk(
        self, folder: str, names: List[str], denied: List[Any], hidden: bool = False
    ) -> List[Tuple[str, os.stat_result]]:
        """(path in `folder`, its stat) of the regular files with one of these first parts, by path.

        The names of a folder are all read before the first file is looked at: when a newer event file is listed, the
        size of an older one is that which it had later.
        """
        found: List[Tuple[str, os.stat_result]] = []
        for name in names:
            if name.startswith(".") and not hidden:
                continue
            try:
                info = os.lstat(os.path.join(folder, name))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    denied.append([name, error.strerror])
                continue
            if stat.S_ISDIR(info.st_mode):
                inner = self._names(os.path.join(folder, name), denied, name)
                found.extend(
                    self._walk(folder, [name + "/" + one for one in inner if self._shown(one, hidden)], denied, hidden)
                )
            elif stat.S_ISREG(info.st_mode):
                found.append((name, info))
        return found

    @staticmethod
    def _shown(name: str, hidden: bool) -> bool:
        return hidden or not name.startswith(".")

    def _names(self, folder: str, denied: List[Any], told: str = "") -> List[str]:
        try:
            return sorted(os.listdir(folder))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                denied.append([told or os.path.basename(folder), error.strerror])
            return []

    # --- reading ----------------------------------------------------------------------------------------------------

    def do_read(self, request: Fields, payload: bytes) -> Answer:
        """`size` bytes from `at`; the file's size, and the fingerprint of what lies before `at` (None: too short)."""
        handle = os.open(self.path(request["path"]), os.O_RDONLY | os.O_NOFOLLOW)
        try:
            info = os.fstat(handle)
            if not stat.S_ISREG(info.st_mode):
                raise Refused(f"no file: {request['path']!r}")
            data = os.pread(handle, request["size"], request["at"])
            before = fingerprint(handle, request["at"]) if request["print"] else None
        finally:
            os.close(handle)
        return {"size": info.st_size, "print": before}, data

    def do_sum(self, request: Fields, payload: bytes) -> Answer:
        """SHA-256 of the first `size` bytes, None where the file is shorter or is not there."""
        return {"sum": self._sum(request["path"], request["size"])}, b""

    def do_sums(self, request: Fields, payload: bytes) -> Answer:
        """Likewise of many files: [path, size] each in the payload; a list of sums."""
        told = [self._sum(path, size) for path, size in json.loads(payload.decode())]
        return {}, json.dumps(told).encode()

    def _sum(self, path: str, size: int) -> Optional[str]:
        total, left = hashlib.sha256(), size
        try:
            handle = os.open(self.path(path), os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        with os.fdopen(handle, "rb") as file:
            while left:
                block = file.read(min(left, _SUM_BLOCK))
                if not block:
                    return None
                total.update(block)
                left -= len(block)
        return total.hexdigest()

    def do_sizes(self, request: Fields, payload: bytes) -> Answer:
        """The sizes of many regular files, a path each in the payload; None of one that is not there."""
        told = [self._size(path) for path in json.loads(zlib.decompress(payload).decode())]
        return {}, zlib.compress(json.dumps(told).encode(), 6)

    def _size(self, path: str) -> Optional[int]:
        try:
            info = os.lstat(self.path(path))
        except OSError:
            return None
        return info.st_size if stat.S_ISREG(info.st_mode) else None

    def do_marks(self, request: Fields, payload: bytes) -> Answer:
        """What tells runs of one name apart: of each run in the payload, marks; None of one that is not there.

        Two folders of one run share a mark; those of two runs share none. A run that has not begun has none.
        """
        told = {run: self._marks(self.path(run)) for run in json.loads(payload.decode())}
        return {}, zlib.compress(json.dumps(told).encode(), 6)

    def _marks(self, folder: str) -> Optional[List[str]]:
        """The first line of the first event logs, which only grow; of a sweep when it was first submitted."""
        if not os.path.isdir(folder):
            return None
        events = os.path.join(folder, self.names["events"])
        logs = [name for name in self._names(events, []) if not name.startswith(".")][:_MARKS]
        firsts = [self._first_line(os.path.join(events, name)) for name in logs]
        if os.path.isfile(os.path.join(folder, self.names["rows"])):
            firsts.append(self._first_submission(folder))
        return [hashlib.sha256(first).hexdigest()[:12] for first in firsts if first]

    @staticmethod
    def _first_line(path: str) -> bytes:
        try:
            with open(path, "rb") as file:
                line = file.readline(EDGE)
        except OSError:
            return b""
        return line if line.endswith(b"\n") else b""

    def _first_submission(self, sweep: str) -> bytes:
        try:
            with open(os.path.join(sweep, self.names["submit"]), "rb") as file:
                told = json.loads(file.read().decode("utf-8", "replace"))
            return repr(told["submissions"][0]["time"]).encode()
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            return b""

    def do_load(self, request: Fields, payload: bytes) -> Answer:
        """Every .json file in a folder, {name: text}; nothing where there is none."""
        folder = self.path(request["path"])
        found = {}
        for name in self._names(folder, []):
            if name.endswith(".json") and not name.startswith("."):
                with open(os.path.join(folder, name), "rb") as file:
                    found[name] = file.read().decode("utf-8", "replace")
        return {}, zlib.compress(json.dumps(found).encode(), 6)

    def do_folders(self, request: Fields, payload: bytes) -> Answer:
        """The folders in a folder."""
        folder = self.path(request["path"])
        return {"names": [name for name in self._names(folder, []) if os.path.isdir(os.path.join(folder, name))]}, b""

    # --- writing ----------------------------------------------------------------------------------------------------

    def do_put(self, request: Fields, payload: bytes) -> Answer:
        """Make the bytes from `at` on those of the payload: what is there and fits is left, the rest is appended.

        In one write where nothing interrupts, then fsync: a reader sees the file grow, and nothing else.
        """
        path = self.path(request["path"])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            at, size = request["at"], os.fstat(handle).st_size
            if size < at:
                raise OSError(errno.EIO, "is shorter than was delivered", request["path"])
            there = os.pread(handle, len(payload), at)
            if payload[: len(there)] != there:
                os.ftruncate(handle, at)
                there = b""
            place = at + len(there)
            rest = memoryview(payload)[len(there) :]
            while rest:
                written = os.pwrite(handle, rest, place)
                place += written
                rest = rest[written:]
            os.fsync(handle)
            return {"print": fingerprint(handle, at + len(payload))}, b""
        finally:
            os.close(handle)

    def do_cut(self, request: Fields, payload: bytes) -> Answer:
        """Shorten a file in place."""
        handle = os.open(self.path(request["path"]), os.O_RDWR | os.O_NOFOLLOW)
        try:
            if os.fstat(handle).st_size > request["size"]:
                os.ftruncate(handle, request["size"])
                os.fsync(handle)
        finally:
            os.close(handle)
        return {}, b""

    def do_move(self, request: Fields, payload: bytes) -> Answer:
        """Rename inside the folder; a name that is taken is not overwritten."""
        source, target = self.path(request["path"]), self.path(request["to"])
        if os.path.lexists(target):
            raise OSError(errno.EEXIST, "is there already", request["to"])
        os.rename(source, target)
        sync_folder(os.path.dirname(target))
        return {}, b""

    def do_save(self, request: Fields, payload: bytes) -> Answer:
        """Write a small file aside, fsync, rename."""
        path = self.path(request["path"])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        aside = os.path.join(os.path.dirname(path), f".{os.getpid()}.new")
        with open(aside, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, path)
        sync_folder(os.path.dirname(path))
        return {}, b""

    def do_fresh(self, request: Fields, payload: bytes) -> Answer:
        """An empty folder for rsync's temporary files: what a killed one left there goes."""
        folder = self.path(request["path"])
        os.makedirs(folder, exist_ok=True)
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
        return {"path": folder}, b""


def fingerprint(handle: int, size: int) -> Optional[str]:
    """SHA-256 of the first and the last EDGE bytes of the first `size`; None where the file is shorter."""
    if os.fstat(handle).st_size < size:
        return None
    first, last = os.pread(handle, min(EDGE, size), 0), os.pread(handle, min(EDGE, size), max(0, size - EDGE))
    return hashlib.sha256(first + last).hexdigest()


def sync_folder(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_exactly(size: int) -> bytes:
    """So many bytes from standard input; fewer at its end."""
    parts: List[bytes] = []
    left = size
    while left:
        part = os.read(0, min(left, 1 << 20))
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def write_all(data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(1, rest) :]


def serve() -> None:
    """Answer the frames on standard input until its end, or until nothing has come for the time that was told."""
    write_all(MARK)
    store: Optional[Store] = None
    idle_s = 600
    while True:
        signal.alarm(idle_s)  # a network that went away must not leave us, and our lock, behind
        head = read_exactly(8)
        if len(head) < 8:
            return
        length, more = struct.unpack(">II", head)
        request = json.loads(read_exactly(length).decode())
        payload = read_exactly(more)
        signal.alarm(0)  # the sums of large files may take longer
        fields: Fields = {}
        data = b""
        try:
            if store is None:
                store = Store(request["root"], request["names"], request["create"])
                idle_s = int(request["idle_s"])
            fields, data = store.answer(request, payload)
        except OSError as error:
            fields = {"error": error.strerror or str(error), "errno": error.errno or errno.EIO}
        except (Refused, KeyError, TypeError, ValueError) as error:
            fields = {"error": f"{type(error).__name__}: {error}", "errno": 0}
        told = json.dumps(fields).encode()
        signal.alarm(idle_s)
        write_all(struct.pack(">II", len(told), len(data)) + told + data)


if __name__ == "__main__":
    serve()
