"""A rank that goes silent is named by the others, which leave with 76: real processes, signals and collectives."""

import ctypes
import faulthandler
import itertools
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hpc.allocation import Allocation
from hpc.preempt import ExitCode
from hpc.rundir import RunDir, read_json, write_json
from hpc.units import percentile
from jobs import watchdog
from jobs.lastresort import LastResort
from jobs.watchdog import Heard, Peers, Watchdog, behind
from tests.tiny_run import CHILD_LIMIT_S, CONTEXT

HANG_S = 3.0
ALONE_S = 2.0
"""A loaded machine may keep a process from a step of 10 ms for a second."""
STEP_S, LAST_STEP = 0.05, 30


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


@dataclass
class Stage:
    """Children that began together, by name and rank: each scene plays by itself, and a test waits for its end."""

    folder: Path
    children: dict[str, list[BaseProcess]] = field(default_factory=dict)

    def run(self, scene: str) -> RunDir:
        return RunDir(self.folder / scene)

    def begin(self, scene: str, target: Callable[..., None], *args: Any) -> None:
        ranks = self.children.setdefault(scene, [])
        path = self.folder / scene
        path.mkdir(exist_ok=True)
        ranks.append(CONTEXT.Process(target=_redirected, args=(path / f"stderr{len(ranks)}", target, path, *args)))
        ranks[-1].start()

    def codes(self, scene: str, but: int = -1) -> list[int | None]:
        for rank, child in enumerate(self.children[scene]):
            if rank != but:
                child.join(CHILD_LIMIT_S)
        return [child.exitcode for child in self.children[scene]]

    def stderr(self, scene: str, rank: int = 0) -> str:
        return (self.folder / scene / f"stderr{rank}").read_text()


def _redirected(stderr: Path, target: Callable[..., None], *args: Any) -> None:
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT, 0o600), 2)
    target(*args)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """All scenes at once: nearly all that they do is wait."""
    stage = Stage(tmp_path_factory.mktemp("stage"))
    for world, event in [(3, stops_rank_0), (3, stops_rank_2), (2, saves), (2, reads)]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(world):
            stage.begin(event.__name__, ranks_step, rank, world, port, event)
    bodies = (sleeps, sleeps_in_a_phase, cannot_write, cannot_finish_writing, holds_pythons_lock)
    for body in (*bodies, is_suspended, is_suspended_with_its_last_resort):
        stage.begin(body.__name__, alone, body)
    yield stage
    for child in itertools.chain(*stage.children.values()):
        child.kill()
        child.join()


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + CHILD_LIMIT_S
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return value


def hangs(run: RunDir) -> list[dict[str, Any]]:
    return [event for event in run.read_events() if event["event"] == "hang"]


# One process.


def alone(path: Path, body: Callable[[Watchdog], None]) -> None:
    faulthandler.enable()  # as jobs/run.py does
    body(Watchdog(RunDir(path), Allocation(node="n0", generation=2), ALONE_S).start())
    os._exit(0)


def steps(dog: Watchdog, count: int = 30, first: int = 0) -> None:
    for step in range(first, first + count):
        dog.beat(step)
        time.sleep(0.01)


def sleeps(dog: Watchdog) -> None:
    steps(dog)
    time.sleep(60)


def sleeps_in_a_phase(dog: Watchdog) -> None:
    with dog.phase("build", 20), dog.phase("compile", 0.5):
        time.sleep(60)


def cannot_write(dog: Watchdog) -> None:
    dog._run.events.touch()  # no folder
    sleeps(dog)


def cannot_finish_writing(dog: Watchdog) -> None:
    """A full pipe that nobody reads stands for a file system that does not answer."""
    dog._run.events.mkdir()
    pipe = dog._run.events / "002-rank0.jsonl"
    os.mkfifo(pipe)
    filled = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(filled, bytes(4096))
    sleeps(dog)


