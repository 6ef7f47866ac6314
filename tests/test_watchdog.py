"""A rank that goes silent is named by the others, which leave with 76: real processes, signals and collectives."""

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hpc.allocation import Allocation
from hpc.preempt import ExitCode
from hpc.rundir import RunDir, read_json, write_json
from jobs import watchdog
from jobs.watchdog import Heard, Peers, Watchdog, behind, percentile_99
from tests.tiny_run import CHILD_LIMIT_S, CONTEXT

HANG_S = 3.0
STEP_S = 0.05


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


@pytest.fixture
def start(run: RunDir) -> Iterator[Callable[..., BaseProcess]]:
    """Start a child with its stderr in a file of the run; none outlives the test."""
    children: list[BaseProcess] = []

    def begin(target: Callable[..., None], *args: Any, rank: int = 0) -> BaseProcess:
        child = CONTEXT.Process(target=_redirected, args=(run.path / f"stderr{rank}", target, *args))
        child.start()
        children.append(child)
        return child

    yield begin
    for child in children:
        child.kill()
        child.join()


def _redirected(stderr: Path, target: Callable[..., None], *args: Any) -> None:
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT, 0o600), 2)
    target(*args)


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + CHILD_LIMIT_S
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return value


def hangs(run: RunDir) -> list[dict[str, Any]]:
    return [event for event in run.read_events() if event["event"] == "hang"]


# One process.


def alone(path: Path, body: Callable[[Watchdog], None], hang_after: float = HANG_S) -> None:
    allocation = Allocation(node="n0", generation=2)
    body(Watchdog(RunDir(path), allocation, hang_after).start())
    os._exit(0)


