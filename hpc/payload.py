"""The carried payload: where jobs, models3d and datasets are, how a child runs from there, and its snapshot.

Only hpc and slurm_templates are installed. The root is HPC_ROOT; else the nearest parent of the working folder with
jobs/__init__.py; else the folder beside hpc.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, TextIO

import hpc
import slurm_templates
from hpc.errors import UserError
from hpc.parent import end_with_parent

_CARRIED = ("jobs", "models3d", "datasets")
_INSTALLED = (hpc, slurm_templates)
_IMPORT = re.compile(rb"^\s*(?:from|import)\s+\.?(\w+)", re.MULTILINE)
_COMMIT, _CHANGES = "commit.txt", "changes.diff"


def root() -> Path:
    """The folder that holds jobs, models3d and datasets. Raises UserError where there is none."""
    given = os.environ.get("HPC_ROOT")
    here = Path.cwd()
    candidates = [Path(given)] if given else [here, *here.parents, Path(hpc.__file__).resolve().parent.parent]
    for folder in candidates:
        if (folder / "jobs" / "__init__.py").is_file():
            return folder.resolve()
    looked = f"HPC_ROOT={given}" if given else f"{here} and its parents"
    raise UserError(f"no jobs/__init__.py in {looked}: work inside a checkout, or set HPC_ROOT to one")


def environment(folder: Path) -> dict[str, str]:
    """This environment with `folder` first on PYTHONPATH, and the working folder not on sys.path."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def child(module: str, arguments: Sequence[str], text: str | None = None, output: TextIO | None = None) -> int:
    """Run `python -m MODULE ARGUMENTS` from the root, its output ours, or all of it `output`'s; the exit code.

    128 + N where signal N ended it, as of a shell; SIGKILL says nothing itself, so that is said here. A terminal sends
    Ctrl-C to the child as well, so it has the time to end its work; SIGTERM is passed on, and sent where this process
    is killed: a command given again must not find the first one still at work. Raises KeyboardInterrupt when
    the child has not succeeded after a Ctrl-C.
    """
    command = [sys.executable, "-m", module, *arguments]
    given = None if text is None else subprocess.PIPE
    interrupted = threading.Event()
    with _heard(signal.SIGINT, interrupted.set):
        process = subprocess.Popen(
            command, env=environment(root()), stdin=given, text=True, stdout=output, preexec_fn=end_with_parent
        )
        with _heard(signal.SIGTERM, process.terminate):
            process.communicate(text)
    code = process.returncode
    if interrupted.is_set() and code:
        raise KeyboardInterrupt
    if code == -signal.SIGKILL:
        print(f"{module} was killed by SIGKILL: most often the memory of this machine or job was full", file=sys.stderr)
    return code if code >= 0 else 128 - code


@contextmanager
def _heard(number: signal.Signals, answer: Callable[[], None]) -> Iterator[None]:
    """The signal calls `answer` in place of what it did before; without effect in other threads than the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, lambda *_: answer())
    try:
        yield
    finally:
        signal.signal(number, before)


def ask(module: str, arguments: Sequence[str], text: str) -> subprocess.CompletedProcess[str]:
    """The same with `text` on its standard input, its output kept."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=environment(root()), input=text, text=True, capture_output=True, check=False)


def snapshot(target: Path) -> None:
    """Copy all five rooms, the installed packages' versions, the commit and what differs from it into `target`."""
    source = root()
    folders = [source / name for name in _CARRIED] + [Path(str(room.__file__)).resolve().parent for room in _INSTALLED]
    target.mkdir(parents=True)
    for folder in folders:
        shutil.copytree(folder, target / folder.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    versions = sorted(f"{d.name}=={d.version}" for d in distributions() if d.name)
    (target / "requirements.txt").write_text("\n".join(versions) + "\n")
    for name, command in ((_COMMIT, ("rev-parse", "HEAD")), (_CHANGES, ("diff", "HEAD"))):
        answer = _git(source, *command)
        if answer:
            (target / name).write_bytes(answer)


def own_code(code: Path, model: str) -> str:
    """8 hex digits of the user's own model `file:PATH:CLASS` in a snapshot, and of the modules beside that it imports.

    Empty where it is a model of another kind, or the code is not here.
    """
    named = re.fullmatch(r"file:.*/(own\d*)/([^/]+\.py):\w+", model)
    folder, waiting, texts = code / (named[1] if named else ""), [named[2]] if named else [], dict[str, bytes]()
    while waiting:
        name = waiting.pop()
        if name not in texts and (folder / name).is_file():
            texts[name] = (folder / name).read_bytes()
            waiting += [f"{module.decode()}.py" for module in _IMPORT.findall(texts[name])]
    told = b"\0".join(name.encode() + b"\0" + texts[name] for name in sorted(texts))
    return hashlib.sha256(told).hexdigest()[:8] if texts else ""


def commit(code: Path, events: Sequence[Mapping[str, Any]] = ()) -> str:
    """The commit of a snapshot, and whether it was changed; empty where that is not known.

    Where the snapshot is not here, as the run's newest attempt has told it: the code does not come home with the logs.
    """
    try:
        name = (code / _COMMIT).read_text(errors="replace").strip()
        return f"{name} with changes" if (code / _CHANGES).exists() else name
    except OSError:
        told = [str(event["commit"]) for event in events if event["event"] == "start" and event.get("commit")]
        return told[-1] if told else ""


def _git(folder: Path, *arguments: str) -> bytes:
    """What git answers, byte for byte (a difference may hold any encoding); empty where it cannot."""
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return b""
