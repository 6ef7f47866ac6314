"""The live cluster: odd nodes and partitions are read right, the sentence at each limit, what preemption means."""

from pathlib import Path
from typing import Any

import pytest

from hpc import fit, slurm
from hpc.cluster import Cluster, Node, Partition, Settings, gpus_of
from hpc.instances import Request
from tests.fakeslurm import FakeSlurm, without_slurm
from tests.slurm.cluster import Cluster as RealCluster

Fields = dict[str, str]


def ask(**changed: Any) -> Request:
    fitting = {"nodes": 1, "tasks_per_node": 1, "cpus": 12, "mem_gb": 64.0, "gpus": 1, "time_s": 3600}
    return Request(**(fitting | changed))


def look(
    fake: FakeSlurm,
    partitions: list[Fields] | None = None,
    nodes: list[Fields] | None = None,
    config: Fields | None = None,
) -> Cluster:
    fake.configure(config, partitions, nodes)
    return Cluster.look()


def check(live: Cluster, wanted: str | None = None, kind: str | None = "a100", **changed: Any) -> fit.Answer:
    return fit.check(live, ask(**changed), kind, wanted)


# What SLURM prints.


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:a100:4", {"a100": 4}),
        ("gpu:tesla_v100:4(S:0-1)", {"tesla_v100": 4}),
        ("gpu:4", {"": 4}),
        ("gpu", {"": 1}),
        ("gpu:a100", {"a100": 1}),
        ("gpu:a100:2(S:0,1),gpu:v100:1,nvme:lscratch:800G,shard:a100:8", {"a100": 2, "v100": 1}),
        ("(null)", {}),
        ("", {}),
    ],
)
def test_gpus_of_a_node(gres: str, gpus: dict[str, int]) -> None:
    assert gpus_of(gres) == gpus


@pytest.mark.parametrize(
    ("state", "away"),
    [
        ("IDLE", None),
        ("MIXED+PLANNED", None),
        ("ALLOCATED", None),
        ("IDLE+CLOUD+POWERED_DOWN", None),  # it is woken up for a job
        ("DOWN", "DOWN"),
        ("IDLE*", "DOWN"),
        ("IDLE+DRAIN", "DRAIN"),
        ("MIXED+DRAIN*", "DOWN"),
        ("IDLE+NOT_RESPONDING", "NOT_RESPONDING"),
        ("IDLE+MAINTENANCE+RESERVED", "MAINT"),
        ("IDLE+FAIL", "FAIL"),
        ("FUTURE", "FUTURE"),
    ],
)
def test_what_keeps_jobs_off_a_node(state: str, away: str | None) -> None:
    assert Node.of({"State": state}).away == away


def test_a_node_offers_what_slurm_does_not_keep_for_itself() -> None:
    fields = {"CPUTot": "128", "CPUEfctv": "126", "RealMemory": "515000", "MemSpecLimit": "15000", "Gres": "gpu:2"}
    node = Node.of({**fields, "NodeName": "n1", "Partitions": "a,b", "State": "IDLE", "Reason": "fan [root@2030]"})
    assert (node.cpus, node.mem_gb, node.partitions, node.reason) == (126, 500, ("a", "b"), "fan")
    assert node.offer == "126 cores, 500 GB, 2 x GPU"
    assert Node.of({"CPUTot": "64"}).cpus == 64, "before 22.05"


def test_a_partition_without_limits_and_one_with_all_of_them() -> None:
    free = Partition.of({"PartitionName": "p", "MaxTime": "UNLIMITED", "MaxNodes": "UNLIMITED", "GraceTime": "0"})
    assert (free.max_time_s, free.max_nodes, free.accounts, free.state, free.grace_s) == (None, None, None, "UP", 0)
    fields = {"MaxTime": "2-00:00:00", "MaxNodes": "4", "MaxCPUsPerNode": "8", "MaxMemPerNode": "32000"}
    full = Partition.of({"PartitionName": "p", **fields, "AllowAccounts": "a,b", "Hidden": "YES", "PriorityTier": "7"})
    assert (full.max_time_s, full.max_nodes, full.max_cpus, full.max_mem_gb) == (172800, 4, 8, 32)
    assert (full.accounts, full.hidden, full.tier) == (("a", "b"), True, 7)


