"""`hpc why` and `hpc ls` of runs that hang, fail again and again, or wait to be started again."""

import os
from pathlib import Path

import pytest

from hpc import attempt, ledger, why
from hpc.rundir import RunDir, write_json, write_text
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


def test_a_used_up_budget_is_told_with_the_cause_of_the_last_failure(run: RunDir, fake: FakeSlurm) -> None:
    for number, cause in ((1, "crash"), (2, "hang"), (3, "crash")):
        run.event("start", "shell", number, job="55", node="node1", restart=number - 1)
        run.event("end", "shell", number, cause=cause)
    run.event("checkpoint", "rank0", 1, step=30)
    ended(run, generation=4, cause="crash", reason="3 crashes, 1 hang since step 30 (...): failed with exit code 1")
    log(run, HEAD + "ValueError: sample 7 is empty\n")
    answer = why.explain(run)
    assert answer.cause == "exception: ValueError: sample 7 is empty"
    assert answer.lines[-1] == (
        "It is not started again by itself: 3 crashes, 1 hang since step 30, and launch.budgets.crash is 3 "
        "restarts in a row."
    )
    write_text(run.experiment, EXPERIMENT.replace("}\n", ", budgets: {crash: 9}}\n"))
    assert "not started again by itself" not in words(why.explain(run)), "something else has ended it"


def test_a_run_that_waits_after_a_crash_tells_of_it_and_of_its_restarts(run: RunDir, fake: FakeSlurm) -> None:
    reason = "failed with exit code 1: ValueError: x; restart 2 of 3 since step 30, in 60 s"
    ended(run, phase="stopped", cause="crash", reason=reason)
    run.event("end", "shell", 1, cause="crash", reason=reason)
    fake.job("55", "PENDING", "BeginTime")
    assert ledger.status(run).detail == reason
    answer = why.explain(run)
    assert answer.state == "requeued" and answer.cause == "BeginTime"
    assert answer.lines[-2] == f"Its last attempt {reason}."
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
    assert answer.lines == [f"Its last attempt {reason}.", "Its script is starting it again."]


def test_memory_that_ran_out_again_and_again_is_counted(run: RunDir, fake: FakeSlurm) -> None:
    ended(run, code=137, cause="memory", reason="4 x out of memory since step 30 (launch.budgets.memory is 3): ...")
    fake.accounted(LINE.format(state="OUT_OF_MEMORY", code="0:125", rss=""))
    assert ledger.status(run).detail.startswith("4 x out of memory since step 30")
    assert why.explain(run).cause == "out of memory"
