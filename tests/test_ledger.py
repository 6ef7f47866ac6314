"""What `hpc ls` says of a run, from its files and squeue alone, and what cancel ends."""

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc import ledger, slurm
from hpc.attempt import process_start
from hpc.errors import UserError
from hpc.rundir import RunDir, read_json, write_json, write_text
from tests.fakeslurm import FakeSlurm

HOST = os.uname().nodename
NOW = 1_800_000_000.0


@pytest.fixture
def dead() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def submitted(run: RunDir, cluster: str, job: object, when: float = NOW, **more: Any) -> None:
    here = {"process_start": process_start(int(str(job)))} if cluster == "local" else {}
    write_json(run.submit, {"cluster": cluster, "job": str(job), "time": when, **here, **more})


def held(run: RunDir, **state: Any) -> None:
    """An attempt that began after the submission."""
    run.event("start", "shell", 1)
    common = {"generation": 1, "job": None, "host": HOST, "node": "n", "pid": 1, "step": 40, "epoch": 2}
    start = process_start(int(state.get("pid", 1)))
    write_json(run.state, {**common, "process_start": start, "started": NOW + 5, "time": NOW + 50, **state})


def told(run: RunDir) -> tuple[str, str]:
    status = ledger.status(run)
    return status.state, status.detail


# On SLURM.


@pytest.mark.parametrize(
    ("job", "state", "expected"),
    [
        ("PENDING|Priority", None, ("pending", "Priority")),
        ("PENDING|BeginTime", {"phase": "stopped", "job": "55"}, ("requeued", "BeginTime")),
        ("RUNNING|None", None, ("running", "starting")),
        ("RUNNING|None", {"phase": "training", "job": "55"}, ("running", "training")),
        ("COMPLETING|None", {"phase": "validation", "job": "55"}, ("running", "validation")),
        (None, None, ("lost", "no attempt has started, and the job is gone")),
        (None, {"phase": "training", "job": "55"}, ("lost", "the job ended without a word while training")),
        (
            "FAILED|NonZeroExitCode",
            {"phase": "training", "job": "55"},
            ("lost", "the job ended without a word while training"),
        ),
        (None, {"phase": "stopped", "job": "55", "reason": "stopped by SIGTERM"}, ("stopped", "stopped by SIGTERM")),
        ("FAILED|NonZero", {"phase": "ended", "job": "55", "reason": "code 1"}, ("failed", "code 1")),
    ],
)
def test_states_on_slurm(
    run: RunDir, fake: FakeSlurm, job: str | None, state: dict[str, Any] | None, expected: tuple[str, str]
) -> None:
    submitted(run, "slurm", 55)
    if job:
        fake.job("55", *job.split("|"))
    if state:
        held(run, **state)
    assert told(run) == expected


def test_a_finished_run_is_finished_whatever_else_is_there(run: RunDir, fake: FakeSlurm) -> None:
    submitted(run, "slurm", 55, cancelled=NOW + 99)
    held(run, phase="training", job="55")
    fake.job("55", "COMPLETING")
    best = {"metrics": {"accuracy": 0.91239}}
    write_json(run.result, {"monitor": "accuracy", "best": best})
    status = ledger.status(run)
    assert (status.state, status.metric, status.step, status.attempts) == ("finished", "accuracy 0.9124", 40, 1)


def test_a_cancelled_run_is_cancelled_until_it_starts_again(run: RunDir, fake: FakeSlurm) -> None:
    submitted(run, "slurm", 55, cancelled=NOW + 60)
    held(run, phase="stopped", job="55", reason="told")
    assert told(run) == ("cancelled", "told")
    fake.job("55", "COMPLETING")
    assert told(run)[0] == "running", "not gone yet"
    fake.job("55", "CANCELLED")
    assert told(run) == ("cancelled", "told")
    fake.job("56", "COMPLETED")
    held(run, phase="stopped", job="56", reason="anew", started=NOW + 70)
    assert told(run) == ("stopped", "anew")


def test_a_hand_made_sbatch_counts_from_its_start(run: RunDir, fake: FakeSlurm) -> None:
    fake.job("77", "RUNNING")
    held(run, phase="training", job="77")
    for submission in ((), ("slurm", 55), ("local", 4711)):
        if submission:
            submitted(run, *submission)
        status = ledger.status(run)
        assert (status.state, status.cluster, status.job) == ("running", "slurm", "77"), submission


