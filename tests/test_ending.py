"""How an attempt has ended: stop.json, the events of its ranks, SLURM's words, and only then the exit code."""

import os
import time
from typing import Any

import pytest

from hpc import ending
from hpc.rundir import RunDir, write_json, write_text
from hpc.verdict import Ending
from tests.fakeslurm import FakeSlurm

TOLD = "the batch shell was told to end"
TABLE = [
    # stop.json's generation, exit code, told, finished -> kind, words
    (3, 75, False, False, "stopped", "stopped by SIGTERM at step 40"),
    (3, 143, False, False, "stopped", "stopped by SIGTERM at step 40"),
    (3, 137, False, False, "stopped", "stopped by SIGTERM at step 40"),
    (3, 0, False, False, "stopped", "stopped by SIGTERM at step 40"),
    (3, 75, True, False, "told", TOLD),
    (3, 143, True, False, "told", TOLD),
    (2, 75, False, False, "crash", "failed with exit code 75"),
    (2, 143, True, False, "told", TOLD),
    (None, 1, False, False, "crash", "failed with exit code 1"),
    (None, 0, False, False, "crash", "left with exit code 0 and without a result"),
    (None, 2, False, False, "bad input", "bad input: it would fail again"),
    (None, 74, False, False, "storage", "storage fault"),
    (None, 76, False, False, "hang", "hung"),
    (None, 134, False, False, "crash", "ended by SIGABRT"),
    (None, 137, False, False, "crash", "ended by SIGKILL"),
    (None, 139, False, False, "crash", "ended by SIGSEGV"),
    (None, 143, False, False, "crash", "ended by SIGTERM"),
    (None, 255, False, False, "crash", "failed with exit code 255"),
    (None, 143, True, False, "told", TOLD),
    (None, 0, False, True, "finished", "finished"),
    (3, 75, False, True, "finished", "finished"),
    (None, 143, True, True, "finished", "finished"),
]


def hold(run: RunDir, job: str | None = "55") -> None:
    held = {"host": os.uname().nodename, "node": "node0", "pid": 1, "phase": "training", "step": 40, "epoch": 2}
    write_json(run.state, {**held, "generation": 3, "job": job, "started": time.time() - 60, "time": time.time()})


def of(run: RunDir, code: int, *events: tuple[str, dict[str, Any]], told: bool = False) -> tuple[str, str]:
    for number, (kind, fields) in enumerate(events):
        run.event(kind, f"rank{number}", 3, **fields)
    own = [event for event in run.read_events() if event["generation"] == 3]
    found = ending.of(run, 3, own, code, told)
    return found.kind, found.words