@pytest.mark.parametrize(
    ("config", "signal"),
    [
        ({}, False),
        ({"PreemptParameters": "reorder_count=3,send_user_signal"}, True),
        ({"SlurmctldParameters": "preempt_send_user_signal"}, True),
    ],
)
def test_settings(fake: FakeSlurm, config: Fields, signal: bool) -> None:
    settings = look(fake, config={**config, "PreemptExemptTime": "01:00:00"}).settings
    assert settings.user_signal is signal
    assert (settings.max_array_size, settings.kill_wait_s, settings.exempt_s) == (1001, 30, 3600)
    assert (settings.preempt_by, settings.version, settings.accounting) == ("partition_prio", "22.05.8", False)


def test_a_configuration_that_is_not_understood_is_one_line() -> None:
    with pytest.raises(slurm.SlurmError, match=r"^scontrol show config: not understood \('MaxArraySize'\)$"):
        Settings.of({})


# Does it fit?

TWO = [{}, {"PartitionName": "long", "Default": "NO", "MaxTime": "7-00:00:00"}]
BOTH = [{"Partitions": "gpu,long"}, {"NodeName": "node1", "Partitions": "gpu,long"}]
REFUSALS: list[tuple[Fields, dict[str, Any], str]] = [
    (
        {"MaxTime": "00:30:00"},
        {},
        "launch.time: 01:00:00 asked, but partition gpu ends a job after 00:30:00; ask for 00:30:00 or less, "
        "or use partition long",
    ),
    (
        {"MaxNodes": "1"},
        {"nodes": 2},
        "launch.nodes: 2 asked, but a job of partition gpu has 1 at most; ask for 1 or less, or use partition long",
    ),
    (
        {"MinNodes": "2"},
        {},
        "launch.nodes: 1 asked, but a job of partition gpu has 2 at least; ask for 2 or more, or use partition long",
    ),
    (
        {"MaxCPUsPerNode": "8"},
        {},
        "launch.cpus: 12 cores per node asked, but the largest node of partition gpu has 8; ask for 8 or less, "
        "or use partition long",
    ),
    (
        {"State": "INACTIVE"},
        {},
        "partition gpu is INACTIVE and takes no jobs; wait until 'sinfo' shows it up, or use partition long",
    ),
    (
        {},
        {"mem_gb": 128.0},
        "launch.mem: 128 GB per node asked, but the largest node of partition gpu has 64; ask for 64 or less",
    ),
    (
        {},
        {"gpus": 4},
        "launch.gpus: 4 x a100 per node asked, but the largest node of partition gpu has 1; ask for 1 or less",
    ),
    (
        {},
        {"nodes": 3},
        "launch.nodes: 3 asked, but partition gpu has 2 with 12 cores, 64 GB, 1 x a100; ask for 2 or less",
    ),
    ({}, {"kind": "h100"}, "gpu_type h100: no node of partition gpu has such a GPU; it has a100"),
]


@pytest.mark.parametrize(("gpu", "asked", "sentence"), REFUSALS, ids=[row[2].split(",")[0] for row in REFUSALS])
def test_a_refusal_says_which_number_which_limit_and_what_would_fit(
    fake: FakeSlurm, gpu: Fields, asked: dict[str, Any], sentence: str
) -> None:
    live = look(fake, [gpu, TWO[1]], BOTH)
    assert check(live, **asked).refusals == [sentence]
    assert check(look(fake, TWO, BOTH)).refusals == [], "and what is within all limits fits"


def test_exactly_the_limit_fits_and_is_told(fake: FakeSlurm) -> None:
    live = look(fake, [{"MaxTime": "01:00:00", "MaxNodes": "2"}])
    assert check(live, nodes=2).passed == [
        "partition gpu: 2 of its 2 nodes fit (12 cores, 64 GB, 1 x a100), 2 idle now"
    ]
    assert check(live, kind=None).passed, "any type of GPU"
    assert check(live, "gpu", None, gpus=0).passed