def holds_pythons_lock(dog: Watchdog) -> None:
    steps(dog)
    ctypes.PyDLL(None).sleep(60)


def is_suspended(dog: Watchdog) -> None:
    """For longer than the last resort waits, and after a silence of nearly the limit."""
    steps(dog)
    time.sleep(0.6 * ALONE_S)
    stop(5.5 * ALONE_S, os.getpid())
    steps(dog, first=30)


def is_suspended_with_its_last_resort(dog: Watchdog) -> None:
    """As `scontrol suspend` does it."""
    assert dog._last_resort
    steps(dog)
    stop(5.5 * ALONE_S, dog._last_resort.pid, os.getpid())
    steps(dog, first=30)
    time.sleep(0.5)


def stop(seconds: float, *pids: int) -> None:
    """SIGSTOP, and SIGCONT later."""
    names = " ".join(map(str, pids))
    subprocess.Popen(["sh", "-c", f"kill -STOP {names}; sleep {seconds}; kill -CONT {names}"])
    time.sleep(0.5)  # where it is ourselves: here


def test_silence_ends_the_process_with_76_stacks_and_an_event(stage: Stage) -> None:
    assert stage.codes("sleeps") == stage.codes("sleeps_in_a_phase") == [ExitCode.HANG]
    (training,), (compiling,) = hangs(stage.run("sleeps")), hangs(stage.run("sleeps_in_a_phase"))
    assert (training["rank"], training["node"], training["step"], training["generation"]) == (0, "n0", 29, 2)
    # told to the millisecond: a look just after the limit tells the limit
    assert training["phase"] == "training" and training["silent"] >= training["limit"] == ALONE_S
    assert training["stuck"][0]["rank"] == 0 and "sleeps" in training["stuck"][0]["at"]
    assert compiling["phase"] == "compile" and compiling["silent"] >= compiling["limit"] == 0.5
    assert compiling["step"] is None
    text = stage.stderr("sleeps")
    assert "rank 0 on n0: nothing has happened for" in text and "in sleeps" in text and "_watch" in text


def test_a_full_disk_or_a_dead_one_keeps_nobody_from_leaving(stage: Stage) -> None:
    assert stage.codes("cannot_write") == stage.codes("cannot_finish_writing") == [ExitCode.HANG]
    assert "the hang is not recorded" in stage.stderr("cannot_write")


def test_a_process_that_holds_pythons_lock_is_ended(stage: Stage) -> None:
    assert stage.codes("holds_pythons_lock") == [-signal.SIGABRT]
    said, _, stacks = stage.stderr("holds_pythons_lock").partition("C code holds its lock")
    assert said and "holds_pythons_lock" in stacks, "no stacks"


def test_a_suspended_process_goes_on_when_it_is_continued(stage: Stage) -> None:
    """D4; scontrol suspend: the clock has jumped."""
    for scene in ("is_suspended", "is_suspended_with_its_last_resort"):
        assert stage.codes(scene) == [0], stage.stderr(scene)
        assert not hangs(stage.run(scene))


def test_the_last_resort_ends_at_once_whoever_holds_its_pipe() -> None:
    """Else it would count on, and end a rank that has finished."""
    resort = LastResort()
    held = os.dup(resort._pipe.fileno())
    closing = threading.Thread(target=resort.close, daemon=True)
    closing.start()
    closing.join(CHILD_LIMIT_S / 20)
    assert not closing.is_alive()
    os.close(held)


# Several ranks.


def ranks_step(path: Path, rank: int, world: int, port: int, event: Callable[..., None]) -> None:
    """A rank that all-reduces once per step; rank 1 makes `event` happen."""
    run, allocation = RunDir(path), Allocation(rank=rank, world_size=world, node=f"n{rank}")
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    store.set(f"pid{rank}", str(os.getpid()))
    dog = Watchdog(run, allocation, HANG_S, Peers(store, allocation)).start()
    dog.beat(0)
    for step in range(1, LAST_STEP + 1):
        if rank == 1:
            event(dog, store, step)
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError:  # the others have left; torch's own way out may take longer than the limit
            os._exit(1)
        dog.beat(step)
        time.sleep(STEP_S)
    dog.close()
    dist.barrier()
    os._exit(0)


