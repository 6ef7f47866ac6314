"""The test cluster itself: two nodes with GPUs, and who gets which signal when a job is displaced or cancelled."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, ClusterError

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parent.parent
BY_HAND = [sys.executable, "-m", "tests.slurm"]

# Batch shell and tasks log their signals; a task leaves with 75 soon after TERM or USR2, as ours do.
BATCH = """#!/bin/bash
trap 'echo batch TERM >> seen' TERM
trap 'echo batch USR2 >> seen' USR2
echo "run ${SLURM_RESTART_COUNT-unset}" >> seen
[ -n "$SLURM_RESTART_COUNT" ] && exit 0
srun bash task.sh &
pid=$!
while kill -0 $pid 2>/dev/null; do wait $pid; code=$?; done
echo "srun $code" >> seen
"""
TASK = """
leave() { echo "task$SLURM_PROCID $1" >> seen; sleep 0.4; exit 75; }
trap 'leave TERM' TERM
trap 'leave USR2' USR2
echo "task$SLURM_PROCID up" >> seen
while :; do sleep 0.1; done
"""
REQUEUE = 'scontrol requeue "$SLURM_JOB_ID"; echo "requeue $?" >> seen'


class Watched:
    """A two-node job that records in the file `seen` what reaches its batch shell and its tasks."""

    def __init__(self, cluster: Cluster, folder: Path, *options: str, tail: str = "") -> None:
        self.cluster, self.seen = cluster, folder / "seen"
        (folder / "task.sh").write_text(TASK)
        (folder / "job.sbatch").write_text(BATCH + tail)
        size = ("--nodes=2", "--ntasks-per-node=1", "--mem=500M", "--output=out")
        self.id = cluster.submit(*size, *options, "job.sbatch", cwd=folder)
        cluster.wait_for(lambda: {"task0 up", "task1 up"} <= set(self.lines()), 20, "both tasks")

    def lines(self) -> list[str]:
        return self.seen.read_text().splitlines() if self.seen.exists() else []

    def finish(self) -> list[str]:
        """Lets the requeued job run again and returns all that was seen."""
        self.cluster.release(self.id)
        self.cluster.wait_state(self.id, "COMPLETED")
        assert self.cluster.job_field(self.id, "Restarts") == "1"
        return self.lines()


def test_a_job_runs_on_both_nodes_with_its_gpus(slurm_cluster: Cluster, tmp_path: Path) -> None:
    print(f"the cluster was up in {slurm_cluster.start_seconds:.2f} s")
    shown = "srun bash -c 'echo $SLURMD_NODENAME $SLURM_JOB_GPUS $CUDA_VISIBLE_DEVICES $(getent ahostsv4 node0)'"
    size = ("--nodes=2", "--cpus-per-task=12", "--mem=60G", "--gres=gpu:a100:1")
    slurm_cluster.submit("--wait", "--output=out", *size, f"--wrap={shown}", cwd=tmp_path)
    nodes = sorted(line.split()[:4] for line in (tmp_path / "out").read_text().splitlines())
    assert nodes == [["node0", "0", "0", "127.0.0.1"], ["node1", "0", "0", "127.0.0.1"]]


def test_more_than_a_node_has_is_refused(slurm_cluster: Cluster) -> None:
    for request in ("--gres=gpu:a100:2", "--cpus-per-task=13", "--mem=65G"):
        with pytest.raises(ClusterError, match="Requested node configuration is not available"):
            slurm_cluster.submit("--nodes=1", request, "--wrap=true")


def test_preempted_without_grace_tells_the_batch_shell_and_requeues(slurm_cluster: Cluster, tmp_path: Path) -> None:
    job = Watched(slurm_cluster, tmp_path, tail=REQUEUE)
    displacer = slurm_cluster.preempt(job.id)
    slurm_cluster.wait_state(displacer, "COMPLETED")
    seen = job.finish()
    assert {"batch TERM", "task0 TERM", "task1 TERM"} <= set(seen)
    assert "requeue 1" in seen, "SLURM has requeued it already: our own requeue must be refused"
    assert seen[-1] == "run 1"


def test_preempted_with_grace_tells_only_the_tasks(slurm_cluster: Cluster, tmp_path: Path) -> None:
    job = Watched(slurm_cluster, tmp_path, "--partition=grace", tail=REQUEUE)
    slurm_cluster.preempt(job.id)
    seen = job.finish()
    assert "batch TERM" not in seen
    assert {"task0 TERM", "task1 TERM"} <= set(seen)
    assert "requeue 0" in seen, "nobody has requeued it: the batch shell must"
    assert seen[-1] == "run 1"


def test_a_cancelled_job_tells_everybody_and_comes_back_if_requeued(slurm_cluster: Cluster, tmp_path: Path) -> None:
    job = Watched(slurm_cluster, tmp_path, tail=REQUEUE)
    slurm_cluster.run("scancel", job.id)
    seen = job.finish()
    assert "batch TERM" in seen
    assert "requeue 0" in seen, "SLURM lets a cancelled job requeue itself: only the batch tail can know better"


@pytest.mark.parametrize(
    ("option", "heard"), [("", {"task0", "task1"}), ("--batch", {"batch"}), ("--full", {"task0", "task1", "batch"})]
)
def test_who_hears_a_signal_sent_by_hand(slurm_cluster: Cluster, tmp_path: Path, option: str, heard: set[str]) -> None:
    job = Watched(slurm_cluster, tmp_path)
    slurm_cluster.run("scancel", "--signal=USR2", *option.split(), job.id)
    slurm_cluster.wait_for(lambda: {s.split()[0] for s in job.lines() if s.endswith("USR2")} == heard, 10, "USR2")
    slurm_cluster.run("scancel", job.id)
    slurm_cluster.wait_state(job.id, "CANCELLED")


def test_a_failed_wait_shows_queue_and_logs(slurm_cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match=r"(?s)in vain for snow.*squeue.*slurmctld\.log\n\["):
        slurm_cluster.wait_for(lambda: False, 0.1, "snow")


def test_what_a_killed_session_left_is_reaped_and_the_living_stay(slurm_cluster: Cluster) -> None:
    shell = subprocess.Popen([*BY_HAND, "--shell"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert shell.stdout
    folder = Path(shell.stdout.readline().decode().split("=")[1].split()[0]).parent
    slurmctld = int((folder / "pids").read_text().split()[-3])
    shell.kill()
    shell.communicate()
    assert Path(f"/proc/{slurmctld}/exe").exists(), "the daemons outlive a killed session"
    reaped = subprocess.run([*BY_HAND, "--reap"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert str(folder) in reaped.stdout
    assert not folder.exists()
    assert not Path(f"/proc/{slurmctld}/cmdline").exists() or not Path(f"/proc/{slurmctld}/cmdline").read_bytes()
    assert slurm_cluster.run("srun", "echo", "well").stdout == "well\n"


def test_job_requeue_0_and_stop_with_a_job_running() -> None:
    with Cluster(job_requeue=0) as cluster:
        folder = cluster.folder
        job = cluster.submit("--wrap=exec sleep 3600", "--output=/dev/null")
        cluster.wait_state(job, "RUNNING")
        refused = cluster.run("scontrol", "requeue", job, check=False)
        assert (refused.returncode, "presently disabled" in refused.stderr) == (1, True)
    assert not folder.exists()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            assert str(folder).encode() not in (entry / "environ").read_bytes()
        except OSError:
            continue
