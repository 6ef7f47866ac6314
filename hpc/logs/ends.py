"""The two ends of a sync: a runs folder here, or host:path, where agent.py answers; one ssh serves a session."""

from __future__ import annotations

import getpass
import importlib.resources
import json
import os
import re
import secrets
import shlex
import socket
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.errors import UserError
from hpc.logs import agent
from hpc.rundir import ROWS, RunDir

IDLE_S = 300
"""So long a remote end waits for the next request before it ends, with its lock."""
_PERSIST = "10m"
_SUMMED_FILES, _SUMMED_BYTES = 1000, 4 << 30  # in one request
_MOST_CHATTER = 1 << 16  # bytes that login scripts may print before the agent speaks


class Unreachable(Exception):
    """The other machine cannot be had, or was lost; in a sentence."""


@dataclass(frozen=True)
class Place:
    """What a user names on the command line: a folder here (no host), or host:path."""

    host: str
    path: str

    def __str__(self) -> str:
        return f"{self.host}:{self.path}" if self.host else self.path


def place_of(text: str) -> Place:
    """The place a user means; a colon before any slash parts host and path. Raises UserError."""
    match = re.fullmatch(r"((?:[^/:\[\]@]+@)?(?:\[[^\]]+\]|[^/:\[\]]+)):(.*)", text, re.S)
    if not match:
        if not text.strip():
            raise UserError(f"{text!r} is no folder; name a folder here, or host:path")
        return Place("", str(Path(text).expanduser().resolve()))
    host, path = match[1], match[2]
    if host.startswith("-") or path.startswith("-") or re.search(r"\s|\0", host):
        raise UserError(f"{text!r} is no host:path; write me@login:runs, or ./{text} for a folder here")
    if path.startswith("//"):
        raise UserError(f"{host}://...: no place for runs; write me@login:runs, a folder here, or mlflow:URI as DEST")
    if not path:
        raise UserError(f"{text!r} names no folder; write {host}:runs")
    return Place(host, path)


class End:
    """One runs folder as the agent shows it. `moved` counts the bytes of the requests and answers."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.moved = 0
        self.root = ""
        self.host = ""
        self.user = ""

    def call(self, op: str, payload: bytes = b"", **fields: Any) -> tuple[dict[str, Any], bytes]:
        """The answer to one request. Raises OSError as the other side met it, and Unreachable."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the folder; what was sent is there."""

    def hello(self) -> None:
        told, _ = self.call("hello")
        self.root, self.host, self.user = told["root"], told["host"], told["user"]

    def read(self, path: str, at: int, size: int, fingerprint: bool = False) -> tuple[dict[str, Any], bytes]:
        return self.call("read", path=path, at=at, size=size, print=fingerprint)

    def sum(self, path: str, size: int) -> str | None:
        told: str | None = self.call("sum", path=path, size=size)[0]["sum"]
        return told

    def sums(self, files: Mapping[str, int]) -> dict[str, str | None]:
        """SHA-256 of the first bytes of many files, so many as are given; None where a file has fewer."""
        found: dict[str, str | None] = {}
        for some in portions(files):
            asked = json.dumps([[path, files[path]] for path in some]).encode()
            found |= dict(zip(some, json.loads(self.call("sums", asked)[1]), strict=True))
        return found

    def sizes(self, files: Sequence[str]) -> dict[str, int | None]:
        """Size of each file; None of one that is not there."""
        told = self.call("sizes", zlib.compress(json.dumps(list(files)).encode()))[1]
        return dict(zip(files, json.loads(zlib.decompress(told)), strict=True))

    def marks(self, runs: Sequence[str]) -> dict[str, list[str] | None]:
        """What tells each of these runs from another of its name; None of one that is not there."""
        told = self.call("marks", json.dumps(list(runs)).encode())[1]
        return dict(json.loads(zlib.decompress(told)))

    def look(self, run: str) -> dict[str, int]:
        """Size of each file under the run's folder of event files, by its path in the run."""
        return dict(json.loads(self.call("look", run=run)[1]))

    def load(self, folder: str) -> dict[str, str]:
        """Text of each .json file in a folder."""
        return dict(json.loads(zlib.decompress(self.call("load", path=folder)[1])))

    def save(self, path: str, text: str) -> None:
        self.call("save", text.encode(), path=path)

    def move(self, path: str, to: str) -> None:
        self.call("move", path=path, to=to)