def stops_rank_0(dog: Watchdog, store: dist.Store, step: int) -> None:
    if step == 20:
        os.kill(int(store.get("pid0")), signal.SIGSTOP)


def stops_rank_2(dog: Watchdog, store: dist.Store, step: int) -> None:
    if step == 20:
        os.kill(int(store.get("pid2")), signal.SIGSTOP)


def saves(dog: Watchdog, store: dist.Store, step: int) -> None:
    """Rank 0 is stopped for less than the limit, then rank 1 saves for longer than it: neither is a hang."""
    if step == 20:
        stop(0.6 * HANG_S, int(store.get("pid0")))
    if step == 25:
        with dog.phase("save", 60):
            time.sleep(1.5 * HANG_S)


def reads(dog: Watchdog, store: dist.Store, step: int) -> None:
    if step == 20:
        threading.Event().wait()


@pytest.mark.parametrize(
    ("scene", "stopped"), [("stops_rank_0", 0), ("stops_rank_2", 2)], ids=["the host of the store", "another"]
)
def test_a_stopped_rank_is_named_by_the_others(stage: Stage, scene: str, stopped: int) -> None:
    """D3."""
    codes, child = stage.codes(scene, but=stopped), stage.children[scene][stopped]
    assert ExitCode.HANG in codes, codes
    events = hangs(stage.run(scene))
    assert events
    for event in events:
        assert event["silent"] > HANG_S
        assert [(one["rank"], one["node"]) for one in event["stuck"]] == [(stopped, f"n{stopped}")], str(event)
    os.kill(child.pid or 0, signal.SIGCONT)  # after longer than the limit: its silence begins anew
    child.join(CHILD_LIMIT_S)
    # torch may need longer than the limit to say that the others have left: then they are the ones it names
    for event in (event for event in hangs(stage.run(scene)) if event["rank"] == stopped):
        assert event["silent"] < 2 * HANG_S and stopped not in [one["rank"] for one in event["stuck"]], str(event)


def test_a_stop_shorter_than_the_limit_and_a_save_longer_than_it_are_no_hang(stage: Stage) -> None:
    """D4; and the others wait for a rank that saves until its own limit has passed."""
    assert stage.codes("saves") == [0, 0]
    assert not hangs(stage.run("saves"))


def test_a_rank_that_waits_for_its_data_is_named_by_place(stage: Stage) -> None:
    """All are at the same step, and all watchdogs live: only one rank is in no collective."""
    assert ExitCode.HANG in stage.codes("reads")
    events = hangs(stage.run("reads"))
    assert events
    for event in events:
        assert [(one["rank"], one["node"]) for one in event["stuck"]] == [(1, "n1")], str(event)
        assert re.fullmatch(r"test_watchdog\.py:\d+ reads, threading\.py:\d+ wait", event["stuck"][0]["at"])


# What is decided, without processes.


def test_it_is_armed_by_the_end_of_the_first_step_or_by_a_phase(run: RunDir) -> None:
    dog = Watchdog(run, Allocation(), 60)
    assert dog._limit() == ("first step", 1800)
    dog.beat(7)
    assert dog._limit() == ("first step", 1800), "resumed at step 7: none has been done here yet"
    with dog.phase("compile", 600):
        assert dog._limit() == ("compile", 600)
        with dog.phase("save", 120):
            assert dog._limit() == ("save", 120)
        assert dog._limit() == ("compile", 600)
    dog.beat(7)
    assert dog._limit() == ("first step", 1800)
    dog.beat(8)
    assert dog._limit() == ("training", 60)
    dog.beat(3)
    assert dog._limit() == ("training", 60), "a rollback disarms nothing"


