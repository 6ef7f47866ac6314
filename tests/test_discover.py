"""hpc instances --discover: odd clusters as scontrol shows them, and the real one, which takes what was discovered."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc import discover, instances, template
from hpc.discover import Found
from hpc.errors import UserError
from hpc.experiment import validate
from hpc.rundir import RunDir
from hpc.settings import Launch
from tests.slurm.cluster import Cluster

Discover = Callable[[list[str], list[str]], dict[str, Found]]

CONFIG = """Configuration data as of 2026-01-31T12:00:00
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = odd
MaxArraySize            = 10001
"""
PARTITION = (
    "PartitionName={name} AllowGroups=ALL AllowAccounts={accounts} AllowQos=ALL AllocNodes=ALL Default={default} "
    "QoS={qos} DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes={max_nodes} "
    "MaxTime={time} MinNodes=0 LLN=NO MaxCPUsPerNode={cpus} Nodes=n[1-9] PriorityJobFactor=1 PriorityTier=1 "
    "RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=OFF State={state} TotalCPUs=1 "
    "TotalNodes=1 SelectTypeParameters=NONE JobDefaults=(null) DefMemPerNode=UNLIMITED {mem}"
)
NODE = (
    "NodeName={name} Arch=x86_64 CoresPerSocket=16 CPUAlloc=0 CPUTot={cpus} CPULoad=0.00 AvailableFeatures={features} "
    "ActiveFeatures={features} Gres={gres} NodeAddr={name} NodeHostName={name} Version=20.11.9 OS=Linux 4.18.0-305 #1 "
    "SMP Thu Apr 29 08:54:30 EDT 2021 RealMemory={mem} AllocMem=0 FreeMem=1 Sockets=2 Boards=1 {spec}State={state} "
    "ThreadsPerCore={threads} TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A Partitions={partitions} "
    "CfgTRES=cpu=1,mem=1M,billing=1 AllocTRES= Reason=bad disk [root@2026-01-01T00:00:00]"
)


def partition(name: str, **other: str) -> str:
    usual = {"accounts": "ALL", "default": "NO", "qos": "N/A", "max_nodes": "UNLIMITED", "time": "2-00:00:00"}
    usual |= {"cpus": "UNLIMITED", "state": "UP", "mem": "MaxMemPerNode=UNLIMITED"}
    return PARTITION.format(name=name, **{**usual, **other})


def node(name: str, gres: str = "(null)", **other: str) -> str:
    usual = {"cpus": "32", "mem": "128000", "features": "(null)", "spec": "", "state": "IDLE", "threads": "1"}
    return NODE.format(name=name, gres=gres, **{**usual, "partitions": "p", **other})


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "own"
    monkeypatch.setenv("HPC_INSTANCES", str(folder))
    return folder


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: Path) -> Discover:
    """What is discovered, by name, where scontrol shows these partitions and nodes; each file is read back."""

    def of(partitions: list[str], nodes: list[str]) -> dict[str, Found]:
        shown = {"config": CONFIG, "partition": "\n".join(partitions) + "\n", "node": "\n".join(nodes) + "\n"}
        for kind, text in shown.items():
            (tmp_path / kind).write_text(text)
        program = tmp_path / "bin" / "scontrol"
        program.parent.mkdir()
        program.write_text(f'#!/usr/bin/env bash\nexec cat "{tmp_path}/${{!#}}"\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        result = {one.name: one for one in discover.read()}
        discover.write(result.values())
        for name, one in result.items():
            read = instances.find(name)
            assert read.check(read.request(Launch())) == []
            assert (read.cpus, read.partition) == (one.values["cpus"], one.values["partition"])
        return result

    return of


GRES = [
    ("gpu:tesla_v100:4(S:0-1)", 4, "tesla_v100", None),
    ("gpu:4", 4, None, None),
    ("gpu:4(S:0,1)", 4, None, None),
    ("gpu", 1, None, None),
    ("gpu:a100-40g:2(IDX:0-1),nvme:1", 2, "a100-40g", 40),
    ("nvme:2,gpu:a100_3g.20gb:8", 8, "a100_3g.20gb", 20),
    ("gpu:nvidia_a100_80gb_pcie:no_consume:2", 2, "nvidia_a100_80gb_pcie", 80),
    ("gpu:a40:8", 8, "a40", 48),
    ("craynetwork:4", None, None, None),
    ("(null)", None, None, None),
    ("gpu:0", None, None, None),
]


@pytest.mark.parametrize(("gres", "count", "kind", "memory"), GRES, ids=[row[0] for row in GRES])
def test_gpus_as_clusters_write_them(gres: str, count: int, kind: str, memory: int, found: Discover) -> None:
    values = found([partition("p")], [node("n1", gres)])["odd-p"].values
    assert (values.get("gpus"), values.get("gpu_type"), values.get("gpu_mem_gb")) == (count, kind, memory)


def test_memory_of_a_gpu_may_stand_in_the_features(found: Discover) -> None:
    nodes = [node("n1", "gpu:4", features="IB:EDR,CPU_MEM:256GB,GPU_MEM:32GB")]
    nodes += [node("n2", "gpu:a100:4", features="icelake,a100-80gb")]
    both = found([partition("p")], nodes)
    assert [one.values["gpu_mem_gb"] for one in both.values()] == [32, 80]


def test_each_kind_of_node_of_a_partition_is_an_instance(found: Discover) -> None:
    nodes = [node("n1"), node("n2"), node("n3", "gpu:a100:4"), node("n4", "gpu:a100:4", mem="512000")]
    nodes += [node("n5", "gpu:a100:2,gpu:t4:1"), node("n6", mem="127900"), node("n7", state="FUTURE", cpus="1")]
    every = found([partition("p", default="YES")], nodes)
    assert {name: one.values["nodes"] for name, one in every.items()} == {
        "odd-p-32cpus": 3,
        "odd-p-4xa100": 1,
        "odd-p-4xa100-32cpus": 1,
        "odd-p-2xa100": 1,
        "odd-p-1xt4": 1,
    }
    assert every["odd-p-32cpus"].values["mem_gb"] == 127.9, "what fits every node of the kind"
    assert {every[name].values["mem_gb"] for name in ("odd-p-4xa100", "odd-p-4xa100-32cpus")} == {128, 512}


def test_partitions_that_share_nodes_each_have_their_limits(found: Discover) -> None:
    parts = [partition("long", time="30-00:00:00", max_nodes="1"), partition("dev", time="01:00:00", cpus="8")]
    parts += [partition("big mem", mem="MaxMemPerNode=64000"), partition("free", time="UNLIMITED")]
    parts += [partition("percpu", mem="MaxMemPerCPU=2000"), partition("empty")]
    nodes = [node(f"n{i}", partitions="long,dev,big mem,free,percpu") for i in range(3)]
    every = found(parts, nodes)
    assert set(every) == {"odd-long", "odd-dev", "odd-big-mem", "odd-free", "odd-percpu"}
    assert (every["odd-long"].values["nodes"], instances.find("odd-long").time_limit) == (1, 30 * 86400)
    assert (every["odd-dev"].values["cpus"], instances.find("odd-dev").time_limit) == (8, 3600)
    assert every["odd-big-mem"].values["mem_gb"] == every["odd-percpu"].values["mem_gb"] == 64
    assert instances.find("odd-big-mem").partition == "big mem"
    assert "time_limit: 7d  # the partition has no limit" in every["odd-free"].text


def test_what_slurm_keeps_for_itself_is_not_offered(found: Discover) -> None:
    reserved = "CoreSpecCount=2 CPUSpecList=62-63,30-31 MemSpecLimit=8000 "
    one = found([partition("p")], [node("n1", cpus="64", threads="2", spec=reserved)])["odd-p"]
    assert (one.values["cpus"], one.values["mem_gb"]) == (60, 120)
    assert "cpus: 60  # SLURM counts hardware threads, 2 of a core" in one.text


def test_remarks_say_what_is_away_and_what_else_may_limit(found: Discover) -> None:
    states = ["IDLE", "DOWN*", "IDLE+DRAIN", "MIXED+PLANNED", "IDLE+CLOUD+POWERED_DOWN", "DOWN+NOT_RESPONDING"]
    nodes = [node(f"n{number}", "gpu:4", state=state) for number, state in enumerate(states)]
    text = found([partition("p", accounts="neuro,bio", qos="p_qos", state="DOWN")], nodes)["odd-p"].text
    assert "nodes: 6  # 3 of 6 are down or drained now: n1, n2, n5\n" in text
    assert "partition: p  # it is DOWN now\n" in text
    assert "# AllowAccounts=neuro,bio\n# QoS=p_qos may set closer limits: sacctmgr show qos p_qos\n" in text
    assert "# MaxArraySize=10001: hpc cuts longer arrays into chunks\n" in text
    assert "# gpu_mem_gb: 40 (say): SLURM does not tell it" in text


def test_a_file_that_is_there_is_kept_and_nothing_is_written(found: Discover, own: Path) -> None:
    one = found([partition("p"), partition("q")], [node("n1", partitions="p,q")])
    mine = own / "odd-q.yaml"
    mine.write_text("base: laptop\n")
    (own / "odd-p.yaml").unlink()
    with pytest.raises(UserError, match=r"own: odd-q.yaml: already there; --force writes over"):
        discover.write(one.values())
    assert mine.read_text() == "base: laptop\n" and not (own / "odd-p.yaml").exists()
    assert discover.write(one.values(), force=True) == [own / "odd-p.yaml", mine]
    assert mine.read_text() == one["odd-q"].text


def hpc(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc.cli", *arguments]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=False)


def test_without_slurm_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = hpc("instances", "--discover", PATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("no SLURM answers here (") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--write", "--force"])
def test_an_option_without_effect_is_refused(option: str) -> None:
    done = hpc("instances", option)
    assert done.returncode == 2 and "hpc instances --discover --write" in done.stderr


@pytest.mark.slurm
def test_the_real_cluster_takes_what_was_discovered_on_it(slurm_cluster: Cluster, own: Path, tmp_path: Path) -> None:
    shown = slurm_cluster.run(sys.executable, "-m", "hpc.cli", "instances", "--discover").stdout
    assert shown.startswith("# hpctest-gpu.yaml\ndescription: hpctest, 12 CPUs, 64 GB, 1 x a100\ncpus: 12\n")
    command = ["env", f"HPC_INSTANCES={own}", sys.executable, "-m", "hpc.cli", "instances", "--discover", "--write"]
    written = slurm_cluster.run(*command).stdout.split()
    assert written == [str(own / f"hpctest-{name}.yaml") for name in ("gpu", "grace", "high")]
    for path in map(Path, written):
        launch = {"instance": path.stem, "nodes": 2}
        values = {"name": "x", "model": {"name": "m"}, "data": {"file": "/x.h5"}, "launch": launch}
        script = tmp_path / "job.sbatch"
        script.write_text(template.render(validate(values, "x"), instances.find(path.stem), RunDir(tmp_path), "/py"))
        assert slurm_cluster.run("sbatch", "--test-only", script).stderr.startswith("sbatch: Job ")