class LocalEnd(End):
    """A runs folder here."""

    def __init__(self, place: Place, create: bool = False) -> None:
        super().__init__(place)
        self._store = agent.Store(place.path, names(), create)
        self.hello()

    def call(self, op: str, payload: bytes = b"", **fields: Any) -> tuple[dict[str, Any], bytes]:
        try:
            return self._store.answer({"op": op, **fields}, payload)
        except agent.Refused as error:
            raise UserError(str(error)) from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._shown(fields)) from None

    def _shown(self, fields: dict[str, Any]) -> str:
        return str(Path(self._store.root, str(fields.get("path", ""))))

    def close(self) -> None:
        self._store.do_unlock({}, b"")


class RemoteEnd(End):
    """A runs folder on another machine."""

    def __init__(self, place: Place, create: bool = False, batch: bool = False) -> None:
        """`batch`: nobody is there who could type a password. Raises Unreachable, UserError."""
        super().__init__(place)
        self._first = {"root": place.path, "names": names(), "create": create, "idle_s": IDLE_S}
        self.ssh = ssh_command(place.host, batch)
        source = zlib.compress(importlib.resources.files("hpc.logs").joinpath("agent.py").read_bytes(), 9)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        self._process = subprocess.Popen(
            [*self.ssh, "--", _bare(place.host), _bootstrap(len(source))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )
        try:
            self._send(source)
            self._skip_chatter()
            self.hello()
        except BaseException:
            self.close()
            raise

    def call(self, op: str, payload: bytes = b"", **fields: Any) -> tuple[dict[str, Any], bytes]:
        request = json.dumps({"op": op, **fields, **self._first}).encode()
        self._first = {}
        self._send(struct.pack(">II", len(request), len(payload)) + request + payload)
        length, more = struct.unpack(">II", self._receive(8))
        told = json.loads(self._receive(length))
        data = self._receive(more)
        if "error" in told:
            shown = f"{self.place.host}:{fields.get('path', self.place.path)}"
            if not told["errno"]:
                raise UserError(f"{shown}: {told['error']}")
            raise OSError(told["errno"], told["error"], shown)
        return told, data

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with suppress(OSError):
                    stream.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _send(self, data: bytes) -> None:
        assert self._process.stdin
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._process.stdin.write(rest) :]
        except OSError:
            raise self._lost() from None
        self.moved += len(data)

    def _receive(self, size: int) -> bytes:
        assert self._process.stdout
        parts, left = [], size
        while left:
            part = self._process.stdout.read(min(left, 1 << 20))
            if not part:
                raise self._lost()
            parts.append(part)
            left -= len(part)
        self.moved += size
        return b"".join(parts)

    def _skip_chatter(self) -> None:
        seen = b""
        while not seen.endswith(agent.MARK):
            if len(seen) > _MOST_CHATTER:
                raise Unreachable(f"{self.place.host} answers with something else than python3: {seen[:60]!r}")
            seen += self._receive(1)

    def _lost(self) -> Unreachable:
        """Why the session ended, in the last words of ssh or of the other machine."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        words = lines[-1] if lines else "the connection was lost"
        if self._process.returncode == 127 or "not found" in words:
            words = f"no python3 there (3.6 or newer is needed): {words}"
        return Unreachable(f"{self.place.host} cannot be had: {words}")


def portions(files: Mapping[str, int]) -> Iterator[list[str]]:
    """Files that are summed in one request: bounded in number and bytes, but for one that is larger alone."""
    some: list[str] = []
    size = 0
    for path, more in files.items():
        if some and (len(some) == _SUMMED_FILES or size + more > _SUMMED_BYTES):
            yield some
            some, size = [], 0
        some.append(path)
        size += more
    if some:
        yield some


def end_of(place: Place, create: bool = False, batch: bool = False) -> End:
    """Open one end; `create` makes its folder. Raises UserError where it is not there, and Unreachable."""
    try:
        return RemoteEnd(place, create, batch) if place.host else LocalEnd(place, create)
    except FileNotFoundError as error:
        raise UserError(f"{place}: {error.strerror}; 'hpc ls --runs FOLDER' shows what a folder holds") from None
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{place}: a file is in the way; name a folder") from None


def same_folder(one: End, other: End, aside: str) -> bool:
    """Whether two ends are one folder, whatever hosts, links and mounts lie between.

    What is written through one is looked for through the other. `aside`: a folder in `one` for this alone. Raises
    OSError where it cannot be written.
    """
    token = secrets.token_hex(16)
    one.save(f"{aside}/{token}", token)
    try:
        return other.sum(f"{aside}/{token}", len(token)) is not None
    finally:
        one.call("fresh", path=aside)


def names() -> dict[str, str]:
    """The names in a run folder that the agent must know."""
    run = RunDir("run")
    known = {"experiment": run.experiment, "result": run.result, "state": run.state, "submit": run.submit}
    folders = {"tb": run.tensorboard, "logs": run.logs, "events": run.events}
    return {"rows": ROWS, **{word: path.name for word, path in (known | folders).items()}}


def _bootstrap(size: int) -> str:
    """What the other machine's shell, whatever it is, starts: python3 that runs the source it gets on its input."""
    loop = "while n:\\n b=os.read(0,n);n-=len(b);d.append(b) if b else sys.exit(1)"
    read = f"import sys,os,zlib;d=[];n={size};exec('{loop}')"
    old = "sys.version_info<(3,6) and sys.exit('python3 is older than 3.6')"
    program = f"{read};{old};exec(compile(zlib.decompress(bytes().join(d)),'agent','exec'))"
    shell = f"p=$(command -v python3||echo /usr/libexec/platform-python);exec $p -I -c {shlex.quote(program)}"
    return f"sh -c {shlex.quote(shell)}"