def test_what_no_single_node_has_together_is_refused_with_what_there_is(fake: FakeSlurm) -> None:
    live = look(fake, nodes=[{}, {"NodeName": "big", "RealMemory": "512000", "Gres": "(null)"}])
    (line,) = check(live, mem_gb=100.0).refusals
    assert line == (
        "no node of partition gpu has 12 cores, 100 GB, 1 x a100 together; "
        "it has 1 of 12 cores, 64 GB, 1 x a100; 1 of 12 cores, 512 GB"
    )


def test_an_unknown_partition_is_told_with_the_nearest_but_no_hidden_one(fake: FakeSlurm) -> None:
    live = look(fake, [*TWO, {"PartitionName": "gpu-secret", "Default": "NO", "Hidden": "YES"}], BOTH)
    assert check(live, "gup").refusals == [
        "partition 'gup' is not on this cluster; did you mean 'gpu'? valid: gpu, long"
    ]
    assert check(live, "gpu-secret").refusals == [], "who knows it may use it"


def test_without_a_default_one_must_be_named(fake: FakeSlurm) -> None:
    live = look(fake, [{"Default": "NO"}])
    assert check(live).refusals == ["launch.partition: none is given, and this cluster has no default; valid: gpu"]
    assert check(live, "gpu").refusals == []


def test_of_several_partitions_one_that_fits_is_enough(fake: FakeSlurm) -> None:
    live = look(fake, [{"MaxTime": "00:30:00"}, TWO[1]], BOTH)
    assert check(live, "gpu,long").refusals == [] and fit.choose(live, "gpu,long") == ["gpu", "long"]
    assert len(check(live, "gpu,long", time_s=8 * 86400).refusals) == 2


def test_an_account_that_the_partition_does_not_take(fake: FakeSlurm) -> None:
    live = look(fake, [{"AllowAccounts": "physics,bio"}])
    told = fit.check(live, ask(), "a100", None, account="art").refusals
    assert told == ["launch.account: art may not use partition gpu; use physics or bio"]
    assert fit.check(live, ask(), "a100", None, account="bio").refusals == []


def test_nodes_that_are_away_make_a_job_wait_and_are_told_apart(fake: FakeSlurm) -> None:
    away = [{"State": "IDLE+DRAIN", "Reason": "fan [root@2030]"}, {"NodeName": "node1", "State": "DOWN*"}]
    answer = check(look(fake, nodes=[*away, {"NodeName": "node2"}]), nodes=2)
    assert answer.refusals == [] and answer.warnings == [
        "partition gpu: of its 3 nodes that fit, 2 are needed, and a job waits: node0 is DRAIN (fan); node1 is DOWN"
    ]
    down = look(fake, [{"State": "DOWN"}], [{}])
    assert check(down).warnings == ["partition gpu is DOWN: a job waits until it is up again"]


# Preemption.