@pytest.mark.parametrize(("stopped", "code", "told", "finished", "kind", "words"), TABLE)
def test_what_an_end_is(
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    stopped: int | None,
    code: int,
    told: bool,
    finished: bool,
    kind: str,
    words: str,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    hold(run)
    if stopped:
        write_json(run.stop, {"generation": stopped, "cause": "SIGTERM", "step": 40})
    if finished:
        write_json(run.result, {"finished": True})
    found = of(run, code, told=told)
    assert found[0] == kind and found[1].startswith(words)
    monkeypatch.delenv("SLURM_JOB_ID")
    local = "cancelled or interrupted; 'hpc resume" if words is TOLD else words
    found = of(run, code, told=told)
    assert found[0] == kind and found[1].startswith(local)


STUCK = {"rank": 1, "node": "node1", "why": "no sign of life"}


@pytest.mark.parametrize("code", [1, 75, 76, 137, 143])
def test_a_hang_is_one_whatever_the_code_and_names_the_node(run: RunDir, code: int) -> None:
    hold(run)
    assert of(run, code, ("hang", {"stuck": [STUCK]})) == ("hang", "hung on node1")
    assert ending.code_of(run.read_events(), code) == 76


def test_where_several_nodes_are_stuck_none_is_named(run: RunDir) -> None:
    hold(run)
    other = {**STUCK, "rank": 0, "node": "node0"}
    assert of(run, 76, ("hang", {"stuck": [STUCK, other]}), ("hang", {"stuck": []})) == ("hang", "hung")
    assert ending.stuck_nodes([{"event": "hang", "stuck": [{**STUCK, "node": "unknown"}]}]) == set()


def test_a_rank_that_knows_that_a_retry_is_vain_ends_the_run(run: RunDir) -> None:
    hold(run)
    diverged = {"reason": "the loss is nan\nat step 5", "retry": False}
    assert of(run, 1, ("failed", diverged)) == ("in vain", "failed, and would fail again: the loss is nan at step 5")


@pytest.mark.parametrize(
    ("code", "own", "kind", "words"),
    [
        (1, {}, "crash", "failed with exit code 1: why"),
        (143, {"code": 74}, "storage", "storage fault: why"),
        (137, {"code": 2}, "bad input", "bad input: why"),
    ],
)
def test_the_word_of_the_rank_that_failed_counts_before_sruns_code(
    run: RunDir, code: int, own: dict[str, int], kind: str, words: str
) -> None:
    hold(run)
    assert of(run, code, ("failed", {"reason": "why", **own})) == (kind, words)


def test_a_bad_node_is_one_whatever_the_code(run: RunDir) -> None:
    hold(run)
    lost = {"node": "node0", "reason": "GPU 0 is lost"}
    assert of(run, 143, ("bad-node", lost), ("bad-node", lost)) == ("node", "bad node node0: GPU 0 is lost")
    assert ending.code_of(run.read_events(), 143) == 77


OOM = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=55.0. Some of your processes may have been killed.\n"
HEAD = 'Traceback (most recent call last):\n  File "train.py", line 12, in fit\n    batch = next(self.loader)\n'


@pytest.mark.parametrize(("code", "kind"), [(137, "memory"), (1, "memory"), (0, "crash")])
def test_memory_is_what_slurm_says_of_the_attempt(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, code: int, kind: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    hold(run)
    write_text(run.output("55", "0", "err"), HEAD + "RuntimeError: DataLoader worker was killed\n" + OOM)
    assert of(run, code)[0] == kind


@pytest.mark.parametrize(("peak_gb", "code", "kind"), [(62.0, 137, "memory"), (40.0, 137, "crash"), (62.0, 1, "crash")])
def test_a_kill_near_the_limit_was_for_memory(run: RunDir, peak_gb: float, code: int, kind: str) -> None:
    hold(run, job=None)
    text = "name: exp\nmodel: {name: m}\ndata: {file: x.h5}\nlaunch: {instance: cedia-a100-40gb, mem: 64GB}\n"
    write_text(run.experiment, text)
    common = {"generation": 3, "node": "n", "seconds": 90.0, "cpu_seconds": 9.0, "busiest_cores": 1.0, "gpus": []}
    usage = {**common, "memory_peak_gb": peak_gb, "memory_limit_gb": 64.0, "asked": {}}
    write_json(run.usage / "003-n.json", usage)
    assert of(run, code)[0] == kind


def test_the_exception_of_a_crash_is_told(run: RunDir) -> None:
    hold(run, job=None)
    write_text(run.output("99", "0", "err"), HEAD + "ValueError: sample 7 is empty\n")
    assert of(run, 1) == ("crash", "failed with exit code 1: ValueError: sample 7 is empty")


def test_a_rank_that_only_lost_another_is_not_to_blame(run: RunDir) -> None:
    hold(run, job=None)
    write_text(run.output("99", "0", "err"), HEAD + "RuntimeError: Connection reset by peer\n")
    kind, words = of(run, 1)
    assert (kind, words.partition(": ")[2][:53]) == ("crash", "a rank left without a word, and rank 0 lost it: Runti")


@pytest.mark.parametrize(
    ("cause", "step", "left_s", "kind"),
    [
        ("SIGUSR2", 40, None, "no step"),
        ("SIGUSR2", 40, 100, "no step"),
        ("SIGUSR2", 40, 9000, "stopped"),
        ("SIGUSR2", 41, None, "stopped"),
        ("SIGUSR2", 30, None, "stopped"),
        ("SIGTERM", 40, None, "stopped"),
    ],
)
def test_a_stop_at_the_time_limit_without_a_step_is_told_from_preemptions_and_from_progress(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, cause: str, step: int, left_s: float | None, kind: str
) -> None:
    """With much time left the notice came from a preemption (preempt_send_user_signal)."""
    hold(run)
    monkeypatch.setenv("HPC_END_TIME", str(time.time() + left_s) if left_s else "")
    run.event("checkpoint", "rank0", 1, step=50)
    run.event("checkpoint", "rank0", 2, step=40)  # went on from an older one, as that was damaged
    write_json(run.stop, {"generation": 3, "cause": cause, "step": step})
    events = run.read_events()
    ended = ending.at_the_limit(run, 3, events, ending.of(run, 3, [], 75, False))
    assert ended == Ending(kind, f"stopped by {cause} at step {step}")


def test_the_budgets_are_the_experiments_and_the_defaults_where_that_is_unreadable(run: RunDir) -> None:
    text = "name: exp\nmodel: {name: m}\ndata: {file: x.h5}\nlaunch: {budgets: {hang: 7}}\n"
    assert ending.budgets_of(run).hang == 3
    write_text(run.experiment, text)
    assert (ending.budgets_of(run).hang, ending.budgets_of(run).crash) == (7, 3)
