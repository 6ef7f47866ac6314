"""The ledger beyond one run and squeue: accounting, lost records, rows of sweeps, and what it costs to ask."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hpc import ledger, records
from hpc.attempt import process_start
from hpc.errors import UserError
from hpc.rundir import RunDir, read_json, write_json, write_text
from hpc.sweepdir import Chunk, SweepDir
from tests.fakeslurm import FakeSlurm, without_slurm

NOW = 1_800_000_000.0
LIMIT_S = 30
LINE = "{job}|{state}|{code}|60|2027-01-15T08:00:00|2027-01-15T09:00:00|08:00:00|64000M||node1|None"


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepDir:
    """Six rows in two chunks."""
    without_slurm(monkeypatch)
    sweep = SweepDir(tmp_path / "runs" / "exp-sweep-0123abcd")
    names = [f"exp-{number:08x}" for number in range(6)]
    for name in names:
        write_text(RunDir(sweep.path / name).experiment, "name: exp\n")
    sweep.rows_file.write_text("".join(f"{name}\n" for name in names))
    sweep.write_chunks([Chunk(0, 0, 4), Chunk(1, 4, 2)], axes={"train.seed": list("012345")})
    return sweep


def held(run: RunDir, job: str | None = "55", phase: str = "training", **state: Any) -> None:
    """An attempt that began five seconds after the submission."""
    common = {"generation": 1, "job": job, "host": os.uname().nodename, "node": "node1", "pid": 1, "step": 40}
    write_json(run.state, {**common, "phase": phase, "epoch": 2, "started": NOW + 5, "time": NOW + 50, **state})


def submitted(run: RunDir, job: str = "55", **more: Any) -> None:
    write_json(run.submit, {"cluster": "slurm", "job": job, "time": NOW, **more})


def told(run: RunDir) -> tuple[str, str]:
    (status,) = ledger.statuses([run])
    return status.state, status.detail


def asked(fake: FakeSlurm) -> list[str]:
    """The commands that were called since the last time."""
    calls = [call.split()[0] for call in fake.calls()]
    (fake.folder / "calls").unlink(missing_ok=True)
    return calls


# Accounting.

ENDS = [
    ("OUT_OF_MEMORY", "training", "failed", "out of memory while training"),
    ("TIMEOUT", "training", "lost", "the time limit was reached while training"),
    ("NODE_FAIL", "training", "lost", "its node failed while training"),
    ("PREEMPTED", "training", "lost", "preempted while training"),
    ("PREEMPTED", "stopped", "stopped", "preempted; stopped by SIGTERM at step 40"),
    ("TIMEOUT", "stopped", "stopped", "the time limit was reached; stopped by SIGTERM at step 40"),
    ("CANCELLED", "stopped", "cancelled", "cancelled by scancel; stopped by SIGTERM at step 40"),
    ("CANCELLED", "training", "cancelled", "cancelled by scancel while training"),
    ("COMPLETED", "training", "lost", "the job ended without a word while training"),
]


@pytest.mark.parametrize("known_by", ["squeue", "sacct"])
@pytest.mark.parametrize(("state", "phase", "expected", "detail"), ENDS)
def test_what_slurm_alone_knows_is_told(
    run: RunDir, fake: FakeSlurm, known_by: str, state: str, phase: str, expected: str, detail: str
) -> None:
    submitted(run)
    held(run, phase=phase, reason="stopped by SIGTERM at step 40", code=75)
    if known_by == "squeue":
        fake.job("55", state)
    else:
        fake.accounted(LINE.format(job=55, state=state, code="0:15"))
    assert told(run) == (expected, detail)
    assert asked(fake) == (["squeue"] if known_by == "squeue" else ["squeue", "sacct"])


def test_a_step_may_be_out_of_memory_where_the_job_only_failed(run: RunDir, fake: FakeSlurm) -> None:
    submitted(run)
    held(run, phase="ended", reason="failed with exit code 137", code=137)
    step = LINE.format(job="55.0", state="OUT_OF_MEMORY", code="0:125")
    fake.accounted(LINE.format(job=55, state="FAILED", code="137:0"), step)
    assert told(run) == ("failed", "out of memory")


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("CANCELLED", ("cancelled", "cancelled by scancel before its first attempt")),
        ("FAILED", ("failed", "the batch script ended before its first attempt")),
        ("NODE_FAIL", ("lost", "its node failed before its first attempt")),
        ("RUNNING", ("lost", "no attempt has started, and the job is gone")),
    ],
)
def test_a_job_that_ended_before_its_first_attempt(
    run: RunDir, fake: FakeSlurm, state: str, expected: tuple[str, str]
) -> None:
    submitted(run)
    fake.accounted(LINE.format(job=55, state=state, code="0:0"))
    assert told(run) == expected


def test_sacct_is_asked_once_for_all_and_only_about_runs_that_do_not_say_how_they_ended(
    tmp_path: Path, fake: FakeSlurm
) -> None:
    runs = [RunDir(tmp_path / "runs" / f"exp-{number}") for number in range(12)]
    for number, run in enumerate(runs):
        write_text(run.experiment, "name: exp\n")
        submitted(run, str(number))
    ended = [{"phase": "ended", "code": 1}, {"phase": "ended", "code": 2}]
    for run, state in zip(runs, ended, strict=False):
        held(run, run.name[4:], **state)
    write_json(runs[2].result, {"best": {}})
    submitted(runs[3], "3", cancelled=NOW + 9)
    fake.job("4", "PENDING", comment="exp-4")
    fake.job("5", "TIMEOUT", comment="exp-5")
    fake.accounted(*(LINE.format(job=number, state="NODE_FAIL", code="0:0") for number in range(12)))
    states = [status.state for status in ledger.statuses(runs)]
    assert states == ["failed", "failed", "finished", "cancelled", "pending", *["lost"] * 7]
    calls = fake.calls()
    assert [call.split()[0] for call in calls] == ["squeue", "sacct"] and calls[1].endswith("--jobs=6,7,8,9,10,11")


def test_without_accounting_the_files_decide_and_sacct_is_not_asked_twice(run: RunDir, fake: FakeSlurm) -> None:
    submitted(run)
    held(run)
    scheduler = ledger.Scheduler(keep_s=0)
    for _ in range(3):
        (seen,) = ledger.look([run], scheduler)
        assert (seen.status.state, seen.status.detail) == ("lost", "the job ended without a word while training")
    assert asked(fake) == ["squeue", "sacct", "squeue", "squeue"]


def test_sacct_is_not_asked_where_squeue_does_not_answer(run: RunDir, fake: FakeSlurm) -> None:
    submitted(run)
    held(run)
    fake.fails("squeue", "Unable to contact slurm controller")
    assert told(run)[0] == "running" and asked(fake) == ["squeue"]


def test_nothing_is_asked_about_finished_runs(run: RunDir, fake: FakeSlurm) -> None:
    submitted(run)
    write_json(run.result, {"best": {}})
    assert told(run) == ("finished", "") and asked(fake) == []


# Requeued, submitted anew, and records that were never written.


def test_a_requeue_that_the_cluster_refused_went_on_as_another_job(run: RunDir, fake: FakeSlurm) -> None:
    """JobRequeue=0: submit.json has the new job under the time of the first submission."""
    submitted(run, "56")
    held(run, "55", "stopped", reason="stopped by SIGUSR2")
    fake.job("55", "COMPLETED")
    fake.job("56", "PENDING", "Priority")
    (status,) = ledger.statuses([run])
    assert (status.state, status.detail, status.job) == ("requeued", "Priority", "56")


def test_a_resubmitted_run_has_not_the_phase_of_its_last_attempt(run: RunDir, fake: FakeSlurm) -> None:
    submitted(run, "56", time=NOW + 100)
    held(run, "55", "stopped", reason="old")
    fake.job("56", "RUNNING")
    assert told(run) == ("running", "starting")
    fake.job("56", "CANCELLED")
    assert told(run) == ("cancelled", "cancelled by scancel before its first attempt")


@pytest.mark.parametrize("record", [{}, {"cluster": "slurm", "job": "40", "time": NOW - 10**6}])
def test_a_job_whose_shell_was_killed_before_the_record_is_found_by_its_token(
    run: RunDir, fake: FakeSlurm, record: dict[str, Any]
) -> None:
    if record:
        write_json(run.submit, record)
    fake.job("55", "PENDING", "Resources", comment=run.name)
    assert told(run) == ("pending", "Resources")
    assert read_json(run.submit)["job"] == "55" and run.read_events()[-1]["event"] == "submit"
    assert ledger.cancel_all([run])[0] == "job 55" and fake.jobs() == {"55": "CANCELLED"}


def test_an_older_job_of_this_name_is_of_another_folder_of_runs(run: RunDir, fake: FakeSlurm) -> None:
    more = "gpu|1|2001-01-01T00:00:00|N/A|N/A|8:00:00|1|(null)"
    fake.job("55", "RUNNING", comment=run.name, more=more)
    assert told(run) == ("planned", "not submitted") and not run.submit.exists()


def test_a_sweep_whose_shell_was_killed_before_the_record_is_recorded_whole(sweep: SweepDir, fake: FakeSlurm) -> None:
    for job, chunk, count in (("70", 0, 4), ("71", 1, 2)):
        for index in range(count):
            fake.job(f"{job}_{index}", "PENDING", "Resources", comment=sweep.token(chunk))
    states = ledger.statuses(sweep.rows())
    assert [status.job for status in states] == ["70_0", "70_1", "70_2", "70_3", "71_0", "71_1"]
    assert {status.state for status in states} == {"pending"} and sweep.count_submissions() == 1


# Rows of sweeps.


def test_rows_have_the_states_of_their_tasks(sweep: SweepDir, fake: FakeSlurm) -> None:
    sweep.record("slurm", {0: ("70", [0, 1, 2, 3]), 1: ("71", [4, 5])})
    rows = sweep.rows()
    asked(fake)
    fake.job("70_0", "RUNNING", comment=sweep.token(0))
    held(rows[0], "70_0")
    held(rows[1], "70_1", "ended", code=1, reason="failed with exit code 1", started=time.time(), time=time.time())
    write_json(rows[2].result, {"monitor": "loss", "direction": "min", "best": {"metrics": {"loss": 0.25}}})
    fake.job("70_3", "PENDING", "JobArrayTaskLimit", comment=sweep.token(0))
    fake.job("71_0", "PENDING", "Dependency", comment=sweep.token(1))
    fake.accounted(LINE.format(job="71_1", state="TIMEOUT", code="0:0"))
    statuses = ledger.statuses(rows)
    assert [status.state for status in statuses] == ["running", "failed", "finished", "pending", "pending", "lost"]
    assert asked(fake) == ["squeue", "sacct"] and {status.sweep for status in statuses} == {sweep.name}
    assert statuses[2].best == 0.25 and statuses[2].direction == "min" and statuses[4].job == "71_0"
    assert ledger.count_states(statuses) == "1 finished, 1 running, 2 pending, 1 failed, 1 lost"


def test_rows_of_a_local_sweep_wait_while_its_controller_lives(sweep: SweepDir, alive: subprocess.Popen[bytes]) -> None:
    start = process_start(alive.pid)
    sweep.record("local", {0: (str(alive.pid), [0, 1, 2, 3])}, process_start=start)
    rows = sweep.rows()
    held(rows[0], None, pid=alive.pid, process_start=start, time=time.time() + 0.01, started=time.time() + 0.01)
    assert [status.state for status in ledger.statuses(rows)] == ["running", *["pending"] * 3, "planned", "planned"]
    with pytest.raises(UserError, match=f"exp-00000001 waits for its turn: cancel the sweep, {sweep.name}"):
        ledger.cancel_all([rows[1]])[0]
    assert ledger.cancel_all([sweep])[0] == f"process {alive.pid}" and alive.wait() == -signal.SIGTERM
    assert [s.state for s in ledger.statuses(rows)] == [*["cancelled"] * 4, "planned", "planned"]


def test_a_sweep_is_cancelled_by_one_scancel_and_only_what_was_open_is_cancelled(
    sweep: SweepDir, fake: FakeSlurm
) -> None:
    sweep.record("slurm", {0: ("70", [0, 1, 2, 3]), 1: ("71", [4, 5])})
    rows = sweep.rows()
    held(rows[0], "70_0", "ended", code=1, reason="failed with exit code 1", started=time.time(), time=time.time())
    write_json(rows[1].result, {"best": {}})
    for job in ("70_2", "70_3", "71_0", "80_1"):
        fake.job(job, "PENDING", comment=f"{sweep.name}/0")
    write_json(rows[5].submit, {"cluster": "slurm", "job": "80_1", "time": time.time() + 1})  # resumed alone
    assert ledger.cancel_all([sweep])[0] == "job 70, job 71, job 80"
    assert [call for call in fake.calls() if call.startswith("scancel")] == ["scancel 70 71 80"]
    for job in ("70_2", "70_3", "71_0", "80_1"):
        (fake.folder / "jobs" / job).unlink()
    states = [status.state for status in ledger.statuses(rows)]
    assert states == ["failed", "finished", *["cancelled"] * 4]
    with pytest.raises(UserError, match="nothing to cancel \\(1 finished, 1 failed, 4 cancelled\\)"):
        ledger.cancel_all([sweep])[0]


def test_several_are_cancelled_together_or_not_at_all(sweep: SweepDir, run: RunDir, fake: FakeSlurm) -> None:
    sweep.record("slurm", {0: ("70", [0, 1, 2, 3])})
    submitted(run)
    fake.job("70_2", "RUNNING", comment=sweep.token(0))
    with pytest.raises(UserError, match="exp-0000aaaa is lost: nothing to cancel"):
        ledger.cancel_all([sweep, run])
    assert "scancel" not in asked(fake)
    fake.job("55", "RUNNING")
    assert ledger.cancel_all([sweep, run]) == ["job 70", "job 55"]
    assert [call for call in fake.calls() if call.startswith("scancel")] == ["scancel 70 55"]


def test_a_damaged_sweep_damages_its_rows_and_no_other_run(sweep: SweepDir, run: RunDir, fake: FakeSlurm) -> None:
    sweep.submit.write_text('{"submissions": [')
    statuses = ledger.statuses([*sweep.rows(), run])
    assert [status.state for status in statuses] == [*["damaged"] * 6, "planned"]
    assert "submit.json: damaged" in statuses[0].detail


def test_a_run_is_found_by_its_job_and_a_sweep_by_its_array(sweep: SweepDir, run: RunDir) -> None:
    folder = run.path.parent
    sweep.record("slurm", {0: ("70", [0, 1, 2, 3]), 1: ("71", [4, 5])})
    submitted(run)
    found = [ledger.find(folder, name) for name in ("55", "71_1", "71", "0123abcd", "exp-0000aaaa", "0000aaaa")]
    assert [one.name for one in found] == [run.name, "exp-00000005", sweep.name, sweep.name, run.name, run.name]
    for name, words in (("99", "no run '99'"), ("exp-", "names 2: exp-sweep-0123abcd, exp-0000aaaa")):
        with pytest.raises(UserError, match=words):
            ledger.find(folder, name)


# Cost.


def test_what_a_sweep_has_in_common_is_read_once(sweep: SweepDir, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep.record("local", {0: ("4194304", [0, 1, 2, 3])}, process_start="gone")
    reads: list[Path] = []
    monkeypatch.setattr("hpc.sweepdir.read_json", lambda path: reads.append(path) or json.loads(path.read_text()))
    assert ledger.statuses(sweep.rows())[0].state == "lost"
    assert reads == [sweep.submit]


def test_a_file_that_has_not_changed_is_not_read_again(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(run)
    held(run)
    reads: list[str] = []
    monkeypatch.setattr(records, "read_json", lambda path: reads.append(path.name) or read_json(path))
    reader = records.Reader(keep=True)
    first = reader.read([run])
    assert reader.read([run]) == first and sorted(reads) == ["result.json", "state.json", "submit.json"]
    held(run, phase="evaluating")
    (changed,) = reader.read([run])
    assert isinstance(changed, records.Records) and changed.phase == "evaluating" and reads[3:] == ["state.json"]


def test_many_runs_are_read_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [RunDir(tmp_path / f"exp-{number}") for number in range(64)]
    for number, run in enumerate(runs):
        write_text(run.experiment, "name: exp\n")
        submitted(run, str(number))
    meeting, own = threading.Barrier(records._AT_ONCE), threading.local()

    def read_together(path: Path) -> dict[str, Any]:
        if not hasattr(own, "met"):
            own.met = meeting.wait(LIMIT_S)  # broken, and so an error, where fewer read at once
        return read_json(path)

    monkeypatch.setattr(records, "read_json", read_together)
    found = records.Reader().read(runs)
    assert [one.submit["job"] for one in found if isinstance(one, records.Records)] == [str(n) for n in range(64)]