HIGH = {"PartitionName": "high", "Default": "NO", "PriorityTier": "9", "PreemptMode": "OFF"}
SHARED = [{"Partitions": "gpu,high"}]
SENTENCES: list[tuple[Fields, Fields, str]] = [
    (
        {},
        {},
        "a preempted job is requeued, and starts again after 2 min or more; its tasks get SIGTERM 30 s (KillWait) "
        "before SIGKILL, and no user signal",
    ),
    (
        {"JobRequeue": "0", "KillWait": "20 sec"},
        {"GraceTime": "8"},
        "a preempted job is requeued, and starts again after 2 min or more (JobRequeue=0, but the script asks for "
        "--requeue); its tasks get SIGTERM 28 s (GraceTime 8 + KillWait 20) before SIGKILL, and no user signal",
    ),
    (
        {"SlurmctldParameters": "preempt_send_user_signal", "PreemptExemptTime": "01:00:00"},
        {"PreemptMode": "CANCEL"},
        "a preempted job is cancelled and does not come back by itself ('hpc resume --all' brings it back), "
        "not in its first 60 min; its tasks get the user signal (USR2) 30 s (KillWait) before SIGKILL",
    ),
    (
        {"PreemptMode": "GANG,SUSPEND"},
        {"PreemptMode": "GANG,SUSPEND"},
        "a preempted job is suspended where it is and goes on later; it hears no signal, and keeps its memory",
    ),
    ({}, {"PreemptMode": "OFF"}, "its jobs are not preempted (PreemptMode=OFF)"),
    ({}, {"PriorityTier": "9"}, "its jobs are not preempted (no partition of a higher tier shares its nodes)"),
    ({"PreemptType": "preempt/none", "PreemptMode": "OFF"}, {}, "jobs are not preempted here"),
    (
        {"PreemptType": "preempt/qos", "PreemptMode": "CANCEL"},
        {"PreemptMode": "OFF"},
        "a preempted job is cancelled and does not come back by itself ('hpc resume --all' brings it back); its tasks "
        "get SIGTERM 30 s (KillWait) before SIGKILL, and no user signal. Its QOS may say otherwise (preempt/qos)",
    ),
]


@pytest.mark.parametrize(("config", "gpu", "sentence"), SENTENCES, ids=[row[2][:40] for row in SENTENCES])
def test_what_a_preempted_job_gets_in_a_sentence(fake: FakeSlurm, config: Fields, gpu: Fields, sentence: str) -> None:
    live = look(fake, [gpu, HIGH], SHARED, config)
    assert live.preemption("gpu") == f"partition gpu: {sentence}"
    ended = "requeued" in sentence or "cancelled" in sentence
    total = int(gpu.get("GraceTime", 0)) + int(config.get("KillWait", "30").split()[0])
    assert live.notice_s("gpu") == (total if ended else None)


# On real clusters.


def enter(cluster: RealCluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    without_slurm(monkeypatch)
    for key, value in cluster.environment().items():
        monkeypatch.setenv(key, value)
    return Cluster.look()


@pytest.mark.slurm
def test_the_real_cluster_as_it_is(slurm_cluster: RealCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    live = enter(slurm_cluster, monkeypatch)
    assert live.default == "gpu" and set(live.partitions) == {"gpu", "grace", "high"}
    assert [node.offer for node in live.nodes] == ["12 cores, 64 GB, 1 x a100"] * 2
    assert check(live, nodes=2).passed and check(live, nodes=3).refusals
    assert live.notice_s("grace") == 13 and live.notice_s("high") is None
    assert "SIGTERM 5 s (KillWait)" in live.preemption("gpu")


@pytest.mark.slurm
def test_limits_that_differ_are_seen_and_sbatch_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = ["PartitionName=short Nodes=node0 MaxTime=10 PriorityTier=1", "PartitionName=off Nodes=ALL State=INACTIVE"]
    options = {"preempt_mode": "CANCEL", "job_requeue": 0, "user_signal": True, "kill_wait": 7}
    with RealCluster(extra=extra, **options) as cluster:
        live = enter(cluster, monkeypatch)
        assert check(live, "short").refusals[0].startswith("launch.time: 01:00:00 asked, but partition short ends")
        assert check(live, "off").refusals[0].startswith("partition off is INACTIVE")
        script = tmp_path / "script.sh"
        script.write_text("#!/bin/bash\n")
        assert not slurm.test_only(script, "--partition=off")[0] and slurm.test_only(script, "--partition=short")[0]
        assert live.preemption("grace") == (
            "partition grace: a preempted job is cancelled and does not come back by itself ('hpc resume --all' brings "
            "it back); its tasks get the user signal (USR2) 15 s (GraceTime 8 + KillWait 7) before SIGKILL"
        )
        cluster.run("scontrol", "update", "NodeName=node1", "State=DRAIN", "Reason=bad fan")
        (warning,) = check(Cluster.look(), nodes=2).warnings
        assert "node1 is DRAIN (bad fan)" in warning
