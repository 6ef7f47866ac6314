"""Events on disks that are full, slow or broken: the training goes on, the files stay whole, what waited is written."""

import errno
import logging
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from hpc.logs import series
from hpc.logs.fsck import State, check
from hpc.rundir import RunDir
from jobs import events_writer
from jobs.event_file import VERSION, cut_back, scalars
from jobs.events_writer import EventsWriter
from jobs.renderer import Renderer
from jobs.spool import Spool
from jobs.tracking import Tracker
from tests.faults.shim import SYNCS, WRITES, Call, Shim


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(events_writer, "RETRY_S", 0.05)
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    return run


def steps(run: RunDir, tag: str = "a") -> list[int]:
    return [step for step, *_ in series.scalars(run.tensorboard).get(tag, [])]


def assert_whole(run: RunDir) -> None:
    assert {one.state for one in check(run.tensorboard)} == {State.COMPLETE}


class Disk:
    """Fails these calls with an error while it is bad; a write that fails takes half of its bytes first."""

    def __init__(self, code: int, names: tuple[str, ...] = WRITES) -> None:
        self.code, self.names, self.bad, self.tore = code, names, True, False

    def __call__(self, call: Call) -> int | None:
        if not self.bad or call.name not in self.names:
            return None
        if call.name in WRITES and not self.tore and len(call.content) > 20:
            self.tore = True
            return len(call.content) // 2
        self.tore = False
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("names", [WRITES, SYNCS, (*WRITES, "ftruncate"), ("open",)], ids="+".join)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=os.strerror)
def test_a_disk_that_refuses_for_a_while_loses_nothing(
    run: RunDir, caplog: pytest.LogCaptureFixture, code: int, names: tuple[str, ...]
) -> None:
    disk = Disk(code, names)
    disk.bad = False
    with Shim(run.path, disk):
        tracker = Tracker(run, 1, 0)
        for step in range(1, 61):
            disk.bad = 20 < step <= 40
            tracker.scalars(step, {"a": step / 7, "b": 1.0})
            if step % 5 == 0:
                tracker.flush(5)
            if step % 20 == 0:
                time.sleep(0.4)
        tracker.close()
    assert steps(run) == list(range(1, 61))
    assert_whole(run)
    if names != ("open",):  # an open file is not opened again
        assert caplog.text.count("events are off") == 1
        assert caplog.text.count("written again; 0 records were dropped") == 1


