"""`hpc train`: what becomes of a run whose terminal closes, whose command is killed, or whose output nobody reads."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc.rundir import RunDir
from tests import scripted

COMMAND = "import sys; from hpc import foreground, rundir; sys.exit(foreground.train(rundir.RunDir(sys.argv[1])))"


@pytest.fixture(autouse=True)
def _hears_hangup() -> Iterator[None]:
    """However the tests were started: by nohup, say."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def start(run: RunDir, *before: str, script: bool = False, **files: int) -> subprocess.Popen[bytes]:
    """`hpc train`, or the script by itself."""
    words = ["bash", str(run.script)] if script else [sys.executable, "-c", COMMAND, str(run.path)]
    return subprocess.Popen([*before, *words], **files)  # type: ignore[call-overload, no-any-return]


def until(told: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while not (found := told()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def log(run: RunDir) -> str:
    return "".join(path.read_text() for path in run.logs.glob("*_0_log.out"))


def rank(run: RunDir) -> int:
    """The process of the rank that waits."""
    words = until(lambda: log(run).rpartition("waiting ")[2].split("\n")[0] if "waiting" in log(run) else "")
    return int(words)


def ends(run: RunDir) -> list[dict[str, object]]:
    return [event for event in run.read_events() if event["event"] == "end"]


def test_a_terminal_that_closes_stops_the_run_as_ctrl_c_does(tmp_path: Path) -> None:
    run = scripted.make(tmp_path, "await SIGTERM, stop", "done", cluster="local")
    terminal, tty = os.openpty()
    process = start(run, "setsid", "--ctty", stdin=tty, stdout=tty, stderr=tty)
    os.close(tty)
    rank(run)
    os.close(terminal)  # the kernel sends HUP, and writing fails from here on
    assert process.wait(60) == 75
    assert [(end["again"], end["code"]) for end in ends(run)] == [(False, 75)]
    assert "heard SIGTERM" in log(run)
    assert log(run).endswith("not started again\n")


def test_a_terminal_that_closes_stops_a_script_that_was_typed_there(tmp_path: Path) -> None:
    run = scripted.make(tmp_path, "await SIGTERM, stop", "done", cluster="local")
    terminal, tty = os.openpty()
    process = start(run, "setsid", "--ctty", script=True, stdin=tty, stdout=tty, stderr=tty)
    os.close(tty)
    shown = b""
    while not re.search(rb"waiting \d+\r\n", shown):  # whole: a rank that cannot print has crashed
        shown += os.read(terminal, 4096)
    os.close(terminal)
    assert process.wait(60) == 75
    assert [(end["again"], end["code"]) for end in ends(run)] == [(False, 75)]


def test_a_command_that_is_killed_leaves_a_run_that_starts_again(tmp_path: Path) -> None:
    run = scripted.make(tmp_path, "checkpoint 5, await SIGTERM", "done", cluster="local")
    process = start(run, stdout=subprocess.PIPE)
    waiting = rank(run)
    process.kill()
    process.communicate()
    os.kill(waiting, signal.SIGKILL)
    until(run.result.exists)
    until(lambda: len(ends(run)) == 2)
    assert [end["again"] for end in ends(run)] == [True, False]
    assert "starting again" in log(run)


def test_a_reader_that_leaves_costs_the_run_nothing(tmp_path: Path) -> None:
    run = scripted.make(tmp_path, "await SIGTERM, checkpoint 5, done", cluster="local")
    process = start(run, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    os.kill(rank(run), signal.SIGTERM)
    assert process.wait(60) == 0
    assert run.result.exists()
    assert "heard SIGTERM" in log(run)


def test_nohup_keeps_a_run_alive_without_its_terminal(tmp_path: Path) -> None:
    run = scripted.make(tmp_path, "await SIGTERM, checkpoint 5, done", cluster="local")
    process = start(run, "nohup", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    waiting = rank(run)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    os.kill(waiting, signal.SIGTERM)
    assert process.wait(60) == 0
    assert run.result.exists()
