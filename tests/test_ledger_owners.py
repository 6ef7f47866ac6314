"""Whose a job is: numbers come again, and two clusters may share a folder of runs; damage of one hides no other."""

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hpc import attempt, ledger, slurm
from hpc.errors import UserError
from hpc.rundir import RunDir, all_runs, find_run, read_json, write_json, write_text
from hpc.sweepdir import Chunk, SweepDir, find_sweep
from tests.fakeslurm import FakeSlurm, without_slurm
from tests.slurm.cluster import Cluster

NOW = 1_800_000_000.0
LINE = "{job}|{state}|0:15|60|2027-01-15T08:00:00|2027-01-15T09:00:00|08:00:00|64000M||node1|None"


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))


def submitted(run: RunDir, job: str = "55", **more: Any) -> None:
    write_json(run.submit, {"cluster": "slurm", "job": job, "time": NOW, **more})


def held(run: RunDir, job: str = "55", phase: str = "training", **more: Any) -> None:
    state = {"generation": 1, "job": job, "host": "node9", "pid": 1, "phase": phase, "step": 4}
    write_json(run.state, {**state, "started": NOW + 5, "time": time.time() - 30, **more})


def told(run: RunDir) -> tuple[str, str]:
    (status,) = ledger.statuses([run])
    return status.state, status.detail


@pytest.fixture
def sweep(run: RunDir) -> SweepDir:
    """Four rows in two chunks, beside the run."""
    sweep = SweepDir(run.path.parent / "exp-sweep-0123abcd")
    names = [f"exp-{number:08x}" for number in range(4)]
    for name in names:
        write_text(RunDir(sweep.path / name).experiment, "name: exp\n")
    sweep.rows_file.write_text("".join(f"{name}\n" for name in names))
    sweep.write_chunks([Chunk(0, 0, 3), Chunk(1, 3, 1)], axes={"train.seed": list("0123")})
    return sweep


# Another job of the same number.


@pytest.mark.parametrize("comment", ["(null)", "exp-0000bbbb", "exp-0000aaaa2", "exp-sweep-0123abcd/0"])
def test_a_job_of_this_number_with_another_comment_is_not_ours(run: RunDir, fake: FakeSlurm, comment: str) -> None:
    submitted(run)
    fake.job("55", "RUNNING", comment=comment)
    assert told(run) == ("lost", "no attempt has started, and the job is gone")
    held(run)
    assert told(run) == ("lost", "the job ended without a word while training")
    with pytest.raises(UserError, match="is lost: nothing to cancel"):
        ledger.cancel_all([run])
    assert fake.jobs() == {"55": "RUNNING"}


def test_a_row_is_its_sweeps_whoever_submitted_it(sweep: SweepDir, fake: FakeSlurm) -> None:
    sweep.record("slurm", {0: ("70", [0, 1, 2])})
    for index, comment in enumerate((sweep.token(0), f"{sweep.token(0)}/1", "exp-sweep-99999999/0")):
        fake.job(f"70_{index}", "PENDING", "Priority", comment=comment)
    assert [status.state for status in ledger.statuses(sweep.rows())] == ["pending", "pending", "lost", "planned"]


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ({"submitted": moment(NOW)}, "failed"),
        ({"submitted": moment(NOW - 60)}, "failed"),
        ({"submitted": moment(NOW + 3600)}, "lost"),
        ({"submitted": moment(NOW - 3600)}, "lost"),
        ({"submitted": moment(NOW), "comment": "exp-0000bbbb"}, "lost"),
        ({"submitted": moment(NOW + 3600), "comment": "exp-0000aaaa"}, "failed"),
        ({"submitted": moment(NOW), "cluster": "other"}, "lost"),
    ],
)
def test_sacct_is_believed_where_comment_or_time_are_ours(
    run: RunDir, fake: FakeSlurm, line: dict[str, str], state: str
) -> None:
    submitted(run, slurm_cluster="fake")
    held(run, slurm_cluster="fake")
    fake.accounted(LINE.format(job=55, state="OUT_OF_MEMORY"), **line)
    assert told(run)[0] == state


def test_a_hand_made_job_was_submitted_before_it_began(run: RunDir, fake: FakeSlurm) -> None:
    held(run)
    fake.accounted(LINE.format(job=55, state="OUT_OF_MEMORY"), submitted=moment(NOW - 10**6))
    assert told(run)[0] == "failed"
    fake.accounted(LINE.format(job=55, state="OUT_OF_MEMORY"), submitted=moment(NOW + 3600))
    assert told(run)[0] == "lost"