def test_a_full_disk_of_its_own(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    """A tmpfs of 64 KB with a file that takes all room, and then gives it back."""
    run.tensorboard.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", run.tensorboard], check=False)
    if mounted.returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        tracker = Tracker(run, 1, 0)
        tracker.scalars(1, {"a": 1.0})
        tracker.flush(10)
        (filler := run.tensorboard / "filler").write_bytes(bytes(48 << 10))
        for step in range(2, 1500):
            tracker.scalars(step, {"a": 1.0})
        tracker.flush(10)
        assert_whole(run)
        assert caplog.text.count("No space left") == 1
        filler.unlink()
        time.sleep(0.1)
        tracker.close()
        assert steps(run) == list(range(1, 1500))
        assert_whole(run)
    finally:
        subprocess.run(["umount", run.tensorboard], check=True)


def test_what_is_too_much_for_the_memory_is_dropped_and_counted(
    run: RunDir, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_writer, "MOST_BYTES", 2000)
    disk = Disk(errno.ENOSPC)
    with Shim(run.path, disk):
        tracker = Tracker(run, 1, 0)
        for step in range(1, 101):
            tracker.scalars(step, {"a": 1.0})
        tracker.flush(5)
        disk.bad = False
        time.sleep(0.2)
        tracker.flush(5)
        tracker.close()
    kept = steps(run)
    assert kept == list(range(101 - len(kept), 101)), "the newest stay"
    assert f"written again; {100 - len(kept)} records were dropped" in caplog.text
    assert_whole(run)


def test_a_disk_that_never_answers_holds_neither_steps_nor_the_end(
    run: RunDir, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls of the training make no storage call at all: the thread alone meets the disk."""
    monkeypatch.setattr(events_writer, "LATE_S", 0.0)
    callers: set[str] = set()
    stuck = True

    def wait(call: Call) -> None:
        import threading

        callers.add(threading.current_thread().name)
        while stuck:
            time.sleep(0.01)

    with Shim(run.path, wait):
        tracker = Tracker(run, 1, 0)
        for step in range(1, 1001):
            tracker.scalars(step, {"a": 1.0})
            if step % 100 == 0:
                tracker.flush()
                time.sleep(0.02)
        tracker.picture(1000, "picture", np.zeros((4, 4, 3), np.uint8))
        tracker.close(0.1)
        assert callers == {"events"}
        assert "end without 1001 records" in caplog.text
        assert caplog.text.count("events are late") == 1
        stuck = False
        time.sleep(0.3)


def test_the_older_files_lose_what_the_run_does_again_and_nothing_else(tmp_path: Path) -> None:
    old = tmp_path / "events.out.tfevents.0000000001.host.1.0.g001"
    kept = VERSION + b"".join(scalars(step, 1.0, {"a": step}) for step in (1, 2, 300))
    late = scalars(2, 1.0, {"late": 2.0})
    old.write_bytes(kept + scalars(301, 1.0, {"a": 1.0}) + late + scalars(302, 1.0, {"a": 1.0})[:-3])
    before = old.stat().st_ino
    assert cut_back(tmp_path, 300) == [late]
    assert old.read_bytes() == kept and old.stat().st_ino == before
    assert cut_back(tmp_path, 300) == []
    old.write_bytes(kept + late[:-1])
    assert cut_back(tmp_path, 300) == []
    assert old.read_bytes() == kept, "a torn tail goes"
    hole = kept + bytes(100)
    old.write_bytes(hole)
    assert cut_back(tmp_path, 300) == []
    assert old.read_bytes() == hole, "a network file system may fill it yet"


def test_an_attempt_that_has_lost_the_run_writes_no_more(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(run, 1, 0)
    tracker.scalars(1, {"a": 1.0})
    tracker.flush(10)
    run.event("start", "shell", 2)
    tracker.scalars(2, {"a": 1.0})
    tracker.close()
    assert steps(run) == [1]
    assert "a later attempt holds the run" in caplog.text


def test_what_waits_on_the_node_keeps_its_order_and_survives_an_outage(run: RunDir, tmp_path: Path) -> None:
    disk = Disk(errno.EIO)
    writer = EventsWriter(run.tensorboard, "", 0, lambda: True, Spool([str(tmp_path / "none"), str(tmp_path)]))
    writer.every = 0.02
    with Shim(run.path, disk):
        for step in range(1, 301):
            writer.put(scalars(step, 1.0, {"a": step}))
            if step == 150:
                writer.cut(100)
            if step % 50 == 0:
                time.sleep(0.1)
        disk.bad = False
        writer.flush(5)
        writer.close(10)
    assert steps(run) == [*range(1, 101), *range(151, 301)]
    assert not [path for path in tmp_path.iterdir() if path != run.path], "nothing is left on the node"


def test_a_node_whose_disk_is_full_or_gone_stages_in_memory(run: RunDir, tmp_path: Path) -> None:
    for folders in ([], [str(tmp_path)]):
        writer = EventsWriter(run.tensorboard, "", 0, lambda: True, spool := Spool(folders))
        spool.put = lambda chunk: None  # type: ignore[method-assign]
        writer.every = 0.01
        for step in range(1, 51):
            writer.put(scalars(step, 1.0, {"a": step}))
            time.sleep(0.001)
        writer.close(10)
        assert steps(run) == list(range(1, 51))


def test_figures_are_drawn_in_order_and_some_are_left_out_rather_than_wait(caplog: pytest.LogCaptureFixture) -> None:
    renderer, drawn = Renderer(), []

    def draw(number: int) -> None:
        time.sleep(0.005)
        drawn.append(number)

    for number in range(100):
        renderer.put(lambda number=number: draw(number))
    renderer.wait()
    assert drawn == sorted(drawn) and 30 <= len(drawn) < 100
    assert caplog.text.count("left out") == 1
    renderer.put(lambda: time.sleep(30))
    renderer.put(lambda: draw(100))
    with caplog.at_level(logging.WARNING):
        renderer.wait(0.05)
    assert "2 evaluations are without their figures" in caplog.text and 100 not in drawn
