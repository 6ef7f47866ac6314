"""Launcher.map_array against submitit's and bare `sbatch --array`, on the real test cluster: `make bench-launch`.

Only the submission is timed: from the call until the job ids are there. The nodes are drained, so no task starts and
takes time from the next submission; each way in turn, several rounds; the medians count. Prints ratios, asserts
nothing. Needs root, as tests/slurm does.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import submitit

from hpc.launch import Launcher
from tests.slurm.cluster import Cluster

MOST = 1000
BARE = "#!/bin/bash\n#SBATCH --array=0-{last}\n#SBATCH --output=/dev/null\n#SBATCH --mem=100M\ntrue\n"


def identity(number: int) -> int:
    return number


def ways(cluster: Cluster, folder: Path, count: int) -> dict[str, Callable[[], object]]:
    """Each way of submitting so many tasks."""
    script = folder / f"{count}.sh"
    script.write_text(BARE.format(last=count - 1))
    theirs = submitit.SlurmExecutor(folder / f"submitit{count}")
    theirs._throttling = 0  # else 0.2 s of waiting when the last submission was short before
    theirs.update_parameters(time=5, mem="100MB")
    ours = Launcher(folder / f"hpc{count}", cluster="slurm", time="5min", mem="100MB", cpus=1)
    return {
        "sbatch --array": lambda: cluster.submit(script),
        "submitit map_array": lambda: theirs.map_array(identity, range(count)),
        "Launcher.map_array": lambda: ours.map_array(identity, range(count)),
    }


def measure(cluster: Cluster, folder: Path, count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one that does not count."""
    these = ways(cluster, folder, count)
    seconds: dict[str, list[float]] = {name: [] for name in these}
    for _ in range(rounds + 1):
        for name, way in these.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
            cluster.run("scancel", "--user=root")
    return {name: taken[1:] for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"{'tasks':>6}  {'way':<22}{'ms':>8}{'x sbatch':>10}{'x submitit':>12}{'min ms':>9}{'max ms':>9}")
    with tempfile.TemporaryDirectory() as folder, Cluster(max_array_size=MOST + 1) as cluster:
        os.environ |= cluster.environment()
        cluster.run("scontrol", "update", f"NodeName={','.join(cluster.nodes)}", "State=DRAIN", "Reason=bench")
        for count in (MOST // 10, MOST):
            seconds = measure(cluster, Path(folder), count, options.rounds)
            middle = {name: statistics.median(taken) for name, taken in seconds.items()}
            for name, taken in seconds.items():
                ratios = [middle[name] / middle[base] for base in ("sbatch --array", "submitit map_array")]
                times = [1000 * value for value in (middle[name], min(taken), max(taken))]
                print(f"{count:>6}  {name:<22}{times[0]:>8.1f}{ratios[0]:>10.2f}{ratios[1]:>12.2f}", end="")
                print(f"{times[1]:>9.1f}{times[2]:>9.1f}")


if __name__ == "__main__":
    main()
