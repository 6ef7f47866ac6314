"""`hpc why` and `hpc ls` of runs that hang, fail again and again, or wait to be started again."""

import os
from pathlib import Path

import pytest

from hpc import attempt, ledger, why
from hpc.rundir import RunDir, write_json, write_text
from hpc.settings import Budgets
from hpc.verdict import Ending, Row, judge
from tests.ended import EXPERIMENT, HEAD, LINE, ended, log, make_run, words
from tests.fakeslurm import FakeSlurm

STUCK = [{"rank": 1, "node": "node1", "why": "no sign of life"}]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    return make_run(tmp_path, monkeypatch)


def test_a_hang_tells_where_and_who_was_behind(run: RunDir, fake: FakeSlurm) -> None:
    ended(run, code=143, cause="hang", reason="hung on node1")
    fields = {"rank": 0, "phase": "training", "step": 40, "limit": 60.0, "silent": 61.2, "stuck": STUCK}
    run.event("hang", "rank0", 1, **fields)
    answer = why.explain(run)
    assert answer.cause == "hang" and answer.lines[0] == (
        "It hung in training after step 40: nothing happened for 61 s; behind: rank 1 on node1 (no sign of life)."
    )
    (run.events / "001-rank0.jsonl").unlink()
    ended(run, code=76)
    assert why.explain(run).lines[0] == "It hung."


def test_what_would_fail_again_is_told_in_the_ranks_own_words(run: RunDir, fake: FakeSlurm) -> None:
    ended(run, cause="in vain", reason="failed, and would fail again: the loss is nan")
    run.event("failed", "rank0", 1, reason="the loss is nan:\nlower the rate", retry=False)
    log(run, HEAD + "FloatingPointError: the loss is nan\n")
    assert why.explain(run).cause == "failed: the loss is nan: lower the rate"


USED_UP = judge("exp-0000aaaa", Ending("crash", "x"), Row(["crash", "hang", "crash"], 30), Budgets()).reason.partition(
    ":"
)[0]


def test_a_used_up_budget_is_told_with_the_cause_of_the_last_failure(run: RunDir, fake: FakeSlurm) -> None:
    for number, cause in ((1, "crash"), (2, "hang"), (3, "crash")):
        run.event("start", "shell", number, job="55", node="node1", restart=number - 1)
        run.event("end", "shell", number, cause=cause)
    run.event("checkpoint", "rank0", 1, step=30)
    ended(run, generation=4, cause="crash", reason=f"{USED_UP}: failed with exit code 1")
    log(run, HEAD + "ValueError: sample 7 is empty\n")
    answer = why.explain(run)
    assert answer.cause == "exception: ValueError: sample 7 is empty"
    assert answer.lines[-1] == (
        "It is not started again by itself: 3 crashes, 1 hang since step 30, and launch.budgets.crash is 3 "
        "restarts in a row."
    )
    ended(run, generation=4, cause="node", reason="bad node node1: no GPU; the job needs it")
    assert "not started again by itself" not in words(why.explain(run)), "something else has ended it"


def test_a_run_that_waits_after_a_crash_tells_of_it_and_of_its_restarts(run: RunDir, fake: FakeSlurm) -> None:
    reason = "failed with exit code 1: ValueError: x; restart 2 of 3 since step 30, in 60 s"
    ended(run, phase="stopped", cause="crash", reason=reason)
    run.event("end", "shell", 1, cause="crash", reason=reason)
    fake.job("55", "PENDING", "BeginTime")
    assert ledger.status(run).detail == reason
    answer = why.explain(run)
    assert answer.state == "requeued" and answer.cause == "BeginTime"
    assert answer.lines[-2] == f"Of its last attempt: {reason}."
    ended(run, phase="stopped", cause="stopped", reason="stopped by SIGTERM at step 40")
    assert ledger.status(run).detail == "BeginTime"
    assert not any("last attempt" in line for line in why.explain(run).lines)


