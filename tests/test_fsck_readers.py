"""What fsck says of each reader beside what the real ones show: TensorBoard's loaders, EventAccumulator, tbparse."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from tbparse import SummaryReader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from hpc.logs import readers
from hpc.logs.readers import Points, Reader
from hpc.logs.records import HEADER, frame
from hpc.logs.series import event_files
from tests.test_event_readers import PATIENCE_S, Board

FIRST, SECOND = "events.out.tfevents.1700000000.node.1.0", "events.out.tfevents.1700000009.node.1.0"
Frames = list[bytes]


def written(first: int, end: int, start: int | None, offset: float) -> Frames:
    """The frames of one attempt: `loss` at each step, `late` at every tenth; `start`: step of a SessionLog.START."""
    events = [Event(wall_time=1e9 + offset, file_version="brain.Event:2")]
    if start is not None:
        log = SessionLog(status=SessionLog.START)
        events.append(Event(wall_time=1e9 + offset, step=start, session_log=log))
    for step in range(first, end):
        event = Event(wall_time=1e9 + offset + step, step=step)
        event.summary.value.add(tag="loss", simple_value=step + offset)
        if step % 10 == 5:
            event.summary.value.add(tag="late", simple_value=step + offset)
        events.append(event)
    return [frame(event.SerializeToString()) for event in events]


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def harmed(harm: Callable[[bytes], bytes]) -> Callable[[Frames], bytes]:
    """One frame in the middle."""
    return lambda frames: b"".join([*frames[:20], harm(frames[20]), *frames[21:]])


KINDS: dict[str, tuple[int | None, int | None, Callable[[Frames], bytes]]] = {
    "as hpc writes": (0, 40, b"".join),
    "no start": (None, None, b"".join),
    "one start": (None, 40, b"".join),
    "torn": (0, 40, lambda frames: b"".join(frames)[:-7]),
    "hole": (0, 40, harmed(lambda one: bytes(len(one)))),
    "payload": (0, 40, harmed(lambda one: flipped(one, len(one) - 5))),
    "payload that is no event": (0, 40, harmed(lambda one: one[:HEADER] + b"\xff" * (len(one) - HEADER))),
    "header": (0, 40, harmed(lambda one: flipped(one, 1))),
    "again": (0, 40, lambda frames: b"".join([*frames, *frames[30:]])),
}
"""START in the first file, in the second, and what became of the first: steps 0 to 49, then 40 to 69."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logs = tmp_path_factory.mktemp("logs")
    for name, (first, second, harm) in KINDS.items():
        (logs / name).mkdir()
        (logs / name / FIRST).write_bytes(harm(written(0, 50, first, 0.0)))
        (logs / name / SECOND).write_bytes(b"".join(written(40, 70, second, 0.5)))
    return logs


def ours(folder: Path, reader: Reader) -> Points:
    return sorted(readers._points(event_files(folder), reader))


def by_board(board: Board, run: str) -> Points:
    tags = board.get("plugin/scalars/tags").get(run, {})
    told = {tag: board.get("plugin/scalars/scalars", run=run, tag=tag) for tag in tags}
    return sorted((tag, step, value) for tag, points in told.items() for _, step, value in points)


@pytest.mark.parametrize(("reader", "options"), [(Reader.DEFAULT, ()), (Reader.PYTHON, ("--load_fast=false",))])
def test_tensorboard_shows_what_was_said(
    folder: Path, tmp_path: Path, reader: Reader, options: tuple[str, ...]
) -> None:
    wanted = {name: ours(folder / name, reader) for name in KINDS}
    board, found = Board(folder, tmp_path / "log", options), dict[str, Points]()
    until = time.monotonic() + PATIENCE_S
    try:
        while found != wanted and time.monotonic() < until:
            time.sleep(0.3)
            with suppress(OSError):  # it does not answer yet
                found = {name: by_board(board, name) for name in KINDS}
        for name in KINDS:
            assert found[name] == wanted[name], name
    finally:
        board.process.terminate()
        board.process.wait()


def test_eventaccumulator_and_tbparse_show_what_was_said(folder: Path) -> None:
    for name in KINDS:
        accumulator = EventAccumulator(str(folder / name), size_guidance={"scalars": 0})
        accumulator.Reload()
        tags = accumulator.Tags()["scalars"]
        found = sorted((tag, one.step, one.value) for tag in tags for one in accumulator.Scalars(tag))
        assert found == ours(folder / name, Reader.ACCUMULATOR), name
        frame_ = SummaryReader(str(folder / name)).scalars
        rows = sorted(zip(frame_["tag"], frame_["step"], frame_["value"], strict=True))
        assert rows == ours(folder / name, Reader.TBPARSE), name


def test_the_counts(folder: Path) -> None:
    def counts(name: str) -> dict[Reader, tuple[int, int, int, int]]:
        told = readers.shown(folder / name)
        return {one.reader: (one.points, one.twice, one.false, one.missing) for one in told}

    assert all(one.right for one in readers.shown(folder / "as hpc writes") if one.reader is not Reader.TBPARSE)
    # 40 to 49 are there twice, one of them with `late`
    assert counts("as hpc writes")[Reader.TBPARSE] == (88, 11, 11, 0)
    assert counts("no start")[Reader.PYTHON] == counts("one start")[Reader.PYTHON] == (88, 11, 11, 0)
    assert counts("one start")[Reader.ACCUMULATOR] == (77, 0, 0, 0)
