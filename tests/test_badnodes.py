"""The list of bad nodes: a day long, one per cluster, written by many at once, and met on a real cluster."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc import badnodes
from hpc.rundir import RunDir, all_runs, read_json
from tests.fakeslurm import FakeSlurm, without_slurm
from tests.slurm.cluster import Cluster
from tests.tiny_run import make_data


def entry(**values: object) -> dict[str, object]:
    return {"node": "node0", "cluster": "fake", "reason": "broken", "run": "exp", "until": time.time() + 60, **values}


def test_a_node_is_kept_for_a_day(tmp_path: Path, fake: FakeSlurm) -> None:
    badnodes.remember(tmp_path, "fake", "exp-1", {"node0": "GPU 0 is lost"})
    (told,) = json.loads(badnodes.file(tmp_path).read_text())["nodes"]
    assert {"node": "node0", "cluster": "fake", "reason": "GPU 0 is lost", "run": "exp-1"}.items() <= told.items()
    assert told["until"] - time.time() == pytest.approx(24 * 3600, abs=60)
    assert badnodes.current(tmp_path) == {"node0": "GPU 0 is lost"}


def test_what_has_expired_is_dropped_and_the_newest_reason_counts(tmp_path: Path, fake: FakeSlurm) -> None:
    old = [entry(node="old", until=time.time() - 1), entry(node="node1"), entry(node="node2")]
    badnodes.file(tmp_path).write_text(json.dumps({"nodes": old}))
    assert badnodes.current(tmp_path) == {"node1": "broken", "node2": "broken"}
    badnodes.remember(tmp_path, "fake", "exp", {"node1": "still broken"})
    told = json.loads(badnodes.file(tmp_path).read_text())["nodes"]
    assert [(node["node"], node["reason"]) for node in told] == [("node2", "broken"), ("node1", "still broken")]


def test_clusters_that_share_the_folder_keep_their_own(tmp_path: Path, fake: FakeSlurm) -> None:
    badnodes.remember(tmp_path, "elsewhere", "exp", {"node0": "broken"})
    badnodes.remember(tmp_path, "fake", "exp", {"node1": "broken"})
    assert badnodes.current(tmp_path) == {"node1": "broken"}
    assert badnodes.known(tmp_path, "elsewhere") == {"node0": "broken"}


def test_slurm_is_asked_only_where_there_are_bad_nodes(tmp_path: Path, fake: FakeSlurm) -> None:
    assert badnodes.current(tmp_path) == {} and not fake.calls()
    badnodes.remember(tmp_path, "fake", "exp", {"node1": "broken"})
    fake.fails("scontrol", "slurm_load_ctl_conf error: Unable to contact slurm controller")
    assert badnodes.current(tmp_path) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"nodes": 3}', '{"nodes": [{"node": "node0"}]}', '{"nodes": ["node0"]}'])
def test_a_damaged_list_is_not_heeded_and_written_anew(
    tmp_path: Path, fake: FakeSlurm, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    badnodes.file(tmp_path).write_text(text)
    assert badnodes.current(tmp_path) == {}
    assert ".bad-nodes.json is not heeded" in capsys.readouterr().err
    badnodes.remember(tmp_path, "fake", "exp", {"node1": "broken"})
    assert badnodes.current(tmp_path) == {"node1": "broken"}


def _remember(runs: Path, number: int) -> None:
    for count in range(5):
        badnodes.remember(runs, "fake", "exp", {f"node{number}-{count}": "broken"})


def test_jobs_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [multiprocessing.get_context("fork").Process(target=_remember, args=(tmp_path, n)) for n in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(badnodes.known(tmp_path, "fake")) == 30


# On a real cluster: the scratch folder of node0 is missing.

EXPERIMENT = """
name: tiny
model: {name: resnet3d_tiny, width: 4, layers: 1, downsample: [], stem_stride: 2}
data: {file: scans.h5, batch_size: 4, verify: 0, threads: 1}
train: {epochs: 1, device: cpu}
launch: {instance: site, cluster: slurm, cpus: 6, mem: 2GB, time: 10min}
"""
INSTANCE = """
cpus: 12
mem_gb: 64
time_limit: 1h
scratch: SCRATCH/$SLURMD_NODENAME
scratch_gb: 0.001
"""


class Site:
    """A folder to work in, with an instance whose scratch space only node1 has."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        make_data(folder)
        (folder / "scratch" / "node1").mkdir(parents=True)
        (folder / "instances").mkdir()
        (folder / "instances" / "site.yaml").write_text(INSTANCE.replace("SCRATCH", str(folder / "scratch")))
        (folder / "tiny.yaml").write_text(EXPERIMENT)

    def hpc(self, *arguments: str, code: int = 0) -> str:
        environ = {**self.cluster.environment(), "HPC_INSTANCES": str(self.folder / "instances")}
        environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
        command = ["hpc", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def runs(self) -> list[RunDir]:
        return all_runs(self.folder / "runs")

    def wait(self, runs: list[RunDir]) -> None:
        def over(run: RunDir) -> bool:  # the batch script's last word comes after the ranks' result
            ends = [event for event in run.read_events() if event["event"] == "end"]
            return bool(ends) and not ends[-1]["again"]

        self.cluster.wait_for(lambda: all(map(over, runs)), 120, "the end of all runs")

    def nodes(self, run: RunDir) -> list[str]:
        """Where its attempts were."""
        return [event["node"] for event in run.read_events() if event["event"] == "start"]


@pytest.fixture
def site(tmp_path: Path, slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Site:
    without_slurm(monkeypatch)
    return Site(tmp_path, slurm_cluster)


@pytest.mark.slurm
def test_a_job_on_a_bad_node_goes_on_elsewhere_and_later_ones_keep_off_it(site: Site) -> None:
    site.hpc("submit", "tiny.yaml")
    (run,) = site.runs()
    job = read_json(run.submit)["job"]
    site.cluster.wait_for(lambda: site.cluster.job_field(job, "ExcNodeList") == "node0", 60, "the exclusion")
    fault = f"scratch space {site.folder}/scratch/node0: No such file or directory"
    [ended] = [event for event in run.read_events() if event["event"] == "end"]
    told = f"bad node node0: {fault}; the job keeps off node0; restart 1 of 3"
    assert (ended["code"], ended["reason"]) == (77, told)
    assert f"bad node node0: {fault}\n" == run.output(job, "0", "err").read_text().splitlines(keepends=True)[0]
    site.wait([run])
    assert site.nodes(run) == ["node0", "node1"]
    site.hpc("submit", "tiny.yaml", "train.seed=1")
    later = site.runs()[-1]
    assert site.cluster.job_field(read_json(later.submit)["job"], "ExcNodeList") == "node0"
    site.wait([later])
    assert site.nodes(later) == ["node1"]


@pytest.mark.slurm
def test_a_scratch_folder_that_no_node_has_is_bad_input_and_leaves_no_node_out(site: Site) -> None:
    (site.folder / "scratch" / "node1").rmdir()
    site.hpc("submit", "tiny.yaml")
    (run,) = site.runs()
    job = read_json(run.submit)["job"]
    site.cluster.wait_for(lambda: site.cluster.job_field(job, "ExcNodeList") == "node0", 60, "the exclusion")
    assert badnodes.known(site.folder / "runs", "hpctest").keys() == {"node0"}
    site.cluster.wait_for(lambda: read_json(run.state).get("phase") == "ended", 90, "the end")
    state = read_json(run.state)
    fault = f"scratch space {site.folder}/scratch/node1: No such file or directory, on two nodes in a row"
    assert (state["code"], state["reason"].partition(": it is")[0]) == (2, f"bad input: {fault}")
    assert site.nodes(run) == ["node0", "node1"] and not badnodes.known(site.folder / "runs", "hpctest")


@pytest.mark.slurm
def test_an_array_with_a_bad_node_finishes_on_the_other(site: Site) -> None:
    """Two tasks on each node: those on the healthy one are not touched."""
    site.hpc("sweep", "tiny.yaml", "train.seed=0:4")
    rows = site.runs()
    bad = rows[:2]
    site.wait(rows)
    ends = [[event["code"] for event in run.read_events() if event["event"] == "end"] for run in bad]
    assert ends == [[77, 0], [77, 0]]
    jobs = [read_json(run.state)["job"] for run in bad]
    assert [site.cluster.job_field(job, "ExcNodeList") for job in jobs] == ["node0", "node0"]
    assert [site.nodes(run) for run in rows] == [["node0", "node1"]] * 2 + [["node1"]] * 2


@pytest.mark.slurm
def test_a_job_that_needs_the_bad_node_ends_with_the_reason(site: Site) -> None:
    """Its batch shell is on the healthy node; each node finds its own scratch space."""
    file = site.folder / "instances" / "site.yaml"
    file.write_text(f"{file.read_text()}nodes: 2\n")
    (site.folder / "scratch" / "node1").rename(site.folder / "scratch" / "node0")
    site.hpc("submit", "tiny.yaml", "launch.nodes=2")
    (run,) = site.runs()
    site.cluster.wait_for(lambda: read_json(run.state).get("phase") == "ended", 90, "the end")
    fault = f"bad node node1: scratch space {site.folder}/scratch/node1: No such file or directory"
    assert read_json(run.state)["reason"].startswith(f"{fault}; without node1 no nodes are left that could run it")
    assert site.nodes(run) == ["node0"]
    assert badnodes.known(site.folder / "runs", "hpctest").keys() == {"node1"}