@pytest.mark.parametrize("trouble", ["fails", "hangs", "missing"])
def test_where_slurm_does_not_answer_a_run_is_not_called_lost(
    run: RunDir, fake: FakeSlurm, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_TIMEOUT_S", 0.2)
    if trouble == "missing":
        (fake.folder / "bin" / "squeue").unlink()
        monkeypatch.setenv("PATH", str(fake.folder / "bin"))
    elif trouble == "hangs":
        fake.hangs("squeue")
    else:
        fake.fails("squeue", "Unable to contact slurm controller")
    submitted(run, "slurm", 55)
    assert told(run) == ("pending", "SLURM does not answer")
    held(run, phase="training", job="55", host="node9")
    state, detail = told(run)
    assert state == "running" and detail.startswith("on node9, last heard of ") and "does not answer" in detail
    held(run, phase="ended", job="55", reason="code 1")
    assert told(run) == ("failed", "code 1"), "what the run wrote itself holds"


def test_one_squeue_serves_all_runs_and_none_is_asked_without_slurm(tmp_path: Path, fake: FakeSlurm) -> None:
    runs = [RunDir(tmp_path / "runs" / f"exp-{number}") for number in range(4)]
    for run in runs:
        write_text(run.experiment, "name: exp\n")
        submitted(run, "local", 1 << 22)
    assert {status.state for status in ledger.statuses(runs)} == {"failed"} and fake.calls() == []
    for number, run in enumerate(runs):
        submitted(run, "slurm", number)
        fake.job(str(number), "PENDING", "Resources", comment=run.name)
    assert {status.detail for status in ledger.statuses(runs)} == {"Resources"}
    assert len(fake.calls()) == 1


# Here.


def test_a_run_that_was_only_made_is_planned(run: RunDir) -> None:
    assert told(run) == ("planned", "not submitted")


@pytest.mark.parametrize(
    ("phase", "lives", "expected"),
    [
        ("training", True, ("running", "training")),
        ("training", False, ("lost", "the job ended without a word while training")),
        ("stopped", True, ("requeued", "why")),
        ("stopped", False, ("stopped", "why")),
        ("ended", False, ("failed", "why")),
        ("ended", True, ("failed", "why")),
    ],
)
def test_states_here(
    run: RunDir, alive: subprocess.Popen[bytes], dead: int, phase: str, lives: bool, expected: tuple[str, str]
) -> None:
    submitted(run, "local", 4711)
    held(run, phase=phase, pid=alive.pid if lives else dead, reason="why")
    assert told(run) == expected


def test_before_the_first_attempt_the_submitted_process_counts(
    run: RunDir, alive: subprocess.Popen[bytes], dead: int
) -> None:
    submitted(run, "local", alive.pid)
    assert told(run) == ("pending", "starting")
    submitted(run, "local", dead)
    assert told(run) == ("failed", "the batch script ended before its first attempt")


def test_a_run_submitted_again_is_pending_until_its_attempt_begins(
    run: RunDir, alive: subprocess.Popen[bytes], dead: int
) -> None:
    held(run, phase="stopped", pid=dead, reason="old")
    submitted(run, "local", alive.pid, when=NOW + 100)
    assert told(run) == ("pending", "starting")
    held(run, phase="training", pid=alive.pid, started=NOW + 101, time=NOW + 101)
    assert told(run) == ("running", "training")


def test_a_run_on_another_host_says_when_it_was_last_heard_of(run: RunDir) -> None:
    submitted(run, "local", 4711, when=1.0)
    held(run, phase="training", host="login2", time=time.time() - 30)
    state, detail = told(run)
    assert state == "running" and detail in ("on login2, last heard of 30 s ago", "on login2, last heard of 31 s ago")


@pytest.mark.parametrize("start", ["", None, "another-boot 4711"])
def test_a_number_that_another_process_has_by_now_is_no_run(
    run: RunDir, alive: subprocess.Popen[bytes], start: str | None
) -> None:
    submitted(run, "local", alive.pid, process_start=start)
    assert told(run) == ("failed", "the batch script ended before its first attempt")
    submitted(run, "local", 4711)
    held(run, phase="training", pid=alive.pid, process_start=start)
    assert told(run) == ("lost", "the job ended without a word while training")
    with pytest.raises(UserError, match="is lost: nothing to cancel"):
        ledger.cancel_all([run])[0]
    assert alive.poll() is None


def test_a_process_that_changes_hands_while_it_is_cancelled_is_left_alone(
    run: RunDir, alive: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(run, "local", 4711)
    held(run, phase="training", pid=alive.pid)
    before = ledger.look([run])
    stale = replace(before[0].records, state={**before[0].records.state, "process_start": "another-boot 4711"})
    monkeypatch.setattr(ledger, "look", lambda runs: [replace(before[0], records=stale)])
    with pytest.raises(UserError, match="has ended just now: nothing to cancel"):
        ledger.cancel_all([run])[0]
    assert alive.poll() is None and "cancelled" not in read_json(run.submit)


# Damage.


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("state.json", b'{"phase": "tr', "state.json: damaged"),
        ("state.json", b'{"phase": "training"}', "state.json: damaged ('pid' is missing, 'host' is missing"),
        ("state.json", b'{"phase": "x", "pid": "4", "host": "h", "time": 1}', "'pid' is not what belongs there"),
        ("state.json", b'{"phase": "x", "pid": 4, "host": "h", "time": null}', "'time' is not what belongs there"),
        ("submit.json", b"\xff\x00", "submit.json: damaged"),
        ("submit.json", b'{"cluster": "local", "job": "x"}', "submit.json: damaged ('job' is not what belongs there)"),
        ("submit.json", b'{"cluster": "local", "time": 1}', "submit.json: damaged ('job' is not what belongs there)"),
        ("result.json", b"[]", "result.json: holds list"),
        ("result.json", b'{"best": {"metrics": 3}}', "result.json: damaged ('best' is not what belongs there)"),
        ("experiment.yaml", b"", "experiment.yaml: is empty"),
    ],
)
def test_a_damaged_run_is_told_with_its_reason_and_hides_no_other(
    tmp_path: Path, run: RunDir, file: str, content: bytes, words: str
) -> None:
    (run.path / file).write_bytes(content)
    other = RunDir(run.path.with_name("exp-0000bbbb"))
    write_text(other.experiment, "name: exp\n")
    damaged, whole = ledger.statuses([run, other])
    assert (damaged.state, whole.state) == ("damaged", "planned")
    assert words in damaged.detail and "\n" not in damaged.detail
    with pytest.raises(UserError, match=f"exp-0000aaaa is damaged: {file}"):
        ledger.cancel_all([run])[0]


