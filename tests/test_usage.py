"""What a run used: sampled from real processes that burn known amounts, and the card made of it."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpc import sampler, usage
from hpc.allocation import Allocation
from hpc.rundir import RunDir, append_line, read_json, write_json
from hpc.sampler import Cgroup, Gpus, Sampler
from tests.tiny_run import make_data, make_run

ASKED = {"nodes": 1, "tasks_per_node": 1, "cpus": 12, "mem_gb": 64.0, "gpus": 0, "time_s": 28800}
MB = 2**20

# Rank 0 samples; each rank takes 50 MB and 0.6 s of a core for every rank up to its own. Told by a file to end.
RANK = """
import os, sys, time
from pathlib import Path
from hpc import sampler
from hpc.allocation import Allocation
from hpc.rundir import RunDir
run, rank = RunDir(sys.argv[1]), int(os.environ["HPC_RANK"])
sampler._LEAST_S, sampler.WRITE_S = 0.05, float(sys.argv[2])
if rank == 0:
    asked = {"cpus": 12, "mem_gb": float(sys.argv[3]), "gpus": 0, "tasks_per_node": 3, "time_s": 28800, "nodes": 1}
    sampling = sampler.Sampler(run, Allocation.current(), asked).start()
block = b"x" * (50 * 2**20 * (rank + 1))
while time.process_time() < 0.6 * (rank + 1):
    pass
(run.path / f"burnt{rank}").write_text(str(time.process_time()))
while rank == 0 and len(list(run.path.glob("burnt*"))) < 3 or len(sys.argv) > 4:
    time.sleep(0.02)
if rank == 0:
    sampling.close()
    (run.path / "end").touch()
while not (run.path / "end").exists():
    time.sleep(0.02)
"""


def start(run: RunDir, *arguments: str, generation: int = 1) -> subprocess.Popen[bytes]:
    run.path.mkdir(parents=True, exist_ok=True)
    environ = {**os.environ, "HPC_GENERATION": str(generation), "HPC_MASTER_PORT": str(os.getpid())}
    command = [sys.executable, "-m", "hpc.localstep", "--tasks=3", "--", sys.executable, "-c", RANK, str(run.path)]
    return subprocess.Popen([*command, *arguments], env=environ)


def told(run: RunDir, generation: int = 1) -> dict[str, Any]:
    (path,) = run.usage.glob(f"{generation:03d}-*.json")
    return read_json(path)


def test_cores_and_memory_of_all_ranks_on_the_node_are_measured(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    other_node = {"HPC_GENERATION": "1", "HPC_MASTER_PORT": str(os.getpid()), "SLURMD_NODENAME": "another"}
    code = f"x = b'x' * {400 * MB}; import time; time.sleep(60)"
    stranger = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **other_node})
    assert start(run, "0.2", "64").wait(60) == 0
    stranger.kill()
    stranger.wait()
    found = told(run)
    burnt = sum(float(path.read_text()) for path in run.path.glob("burnt*"))
    assert burnt > 3.5
    assert 0.75 * burnt < found["cpu_seconds"] < 1.25 * burnt
    assert 0.3 < found["memory_peak_gb"] < 0.42, "50, 100 and 150 MB in blocks, and four interpreters"
    assert found["samples"] > 1 and 0.1 < found["busiest_cores"] < 3.1


def test_a_killed_attempt_leaves_its_last_sample_and_attempts_are_merged(tmp_path: Path) -> None:
    """Its periodic write is far away: what is near the limit is written at once."""
    run = RunDir(tmp_path / "run")
    step = start(run, "1000", "0.32", "for ever", generation=1)
    end = time.monotonic() + 60
    while time.monotonic() < end and not (list(run.usage.glob("001-*.json")) and told(run)["memory_peak_gb"] > 0.3):
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(step.pid)], capture_output=True, text=True, check=True).stdout.split()
    for rank in ranks:
        os.kill(int(rank), signal.SIGKILL)
    step.wait()
    first = told(run)
    assert first["memory_peak_gb"] > 0.9 * first["memory_limit_gb"] == 0.9 * 0.32
    for path in run.path.glob("burnt*"):
        path.unlink()
    assert start(run, "0.2", "64", generation=2).wait(60) == 0
    both = usage.summary(run)
    second = told(run, 2)
    assert (both["attempts"], both["nodes"]) == (2, 1)
    assert both["seconds"] == pytest.approx(first["seconds"] + second["seconds"], abs=0.1)
    assert both["memory_peak_gb"] == max(first["memory_peak_gb"], second["memory_peak_gb"])
    assert both["cores"] * both["seconds"] == pytest.approx(first["cpu_seconds"] + second["cpu_seconds"], rel=0.02)


# Where a sample comes from.

V2 = {
    "job_12/cpu.stat": "usage_usec 7500000\nuser_usec 7000000\nsystem_usec 500000\n",
    "job_12/memory.stat": f"anon {300 * MB}\nfile {9000 * MB}\nkernel 1\nshmem {100 * MB}\n",
    "job_12/memory.max": f"{64000 * MB}\n",
}
V1 = {
    "cpuacct/slurm/uid_0/job_12/cpuacct.usage": "7500000000\n",
    "memory/slurm/uid_0/job_12/memory.stat": f"rss 1\ntotal_cache {9000 * MB}\ntotal_rss {300 * MB}\n"
    f"total_shmem {100 * MB}\n",
    "memory/slurm/uid_0/job_12/memory.limit_in_bytes": f"{64000 * MB}\n",
}
IN_V2 = "0::/system.slice/slurmstepd.scope/job_12/step_0/user/task_0\n"
IN_V1 = (
    "11:memory:/slurm/uid_0/job_12/step_0/task_0\n7:cpu,cpuacct:/slurm/uid_0/job_12/step_0/task_0\n"
    "1:name=systemd:/system.slice/slurmd.service\n0::/system.slice/slurmd.service\n"
)


@pytest.mark.parametrize(
    ("own", "files"),
    [(IN_V2, {f"system.slice/slurmstepd.scope/{name}": text for name, text in V2.items()}), (IN_V1, V1)],
)
def test_the_cgroup_of_a_job_counts_all_steps_and_no_page_cache(
    tmp_path: Path, own: str, files: dict[str, str]
) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    group = Cgroup.of_job(tmp_path / "own", tmp_path)
    assert group and group.sample() == (7.5, 0.4) and group.limit_gb() == 64
    limit = next(path for path in tmp_path.rglob("memory.*") if path.name in ("memory.max", "memory.limit_in_bytes"))
    limit.write_text("max\n" if limit.name == "memory.max" else "9223372036854771712\n")
    assert group.limit_gb() is None
    next(tmp_path.rglob("memory.stat")).unlink()
    assert Cgroup.of_job(tmp_path / "own", tmp_path) is None, "SLURM does not limit memory here"


@pytest.mark.parametrize("own", ["0::/user.slice/user-0.slice/session-1.scope\n", "", "4:memory:/jobs/job_x\n0::/\n"])
def test_outside_a_job_there_is_no_cgroup(tmp_path: Path, own: str) -> None:
    (tmp_path / "own").write_text(own)
    assert Cgroup.of_job(tmp_path / "own") is None


IN_GROUP = """
import os, sys, time
from pathlib import Path
from hpc.sampler import Cgroup
for folder in sys.argv[1:]:
    Path(folder, "cgroup.procs").write_text(str(os.getpid()))
