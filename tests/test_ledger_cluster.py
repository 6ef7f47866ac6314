"""The ledger, why and logs against the real cluster: with slurmdbd once squeue has forgotten the jobs, and without."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc import ledger, slurm, why
from hpc.rundir import RunDir, read_json, write_text
from hpc.sweepdir import Chunk, SweepDir
from tests.fakeslurm import without_slurm
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm

EXPERIMENT = "name: exp\nmodel: {name: resnet3d_tiny}\ndata: {file: /x.h5}\n"
# An attempt as the template begins one; what follows is the test's.
SCRIPT = """#!/bin/bash
#SBATCH --comment={name} --mem=50M --time=10 --requeue --output={logs}/%j_0_log.out --error={logs}/%j_0_log.err
attempt=$({python} -m hpc.attempt {run}) || exit $?
eval "$attempt"
{body}
"""
ARRAY = """#!/bin/bash
#SBATCH --comment={token} --mem=10M --time=10 --output=/dev/null --array=0-{last}%1
exec sleep 60
"""
HOG = f"{sys.executable} -c 'import time; eaten = bytes(range(256)) * 800_000; time.sleep(60)'"


def make(folder: Path, name: str, body: str) -> RunDir:
    run = RunDir(folder / "runs" / f"exp-{name}")
    write_text(run.experiment, EXPERIMENT)
    run.logs.mkdir()
    write_text(run.script, SCRIPT.format(name=run.name, logs=run.logs, python=sys.executable, run=run.path, body=body))
    return run


def reach(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Commands of this process go to the cluster from now on."""
    without_slurm(monkeypatch)
    for key, value in {**cluster.environment(), "PYTHONPATH": str(Path.cwd())}.items():
        monkeypatch.setenv(key, value)
    return cluster