def test_what_sacct_calls_running_and_squeue_does_not_know_is_asked_about_again(run: RunDir, fake: FakeSlurm) -> None:
    submitted(run)
    held(run)
    scheduler = ledger.Scheduler(keep_s=0)
    fake.accounted(LINE.format(job=55, state="RUNNING"))
    (seen,) = ledger.look([run], scheduler)
    assert (seen.status.state, seen.accounted) == ("lost", None)
    fake.accounted(LINE.format(job=55, state="OUT_OF_MEMORY"))
    for _ in range(2):
        (seen,) = ledger.look([run], scheduler)
        assert seen.status.detail == "out of memory while training"
    assert [call.split()[0] for call in fake.calls()] == ["squeue", "sacct", "squeue", "sacct", "squeue"]


def test_several_runs_of_one_number_are_named(run: RunDir, sweep: SweepDir) -> None:
    submitted(run)
    sweep.record("slurm", {0: ("55", [0, 1, 2])})
    with pytest.raises(UserError, match=r"job 55 is of 2 runs, .*exp-0000aaaa.*; name one"):
        ledger.find(run.path.parent, "55")
    assert ledger.find(run.path.parent, "55_1").name == "exp-00000001"


# Another cluster.


def test_a_run_on_another_cluster_is_told_from_its_files(run: RunDir, fake: FakeSlurm) -> None:
    submitted(run, slurm_cluster="other")
    fake.job("55", "RUNNING", comment="(null)")
    assert told(run) == ("pending", "on cluster other")
    held(run, slurm_cluster="other")
    state, detail = told(run)
    assert state == "running" and detail.startswith("on cluster other, last heard of 3")
    held(run, phase="stopped", slurm_cluster="other")
    assert told(run)[0] == "requeued"
    with pytest.raises(UserError, match="exp-0000aaaa is on cluster other; cancel it there"):
        ledger.cancel_all([run])
    assert not any("scancel" in call for call in fake.calls()) and "cancelled" not in read_json(run.submit)
    held(run, phase="ended", code=1, reason="failed with exit code 1", slurm_cluster="other")
    assert told(run) == ("failed", "failed with exit code 1")


def test_the_cluster_is_asked_for_its_name_only_about_runs_that_are_gone(run: RunDir, fake: FakeSlurm) -> None:
    submitted(run, slurm_cluster="fake")
    fake.job("55", "RUNNING")
    assert told(run)[0] == "running" and len(fake.calls()) == 1
    (fake.folder / "jobs" / "55").unlink()
    assert told(run)[0] == "lost" and [call.split()[0] for call in fake.calls()[1:]] == ["squeue", "sacct", "scontrol"]


def test_submissions_and_attempts_name_their_cluster(
    run: RunDir, sweep: SweepDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt.record_submission(run, "slurm", "55")
    sweep.record("slurm", {0: ("70", [0, 1, 2])})
    assert read_json(run.submit)["slurm_cluster"] == sweep.submissions()[1]["slurm_cluster"] == "fake"
    attempt.record_submission(run, "local", str(os.getpid()))
    sweep.record("local", {0: ("1", [0, 1, 2])})
    assert "slurm_cluster" not in read_json(run.submit) and "slurm_cluster" not in sweep.submissions()[1]
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "inside")
    attempt.begin(run, os.getpid())
    assert read_json(run.state)["slurm_cluster"] == "inside"


def test_a_holder_elsewhere_counts_while_it_writes_and_another_job_of_its_number_is_none(
    run: RunDir, fake: FakeSlurm
) -> None:
    held(run, slurm_cluster="other")
    with pytest.raises(UserError, match="held by job 55"):
        attempt.begin(run, os.getpid())
    assert not any(call.startswith("squeue") for call in fake.calls())
    os.utime(run.state, (1, 1))
    assert attempt.begin(run, os.getpid())
    held(run, slurm_cluster="fake")
    fake.job("55", "RUNNING", comment="exp-0000bbbb")
    assert attempt.begin(run, os.getpid())
    held(run, slurm_cluster="fake")
    fake.job("55", "RUNNING")
    with pytest.raises(UserError, match="held by job 55"):
        attempt.begin(run, os.getpid())


@pytest.fixture
def clusters(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, Cluster]]:
    without_slurm(monkeypatch)
    with (
        Cluster(nodes=1, extra=["ClusterName=first"]) as first,
        Cluster(nodes=1, extra=["ClusterName=second"]) as other,
    ):
        yield first, other


