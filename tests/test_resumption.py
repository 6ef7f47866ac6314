"""`hpc resume`: what is submitted again, what is not and why, and that one fault keeps nobody else from going on."""

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpc import ledger, resumption, sweep
from hpc.commands.run import app
from hpc.errors import UserError
from hpc.rundir import RunDir, write_json, write_text
from hpc.sweepdir import SweepDir
from tests.fakeslurm import FakeSlurm

EXPERIMENT = """
name: exp
model: {name: m}
data: {file: x.h5}
launch: {instance: laptop, cluster: slurm, cpus: 1, mem: 1GB, time: 10min}
"""
MOST = {"MaxArraySize": "3"}


@pytest.fixture
def runs(run: RunDir, fake: FakeSlurm) -> Path:
    """A folder of runs with one run, exp-0000aaaa; arrays have three tasks at most."""
    fake.configure(MOST)
    write_text(run.experiment, EXPERIMENT)
    return run.path.parent


def made(runs: Path) -> SweepDir:
    """Five rows in two chunks, whose arrays were jobs 70 and 71."""
    (runs.parent / "exp.yaml").write_text(EXPERIMENT)
    folder = sweep.create(sweep.make(runs.parent / "exp.yaml", ["train.seed=0:5"], runs), lambda: None)
    folder.record("slurm", {0: ("70", [0, 1, 2]), 1: ("71", [3, 4])})
    return folder


def ended(run: RunDir, phase: str = "ended", job: str = "70_0", **state: object) -> RunDir:
    common = {"generation": 1, "job": job, "host": "away", "node": "n", "pid": 1, "step": 40, "epoch": 2}
    write_json(run.state, {**common, "phase": phase, "started": time.time() - 9, "time": time.time(), **state})
    return run


def sbatch(fake: FakeSlurm) -> list[str]:
    return [call for call in fake.calls() if call.startswith("sbatch ") and "--test-only" not in call]


def refusal(names: list[str], runs: Path) -> str:
    with pytest.raises(UserError) as fault:
        list(resumption.named(names, runs))
    return str(fault.value)


def test_of_a_sweep_the_rows_that_are_neither_finished_nor_under_way(runs: Path, fake: FakeSlurm) -> None:
    folder = made(runs)
    rows = folder.rows()
    write_json(rows[0].result, {"finished": True})
    ended(rows[1], code=1, reason="failed with exit code 1", job="70_1")
    fake.job("70_2", "RUNNING", comment=f"{folder.name}/0")
    fake.job("71_3", "PENDING", comment=f"{folder.name}/1")
    (line,) = resumption.named([folder.name], runs)
    assert line.startswith(f"{folder.name}  3 of 5 rows  job ") and line.endswith(" (slurm)")
    first, second = sbatch(fake)
    assert f"--array=1 --comment={folder.name}/0.1 " in first, "row 0 is finished, row 2 runs"
    assert f"--hold --comment={folder.name}/1.1 " in second, "the whole of chunk 1"
    assert any(call.startswith("scontrol release ") for call in fake.calls())
    assert [folder.submissions()[row]["job"].partition("_")[0] for row in (0, 2)] == ["70", "70"]


def test_a_sweep_with_nothing_to_resume_is_told_by_its_rows(runs: Path, fake: FakeSlurm) -> None:
    folder = made(runs)
    for row in folder.rows()[:3]:
        write_json(row.result, {"finished": True})
    for task in (0, 1):
        fake.job(f"71_{task}", "PENDING", comment=f"{folder.name}/1")
    assert refusal([folder.name], runs) == f"{folder.name}: nothing to resume (3 finished, 2 pending)"
    assert not sbatch(fake)


