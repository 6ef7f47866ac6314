"""How long `hpc ls` takes for 100 and 1,000 runs: `python -m tests.bench.ledger` (`make bench-ledger`).

Half of the runs stand alone, half are rows of one sweep; a third each is finished, running and pending. Each command
is a fresh process, squeue a stand-in that prints the jobs at once. Beside them: a Python that only lists the same
folders and reads the same files, and `hpc --help`. Medians of several repeats, with a warm cache of the file system.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hpc import slurm, yamlfile
from hpc.rundir import RunDir, write_json
from hpc.sweepdir import Chunk, SweepDir

REPEATS = 7
HPC = [sys.executable, "-m", "hpc.cli"]
BARE = """
import os, sys
for folder, _, files in os.walk(sys.argv[1]):
    for name in files:
        if name in ("state.json", "submit.json", "result.json", "rows.txt", "sweep.yaml"):
            with open(os.path.join(folder, name), "rb") as file:
                file.read()
"""
EXPERIMENT = "name: exp\nmodel: {name: resnet3d_tiny}\ndata: {file: x.h5}\n"


def make_run(path: Path, number: int, job: str, comment: str, submit: bool) -> str:
    """A run in one of three states; its line of squeue, empty when it is finished. `submit`: it has its own record."""
    run, now = RunDir(path), time.time()
    run.events.mkdir(parents=True)
    run.logs.mkdir()
    run.experiment.write_text(EXPERIMENT)
    run.delta.write_text(yamlfile.dump({"train.seed": number, "train.optimizer.lr": 1e-3}))
    if submit:
        write_json(run.submit, {"cluster": "slurm", "job": job, "time": now - 900})
    kind = ("finished", "running", "pending")[number % 3]
    if kind != "pending":
        run.event("start", "shell", 1, job=job)
        best = {"epoch": 3, "step": 30, "metrics": {"accuracy": 0.5 + number / 4000, "loss": 0.4}}
        state = {"generation": 1, "job": job, "host": "n", "node": "n", "pid": 1, "phase": "training", "step": 40}
        common = {"epoch": 4, "steps": 90, "monitor": "accuracy", "best": best, "started": now - 800, "time": now - 1}
        write_json(run.state, {**state, **common})
        if kind == "finished":
            write_json(run.result, {"monitor": "accuracy", "direction": "max", "best": best})
            return ""
    state, reason = ("RUNNING", "None") if kind == "running" else ("PENDING", "Priority")
    told = {"job": job, "state": state, "reason": reason, "time_limit_s": "8:00:00", "comment": comment}
    return "|".join(told.get(field, "N/A") for field in slurm.QUEUE_FIELDS)


def make_runs(folder: Path, count: int) -> Path:
    """`count` runs under `folder`/runs, and a squeue that knows their jobs; the folder of that."""
    half, runs = count // 2, folder / "runs"
    alone = [runs / f"exp-{number:08x}" for number in range(half)]
    lines = [make_run(path, n, str(1000 + n), path.name, True) for n, path in enumerate(alone)]
    sweep = SweepDir(runs / "exp-sweep-0123abcd")
    names = [f"exp-{number:08x}" for number in range(half, count)]
    lines += [make_run(sweep.path / name, n, f"999_{n}", sweep.token(0), False) for n, name in enumerate(names)]
    sweep.rows_file.write_text("".join(f"{name}\n" for name in names))
    sweep.write_chunks([Chunk(0, 0, len(names), 8)], axes={"train.seed": [str(n) for n in range(len(names))]})
    sweep.record("slurm", {0: ("999", list(range(len(names))))})
    (folder / "bin").mkdir()
    (folder / "jobs").write_text("".join(f"{line}\n" for line in lines if line))
    squeue = folder / "bin" / "squeue"
    squeue.write_text(f"#!/bin/sh\nexec cat '{folder}/jobs'\n")
    squeue.chmod(0o755)
    return folder / "bin"


def measure(command: list[str], environ: dict[str, str]) -> tuple[float, float]:
    """Seconds of a fresh process, by the clock and of a core: the second hardly knows what else the machine does."""
    took = []
    for _ in range(REPEATS + 1):
        began, before = time.perf_counter(), os.times()
        subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, check=True)
        now = os.times()
        cpu = now.children_user + now.children_system - before.children_user - before.children_system
        took.append((time.perf_counter() - began, cpu))
    wall, cpu_seconds = zip(*took[1:], strict=True)
    return statistics.median(wall), statistics.median(cpu_seconds)


def main() -> None:
    print(f"{'runs':>6}  {'command':<24}{'seconds':>9}{'of a core':>11}{'to bare reading':>17}")
    for count in (100, 1000):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = f"{make_runs(folder, count)}{os.pathsep}{os.environ['PATH']}"
            environ = {**os.environ, "PATH": path, "HPC_RUNS": str(folder / "runs"), "COLUMNS": "160"}
            bare, bare_cpu = measure([sys.executable, "-c", BARE, str(folder / "runs")], environ)
            print(f"{count:>6}  {'bare reading':<24}{bare:>9.3f}{bare_cpu:>11.3f}{1:>17.1f}")
            for words in ("--help", "ls", "ls --all", "ls 0123abcd", "ls --json", "watch --once"):
                wall, cpu = measure([*HPC, *words.split()], environ)
                print(f"{count:>6}  {'hpc ' + words:<24}{wall:>9.3f}{cpu:>11.3f}{cpu / bare_cpu:>17.1f}")


if __name__ == "__main__":
    main()