@pytest.mark.slurm
def test_two_clusters_that_share_the_runs_keep_off_each_others_jobs(
    clusters: tuple[Cluster, Cluster], run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = clusters
    run.script.write_text(f"#!/bin/bash\n#SBATCH --comment={run.name} --mem=50M --output=/dev/null\nexec sleep 60\n")
    for key, value in first.environment().items():
        monkeypatch.setenv(key, value)
    job = slurm.submit(run.script)
    attempt.record_submission(run, "slurm", job)
    assert ledger.status(run).state in ("pending", "running")
    for key, value in second.environment().items():
        monkeypatch.setenv(key, value)
    foreign = slurm.submit(run.script, "--comment=mine")
    assert foreign == job, "both count from the same number"
    assert told(run) == ("pending", "on cluster first")
    with pytest.raises(UserError, match="on cluster first; cancel it there"):
        ledger.cancel_all([run])
    assert slurm.queue([foreign])[foreign].live


# Damage, and names.

SUBMISSION = {"cluster": "slurm", "time": 1.0}
DAMAGE = [
    ("submit.json", json.dumps({"submissions": 5}), "submit.json: damaged ('submissions' is not"),
    ("submit.json", json.dumps({"submissions": [5]}), "submit.json: damaged ('submissions' is not"),
    ("submit.json", json.dumps({"submissions": [{**SUBMISSION, "chunks": [5]}]}), "'submissions' is not"),
    (
        "submit.json",
        json.dumps({"submissions": [{**SUBMISSION, "chunks": [{"chunk": 7, "job": "5", "rows": "0"}]}]}),
        "there is no chunk 7",
    ),
    (
        "submit.json",
        json.dumps({"submissions": [{**SUBMISSION, "chunks": [{"chunk": 1, "job": "5", "rows": "0-3"}]}]}),
        "rows 0-3 are not of chunk 1",
    ),
    (
        "submit.json",
        json.dumps({"submissions": [{**SUBMISSION, "chunks": [{"chunk": 1, "job": "5", "rows": "x"}]}]}),
        "is no list of rows",
    ),
    ("sweep.yaml", "chunks: [{number: a, first: 0, count: 3}]\n", "sweep.yaml: damaged ('chunks' is not"),
    ("sweep.yaml", "chunks: 5\n", "sweep.yaml: damaged"),
    ("sweep.yaml", None, "sweep.yaml: no such file"),
    ("rows.txt", "../..\n/etc/passwd\n\0\n..\n", "experiment.yaml: is missing"),
    ("rows.txt", b"\xff\xfe" * 400, "File name too long"),
]


@pytest.mark.parametrize(("file", "content", "words"), DAMAGE)
def test_a_damaged_sweep_is_told_with_its_reason_and_hides_no_other(
    run: RunDir, sweep: SweepDir, fake: FakeSlurm, file: str, content: str | bytes | None, words: str
) -> None:
    path = sweep.path / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = all_runs(run.path.parent)
    assert all(one.path.is_relative_to(run.path.parent) for one in found)
    statuses = {one.path: status for one, status in zip(found, ledger.statuses(found), strict=True)}
    assert statuses.pop(run.path).state == "planned"
    assert {status.state for status in statuses.values()} == {"damaged"}
    assert all(words in status.detail and "\n" not in status.detail for status in statuses.values()), statuses
    with pytest.raises(UserError):
        ledger.cancel_all([sweep])


def test_a_sweep_without_rows_and_a_folder_that_is_no_row_are_told(sweep: SweepDir) -> None:
    with pytest.raises(UserError, match="exp-0000ffff is not named"):
        sweep.place(RunDir(sweep.path / "exp-0000ffff"))
    sweep.rows_file.write_text("")
    with pytest.raises(UserError, match=r"rows.txt: damaged \(it names no row\)"):
        sweep.rows()
    write_text(sweep.file, "axes: [1]\n")
    with pytest.raises(UserError, match="'axes' is not what belongs there"):
        sweep.axes()


def test_an_empty_name_is_no_run_and_a_long_one_is_none_either(
    run: RunDir, sweep: SweepDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.path)
    for name in ("", " "):
        for finder in (find_run, find_sweep, ledger.find):
            with pytest.raises(UserError, match="is no name of a run"):
                finder(run.path.parent, name)
    for name in ("x" * 300, "x/" * 3000):
        with pytest.raises(UserError, match="no run 'x"):
            ledger.find(run.path.parent, name)


def test_a_run_stays_damaged_when_another_is_repaired(run: RunDir, fake: FakeSlurm) -> None:
    other = RunDir(run.path.with_name("exp-0000bbbb"))
    write_text(other.experiment, "name: [")
    fake.job("55", "PENDING")
    found = [seen.status.state for seen in ledger.look([run, other], thorough=True)]
    assert found == ["pending", "damaged"] and read_json(run.submit)["job"] == "55"


def test_lines_that_are_no_events_are_left_out(run: RunDir) -> None:
    run.event("start", "shell", 1)
    with (run.events / "001-shell.jsonl").open("a") as file:
        file.write('5\n[]\nnull\n{}\n{"time": "x", "event": "start", "generation": 1}\n{"time": 1}\n')
    assert [event["event"] for event in run.read_events()] == ["start"]
