"""When a run saves, and when it stops by itself ahead of its time limit."""

import time

import pytest

from hpc import limits
from hpc.allocation import Allocation
from hpc.preempt import NOTICE, StopFlag
from jobs.schedule import Schedule


def schedule(every_s: float = 300, slow_s: float | None = None, **allocation: float | None) -> Schedule:
    return Schedule(every_s, Allocation(**allocation), lambda: slow_s)  # type: ignore[arg-type]


def test_a_save_is_due_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    mine = schedule(300)
    now += 299
    assert not mine.save_due()
    now += 2
    assert mine.save_due()
    mine.saved()
    assert not mine.save_due()


@pytest.mark.parametrize(
    ("slow_s", "notice_s", "interval_s"),
    [
        (None, 30, 300),  # nothing was saved yet
        (40, None, 300),  # jobs are not preempted here
        (20, 30, 300),  # it fits
        (40, 30, 160),
        (100, 30, 300),  # never longer than asked
    ],
)
def test_saves_that_no_notice_is_long_enough_for_come_more_often(
    slow_s: float | None, notice_s: int | None, interval_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    mine = schedule(300, slow_s, notice_s=notice_s)
    assert mine.interval_s == mine.interval_s == interval_s
    told = bool(slow_s and notice_s and slow_s > notice_s)
    assert caplog.text.count("may lose") == told


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since 1970, and of the monotonic clock."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_run_stops_itself_when_its_time_is_nearly_over(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "end_time", lambda: 2000.0)
    none, fast, slow = schedule(), schedule(end_time=2000.0), schedule(end_time=2000.0, slow_s=40)
    told = []
    for clock[0] in (1800.0, 1849.0, 1851.0, 1969.0, 1971.0):
        told.append((none.ending(), fast.ending(), slow.ending()))
    assert told == [(False, False, False)] * 2 + [(False, False, True)] * 2 + [(False, True, True)]


def test_saves_as_long_as_the_job_leave_it_half_of_its_time(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "end_time", lambda: 2000.0)
    mine = schedule(end_time=2000.0, slow_s=900)
    clock[0] = 1499.0
    assert not mine.ending()
    clock[0] = 1501.0
    assert mine.ending()


def test_more_time_is_asked_for_once_in_a_while_only(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    ends = [2000.0]
    monkeypatch.setattr(limits, "end_time", lambda: asked.append(clock[0]) or ends[0])
    mine = schedule(end_time=2000.0)
    for clock[0] in (1980.0, 1981.0, 2005.0):
        assert mine.ending()
    assert asked == [1980.0]
    ends[0] = 3000.0
    clock[0] = 2011.0
    assert not mine.ending() and asked == [1980.0, 2011.0]


def test_a_stop_by_the_clock_counts_as_the_notice() -> None:
    flag = StopFlag()
    flag.notice()
    assert flag.cause == NOTICE.name and flag.received
    first = flag.received
    flag.notice()
    assert flag.received == first
