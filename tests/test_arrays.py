"""Submission of sweeps on the real cluster, which takes the jobs but starts none: whole or not at all, never twice."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc import arrays, slurm, submission, sweep
from hpc.errors import UserError
from hpc.sweepdir import SweepDir
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm
TINY = """
name: exp
model: {name: m}
data: {file: x.h5}
launch: {instance: cedia-a100-40gb, cluster: slurm, gpus: 0, tasks_per_node: 1, cpus: 1, mem: 1GB, time: 10min}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(max_array_size=4) as cluster:
        cluster.run("scontrol", "update", "PartitionName=gpu", "State=DOWN")
        yield cluster


@pytest.fixture
def here(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """This process talks to the cluster, whose queue is empty before and after."""
    for key in [key for key in os.environ if key.startswith("SLURM_")]:
        monkeypatch.delenv(key)
    for key, value in cluster.environment().items():
        monkeypatch.setenv(key, value)
    yield cluster
    cluster.run("scancel", "--me")
    cluster.wait_for(lambda: not queued(), 20, "an empty queue")


@pytest.fixture
def folder(here: Cluster, tmp_path: Path) -> SweepDir:
    """Ten rows, in three chunks."""
    return made(tmp_path)


def made(tmp_path: Path, *axes: str, parallel: int | None = 6) -> SweepDir:
    (tmp_path / "exp.yaml").write_text(TINY)
    plan = sweep.make(tmp_path / "exp.yaml", axes or ["train.seed=0:10"], tmp_path / "runs", parallel=parallel)
    return sweep.create(plan, lambda: None)


def queued() -> dict[str, slurm.JobInfo]:
    return {job: info for job, info in slurm.queue().items() if info.live}


def recorded(folder: SweepDir) -> list[str]:
    return [folder.submissions()[row]["job"] for row in range(len(folder.rows()))]


def test_a_sweep_above_max_array_size_is_cut_under_one_cap_and_released_whole(folder: SweepDir, here: Cluster) -> None:
    jobs = arrays.submit(folder, "slurm")
    assert len(jobs) == 3 and len(queued()) == 10
    assert recorded(folder) == [
        f"{job}_{task}" for job, tasks in zip(jobs, (4, 3, 3), strict=True) for task in range(tasks)
    ]
    here.wait_for(lambda: {info.reason for info in queued().values()} == {"PartitionDown"}, 10, "all to be released")
    caps = [here.job_field(job, "ArrayTaskThrottle") for job in jobs]
    assert caps == ["2", "2", "2"]
    assert {here.job_field(job, "Comment") for job in jobs} == {f"{folder.name}/{chunk}" for chunk in range(3)}


def test_with_more_chunks_than_the_cap_a_chunk_waits_for_another(here: Cluster, tmp_path: Path) -> None:
    jobs = arrays.submit(made(tmp_path, parallel=2), "slurm")
    assert [here.job_field(job, "ArrayTaskThrottle") for job in jobs] == ["1", "1", "1"]
    waits = [here.job_field(job, "Dependency") for job in jobs]
    assert waits[:2] == ["(null)", "(null)"] and waits[2].startswith(f"afterany:{jobs[0]}_")


def test_a_refused_chunk_takes_the_others_back(folder: SweepDir, capfd: pytest.CaptureFixture[str]) -> None:
    last = folder.script(2)
    last.write_text(last.read_text().replace("#SBATCH --nodes=1", "#SBATCH --nodes=1\n#SBATCH --partition=nowhere"))
    with pytest.raises(
        UserError, match=r"sbatch refused .*job-2.sbatch: invalid partition specified: nowhere;"
    ) as refusal:
        arrays.submit(folder, "slurm")
    assert "\n" not in str(refusal.value) and not capfd.readouterr().err
    assert queued() == {} and not folder.submit.exists()


def test_some_rows_are_resubmitted_under_a_token_of_their_own(folder: SweepDir, here: Cluster) -> None:
    first = arrays.submit(folder, "slurm")
    slurm.cancel(*first)
    here.wait_for(lambda: not queued(), 20, "an empty queue")
    (job_a, job_b) = arrays.submit(folder, "slurm", [1, 3, 8])
    assert sorted(queued()) == sorted([f"{job_a}_1", f"{job_a}_3", f"{job_b}_1"])
    assert {here.job_field(job, "Comment") for job in (job_a, job_b)} == {f"{folder.name}/0.1", f"{folder.name}/2.1"}
    assert recorded(folder)[3] == f"{job_a}_3" and recorded(folder)[8] == f"{job_b}_1"
    assert recorded(folder)[0] == f"{first[0]}_0", "what was not resubmitted keeps its job"


def test_one_row_is_resubmitted_alone(folder: SweepDir, here: Cluster) -> None:
    job = submission.submit(folder.rows()[5], "slurm")
    assert list(queued()) == [f"{job.job_id}_1"]
    assert here.job_field(job.job_id, "Comment") == f"{folder.name}/1/1"


def killed_while_submitting(folder: SweepDir, chunks: int) -> None:
    """The submitting command gets KILL when `chunks` of the sweep's jobs are in the queue."""
    bin = folder.path.parent / "bin"
    bin.mkdir()
    real = shutil.which("sbatch")
    counting = f'#!/bin/sh\n"{real}" "$@"\necho x >> "{bin}/count"\n'
    (bin / "sbatch").write_text(f'{counting}[ "$(wc -l < "{bin}/count")" -lt {chunks} ] || kill -KILL $PPID\n')
    (bin / "sbatch").chmod(0o755)
    environ = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}"}
    text = "import sys; from hpc import arrays, sweepdir; arrays.submit(sweepdir.SweepDir(sys.argv[1]), 'slurm')"
    done = subprocess.run([sys.executable, "-c", text, str(folder.path)], env=environ, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not folder.submit.exists()


def test_a_command_killed_after_its_last_sbatch_is_repaired(folder: SweepDir, here: Cluster) -> None:
    killed_while_submitting(folder, chunks=3)
    assert {info.reason for info in queued().values()} == {"JobHeldUser"}
    assert arrays.repair(folder, slurm.queue())
    assert sorted(recorded(folder)) == sorted(queued()) and len(queued()) == 10
    here.wait_for(lambda: {info.reason for info in queued().values()} == {"PartitionDown"}, 10, "the release")
    assert not arrays.repair(folder, slurm.queue()), "a second time there is nothing to do"
    assert folder.count_submissions() == 1


def test_a_command_killed_between_its_sbatches_leaves_no_job(folder: SweepDir, here: Cluster) -> None:
    killed_while_submitting(folder, chunks=2)
    assert len(queued()) == 7
    assert not arrays.repair(folder, slurm.queue())
    here.wait_for(lambda: not queued(), 20, "an empty queue")
    assert not folder.submit.exists()
    assert len(arrays.submit(folder, "slurm")) == 3, "it may be submitted now"


def test_a_sweep_that_is_being_submitted_is_left_alone(folder: SweepDir, here: Cluster) -> None:
    bin = folder.path.parent / "bin"
    bin.mkdir()
    real = shutil.which("sbatch")
    (bin / "sbatch").write_text(
        f'#!/bin/sh\n"{real}" "$@"\ntouch "{bin}/one"\nwhile [ ! -e "{bin}/go" ]; do sleep 0.05; done\n'
    )
    (bin / "sbatch").chmod(0o755)
    environ = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}"}
    text = "import sys; from hpc import arrays, sweepdir; arrays.submit(sweepdir.SweepDir(sys.argv[1]), 'slurm')"
    submitting = subprocess.Popen([sys.executable, "-c", text, str(folder.path)], env=environ)
    here.wait_for((bin / "one").exists, 30, "the first sbatch")
    assert not arrays.repair(folder, slurm.queue()) and len(queued()) == 4
    (bin / "go").touch()
    assert submitting.wait(30) == 0 and len(queued()) == 10 and folder.count_submissions() == 1


def test_an_sbatch_that_fails_after_it_submitted_is_found_by_its_token(folder: SweepDir) -> None:
    """Exactly one job: the answer was lost, not the submission."""
    bin = folder.path.parent / "bin"
    bin.mkdir()
    real = shutil.which("sbatch")
    words = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    (bin / "sbatch").write_text(f'#!/bin/sh\n"{real}" "$@" > /dev/null\necho "{words}" >&2\nexit 1\n')
    (bin / "sbatch").chmod(0o755)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{bin}:{before}"
    try:
        jobs = arrays.submit(folder, "slurm")
    finally:
        os.environ["PATH"] = before
    assert len(set(jobs)) == 3 and sorted(recorded(folder)) == sorted(queued()) and len(queued()) == 10