def _bare(host: str) -> str:
    """[::1] as ssh wants it."""
    return re.sub(r"\[([^\]]*)\]$", r"\1", host)


def ssh_command(host: str, batch: bool = False) -> list[str]:
    """ssh with a connection that later rounds share (a password or second factor is asked for once).

    What the user's ssh config says of a shared connection, timeouts and keep-alives is kept. HPC_SSH names another
    ssh, with options.
    """
    command = shlex.split(os.environ.get("HPC_SSH", "ssh"))
    known = _configured(command, _bare(host))
    options: dict[str, str] = {}
    if known.get("controlpath", "none") == "none":
        options |= {"ControlMaster": "auto", "ControlPath": f"{_control_folder()}/%C", "ControlPersist": _PERSIST}
    if known.get("connecttimeout", "none") == "none":
        options["ConnectTimeout"] = "20"
    if known.get("serveraliveinterval", "0") == "0":
        options |= {"ServerAliveInterval": "15", "ServerAliveCountMax": "3"}
    if batch:
        options["BatchMode"] = "yes"
    return [*command, "-T", *(part for key, value in options.items() for part in ("-o", f"{key}={value}"))]


def _configured(command: list[str], host: str) -> dict[str, str]:
    """What ssh would do for this host, by `ssh -G`, which connects to nothing. Raises UserError without ssh."""
    try:
        told = subprocess.run([*command, "-G", "--", host], capture_output=True, text=True, check=False, timeout=20)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not installed here; install OpenSSH, or name folders of this machine"
        ) from None
    pairs = (line.partition(" ") for line in told.stdout.splitlines())
    return {key: value for key, _, value in pairs}


def _control_folder() -> Path:
    """A folder of ours alone for the sockets of shared connections, short: a socket's path has 104 bytes."""
    cache = Path(os.environ.get("XDG_RUNTIME_DIR") or Path.home() / ".cache") / "hpc"
    if len(os.fsencode(cache)) > 50:
        cache = Path(tempfile.gettempdir()) / f"hpc-ssh-{os.getuid()}"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = cache.lstat()
    if info.st_uid != os.getuid() or not cache.is_dir() or cache.is_symlink():
        raise UserError(f"{cache}: is not yours alone; remove it, or set XDG_RUNTIME_DIR")
    cache.chmod(0o700)
    return cache


def here() -> str:
    """This machine as others name it: me@host."""
    return f"{getpass.getuser()}@{socket.gethostname()}"
