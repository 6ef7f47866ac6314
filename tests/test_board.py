"""`hpc board`: the real TensorBoard, asked over HTTP for what it shows, and gone without a trace when told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from hpc.board import address, is_loopback, serve
from hpc.errors import UserError
from hpc.logs.records import frame
from hpc.rundir import all_runs

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a49444154789c63f80f00010101001bb6ee560000000049454e44ae426082"
)
PICTURES, SCALARS = 14, 1500
WAIT_S = 60


def make_run(path: Path, steps: int = 0) -> Path:
    """A run as 'hpc sync' leaves it: no code, no checkpoints."""
    (path / "tb").mkdir(parents=True)
    (path / "experiment.yaml").write_text("name: a\n")
    events = [Event(wall_time=1.7e9, file_version="brain.Event:2")]
    image = Summary.Image(height=1, width=1, colorspace=1, encoded_image_string=PIXEL)
    for step in range(steps):
        values = [Summary.Value(tag="loss", simple_value=step)]
        if step < PICTURES:
            values.append(Summary.Value(tag="confusion", image=image))
        events.append(Event(wall_time=1.7e9 + step, step=step, summary=Summary(value=values)))
    name = "events.out.tfevents.1700000000.node.1.0.g001"
    (path / "tb" / name).write_bytes(b"".join(frame(event.SerializeToString()) for event in events))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("board") / "runs"
    make_run(folder / "first-11111111", SCALARS)
    make_run(folder / "second-22222222", 3)
    make_run(folder / "sweep-33333333" / "row-1", 3)
    (folder / "sweep-33333333" / "rows.txt").write_text("row-1\n")
    return folder


@contextmanager
def board(runs: Path, temporary: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`hpc board` in a process group of its own, and the address it prints."""
    command = [sys.executable, "-m", "hpc.cli", "board", "--runs", str(runs), *options]
    temporary.mkdir(exist_ok=True)
    env = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout
        yield process, process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate()


def ask(url: str, what: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{url}/data/{what}?{urlencode(query)}", timeout=WAIT_S) as answer:
        return json.load(answer)


def wait_for(question: Callable[[], Any], wanted: Callable[[Any], bool]) -> Any:
    end, found = time.monotonic() + WAIT_S, None
    while time.monotonic() < end:
        try:
            found = question()
            if wanted(found):
                return found
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"not in {WAIT_S} s: {found!r:.300}")


def group(of: int) -> list[int]:
    """Processes below this one, those of other sessions too."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in map(str.split, listed.splitlines())}
    found = [of]
    for one in found:
        found += [pid for pid, parent in parents.items() if parent == one]
    return found[1:]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def ended(process: subprocess.Popen[str], number: int) -> None:
    """By this signal, with code 0, and with every process below."""
    below = group(process.pid)
    assert below
    process.send_signal(number)
    assert process.wait(WAIT_S) == 0
    assert not [pid for pid in below if alive(pid)]


def test_everything_is_kept_and_only_this_address_answers(runs: Path, tmp_path: Path) -> None:
    with board(runs, tmp_path / "tmp") as (process, url):
        names = wait_for(lambda: ask(url, "runs"), lambda found: len(found) == 3)
        assert sorted(names) == ["first-11111111", "second-22222222", "sweep-33333333/row-1"]
        first = names[names.index("first-11111111")]
        scalars = wait_for(
            lambda: ask(url, "plugin/scalars/scalars", run=first, tag="loss"), lambda found: len(found) == SCALARS
        )
        assert [value for _, _, value in scalars] == list(range(SCALARS))
        assert len(ask(url, "plugin/images/images", run=first, tag="confusion", sample="0")) == PICTURES > 10
        _nobody_else_is_answered(int(url.rpartition(":")[2]))
        late = runs / "late-44444444"
        try:
            make_run(late, 3)
            wait_for(lambda: ask(url, "runs"), lambda found: late.name in found)
        finally:
            shutil.rmtree(late)
        assert any("tensorboard_data_server" in Path(f"/proc/{pid}/cmdline").read_text() for pid in group(process.pid))
        ended(process, signal.SIGTERM)
        assert not list((tmp_path / "tmp").glob("hpc-board-*"))
        assert process.stderr and "TensorBoard has no login: every user of this machine" in process.stderr.read()


def _nobody_else_is_answered(port: int) -> None:
    """Neither another loopback address nor that of the machine's network, where it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            outside = probe.getsockname()[0]
        except OSError:
            outside = "127.0.0.3"
    for host in {"127.0.0.2", outside}:
        with pytest.raises(OSError):
            socket.create_connection((host, port), timeout=5).close()


def test_chosen_runs_alone_and_ctrl_c(runs: Path, tmp_path: Path) -> None:
    with board(runs, tmp_path / "tmp", "second", "sweep-33333333") as (process, url):
        names = wait_for(lambda: ask(url, "runs"), lambda found: len(found) >= 2)
        assert sorted(names) == ["second-22222222", "sweep-33333333/row-1"]
        ended(process, signal.SIGINT)
    assert not list((tmp_path / "tmp").glob("hpc-board-*"))


def test_a_killed_board_leaves_no_server(runs: Path, tmp_path: Path) -> None:
    with board(runs, tmp_path / "tmp", "second") as (process, _):
        below = wait_for(lambda: group(process.pid), bool)
        process.kill()
        wait_for(lambda: [pid for pid in below if alive(pid)], lambda found: not found)


def refusal(folder: Path, port: int = 0, host: str = "127.0.0.1") -> str:
    with pytest.raises(UserError) as told:
        serve(lambda: all_runs(folder), folder, port, host, False)
    return str(told.value)


def test_an_address_of_others_needs_a_second_word(runs: Path) -> None:
    command = [sys.executable, "-m", "hpc.cli", "board", "--runs", str(runs), "--bind_all"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode, done.stdout) == (2, "")
    for told in (done.stderr, refusal(runs, host="0.0.0.0")):
        assert told.startswith("0.0.0.0: TensorBoard has no login") and "--open-to-others" in told and "ssh -L" in told


def test_refusals_name_the_value_and_the_remedy(runs: Path, tmp_path: Path) -> None:
    assert "no runs yet" in refusal(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: Address already in use; --port 0" in refusal(runs, port)
    assert "127.0.0.1:99999: " in refusal(runs, 99999)


def test_the_line_for_another_machine_names_this_one() -> None:
    assert address("::1", 6006).startswith("http://[::1]:6006\nfrom elsewhere:  ssh -L 6006:[::1]:6006 ")
    line = address("127.0.0.1", 6006).splitlines()[1]
    assert "ssh -L 6006:127.0.0.1:6006 " in line and line.endswith(f"@{socket.gethostname()}")
    assert [is_loopback(host) for host in ("localhost", "127.0.0.9", "::1", "0.0.0.0", "10.1.2.3", "node1")] == [
        True, True, True, False, False, False
    ]  # fmt: skip
