"""What follows the end of an attempt: budgets, backoff, what counts as progress, and the words of it."""

from typing import Any

import pytest

from hpc.settings import Budgets
from hpc.verdict import BACKOFF_S, FAILURES, Ending, Row, judge, row_before, tally

RUN = "exp-0000aaaa"


def judged(kind: str, *before: str, step: int = 120, obstacle: str = "", **budgets: int) -> Any:
    return judge(RUN, Ending(kind, "words", obstacle), Row(before, step), Budgets(**budgets))


@pytest.mark.parametrize("kind", ["finished", "told", "bad input", "in vain"])
def test_some_ends_are_final_whatever_the_budget(kind: str) -> None:
    assert judged(kind, crash=9) == (judged(kind)) and not judged(kind).again and judged(kind).reason == "words"


def test_a_clean_stop_is_free_however_many_failures_were_before() -> None:
    stopped = judged("stopped", *["crash"] * 9, crash=0)
    assert (stopped.again, stopped.reason, stopped.wait_s) == (True, "words", 0)


@pytest.mark.parametrize("kind", FAILURES)
def test_each_cause_has_its_budget_and_then_the_run_ends_with_a_reason(kind: str) -> None:
    budgets = {**dict.fromkeys(FAILURES, 0), kind: 3}
    waits = []
    for number in range(3):
        again = judged(kind, *[kind] * number, **budgets)
        assert again.again and again.reason.startswith(f"words; restart {number + 1} of 3 since step 120")
        waits.append(again.wait_s)
    assert waits == list(BACKOFF_S) == [0, 60, 300] and again.reason.endswith("in 300 s")
    last = judged(kind, *[kind] * 3, **budgets)
    assert not last.again and last.wait_s == 0
    assert f"since step 120 (launch.budgets.{kind} is 3): words; 'hpc why {RUN}'" in last.reason
    assert last.reason.endswith(f"'hpc resume {RUN}' goes on") and last.reason.startswith("4 ")
    assert not judged(kind, **{**budgets, kind: 0}).again, "a budget of 0 allows none"


def test_crashes_hangs_and_memory_kills_are_counted_together_and_other_causes_for_themselves() -> None:
    assert judged("hang", "crash", "memory").again
    ended = judged("hang", "crash", "memory", "crash")
    counted = ("2 crashes", "1 hang", "1 x out of memory", "since step 120", "launch.budgets.hang is 3")
    assert not ended.again and all(words in ended.reason for words in counted)
    assert judged("hang", "crash", "storage", "crash").again
    assert judged("node", "storage", "node", "storage", "node", "crash").again
    assert not judged("storage", "crash", "storage", "storage", "storage").again


def test_the_third_time_limit_without_a_step_ends_the_run_with_the_remedy() -> None:
    attempts = ["no-step"] * 2 + ["crash", "no-step", "stopped", "told", "now"]
    assert row_before(history("no-step", "5 no-step", "no-step", "now"), 4).no_step == 2, "a checkpoint is progress"
    assert row_before(history("no-step", "new no-step", "no-step", "now"), 4).no_step == 2, "a new submission"
    assert row_before(history(*attempts), len(attempts)) == Row(("crash",), 0, 3), "preemptions count neither way"
    stopped = Ending("no step", "stopped by SIGUSR2 at step 0")
    again, last = (judge(RUN, stopped, Row(no_step=number), Budgets()) for number in (1, 2))
    assert again.again and again.reason.endswith("at step 0, where it began: 2 of 3 attempts without a step")
    assert not last.again and last.reason.startswith(
        "3 attempts in a row ended at the time limit without a step: launch.time is too short for its start; 'hpc "
    )


def test_an_obstacle_ends_the_run_before_its_budget_does() -> None:
    assert judged("node", obstacle="no nodes are left").reason == "words; no nodes are left"
    assert not judged("node", obstacle="no nodes are left").again


def test_the_tally_in_words() -> None:
    assert tally(["crash"], 0) == "1 crash with nothing saved"
    assert tally(["memory", "memory", "hang"], 7) == "2 x out of memory, 1 hang since step 7"


def history(*attempts: str) -> list[dict[str, Any]]:
    """Events of attempts 1, 2, ...: `crash`, `50 crash` (saved before), `new crash` (submitted anew), `` (no word)."""
    events: list[dict[str, Any]] = []
    for number, words in enumerate(attempts, 1):
        parts = words.split()
        first = number == 1 or "new" in parts
        events.append({"event": "start", "generation": number, "job": "55", "restart": 0 if first else number})
        events += [{"event": "checkpoint", "generation": number, "step": int(w)} for w in parts if w.isdigit()]
        kinds = [word for word in parts if not word.isdigit() and word != "new"]
        events += [{"event": "end", "generation": number, "cause": kind.replace("-", " ")} for kind in kinds]
    return events


@pytest.mark.parametrize(
    ("attempts", "kinds", "step"),
    [
        (["crash"], [], 0),
        (["crash", "crash", "now"], ["crash", "crash"], 0),
        (["crash", "50 hang", "memory", "now"], ["hang", "memory"], 50),
        (["50 crash", "50 crash", "40 crash", "now"], ["crash", "crash", "crash"], 50),
        (["crash", "crash", "50"], [], 50),
        (["crash", "stopped", "crash", "now"], ["crash", "crash"], 0),
        (["crash", "", "told", "crash", "now"], ["crash", "crash"], 0),
        (["50 crash", "crash", "new crash", "now"], ["crash"], 50),
        (["50 crash", "crash", "new"], [], 50),
    ],
    ids=lambda value: "-".join(value).replace(" ", "_") if isinstance(value, list) else str(value),
)
def test_what_counts_as_failures_in_a_row(attempts: list[str], kinds: list[str], step: int) -> None:
    """The last attempt is the one that is judged: its own end does not count, what it has saved does."""
    events = history(*attempts)
    expected = Row(tuple(kinds), step)
    assert row_before(events, len(attempts)) == expected
    assert row_before(list(reversed(events)), len(attempts)) == expected, "clocks of nodes differ: no order is assumed"
    assert row_before([*events, *history(*attempts, "100 crash")[-3:]], len(attempts)) == expected, "no later attempt"


def test_a_job_that_the_tail_has_submitted_anew_is_no_submission_by_hand() -> None:
    events = history("crash", "new crash", "now")
    events[2]["job"] = "56"
    assert row_before(events, 3).kinds == ("crash",)
    events.append({"event": "submit", "generation": 0, "job": "56"})
    assert row_before(events, 3).kinds == ("crash",), "hpc resume"
    events.append({"event": "submit", "generation": 1, "job": "56", "after": "55"})
    assert row_before(events, 3).kinds == ("crash", "crash")


def test_the_last_word_on_an_attempt_counts() -> None:
    """A script that was told while it waited to start again says so: cancelled, and no failure."""
    events = [*history("crash", "now"), {"event": "end", "generation": 1, "cause": "told"}]
    assert row_before(events, 2).kinds == ()
