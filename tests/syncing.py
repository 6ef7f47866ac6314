"""What the tests of sync share: runs with event files of known steps, and what a real TensorBoard shows of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Self

import pytest
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

from hpc.logs.records import frame
from hpc.rundir import RunDir

ROOT = Path(__file__).parents[1]
NEEDS_SETPRIV = pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="takes root's rights away")
_RIGHTS = "-dac_override,-dac_read_search,-fowner"
WITHOUT_RIGHTS = ("setpriv", "--bounding-set", _RIGHTS, "--inh-caps", _RIGHTS)
"""In front of a command: root is bound by permissions then."""

FIRST, SECOND, THIRD = (f"events.out.tfevents.17000{k}0000.node{k}.7.0.g00{k}" for k in (1, 2, 3))


BEGAN = time.time() // 1 - 3600
"""TensorBoard's Python loader reads no file again whose newest record is a day old."""


def scalar(step: int, value: float, tag: str = "loss", when: float | None = None) -> bytes:
    """One record."""
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
    event = Event(wall_time=when or BEGAN + step / 100, step=step, summary=summary)
    return frame(event.SerializeToString())


def attempt(start: int, stop: int, number: int, **more: float) -> bytes:
    """The event file of one attempt: purge_step is its first step; loss is step + number / 10."""
    head = [Event(wall_time=BEGAN, step=start, file_version="brain.Event:2")]
    head += [Event(wall_time=BEGAN, step=start, session_log=SessionLog(status=SessionLog.START))]
    records = [frame(event.SerializeToString()) for event in head]
    return b"".join([*records, *(scalar(step, step + number / 10, **more) for step in range(start, stop))])


def make_run(runs: Path, name: str = "tiny-1a2b3c4d", **files: bytes) -> RunDir:
    """A run with event files; keywords are 'first', 'second', 'third'."""
    run = RunDir(runs / name)
    run.tensorboard.mkdir(parents=True)
    run.experiment.write_text("name: tiny\n")
    for key, content in files.items():
        write(run, {"first": FIRST, "second": SECOND, "third": THIRD}[key], content)
    return run


def write(run: RunDir, name: str, content: bytes, old: bool = True) -> Path:
    """An event file of the run; `old`: it has not changed for an hour."""
    path = run.tensorboard / name
    path.write_bytes(content)
    if old:
        age(path)
    return path


def append(path: Path, content: bytes, old: bool = True) -> None:
    with path.open("ab") as file:
        file.write(content)
    if old:
        age(path)


def age(path: Path, seconds: float = 3600.0) -> None:
    when = time.time() - seconds
    os.utime(path, (when, when))


def visible(folder: Path) -> dict[str, bytes]:
    """What TensorBoard takes for event files under a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*tfevents*"))}


class Board:
    """A real TensorBoard on a folder; `fast` is its default loader."""

    def __init__(self, folder: Path, fast: bool = True) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
        command += ["--port", str(self._port), "--reload_interval", "1", "--samples_per_plugin", "scalars=100000"]
        command += ["--load_fast", "true" if fast else "false", "--reload_multifile", "true"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)  # the data server is its child
        self._process.wait(20)

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/data/{path}", timeout=10) as answer:
            return json.loads(answer.read())

    def points(self, run: str, tag: str = "loss") -> list[tuple[int, float]]:
        """(step, value) as the page shows them; nothing where it does not know the run yet."""
        query = urllib.parse.urlencode({"run": run, "tag": tag})
        try:
            found = self._get(f"plugin/scalars/scalars?{query}")
        except (OSError, urllib.error.URLError):
            return []
        return [(int(step), round(value, 3)) for _, step, value in found]

    def wait(self, run: str, expected: list[tuple[int, float]], seconds: float = 60.0) -> list[list[tuple[int, float]]]:
        """Wait for exactly these points; every different view that was seen on the way."""
        end, seen = time.monotonic() + seconds, [[(-1, 0.0)]]
        while time.monotonic() < end:
            if (points := self.points(run)) != seen[-1]:
                seen.append(points)
            if points == expected:
                return seen[1:]
            time.sleep(0.2)
        raise AssertionError(f"TensorBoard shows {len(seen[-1])} points, not {len(expected)}: {seen[-1][-5:]}")


def truth(*spans: tuple[int, int, int]) -> list[tuple[int, float]]:
    """The points of attempts (first step, end, number)."""
    return [(step, round(step + number / 10, 3)) for start, stop, number in spans for step in range(start, stop)]
