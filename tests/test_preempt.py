"""The stop flag: a signal at any moment is heard once, and by all ranks at the same boundary."""

import os
import signal

from hpc.preempt import STOP_SIGNALS, StopFlag


def listening() -> StopFlag:
    """As `install` has it, but for this process alone: what it forks later must not be deaf."""
    flag = StopFlag()
    for number in STOP_SIGNALS:
        signal.signal(number, flag._raise)
    return flag


def meets(heard: int, during: int | None = None) -> int:
    """A collective whose highest value is `heard`; a signal comes while the ranks meet."""
    if during:
        os.kill(os.getpid(), during)
    return heard


def test_a_signal_that_comes_while_the_ranks_meet_is_for_the_next_boundary() -> None:
    flag = listening()
    assert flag.agree(lambda mine: meets(mine, signal.SIGTERM)) is None
    assert flag.agree(lambda mine: meets(mine)) == "SIGTERM"


def test_all_ranks_name_the_cause_that_they_agreed_on() -> None:
    flag = listening()
    assert flag.agree(lambda mine: meets(signal.SIGUSR2, signal.SIGTERM)) == "SIGUSR2"
    assert flag.agree(lambda mine: mine) == "SIGUSR2"


def test_the_first_signal_is_the_cause_and_its_time_is_kept() -> None:
    flag = listening()
    os.kill(os.getpid(), signal.SIGUSR2)
    first = flag.received
    os.kill(os.getpid(), signal.SIGTERM)
    assert flag.cause == "SIGUSR2" and flag.received == first