def test_one_run_is_read_with_its_experiment_which_takes_too_long_for_a_list(run: RunDir) -> None:
    run.experiment.write_text("name: [")
    assert ledger.status(run).state == "damaged" and "experiment.yaml, line 1" in ledger.status(run).detail
    assert ledger.statuses([run])[0].state == "planned"


# Cancel.


def test_cancel_here_tells_the_shell_and_marks_the_run(run: RunDir, alive: subprocess.Popen[bytes]) -> None:
    submitted(run, "local", 4711)
    held(run, phase="training", pid=alive.pid)
    assert ledger.cancel_all([run])[0] == f"process {alive.pid}"
    assert alive.wait() == -signal.SIGTERM
    assert read_json(run.submit)["cancelled"] > NOW - 1e9 and run.read_events()[-1]["event"] == "cancel"


def test_cancel_on_slurm_names_the_newest_job(run: RunDir, fake: FakeSlurm) -> None:
    submitted(run, "slurm", 55)
    held(run, phase="training", job="77")
    fake.job("77", "RUNNING")
    assert ledger.cancel_all([run])[0] == "job 77"
    assert fake.jobs() == {"77": "CANCELLED"}


def test_a_process_number_is_never_given_to_scancel(
    run: RunDir, fake: FakeSlurm, alive: subprocess.Popen[bytes]
) -> None:
    """Ran on SLURM once, started here since: its pid may be the number of another job."""
    held(run, phase="stopped", job="55")
    fake.job(str(alive.pid), "RUNNING", comment="(null)")
    submitted(run, "local", alive.pid, when=NOW + 100)
    assert told(run) == ("pending", "starting")
    with pytest.raises(UserError, match="is just starting: repeat this in a moment"):
        ledger.cancel_all([run])[0]
    assert fake.jobs() == {str(alive.pid): "RUNNING"} and alive.poll() is None


@pytest.mark.parametrize("words", ["Invalid job id specified", "Access/permission denied"])
def test_a_refusal_of_scancel_is_told_and_nothing_is_marked(run: RunDir, fake: FakeSlurm, words: str) -> None:
    submitted(run, "slurm", 55)
    fake.job("55", "RUNNING")
    fake.fails("scancel", words)
    with pytest.raises(UserError, match=f"scancel 55: {words}"):
        ledger.cancel_all([run])[0]
    assert "cancelled" not in read_json(run.submit)


def test_there_must_be_something_to_cancel_and_it_must_be_here(run: RunDir) -> None:
    with pytest.raises(UserError, match="exp-0000aaaa is planned: nothing to cancel"):
        ledger.cancel_all([run])[0]
    submitted(run, "local", 4711)
    held(run, phase="training", host="login2")
    with pytest.raises(UserError, match="exp-0000aaaa runs on login2; cancel it there"):
        ledger.cancel_all([run])[0]