group = Cgroup.of_job()
before, block = group.sample(), b"x" * (200 * 2**20)
start = time.process_time()
while time.process_time() < start + 0.5:
    pass
after = group.sample()
print(after[0] - before[0], after[1] - before[1], time.process_time() - start)
"""


def test_the_kernels_own_numbers() -> None:
    """A cgroup of this test's making; not everywhere may it make one."""
    folders = [Path(f"/sys/fs/cgroup/{kind}/hpc-test/job_{os.getpid()}") for kind in ("cpuacct", "memory")]
    try:
        for folder in folders:
            folder.mkdir(parents=True)
    except OSError as error:
        for folder in filter(Path.exists, folders):
            folder.rmdir()
        pytest.skip(f"no cgroup (version 1) can be made here: {error}")
    try:
        command = [sys.executable, "-c", IN_GROUP, *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        for folder in folders:
            folder.rmdir()
            folder.parent.rmdir()
    seconds, gb, burnt = map(float, done.stdout.split())
    assert 0.8 * burnt < seconds < 1.5 * burnt + 0.2 and gb == pytest.approx(0.2, rel=0.1)


SMI = """#!/usr/bin/env bash
case "$1" in
  --query-gpu=*utilization*) echo "0, GPU-aaaa, 10, 1024, 40960"; echo "1, GPU-bbbb, $(cat "$0.busy"), 40960";
    [ ! -e "$0.sick" ] || echo "Unable to determine the device handle for GPU2: 0000:41:00.0: Unknown Error" ;;
  --query-gpu=*ecc*) echo "0, GPU-aaaa, $(cat "$0.ecc" 2>/dev/null || echo 0), No" ;;
  --query-gpu=*) echo "0, GPU-aaaa, 4, 40960"; echo "1, GPU-bbbb, 4, 40960" ;;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    return tool


def test_the_jobs_own_gpus_are_sampled(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    gpus = Gpus()
    for said in ("100, 20480", "50, 30720", "[N/A], [N/A]", "[Unknown Error], 1024", "90, 1024"):
        smi.with_name("nvidia-smi.busy").write_text(said)
        smi.with_name("nvidia-smi.sick").touch()
        assert gpus.sample()
    assert gpus.told() == [{"gpu": "1", "busy": 0.8, "samples": 3, "peak_gb": 30.0, "total_gb": 40.0}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert not Gpus().sample(), "none of ours is shown: it is not asked again"


def test_a_full_disk_takes_the_records_and_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDir(tmp_path)
    run.usage.write_text("a file where the folder should be: no write succeeds, root or not")
    sampling = Sampler(run, Allocation(node="n"), {}).start()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            sampling.update()
    run.usage.unlink()
    sampling.close()
    assert sum("is not recorded for now" in record.message for record in caplog.records) == 1
    assert told(run)["samples"] >= 4


# The card.


def record(run: RunDir, generation: int = 1, node: str = "node0", **values: Any) -> None:
    whole = {"generation": generation, "node": node, "asked": ASKED, "time": 0.0, "samples": 99, "gpus": []}
    used = {"seconds": 11520.0, "cpu_seconds": 104832.0, "busiest_cores": 9.3, "memory_gb": 20.0}
    memory = {"memory_peak_gb": 21.2, "memory_limit_gb": 64.0}
    write_json(run.usage / f"{generation:03d}-{node}.json", {**whole, **used, **memory, **values})


def gpu(number: int = 0, busy: float = 0.93, peak: float = 31.2, samples: int = 100) -> dict[str, Any]:
    return {"gpu": str(number), "busy": busy, "samples": samples, "peak_gb": peak, "total_gb": 40.0}


@pytest.fixture
def done(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    write_json(run.result, {"finished": True})
    return run


def metrics(run: RunDir, waiting: float) -> None:
    append_line(run.metrics, {"generation": 1, "step": 1, "split": "validation", "waiting_share": waiting})


def test_the_card(done: RunDir) -> None:
    record(done, asked={**ASKED, "gpus": 1}, gpus=[gpu()])
    metrics(done, 0.04)
    assert usage.card(done) == [
        "CPU 9.1 of 12 cores (76 %)",
        "memory 21.2 of 64 GB at most",
        "GPU 0: 93 % busy, 31.2 of 40 GB at most",
        "waiting for data 4 %",
        "wall time 3.2 h of 8.0 h asked",
        "suggested: launch.mem=26GB launch.time=4h (what was used and 20 % more)",
    ]
    assert json.loads(json.dumps(usage.summary(done))) == usage.summary(done), "result.json carries it"
    assert usage.lines({}) == usage.card(RunDir("/nowhere")) == []


@pytest.mark.parametrize(
    ("values", "waiting", "finished", "last"),
    [
        ({"busiest_cores": 8.0}, 0.0, True, "suggested: launch.mem=26GB launch.cpus=10 launch.time=4h (what was"),
        ({"busiest_cores": 8.0}, 0.2, True, "suggested: launch.mem=26GB launch.time=4h (what was"),
        ({"busiest_cores": 8.0}, 0.0, False, "suggested: launch.mem=26GB launch.cpus=10 (what was"),
        ({"busiest_cores": 8.0, "asked": {**ASKED, "tasks_per_node": 4}}, 0.0, False, "suggested: launch.mem=26GB (wh"),
        ({"memory_peak_gb": 50.0}, 0.0, False, "the request fits what was used"),
        ({"memory_peak_gb": 60.0}, 0.0, False, "suggested: launch.mem=72GB (what was used and 20 % more)"),
        ({"seconds": 300.0}, 0.0, True, "suggested: launch.mem=26GB launch.time=10min (what was used and 20 % more; a"),
        ({"seconds": 59.0}, 0.0, True, "no request suggested: sampled for 59 s only"),
        ({"seconds": 28000.0, "memory_peak_gb": 52.0}, 0.0, True, "the request fits what was used"),
        ({"asked": {}, "memory_limit_gb": None}, 0.0, True, "no request suggested: sampled for 3.2 h only"),
    ],
)
def test_the_suggestion(done: RunDir, values: dict[str, Any], waiting: float, finished: bool, last: str) -> None:
    record(done, **values)
    metrics(done, waiting)
    if not finished:
        done.result.unlink()
    assert usage.card(done)[-1].startswith(last)


def test_attempts_and_nodes_are_merged(done: RunDir) -> None:
    record(done, 1, "node0", seconds=3600.0, cpu_seconds=3600.0, gpus=[gpu(3, busy=0.5, peak=20.0, samples=300)])
    record(done, 1, "node1", seconds=3500.0, cpu_seconds=3500.0, gpus=[gpu(1)], memory_peak_gb=30.0)
    record(done, 2, "node7", seconds=1800.0, cpu_seconds=1800.0, gpus=[gpu(0, busy=0.9, peak=39.0)])
    (done.usage / "002-node8.json").write_text("{torn")
    found = usage.summary(done)
    assert (found["attempts"], found["nodes"], found["seconds"], found["longest_s"]) == (2, 3, 5400.0, 3600.0)
    assert (found["cores"], found["memory_peak_gb"]) == (1.0, 30.0)
    assert [(gpu["busy"], gpu["peak_gb"]) for gpu in found["gpus"]] == [(0.6, 39.0), (0.93, 31.2)]
    assert "wall time 1.5 h in 2 attempts, the longest 60 min of 8.0 h asked" in usage.card(done)


def test_many_gpus_are_one_line(done: RunDir) -> None:
    record(done, gpus=[gpu(number, busy=0.9) for number in range(7)] + [gpu(7, busy=0.1)])
    assert "8 GPUs: 80 % busy, the least 10 %, 31.2 of 40 GB at most" in usage.card(done)


# The payload.


def payload(run: RunDir, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.run", str(run.path)]
    given = {"HPC_GENERATION": "1", "HPC_CPUS_PER_TASK": "1", "HPC_MASTER_PORT": "1", "HPC_GPUS": "0", **environ}
    return subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, check=False)


def test_a_run_ends_with_its_card_and_its_result_carries_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny", make_data(tmp_path), "launch.mem=2GB", "launch.cpus=1")
    done = payload(run)
    assert done.returncode == 0, done.stderr
    used = read_json(run.result)["usage"]
    assert used["asked"]["mem_gb"] == 2 and used["cores"] > 0.1 and 0.05 < used["memory_peak_gb"] < 2
    for line in usage.lines(used):
        assert f"[0] {line}\n" in done.stdout


def test_a_bad_node_is_left_at_once_with_word_of_it(tmp_path: Path, smi: Path) -> None:
    run = make_run(tmp_path / "tiny", make_data(tmp_path), "train.device=auto")
    smi.with_name("nvidia-smi.ecc").write_text("7")
    done = payload(run, HPC_GPUS="1", CUDA_VISIBLE_DEVICES="0", HPC_GENERATION="4")
    reason = "GPU 0: 7 uncorrected memory errors (ECC) since its driver was loaded"
    assert (done.returncode, done.stderr) == (77, f"bad node {os.uname().nodename}: {reason}\n")
    (event,) = run.read_events()
    assert (event["event"], event["generation"], event["reason"]) == ("bad-node", 4, reason)
    assert not run.usage.exists(), "nothing else was begun"


def test_a_run_on_the_cpu_asks_for_no_gpu_and_bad_settings_are_no_bad_node(tmp_path: Path, smi: Path) -> None:
    run = make_run(tmp_path / "tiny", make_data(tmp_path), "train.device=cpu")
    smi.with_name("nvidia-smi.ecc").write_text("7")
    done = payload(run, HPC_GPUS="1", CUDA_VISIBLE_DEVICES="0", HPC_SCRATCH="$NOWHERE_AT_ALL")
    assert done.returncode == 2 and "a variable of it is not set here" in done.stderr
    assert [event["event"] for event in run.read_events()] == ["failed"], "and no node is named"


def test_the_cost_of_a_sample_sets_the_time_to_the_next() -> None:
    assert [sampler._pause(2, cost) for cost in (0, 0.001, 0.01, 1)] == [2, 2, 10, 60]


RECORD = {"generation": 1, "seconds": 9.0, "cpu_seconds": 9.0, "memory_peak_gb": 1.0, "busiest_cores": 1.0} | {
    "node": "node1",
    "memory_limit_gb": None,
    "asked": {},
    "gpus": [],
}


@pytest.mark.parametrize("text", ["{", "[1, 2]", "{}", '{"seconds": 9.0}', json.dumps({**RECORD, "generation": "one"})])
def test_a_file_that_is_no_record_is_left_out(tmp_path: Path, text: str) -> None:
    run = RunDir(tmp_path / "run")
    run.usage.mkdir(parents=True)
    (run.usage / "001-node0.json").write_text(text)
    assert usage.summary(run) == {} and usage.card(run) == []
    (run.usage / "001-node1.json").write_text(json.dumps(RECORD))
    assert usage.summary(run)["nodes"] == 1