def steps(dog: Watchdog, count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        dog.beat(step)
        time.sleep(0.01)


def sleeps(dog: Watchdog) -> None:
    steps(dog, 5)
    time.sleep(60)


def sleeps_in_a_phase(dog: Watchdog) -> None:
    with dog.phase("build", 20), dog.phase("compile", 0.5):
        time.sleep(60)


def cannot_write(dog: Watchdog) -> None:
    steps(dog, 5)
    dog._run.path.rmdir()
    time.sleep(60)


def cannot_finish_writing(dog: Watchdog) -> None:
    """events/ is a file system that does not answer."""
    dog._run.event = lambda *args, **fields: time.sleep(60)  # type: ignore[method-assign]
    steps(dog, 5)
    time.sleep(60)


def holds_pythons_lock(dog: Watchdog) -> None:
    steps(dog, 30)
    ctypes.PyDLL(None).sleep(60)


def test_silence_ends_the_process_with_76_stacks_and_an_event(run: RunDir, start: Callable[..., BaseProcess]) -> None:
    silent, phase = (start(alone, run.path, body, 1.0, rank=n) for n, body in enumerate([sleeps, sleeps_in_a_phase]))
    for child in (silent, phase):
        child.join(CHILD_LIMIT_S)
        assert child.exitcode == ExitCode.HANG
    by_phase = {event["phase"]: event for event in hangs(run)}
    training, compiling = by_phase["training"], by_phase["compile"]
    assert (training["rank"], training["node"], training["step"], training["generation"]) == (0, "n0", 4, 2)
    assert training["silent"] > training["limit"] == 1.0
    assert training["stuck"][0]["rank"] == 0 and "sleeps" in training["stuck"][0]["at"]
    assert compiling["silent"] > compiling["limit"] == 0.5 and compiling["step"] is None
    text = (run.path / "stderr0").read_text()
    assert "rank 0 on n0: nothing has happened for" in text and "in sleeps" in text and "_watch" in text


def test_nothing_that_fails_keeps_it_from_leaving(
    run: RunDir, start: Callable[..., BaseProcess], tmp_path: Path
) -> None:
    gone, blocked = tmp_path / "gone", tmp_path / "blocked"
    gone.mkdir()
    blocked.mkdir()
    children = [
        start(alone, gone, cannot_write, 0.5, rank=0),
        start(alone, blocked, cannot_finish_writing, 0.5, rank=1),
    ]
    children.append(start(alone, run.path, holds_pythons_lock, 0.5, rank=2))
    for child in children:
        child.join(CHILD_LIMIT_S)
    assert [child.exitcode for child in children] == [ExitCode.HANG, ExitCode.HANG, 1]
    assert "the hang is not recorded" in (run.path / "stderr0").read_text()
    assert "holds_pythons_lock" in (run.path / "stderr2").read_text(), "no stacks without Python's lock"
    assert not hangs(run)


# Several ranks.


def ranks_step(path: Path, rank: int, world: int, port: int, how: str) -> None:
    """A rank that all-reduces once per step; at step 20 what `how` says happens to rank 1."""
    run, allocation = RunDir(path), Allocation(rank=rank, world_size=world, node=f"n{rank}")
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    dog = Watchdog(run, allocation, HANG_S, Peers(store, allocation)).start()
    dog.beat(0)
    for step in range(1, 10_000):
        if step == 20 and rank == 1 and how == "reads":
            reads_for_ever()
        if step == 20 and rank == 1 and how == "saves":
            with dog.phase("save", 60):
                time.sleep(1.5 * HANG_S)
        dist.all_reduce(torch.ones(1))
        dog.beat(step)
        if step == 20:
            (path / f"at20-{rank}").touch()
        if how == "saves" and step == 30:
            break
        time.sleep(STEP_S)
    dog.close()
    dist.barrier()
    os._exit(0)


def reads_for_ever() -> None:
    threading.Event().wait()


def all_ranks(run: RunDir, start: Callable[..., BaseProcess], world: int, how: str) -> list[BaseProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start(ranks_step, run.path, rank, world, port, how, rank=rank) for rank in range(world)]


def join_but(children: list[BaseProcess], stopped: int) -> list[int | None]:
    for rank, child in enumerate(children):
        if rank != stopped:
            child.join(CHILD_LIMIT_S)
    return [child.exitcode for child in children]


@pytest.mark.parametrize("stopped", [0, 2], ids=["the host of the store", "another"])
def test_a_stopped_rank_is_named_by_the_others(run: RunDir, start: Callable[..., BaseProcess], stopped: int) -> None:
    """D3; and D4 before: a stop of less than the limit, or of more of a single rank, is none of its own doing."""
    children = all_ranks(run, start, 3, "steps")
    until(lambda: (run.path / "at20-0").exists())
    began = time.monotonic()
    os.kill(children[stopped].pid or 0, signal.SIGSTOP)
    codes = join_but(children, stopped)
    assert time.monotonic() - began > HANG_S
    assert ExitCode.HANG in codes, codes
    events = hangs(run)
    assert events
    for event in events:
        assert [(one["rank"], one["node"]) for one in event["stuck"]] == [
            (stopped, f"n{stopped}" if stopped else event["stuck"][0]["node"])
        ], event
        assert event["rank"] != stopped
    os.kill(children[stopped].pid or 0, signal.SIGCONT)  # back after longer than the limit: it starts a new silence
    children[stopped].join(CHILD_LIMIT_S)
    assert not [event for event in hangs(run) if event["rank"] == stopped]


def test_a_stop_shorter_than_the_limit_and_a_save_longer_than_it_are_no_hang(
    run: RunDir, start: Callable[..., BaseProcess]
) -> None:
    """D4, and a rank that saves: the others wait until its own limit has passed."""
    children = all_ranks(run, start, 2, "saves")
    until(lambda: (run.path / "stderr1").exists())
    time.sleep(0.5)
    os.kill(children[0].pid or 0, signal.SIGSTOP)
    time.sleep(0.6 * HANG_S)
    os.kill(children[0].pid or 0, signal.SIGCONT)
    assert join_but(children, -1) == [0, 0]
    assert not hangs(run)


def test_a_rank_that_waits_for_its_data_is_named_by_place(run: RunDir, start: Callable[..., BaseProcess]) -> None:
    """All are at the same step, and all watchdogs live: only one rank is in no collective."""
    children = all_ranks(run, start, 2, "reads")
    assert ExitCode.HANG in join_but(children, -1)
    for event in hangs(run):
        assert [one["rank"] for one in event["stuck"]] == [1], event
        assert event["stuck"][0]["node"] == "n1" and "wait" in event["stuck"][0]["at"]


def test_all_stopped_and_continued_after_the_limit_go_on(run: RunDir, start: Callable[..., BaseProcess]) -> None:
    """scontrol suspend: the clock has jumped for all of them."""
    child = start(alone, run.path, walks, 1.0)
    until(lambda: (run.path / "walks").exists())
    os.kill(child.pid or 0, signal.SIGSTOP)
    time.sleep(3.5)
    os.kill(child.pid or 0, signal.SIGCONT)
    child.join(CHILD_LIMIT_S)
    assert child.exitcode == 0 and not hangs(run)


def walks(dog: Watchdog) -> None:
    steps(dog, 5)
    (dog._run.path / "walks").touch()
    time.sleep(0.9)  # nearly too long already
    steps(dog, 10, 5)


# What is decided, without processes.


def test_it_is_armed_by_the_end_of_the_first_step_or_by_a_phase(run: RunDir) -> None:
    dog = Watchdog(run, Allocation(), 60)
    assert dog._limit() == ("starting", None)
    dog.beat(7)
    assert dog._limit() == ("starting", None), "resumed at step 7: none has been done here yet"
    with dog.phase("compile", 600):
        assert dog._limit() == ("compile", 600)
        with dog.phase("save", 120):
            assert dog._limit() == ("save", 120)
        assert dog._limit() == ("compile", 600)
    dog.beat(7)
    assert dog._limit() == ("starting", None)
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
def test_percentile_99(count: int, expected: float) -> None:
    assert percentile_99([float(n) for n in range(count, 0, -1)]) == expected


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
    ],
)
def test_who_is_behind(table: list[Heard], expected: set[int]) -> None:
    assert set(behind(dict(enumerate(table)), 10, patience=3)) == expected


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