def test_all_that_was_stopped_or_lost_comes_back_and_what_failed_or_was_cancelled_does_not(
    runs: Path, run: RunDir, fake: FakeSlurm
) -> None:
    folder = made(runs)
    rows = folder.rows()
    ended(rows[0], code=1, reason="failed with exit code 1")
    ended(rows[1], "stopped", job="70_1", reason="stopped by SIGTERM at step 40")
    ended(rows[2], "training", job="70_2")
    for row in rows[3:]:
        write_json(row.submit, {"cluster": "slurm", "job": "71_0", "time": time.time(), "cancelled": time.time() + 1})
    write_json(run.submit, {"cluster": "slurm", "job": "60", "time": time.time() - 20})
    ended(run, "stopped", job="60", reason="stopped by SIGTERM at step 40")
    (run.checkpoints / "g001-s00000040").mkdir(parents=True)
    of_sweep, alone = resumption.stopped(runs)
    assert of_sweep.startswith(f"{folder.name}  2 of 5 rows")
    assert alone.startswith(run.name) and alone.endswith("goes on from checkpoint g001-s00000040")
    assert [call.split()[1] for call in sbatch(fake)][:1] == ["--array=1-2"] and len(sbatch(fake)) == 2
    for task in (1, 2):  # as squeue shows an array
        fake.job(f"{of_sweep.split()[-2]}_{task}", "PENDING", comment=f"{folder.name}/0.1")
    assert list(resumption.stopped(runs)) == [f"no run in {runs} was stopped or lost"]


def test_an_unknown_name_resumes_nobody(runs: Path, run: RunDir, fake: FakeSlurm) -> None:
    assert "no run 'nobody'" in refusal([run.name, "nobody"], runs)
    assert not sbatch(fake)


def test_one_that_cannot_be_resumed_keeps_no_other_from_it(runs: Path, run: RunDir, fake: FakeSlurm) -> None:
    write_text(RunDir(runs / "done-0000aaaa").experiment, EXPERIMENT)
    write_json(RunDir(runs / "done-0000aaaa").result, {"finished": True})
    write_text(RunDir(runs / "torn-0000aaaa").experiment, EXPERIMENT)
    write_text(RunDir(runs / "torn-0000aaaa").state, "{")
    lines = []
    with pytest.raises(UserError) as fault:
        lines += resumption.named(["done", "torn", run.name], runs)
    done, torn = str(fault.value).splitlines()
    assert done == "done-0000aaaa is finished: nothing to resume"
    assert torn.startswith("torn-0000aaaa is damaged: state.json: damaged")
    assert len(sbatch(fake)) == 1 and ledger.status(run).state == "pending"


def test_a_run_whose_checkpoints_are_gone_is_not_queued_in_vain(runs: Path, run: RunDir, fake: FakeSlurm) -> None:
    ended(run, phase="stopped")
    run.event("checkpoint", "rank0", 1, step=30)
    told = refusal([run.name], runs)
    assert f"{run.name} has saved step 30, and {run.checkpoints} is empty: restore a checkpoint from a copy" in told
    assert not sbatch(fake)
    (run.checkpoints / "g001-s00000030").mkdir(parents=True)
    list(resumption.named([run.name], runs))
    assert len(sbatch(fake)) == 1


def test_a_run_that_is_under_way_is_left_alone(runs: Path, run: RunDir, fake: FakeSlurm) -> None:
    write_json(run.submit, {"cluster": "slurm", "job": "60", "time": time.time()})
    fake.job("60", "PENDING", "Priority", comment=run.name)
    assert refusal([run.name], runs) == f"{run.name} is pending (Priority): nothing to resume"


