"""hpc sync over a real sshd: pull and push, killed at random bytes under an open TensorBoard, lost and found hosts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hpc.errors import UserError
from hpc.logs import positions
from hpc.logs.ends import RemoteEnd, Unreachable, end_of, place_of, ssh_command
from hpc.logs.sync import Busy, Carried, Round, Session
from tests.sshd import MISSING, Sshd
from tests.sync_killed import STEPS, life
from tests.syncing import FIRST, SECOND, Board, append, attempt, make_run, scalar, truth, visible, write

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
ROOT = Path(__file__).parents[1]
NAME = "tiny-1a2b3c4d"
ROUNDS = 500 if os.environ.get("HPC_SOAK") == "1" else 50


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    before = dict(os.environ)
    with Sshd(tmp_path_factory.mktemp("ssh")) as started:
        os.environ.update(started.env)
        yield started
    os.environ.clear()
    os.environ.update(before)


def sync(source: str, dest: str, *more: str) -> Round:
    session = Session(place_of(source), place_of(dest), Carried(more), batch=True)
    try:
        return session.round()
    finally:
        session.close()


def hpc(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_killed_again_and_again_it_ends_equal_and_tensorboard_sees_every_step_once(
    server: Sshd, tmp_path: Path
) -> None:
    runs, home = tmp_path / "runs", tmp_path / "home"
    run = make_run(runs)
    run.metrics.write_text("{}\n")
    home.mkdir()
    source = f"{server.host}:{runs}"
    whole = truth((0, STEPS - 10, 1), (STEPS - 10, 2 * STEPS - 10, 2), (2 * STEPS - 10, 3 * STEPS, 3))
    command = [sys.executable, "-m", "tests.sync_killed", source, str(home), str(ROUNDS), "7"]
    with Board(home) as board, subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as killed:
        views: list[list[tuple[int, float]]] = []
        while killed.poll() is None:
            views.append(board.points(f"{NAME}/tb"))
            time.sleep(0.2)
        ends = json.loads(killed.stdout.read()) if killed.stdout else {}
        assert killed.returncode == 0, ends
        hit = {kind: ends.get(f"{kind}: killed", 0) for kind in ("write", "ask", "answer", "moment")}
        assert all(hit.values()), f"in the middle of a write, a request, an answer, and at some moment: {ends}"
        assert sum(hit.values()) >= 0.9 * ROUNDS, f"nearly all died at work, by SIGKILL: {ends}"
        for name in life():
            os.utime(run.tensorboard / name, (1.7e9, 1.7e9))
        sync(source, str(home))
        board.wait(f"{NAME}/tb", whole)
    assert visible(home) == visible(runs)
    for points in filter(None, views):
        steps = [step for step, _ in points]
        assert steps == list(range(len(steps))), "every step once, and none is missing"
    assert len({len(points) for points in views}) > 2, "it was looked at while it grew"


def test_the_same_folder_through_another_host_is_refused(server: Sshd, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    make_run(runs, first=attempt(0, 9, 1))
    for ends in ((str(runs), f"{server.host}:{runs}"), (f"{server.host}:{runs}", str(runs))):
        with pytest.raises(UserError, match="are one folder"):
            sync(*ends)


@pytest.mark.parametrize("fast", [True, False], ids=["default loader", "python loader"])
def test_an_open_tensorboard_is_right_after_late_replaced_and_shrunk_files(fast: bool, tmp_path: Path) -> None:
    runs, home = tmp_path / "runs", tmp_path / "home"
    run = make_run(runs, first=attempt(0, 30, 1), second=attempt(60, 90, 2))
    sync(str(runs), str(home))
    with Board(home, fast) as board:
        shown = f"{NAME}/tb"
        board.wait(shown, truth((0, 30, 1), (60, 90, 2)))
        write(run, FIRST, attempt(0, 60, 1))
        sync(str(runs), str(home))
        board.wait(shown, truth((0, 60, 1), (60, 90, 2)))
        append(run.tensorboard / SECOND, b"".join(scalar(step, step + 0.2) for step in range(90, 95)))
        sync(str(runs), str(home))
        board.wait(shown, truth((0, 60, 1), (60, 95, 2)))
        write(run, FIRST, attempt(0, 60, 5))
        sync(str(runs), str(home))
        board.wait(shown, truth((0, 60, 5), (60, 95, 2)))
        write(run, FIRST, attempt(0, 50, 5))
        sync(str(runs), str(home))
        append(run.tensorboard / SECOND, scalar(95, 95.2))
        sync(str(runs), str(home))
        points = board.wait(shown, truth((0, 60, 5), (60, 96, 2)))[-1]
        assert len(points) == 96, "what was shown and then cut stays till the next start"
    with Board(home, fast) as board:
        board.wait(f"{NAME}/tb", truth((0, 50, 5), (60, 96, 2)))


def test_bytes_moved_are_bytes_new(server: Sshd, tmp_path: Path) -> None:
    runs, home = tmp_path / "runs", tmp_path / "home"
    content = attempt(0, 30_000, 1)
    run = make_run(runs, first=content)
    for number in range(20):
        make_run(runs, f"other-{number:08x}", first=attempt(0, 20, 1))
    session = Session(place_of(f"{server.host}:{runs}"), place_of(str(home)), Carried(), batch=True)
    try:
        session.round()
        new = attempt(30_000, 60_000, 1)
        append(run.tensorboard / FIRST, new)
        done = session.round()
        assert done.size == len(new) and len(new) <= done.moved <= 1.01 * len(new), (done.moved, len(new))
        assert session.round().moved < 0.01 * len(new)
    finally:
        session.close()
    append(run.tensorboard / FIRST, new)
    session = Session(place_of(f"{server.host}:{runs}"), place_of(str(home)), Carried(), batch=True)
    session.round()
    session.close()
    assert session.source.moved <= 1.01 * len(new), "a session of its own, with the agent that is sent"
    assert visible(home) == visible(runs)


def test_push_and_pull_carry_the_same(server: Sshd, tmp_path: Path) -> None:
    runs = tmp_path / "runs with ü and 'quotes'"
    run = make_run(runs, first=attempt(0, 30, 1), second=attempt(30, 40, 2))
    (run.path / "figures").mkdir()
    (run.path / "figures" / "confusion matrix $x.png").write_bytes(b"png")
    run.result.write_text("{}")
    pushed, pulled = tmp_path / "pushed $HOME", tmp_path / "pulled;x"
    for source, dest in ((str(runs), f"{server.host}:{pushed}"), (f"{server.host}:{runs}", str(pulled))):
        assert sync(source, dest).problems == []
        assert sync(source, dest).others == 0
    for folder in (pushed, pulled):
        assert visible(folder) == visible(runs)
        assert (folder / NAME / "figures" / "confusion matrix $x.png").read_bytes() == b"png"
    found = positions.read(runs)
    assert [one.complete for one in found] == [True, True]
    assert {one.sink for one in found} >= {f"{server.host}:{pushed}"}


def test_a_remote_destination_has_one_writer(server: Sshd, tmp_path: Path) -> None:
    make_run(tmp_path / "runs", first=attempt(0, 3, 1))
    dest = f"{server.host}:{tmp_path / 'home'}"
    session = Session(place_of(str(tmp_path / "runs")), place_of(dest), Carried(), batch=True)
    with pytest.raises(Busy):
        sync(str(tmp_path / "runs"), dest)
    session.close()
    end = time.monotonic() + 20
    while True:  # the far end goes when its input ends
        try:
            sync(str(tmp_path / "runs"), dest)
            break
        except Busy:
            assert time.monotonic() < end
            time.sleep(0.1)


def test_a_far_end_without_python_or_with_a_chatty_login(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "runs", first=attempt(0, 3, 1))
    source = f"{server.host}:{tmp_path / 'runs'}"
    wrapper = tmp_path / "ssh"
    real = os.environ["HPC_SSH"]
    for words, told in (("PATH=/nowhere", "no python3 there"), ("echo hello;echo you;", "")):
        changed = (
            f'last="{words} ${{last}}"'
            if words.startswith("echo")
            else f'last="/usr/bin/env -i {words} /bin/${{last}}"'
        )
        lines = ["#!/bin/bash", "for last; do :; done", 'if [ "$1" = -G ]; then :; fi']
        lines += [
            'case "$last" in sh\\ -c*) set -- "${@:1:$#-1}";',
            changed,
            f'exec {real} "$@" "$last";; esac',
            f'exec {real} "$@"',
        ]
        wrapper.write_text("\n".join(lines) + "\n")
        wrapper.chmod(0o755)
        monkeypatch.setenv("HPC_SSH", f"'{wrapper}'")
        if told:
            with pytest.raises(Unreachable, match=told):
                end_of(place_of(source), batch=True)
        else:
            end = end_of(place_of(source), batch=True)
            assert isinstance(end, RemoteEnd) and end.root == str(tmp_path / "runs")
            end.close()


def test_a_host_that_is_down_and_comes_back(server: Sshd, tmp_path: Path) -> None:
    runs, home = tmp_path / "runs", tmp_path / "home"
    run = make_run(runs, first=attempt(0, 3, 1))
    source = f"{server.host}:{runs}"
    command = [sys.executable, "-u", "-m", "hpc.cli", "sync", source, str(home), "--watch", "--every", "1s"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout
        assert "5 records" in watching.stdout.readline()
        server.stop()
        done = hpc("sync", source, str(tmp_path / "other"))
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "cannot be had" in done.stderr, done
        done = hpc("sync", source, str(tmp_path / "other"), "--from-cron")
        assert (done.returncode, done.stdout) == (1, "") and "cannot be had" in done.stderr
        while "again in" not in (line := watching.stdout.readline()):
            assert line
        append(run.tensorboard / FIRST, scalar(3, 3.1))
        server.start()
        while "1 records" not in (line := watching.stdout.readline()):
            assert line
        _cut(server)
        while "again in" not in (line := watching.stdout.readline()):
            assert line
        append(run.tensorboard / FIRST, scalar(4, 4.1))
        while "1 records" not in (line := watching.stdout.readline()):
            assert line
        watching.send_signal(2)
        assert watching.wait(20) == 0
    assert visible(home) == visible(runs)


def test_stopped_in_the_middle_of_rsync_it_leaves_nothing_at_work(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, home, slow = tmp_path / "runs", tmp_path / "home", tmp_path / "bin" / "rsync"
    run = make_run(runs, first=attempt(0, 3, 1))
    run.logs.mkdir()
    (run.logs / "1_0_log.out").write_bytes(os.urandom(4_000_000))
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\nexec {shutil.which("rsync")} --bwlimit=500 "$@"\n')
    slow.chmod(0o755)
    source = f"{server.host}:{runs}"
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
        done = hpc("sync", source, str(home), "--from-cron", "--at-most", "2s")
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(home).encode() in _content(path)]
    assert (done.returncode, done.stdout, left) == (1, "", []) and "stopped after 2 s" in done.stderr
    assert visible(home) == visible(runs) and not (home / NAME / "logs" / "1_0_log.out").exists()
    assert hpc("sync", source, str(home)).returncode == 0
    assert (home / NAME / "logs" / "1_0_log.out").read_bytes() == (run.logs / "1_0_log.out").read_bytes()


def _cut(server: Sshd) -> None:
    """The connections die, and the server goes on."""
    assert server._process
    told = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    for pid, parent in (map(int, line.split()) for line in told.splitlines()):
        if parent == server._process.pid:
            os.kill(pid, signal.SIGKILL)


def _content(path: Path) -> bytes:
    with suppress(OSError):  # a process that has ended
        return path.read_bytes()
    return b""


def test_a_shared_connection_of_the_users_own_is_used(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert any(part.startswith("ControlPath=") for part in ssh_command(server.host))
    config = tmp_path / "config"
    config.write_text(f"{server.config.read_text()}    ControlPath /tmp/mine-%C\n    ServerAliveInterval 7\n")
    monkeypatch.setenv("HPC_SSH", f"ssh -F '{config}'")
    command = ssh_command(server.host, batch=True)
    assert not [part for part in command if part.startswith(("Control", "ServerAlive"))]
    assert "BatchMode=yes" in command


def test_nothing_secret_and_nothing_of_ssh_is_left_in_runs(server: Sshd, tmp_path: Path) -> None:
    runs, home = tmp_path / "runs", tmp_path / "home"
    make_run(runs, first=attempt(0, 3, 1))
    sync(f"{server.host}:{runs}", str(home))
    found = b"".join(path.read_bytes() for folder in (runs, home) for path in folder.rglob("*") if path.is_file())
    assert b"PRIVATE" not in found and b"ssh_config" not in found
    assert oct(next((server.sockets / "hpc").parent.glob("hpc")).stat().st_mode)[-3:] == "700"
