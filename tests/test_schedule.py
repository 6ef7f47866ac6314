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


def test_a_run_stops_itself_when_its_time_is_nearly_over(monkeypatch: pytest.MonkeyPatch) -> None:
    end = time.time() + 100
    monkeypatch.setattr(limits, "end_time", lambda: end)
    assert not schedule().ending()
    assert not schedule(end_time=end).ending()
    assert not schedule(end_time=end, slow_s=20).ending()
    assert schedule(end_time=end, slow_s=40).ending()
    assert schedule(end_time=end - 90).ending() is False, "asked again, there is more time"


def test_more_time_is_asked_for_once_in_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, end = [], time.time() + 10

    def ask() -> float:
        asked.append(end)
        return end

    monkeypatch.setattr(limits, "end_time", ask)
    mine = schedule(end_time=end)
    assert [mine.ending() for _ in range(5)] == [True] * 5
    assert len(asked) == 1
    monkeypatch.setattr(limits, "end_time", lambda: None)
    assert not schedule(end_time=end).ending(), "the limit was lifted"


def test_a_stop_by_the_clock_counts_as_the_notice() -> None:
    flag = StopFlag()
    flag.notice()
    assert flag.cause == NOTICE.name and flag.received
    first = flag.received
    flag.notice()
    assert flag.received == first