def test_a_run_that_waits_here_after_a_crash_tells_of_it(run: RunDir) -> None:
    write_json(run.submit, {"cluster": "local", "job": "1", "time": 1.0})
    own = {"pid": os.getpid(), "process_start": attempt.process_start(os.getpid())}
    reason = "failed with exit code 1; restart 2 of 3, in 60 s"
    ended(run, job=None, phase="stopped", cause="crash", reason=reason, **own)
    answer = why.explain(run)
    assert answer.state == "requeued"
    assert answer.lines == [f"Of its last attempt: {reason}.", "Its script is starting it again."]


def test_memory_that_ran_out_again_and_again_is_counted(run: RunDir, fake: FakeSlurm) -> None:
    ended(run, code=137, cause="memory", reason="4 x out of memory since step 30 (launch.budgets.memory is 3): ...")
    fake.accounted(LINE.format(state="OUT_OF_MEMORY", code="0:125", rss=""))
    assert ledger.status(run).detail.startswith("4 x out of memory since step 30")
    assert why.explain(run).cause == "out of memory"


def here(run: RunDir, **state: object) -> None:
    write_json(run.submit, {"cluster": "local", "job": "1", "time": 1.0})
    ended(run, job=None, **state)  # type: ignore[arg-type]


def test_a_time_limit_that_is_shorter_than_the_start_is_told_with_a_longer_one(run: RunDir) -> None:
    reason = "3 attempts in a row ended at the time limit without a step: launch.time is too short for its start"
    here(run, code=75, cause="no step", reason=f"{reason}; 'hpc resume exp-0000aaaa launch.time=...' goes on with more")
    run.event("signal", "rank0", 1, cause="SIGUSR2", step=0)
    write_text(run.experiment, EXPERIMENT.replace("cedia-a100-40gb", "laptop, time: 10s"))
    answer = why.explain(run)
    assert answer.state == "failed" and answer.lines[0] == f"{reason}."
    assert answer.commands == ["hpc resume exp-0000aaaa launch.time=10min"]


def test_an_interrupted_run_is_no_time_limit_although_its_notice_had_come(run: RunDir) -> None:
    here(
        run,
        code=75,
        phase="stopped",
        cause="told",
        reason="cancelled or interrupted; 'hpc resume exp-0000aaaa' goes on",
    )
    run.event("signal", "rank0", 1, cause="SIGUSR2", step=40)
    answer = why.explain(run)
    assert answer.cause == "cancelled or interrupted" and "time limit" not in words(answer)


def test_why_does_not_say_that_why_tells_more(run: RunDir) -> None:
    reason = "1 crash with nothing saved (launch.budgets.crash is 0): left with exit code 0 and without a result"
    advice = "'hpc why exp-0000aaaa' tells more, 'hpc resume exp-0000aaaa' goes on"
    here(run, cause="crash", reason=f"{reason}; {advice}")
    answer = why.explain(run)
    assert answer.cause == reason and "hpc why" not in words(answer)


def test_what_was_refused_after_a_checkpoint_is_mended_and_resumed(run: RunDir) -> None:
    here(run, code=2, cause="bad input", reason="bad input: x.h5: no such file")
    assert why.explain(run).commands[0].startswith("hpc plan ")
    (run.checkpoints / "g001-s00000030").mkdir(parents=True)
    answer = why.explain(run)
    assert answer.commands[0] == "hpc resume exp-0000aaaa"
    assert answer.lines[-1] == "Mend that first. It goes on from checkpoint g001-s00000030."


GLOO = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection reset by peer [127.0.0.1]:3\n"


@pytest.mark.parametrize(
    ("code", "cause"), [(1, "a rank left without a word"), (2, "bad input: no such data"), (137, "ended by SIGKILL")]
)
def test_a_rank_that_lost_its_peer_is_a_consequence(run: RunDir, code: int, cause: str) -> None:
    here(run, code=code, cause="crash", reason="x")
    log(run, HEAD + GLOO + "no such data\n" * (code == 2), job="1")
    answer = why.explain(run)
    assert answer.cause == cause and "Rank 0 failed" not in words(answer)
