"""What is sent of a run that grows, is preempted and goes back: each step once and as it is true."""

import json
import random
from pathlib import Path

import pytest

from hpc.logs.records import scan
from hpc.logs.series import event_files, scalars
from hpc.logs.sinks.base import Point
from hpc.logs.sinks.facts import durable_step
from hpc.logs.sinks.pending import Cursor, LostSteps, Pending
from tests.sinkruns import FakeRun


class Receiver:
    """Keeps what it is sent, as a server would, and how often it had to begin anew."""

    def __init__(self, run: FakeRun) -> None:
        self.run = run
        self.cursor = Cursor()
        self.kept: list[Point] = []
        self.anew = 0

    def feed(self, over: bool, killed: bool = False) -> None:
        folder = self.run.dir.tensorboard
        try:
            pending = Pending(folder, self.cursor)
        except LostSteps:
            self.anew += 1
            self.kept, self.cursor = [], Cursor()
            pending = Pending(folder, self.cursor)
        below = None if over else durable_step(self.run.dir.read_events(), pending.restarts)
        points = pending.points(below)
        if killed and len(points) > 3:
            middle = points[len(points) // 2].step
            self.kept += [point for point in points if point.step < middle]
            self.cursor = pending.halfway(middle, middle - 1)
            return
        self.kept += points
        self.cursor = pending.after(below, max((point.step for point in points), default=-1))

    def truth(self) -> list[Point]:
        found = scalars(self.run.dir.tensorboard)
        return sorted(Point(tag, step, round(wall * 1000), value) for tag in found for step, wall, value in found[tag])


@pytest.mark.parametrize("seed", range(20))
def test_any_course_of_a_run_is_sent_as_it_is_true(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    run = FakeRun(tmp_path)
    receiver = Receiver(run)
    step = saved = backwards = 0
    run.attempt()
    for number in range(40):
        what = rng.choice(["steps", "steps", "steps", "save", "preempted", "fails", "damaged", "feed"])
        if what == "steps":
            run.steps(step + 1, step := step + rng.randint(1, 6), offset=number)
        elif what == "save":
            run.checkpoint(saved := step)
        elif what == "preempted":
            run.attempt(resumed=saved)
            step = saved
        elif what == "fails":
            receiver.feed(over=True)
            run.attempt(resumed=saved)
            backwards += 1
            step = saved
        elif what == "damaged":
            run.attempt(resumed=saved // 2)
            backwards += 1
            step = saved = saved // 2
        receiver.feed(over=False, killed=rng.random() < 0.3)
    receiver.feed(over=True)
    assert sorted(receiver.kept) == receiver.truth()  # nothing twice, though the kills sent nothing again here
    assert receiver.anew <= backwards
    files = event_files(run.dir.tensorboard)
    assert receiver.cursor.records == sum(scan(path).records for path in files)
    assert [size for _, size in Pending(run.dir.tensorboard, receiver.cursor).sizes(receiver.cursor.start)] == [
        path.stat().st_size for path in files
    ]


def test_an_unfinished_record_is_left_for_the_next_time(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    receiver = Receiver(run)
    run.attempt()
    run.steps(1, 5)
    whole = run.file.read_bytes()
    for size in range(0, len(whole) + 1, 7):
        run.file.write_bytes(whole[:size])
        receiver.feed(over=True)
    run.file.write_bytes(whole)
    receiver.feed(over=True)
    assert sorted(receiver.kept) == receiver.truth()
    assert receiver.anew == 0


def test_a_hole_is_told_and_what_follows_in_other_files_is_sent(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    run.attempt()
    run.steps(1, 5)
    with run.file.open("ab") as file:
        file.write(bytes(100))
    run.attempt(resumed=5)
    run.steps(6, 7)
    pending = Pending(run.dir.tensorboard, Cursor())
    assert [point.step for point in pending.points(None) if point.tag == "step/loss"] == list(range(1, 8))
    (sentence,) = pending.damaged
    assert "zeros, damaged at byte" in sentence
    cursor = Cursor.load(json.loads(json.dumps(pending.after(None, 7).dump())))
    again = Pending(run.dir.tensorboard, cursor)
    assert again.damaged == [sentence] and again.points(None) == [], "it is not forgotten behind newer files"
    (hole, _), (newer, size) = again.sizes(cursor.start)
    assert again.sizes(cursor.start) == [(hole, hole.stat().st_size - 100), (newer, newer.stat().st_size)]
    assert size == newer.stat().st_size