def test_while_slurm_is_silent_nothing_is_submitted_and_nothing_moves_here(
    runs: Path, run: RunDir, fake: FakeSlurm
) -> None:
    write_text(run.experiment, EXPERIMENT.replace("cluster: slurm", "cluster: auto"))
    write_json(run.submit, {"cluster": "slurm", "job": "60", "time": time.time() - 20})
    for command in ("squeue", "sinfo"):
        fake.fails(command, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    assert refusal([run.name], runs) == f"{run.name} is pending (SLURM does not answer): nothing to resume"
    ended(run, code=1, reason="failed with exit code 1", job="60")
    assert refusal([run.name], runs).startswith("SLURM is here, but does not answer")
    assert not sbatch(fake) and json.loads(run.submit.read_text())["job"] == "60"


def test_a_resumed_run_may_follow_another(runs: Path, run: RunDir, fake: FakeSlurm) -> None:
    other = RunDir(runs / "pack-0000aaaa")
    write_text(other.experiment, EXPERIMENT)
    write_json(other.submit, {"cluster": "slurm", "job": "60", "time": time.time()})
    fake.job("60", "RUNNING", comment=other.name)
    list(resumption.named([run.name], runs, ["pack"]))
    assert "--dependency=afterok:60 --kill-on-invalid-dep=yes" in sbatch(fake)[0]
    folder = made(runs)
    list(resumption.named([folder.name], runs, ["pack"]))
    assert all("--dependency=afterok:60 --kill-on-invalid-dep=yes" in call for call in sbatch(fake)[1:])
    assert "--after nobody: no run" in _fault(lambda: resumption.named([folder.name], runs, ["nobody"]))


def _fault(call: object) -> str:
    with pytest.raises(UserError) as fault:
        list(call())  # type: ignore[operator]
    return str(fault.value)


def saved(run: RunDir, *took: float) -> None:
    for step, seconds in enumerate(took, 1):
        run.event("checkpoint", "rank0", 1, step=step, seconds=seconds)
        (run.checkpoints / f"g001-s{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("took", "option"),
    [([], None), ([30.0] * 9, None), ([31.0] * 9, "USR2@123"), ([1.0] * 99 + [500.0], None), ([900.0], "USR2@300")],
    ids=["no save", "90 + 30 s are enough", "93 + 30 s", "one slow save", "half of the time at most"],
)
def test_a_run_whose_saves_take_long_is_given_notice_enough(
    runs: Path, run: RunDir, fake: FakeSlurm, took: list[float], option: str | None
) -> None:
    """The script's own is 120 s; the time limit is 10 min."""
    saved(run, *took)
    list(resumption.named([run.name], runs))
    assert [word for word in sbatch(fake)[0].split() if word.startswith("--signal")] == (
        [f"--signal={option}"] if option else []
    )


def test_a_sweep_is_given_the_notice_that_its_open_rows_need(runs: Path, fake: FakeSlurm) -> None:
    folder = made(runs)
    write_json(folder.rows()[0].result, {"finished": True})
    saved(folder.rows()[0], 200.0)
    list(resumption.named([folder.name], runs))
    saved(folder.rows()[1], 40.0)
    before = sbatch(fake)
    for row in folder.rows():
        ended(row, code=1)
    list(resumption.named([folder.name], runs))
    assert not any("--signal" in call for call in before)
    assert all("--signal=USR2@150 " in call for call in sbatch(fake)[len(before) :])


def test_changed_data_are_accepted_for_runs_that_are_named_and_by_an_event(
    runs: Path, run: RunDir, fake: FakeSlurm
) -> None:
    list(resumption.named([run.name], runs))
    assert "accept-data-change" not in [event["event"] for event in run.read_events()]
    fake.job("101", "FAILED", comment=run.name)
    list(resumption.named([run.name], runs, accept_data=True))
    (word,) = [event for event in run.read_events() if event["event"] == "accept-data-change"]
    assert word["generation"] == 0 and word["time"] > time.time() - 60
    folder = made(runs)
    list(resumption.named([folder.name], runs, accept_data=True))
    assert all("accept-data-change" in [event["event"] for event in row.read_events()] for row in folder.rows())
    everything = CliRunner().invoke(app, ["resume", "--all", "--accept-data-change", "--runs", str(runs)])
    assert "is for runs that you name" in str(everything.exception)
