"""The test cluster itself: two nodes with GPUs, and who gets which signal when a job is displaced or cancelled."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, ClusterError

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parent.parent
INSTALL = ROOT / "tests" / "install.sh"
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
    nothing_is_left(folder)


def nothing_is_left(folder: Path) -> None:
    """No file, no cgroup, and no process that was started for the cluster in this folder."""
    assert not folder.exists()
    assert not Path("/sys/fs/cgroup/memory", folder.name).exists()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            assert str(folder).encode() not in (entry / "environ").read_bytes()
        except OSError:
            continue


@pytest.mark.slurm(accounting=True)
def test_accounting_remembers_each_attempt(tmp_path: Path) -> None:
    with Cluster(accounting=True, kill_wait=1) as cluster:
        print(f"the cluster with accounting was up in {cluster.start_seconds:.2f} s")
        folder = cluster.folder
        job = Watched(cluster, tmp_path)
        of_batch = ("--noheader", "--parsable2", f"--jobs={job.id}.batch", "--format=MaxRSS")

        def sampled() -> bool:
            """Each second: an attempt that is shorter, or that starts late on a busy machine, has no figure."""
            return cluster.run("sstat", *of_batch, check=False).stdout.strip() not in ("", "0")

        cluster.wait_for(sampled, 60, "a sample of the batch shell's memory")
        cluster.preempt(job.id)
        job.finish()
        failed = cluster.submit("--wrap=exit 3", "--output=/dev/null")
        shown = ("sacct", "--noheader", "--parsable2", "--duplicates", "--allocations", "--format=JobID,State,ExitCode")
        expected = {f"{job.id}|PREEMPTED|0:0", f"{job.id}|COMPLETED|0:0", f"{failed}|FAILED|3:0"}
        cluster.wait_for(lambda: expected <= set(cluster.run(*shown).stdout.splitlines()), 60, "the records")
        memory = ("sacct", "--duplicates", *of_batch)
        cluster.wait_for(lambda: cluster.run(*memory).stdout.strip(), 60, "the memory of the batch shell")
    nothing_is_left(folder)


def test_without_accounting_sacct_says_so(slurm_cluster: Cluster) -> None:
    refused = slurm_cluster.run("sacct", check=False)
    assert (refused.returncode, refused.stderr) == (1, "Slurm accounting storage is disabled\n")


HOG = "python3 -c 'import time; eaten = bytes(range(256)) * 800_000; time.sleep(9)'"
KILLED = {
    "kernel": ("OUT_OF_MEMORY", "0:125", "oom-kill event(s) in StepId={}.batch"),
    "sampled": ("FAILED", "0:9", "StepId={}.batch exceeded memory limit"),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slurm(memory_limit=kind)) for kind in ("kernel", "sampled")]
)
def test_a_job_over_its_memory_is_killed(kind: str, tmp_path: Path) -> None:
    with Cluster(memory_limit=kind) as cluster:
        folder = cluster.folder
        modest = cluster.submit("--mem=400M", "--output=/dev/null", f"--wrap={HOG.replace('9', '2')}")
        greedy = cluster.submit("--mem=50M", "--output=out", f"--wrap={HOG}", cwd=tmp_path)
        state, code, words = KILLED[kind]
        cluster.wait_state(greedy, state)
        assert cluster.job_field(greedy, "ExitCode") == code
        assert words.format(greedy) in (tmp_path / "out").read_text()
        cluster.wait_state(modest, "COMPLETED")
    nothing_is_left(folder)


def test_cancel_mode_and_the_signal_of_the_users_choice(tmp_path: Path) -> None:
    with Cluster(preempt_mode="CANCEL", user_signal=True, kill_wait=1) as cluster:
        job = Watched(cluster, tmp_path, "--partition=grace", "--signal=USR2@60", "--time=10")
        cluster.preempt(job.id)
        cluster.wait_for(lambda: any(line.startswith("srun") for line in job.lines()), 20, "the end of srun")
        assert {"task0 USR2", "task1 USR2"} <= set(job.lines())
        assert not [line for line in job.lines() if line.startswith("batch") or line.endswith("TERM")]
        plain = cluster.submit("--requeue", "--wrap=sleep 60", "--output=/dev/null")
        cluster.wait_state(plain, "RUNNING")
        cluster.preempt(plain)
        cluster.wait_state(plain, "PREEMPTED")
        assert cluster.job_field(plain, "Restarts") == "0", "not even --requeue helps"


def test_each_task_of_an_array_is_displaced_alone(tmp_path: Path) -> None:
    with Cluster(nodes=3, max_array_size=4, kill_wait=1) as cluster:
        whole = ("--requeue", "--cpus-per-task=12", "--output=/dev/null", "--wrap=exec sleep 60")
        with pytest.raises(ClusterError, match="Invalid job array specification"):
            cluster.submit("--array=0-4", *whole)
        job = cluster.submit("--array=0-3", *whole)
        expected = {0: "RUNNING", 1: "RUNNING", 2: "RUNNING", 3: "PENDING"}
        cluster.wait_for(lambda: cluster.array_states(job) == expected, 10, "three tasks to run")
        cluster.run("scancel", f"{job}_3")
        with pytest.raises(ClusterError, match="is CANCELLED: only a running job"):
            cluster.preempt(f"{job}_3")
        for index in (2, 0, 1):
            cluster.wait_state(cluster.preempt(f"{job}_{index}", seconds=0.1), "COMPLETED")
            expected |= {index: "PENDING", 3: "CANCELLED"}
            assert cluster.array_states(job) == expected
        assert [cluster.job_field(f"{job}_{index}", "Restarts") for index in range(3)] == ["1"] * 3


def test_jobs_outlive_the_controller_and_a_failed_sbatch_may_have_submitted() -> None:
    with Cluster(message_timeout=2) as cluster:
        job = cluster.submit("--wrap=exec sleep 60", "--output=/dev/null")
        cluster.wait_state(job, "RUNNING")
        cluster.stop_controller()
        with pytest.raises(ClusterError, match=r"Unable to contact slurm controller \(connect failure\)"):
            cluster.submit("--wrap=true")
        cluster.start_controller()
        assert cluster.state(job) == "RUNNING"
        cluster.pause_controller()
        with pytest.raises(ClusterError, match="Socket timed out"):
            cluster.submit("--hold", "--comment=token", "--wrap=true")
        cluster.resume_controller()
        comments = ("squeue", "--noheader", "--states=all", "--format=%k")
        cluster.wait_for(lambda: cluster.run(*comments).stdout.split().count("token") == 1, 10, "exactly one job")


def test_a_node_goes_down_and_comes_back(tmp_path: Path) -> None:
    with Cluster(node_timeout=3, message_timeout=2, kill_wait=1) as cluster:
        again, never = (
            cluster.submit(option, "--nodelist=node0", "--wrap=exec sleep 60", "--output=/dev/null")
            for option in ("--requeue", "--no-requeue")
        )
        for job in (again, never):
            cluster.wait_state(job, "RUNNING")
        cluster.node_down("node0")
        cluster.wait_state(never, "NODE_FAIL")
        cluster.wait_state(again, "PENDING")
        assert cluster.node_state("node0") in ("down", "drained", "draining")
        cluster.node_up("node0")
        cluster.release(again)
        cluster.wait_state(again, "RUNNING")
        cluster.cut_power("node0")
        cluster.wait_for(lambda: cluster.node_state("node0") == "down*", 30, "the silent node to be missed")
        cluster.node_up("node0")
        cluster.wait_state(again, "PENDING")
        assert cluster.job_field(again, "Restarts") == "2"


def test_two_clusters_side_by_side_know_nothing_of_each_other(slurm_cluster: Cluster, tmp_path: Path) -> None:
    names = ("squeue", "--noheader", "--states=all", "--format=%j")
    with Cluster(nodes=1) as other:
        for cluster, name in ((slurm_cluster, "ours"), (other, "theirs")):
            job = cluster.submit(f"--job-name={name}", f"--wrap=echo {name} $SLURM_CONF > {name}", cwd=tmp_path)
            cluster.wait_state(job, "COMPLETED")
            assert (tmp_path / name).read_text() == f"{name} {cluster.folder}/slurm.conf\n"
        assert "theirs" not in slurm_cluster.run(*names).stdout.split()
        assert sorted(set(other.run(*names).stdout.split())) == ["theirs", "true"]
    assert slurm_cluster.run("srun", "echo", "well").stdout == "well\n"


@pytest.mark.slurm(accounting=True)
def test_nothing_is_installed_where_all_is_there() -> None:
    done = subprocess.run(["sh", INSTALL], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