@pytest.fixture
def here(slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    yield reach(slurm_cluster, monkeypatch)
    slurm_cluster.run("scancel", "--me")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands of SLURM that are run from now on."""
    calls: list[str] = []
    real = slurm._run
    monkeypatch.setattr(slurm, "_run", lambda *command, **more: calls.append(command[0]) or real(*command, **more))
    return calls


def test_ends_that_slurm_alone_knows_are_told_once_squeue_has_forgotten_the_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"preempt_mode": "CANCEL", "memory_limit": "sampled", "kill_wait": 1}
    with Cluster(accounting=True, extra=("MinJobAge=2",), **settings) as cluster:
        reach(cluster, monkeypatch)
        bodies = {"greedy": HOG, "displaced": "exec sleep 60", "ended": "exec sleep 60", "silent": "exit 0"}
        runs = {name: make(tmp_path, name, body) for name, body in bodies.items()}
        jobs = {name: slurm.submit(runs[name].script, "--nodelist=node0") for name in ("greedy", "ended", "silent")}
        jobs["displaced"] = slurm.submit(runs["displaced"].script, "--nodelist=node1")
        for name in ("displaced", "ended"):
            cluster.wait_for(runs[name].state.exists, 20, f"the attempt of {name}")
        slurm.cancel(jobs["ended"])
        displacer = cluster.preempt(jobs["displaced"])
        gone = {*jobs.values(), displacer}
        cluster.wait_for(lambda: not gone & slurm.queue().keys(), 60, "squeue to forget the jobs")
        calls = counted(monkeypatch)
        told = dict(zip(runs, ledger.statuses(list(runs.values())), strict=True))
        assert calls == ["squeue", "sacct"]
        assert {name: status.state for name, status in told.items()} == {
            "greedy": "lost",  # where SLURM samples the memory itself, it calls the end FAILED
            "displaced": "lost",
            "ended": "cancelled",
            "silent": "lost",
        }
        assert told["displaced"].detail == "preempted while starting"
        answers = {name: why.explain(run) for name, run in runs.items()}
        assert {name: answer.cause for name, answer in answers.items()} == {
            "greedy": "out of memory",
            "displaced": "preempted",
            "ended": "cancelled",
            "silent": "the job ended without a word while starting",
        }
        greedy = answers["greedy"]
        assert "memory of 0.05 GB a node" in greedy.lines[0] and "when it was last measured" in greedy.lines[0]
        assert "exceeded memory limit" in greedy.quote[0]
        assert greedy.commands == ["hpc resume exp-greedy launch.mem=1GB"]


def test_a_run_is_followed_from_the_queue_to_its_cancellation(
    here: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path, "queued", "echo begun; exec sleep 60")
    job = slurm.submit(run.script, "--hold")
    assert not run.submit.exists()
    assert ledger.status(run).detail == "JobHeldUser" and read_json(run.submit)["job"] == job, "found by its token"
    answer = why.explain(run)
    assert "it is held by its user" in answer.lines[0] and f"scontrol release {job}" in answer.lines[-1]
    slurm.release(job)
    here.wait_for(lambda: ledger.status(run).state == "running", 20, "the run to run")
    here.wait_for(lambda: ledger.status(run).detail == "starting" and run.state.exists(), 20, "its attempt")
    here.preempt(job)
    here.wait_for(lambda: ledger.status(run).state == "requeued", 20, "the requeue")
    assert "may not start before its time" in why.explain(run).lines[0]
    calls = counted(monkeypatch)
    assert ledger.cancel_all([run])[0] == f"job {job}" and calls == ["squeue", "scancel"]
    here.wait_for(lambda: ledger.status(run).state == "cancelled", 20, "the end")


def test_a_sweep_without_a_record_is_found_and_cancelled_as_a_whole(here: Cluster, tmp_path: Path) -> None:
    sweep = SweepDir(tmp_path / "runs" / "exp-sweep-0123abcd")
    names = [f"exp-{number:08x}" for number in range(5)]
    for name in names:
        write_text(RunDir(sweep.path / name).experiment, EXPERIMENT)
    sweep.rows_file.write_text("".join(f"{name}\n" for name in names))
    chunks = [Chunk(0, 0, 3, 1), Chunk(1, 3, 2, 1)]
    sweep.write_chunks(chunks)
    jobs = []
    for chunk in chunks:
        sweep.script(chunk.number).write_text(ARRAY.format(token=sweep.token(chunk.number), last=chunk.count - 1))
        jobs.append(slurm.submit(sweep.script(chunk.number)))
    first, second = jobs
    here.wait_for(lambda: here.state(f"{second}_0") == here.state(f"{first}_0") == "RUNNING", 20, "both to run")
    statuses = ledger.statuses(sweep.rows())
    assert [status.job for status in statuses] == [
        f"{first}_0",
        f"{first}_1",
        f"{first}_2",
        f"{second}_0",
        f"{second}_1",
    ]
    assert [status.state for status in statuses] == ["running", "pending", "pending", "running", "pending"]
    assert statuses[1].detail == "JobArrayTaskLimit" and sweep.count_submissions() == 1
    groups = why.explain_sweep(sweep)
    assert [(group.rows, group.answer.cause) for group in groups] == [
        ([1, 2, 4], "JobArrayTaskLimit"),
        ([0, 3], "starting"),
    ]
    assert ledger.find(tmp_path / "runs", f"{second}_1").name == names[4]
    assert ledger.cancel_all([sweep])[0] == f"job {first}, job {second}"
    here.wait_for(lambda: {s.state for s in ledger.statuses(sweep.rows())} == {"cancelled"}, 20, "all to be cancelled")


def test_logs_follow_a_job_to_its_end(here: Cluster, tmp_path: Path) -> None:
    run = make(tmp_path, "talking", "for word in one two three; do echo $word; sleep 0.3; done")
    slurm.submit(run.script)
    began = time.monotonic()
    code = "import sys; from hpc.cli import main; main()"
    command = [sys.executable, "-c", code, "logs", run.name, "-f", "--runs", str(run.path.parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("one\ntwo\nthree\n"), f"{done.stdout} after {time.monotonic() - began:.1f} s"
