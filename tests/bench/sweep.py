"""`hpc sweep` of 1,000 rows against submitit's map_array and sbatch, on the real test cluster: `make bench-sweep`.

Only the submission counts: the partition is down, so no task starts. Two clusters, one after the other: MaxArraySize
as SLURM ships it (1001: one array), and 251 (four arrays, held until all are accepted). Each way in turn, medians of
the rounds after one that does not count. The payload's check (a child that imports torch) runs beside the making of
the folder: `hpc sweep` is timed as a whole, and without it; its parts are timed in one process that has imported
everything. Prints a table, asserts nothing. Needs root, as tests/slurm does.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import submitit

from datasets.writer import VolumeWriter
from hpc import arrays, preflight, sweep
from tests.slurm.cluster import Cluster

ROWS, SINGLE = 1000, 20
EXPERIMENT = """
name: bench
model: {name: resnet3d_tiny}
data: {file: scans.h5, batch_size: 4}
launch: {instance: cedia-a100-40gb, cluster: slurm, gpus: 0, cpus: 1, mem: 1GB, time: 10min}
"""
AXES = ["train.seed=0:200", "train.optimizer.lr=1e-3,3e-3,1e-4,3e-4,1e-5"]
BARE = "#!/bin/bash\n#SBATCH --output=/dev/null\n#SBATCH --mem=100M\ntrue\n"
HPC = [sys.executable, "-m", "hpc.cli"]
Times = dict[str, float]


def identity(number: int) -> int:
    return number


def prepare(folder: Path) -> None:
    """An experiment, its data file, and a payload that finds no fault without importing torch."""
    (folder / "exp.yaml").write_text(EXPERIMENT)
    with VolumeWriter(folder / "scans.h5", shape=(1, 8, 8, 8), dtype="int16", num_samples=8, class_names="ab") as data:
        for number in range(8):
            split = "train" if number < 4 else "validation"
            data.add(np.full((1, 8, 8, 8), number, "int16"), number % 2, id=str(number), split=split, scale=1.0)
    for room in ("jobs", "models3d", "datasets"):
        (folder / "quick" / room).mkdir(parents=True)
        (folder / "quick" / room / "__init__.py").touch()
    (folder / "quick" / "jobs" / "check.py").touch()
    (folder / "job.sh").write_text(BARE)


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def command(words: list[str], folder: Path, **environment: str) -> float:
    environ, nothing = {**os.environ, **environment}, subprocess.DEVNULL
    return seconds(lambda: subprocess.run(words, cwd=folder, env=environ, stdout=nothing, stderr=nothing, check=True))


def parts(folder: Path, runs: Path) -> Times:
    """The steps of `hpc sweep`, one after the other."""
    plans: list[sweep.SweepPlan] = []
    made = seconds(lambda: plans.append(sweep.make(folder / "exp.yaml", AXES, runs)))
    plan = plans[0]
    experiments = [row.experiment for row in plan.rows]
    checked = seconds(
        lambda: preflight.check_many(experiments, plan.instance, plan.cluster, plan.scripts[0], runs, payload=False)
    )
    whole = seconds(
        lambda: preflight.check_many(experiments, plan.instance, plan.cluster, plan.scripts[0], runs, payload=True)
    )
    written = seconds(lambda: sweep.create(plan, lambda: None))
    submitted = seconds(lambda: arrays.submit(plan.sweep, plan.cluster))
    return {
        "  rows resolved, scripts rendered": made,
        "  folder: 1000 runs and the snapshot": written,
        "  check: instance, cluster, sbatch --test-only": checked,
        "  check by the payload, torch and all (beside)": whole - checked,
        "  sbatch and the record": submitted,
    }


def round_(cluster: Cluster, folder: Path, count: int, most: int) -> Times:
    """Seconds of each way, once."""
    words, script = [*HPC, "sweep", "exp.yaml", *AXES, "--runs"], str(folder / "job.sh")
    theirs = submitit.SlurmExecutor(folder / f"submitit{count}")
    theirs.update_parameters(time=5, mem="100MB")
    shares = [range(first, min(first + most, ROWS)) for first in range(0, ROWS, most)]
    times = {
        "hpc sweep": command([*words, f"whole{count}"], folder),
        "hpc sweep, payload's check not counted": command(
            [*words, f"quick{count}"], folder, HPC_ROOT=str(folder / "quick")
        ),
        **parts(folder, folder / f"parts{count}"),
        "submitit map_array of an empty function": seconds(lambda: [theirs.map_array(identity, s) for s in shares]),
        "sbatch --array": seconds(lambda: [cluster.submit(f"--array=0-{len(s) - 1}", script) for s in shares]),
    }
    single = seconds(lambda: [cluster.submit(script) for _ in range(SINGLE)])
    cluster.run("scancel", "--me")
    return {**times, f"sbatch 1000 times ({SINGLE} timed)": single * ROWS / SINGLE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{'MaxArraySize':>12}  {'way':<46}{'seconds':>9}{'x sbatch':>10}{'x submitit':>12}{'min':>8}{'max':>8}")
    for size in (ROWS + 1, ROWS // 4 + 1):
        with tempfile.TemporaryDirectory() as name, Cluster(max_array_size=size) as cluster:
            folder = Path(name)
            prepare(folder)
            os.environ |= cluster.environment()
            cluster.run("scontrol", "update", "PartitionName=gpu", "State=DOWN")
            rounds = [round_(cluster, folder, count, size) for count in range(options.rounds + 1)][1:]
        middle = {way: statistics.median(times[way] for times in rounds) for way in rounds[0]}
        for way, value in middle.items():
            ratios = [value / middle[base] for base in ("sbatch --array", "submitit map_array of an empty function")]
            ends = [choose(times[way] for times in rounds) for choose in (min, max)]
            print(
                f"{size:>12}  {way:<46}{value:>9.3f}{ratios[0]:>10.1f}{ratios[1]:>12.2f}{ends[0]:>8.3f}{ends[1]:>8.3f}"
            )


if __name__ == "__main__":
    main()