def test_the_limit_follows_the_step_times_but_not_what_lay_between(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    dog = Watchdog(run, Allocation(), 60)
    for step in range(1000):
        dog.beat(step)
        if step % 100 == 50:
            with dog.phase("validation", 3600):
                clock[0] += 1000
        clock[0] += 5 if step % 20 == 0 else 9
    assert dog._limit() == ("training", 90)
    assert len(dog._times) == watchdog._WINDOW


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (99, 99), (100, 99), (101, 100), (500, 495)])
def test_the_99th_percentile(count: int, expected: float) -> None:
    assert percentile([float(n) for n in range(count, 0, -1)], 0.99) == expected


def heard(since: float = 10, **beat: Any) -> Heard:
    return Heard({"node": "n", "step": 5, "waits": True, **beat}, since)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([heard(), heard(2), heard()], {1}),
        ([heard(), heard(2), heard(2)], {1, 2}),
        ([heard(8.5), heard(2), heard()], {1}),
        ([heard(), heard(), Heard({}, 2)], {2}),
        ([heard(), heard(step=4), heard()], {1}),
        ([heard(step=4, since=2), heard(step=3), heard()], {0}),
        ([heard(), heard(waits=False), heard()], {1}),
        ([heard(), heard(step=None), heard()], {1}),
        ([heard(), heard(), heard()], {0, 1, 2}),
        ([heard(3, leaves=True), heard(2), heard()], {1}),
        ([heard(3, leaves=True, waits=False), heard(), heard()], {0}),
        ([heard(3, leaves=True, step=4), heard(), heard(leaves=True)], {0}),
    ],
)
def test_who_is_behind(table: list[Heard], expected: set[int]) -> None:
    assert set(behind(dict(enumerate(table)), 10, patience=3)) == expected


def test_a_rank_whose_own_words_are_late_does_not_name_itself() -> None:
    """It is alive, or it would not ask."""
    peers = object.__new__(watchdog.Peers)
    peers._rank, peers._world, peers._asked, peers._answered = 0, 2, None, 10.0
    peers._listening, peers._lost = True, False
    peers._table = {0: heard(2, node="n0"), 1: heard(10, node="n1", waits=False)}
    assert [one["rank"] for one in peers.stuck(patience=3)] == [1]


# The lease.


def age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def test_rank_0_keeps_the_lease_while_it_is_its_own(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """hpc.attempt takes a holder for dead whose state.json is a minute old."""
    monkeypatch.setattr(watchdog, "_LEASE_S", 0.02)
    write_json(run.state, {"generation": 3, "phase": "training"})
    dog = Watchdog(run, Allocation(generation=3), 60).start()
    for _ in range(2):
        os.utime(run.state, (1, 1))
        until(lambda: age(run.state) < 60)
    for other in ({"generation": 4, "phase": "training"}, {"generation": 3, "phase": "stopped"}):
        write_json(run.state, other)
        time.sleep(0.1)  # what was looked at before may be touched still
        os.utime(run.state, (1, 1))
        time.sleep(0.2)
        assert age(run.state) > 1e6 and read_json(run.state) == other
    run.state.write_text("{")
    time.sleep(0.1)
    write_json(run.state, {"generation": 3, "phase": "training"})
    os.utime(run.state, (1, 1))
    until(lambda: age(run.state) < 60)
    dog.close()
    os.utime(run.state, (1, 1))
    time.sleep(0.1)
    assert age(run.state) > 1e6


def test_closing_leaves_no_thread(run: RunDir) -> None:
    before = threading.active_count()
    dog = Watchdog(run, Allocation(rank=1), 60).start()
    assert threading.active_count() == before + 1, "rank 1 keeps no lease"
    dog.close()
    dog.close()
    assert threading.active_count() == before
