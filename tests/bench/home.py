"""Logs brought home: `python -m tests.bench.home [--only ROW]` (a part of `make bench-logs`).

sync    a million scalar points into an empty folder, beside a bare loop over the frames; CPU seconds, children's too
mlflow  the same to a real MLflow server (SQLite), beside log_batch of lists that are at hand; seconds of the clock
report  `hpc report` of 200 runs of 100 evaluations each; seconds of the clock, beside parsing their lines as JSON
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hpc.logs import following
from hpc.logs.ends import place_of
from hpc.logs.sinks import feed
from hpc.logs.sync import Carried
from hpc.rundir import append_line, write_json
from tests.bench.logs import POINTS, TAGS, bare, write
from tests.mlflow_server import MlflowServer
from tests.sinkruns import FakeRun
from tests.test_journal import line, result

_BATCH = 1000
"""Points of a request: the most that MLflow takes."""


def cpu() -> float:
    """Seconds of this process and of its children."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


def taken(clock: Callable[[], float], work: Callable[[], object]) -> float:
    begin = clock()
    work()
    return clock() - begin


def long_run(runs: Path, points: int) -> FakeRun:
    run = FakeRun(runs)
    run.attempt()
    write(run.file, points)
    run.finish()
    return run


def sync_row(folder: Path, points: int) -> tuple[float, float]:
    run = long_run(folder / "runs", points)
    ends = place_of(str(folder / "runs")), place_of(str(folder / "copy"))
    ours = taken(cpu, lambda: following.once(*ends, Carried(), batch=False, quiet=True))
    copies = list((folder / "copy").rglob("*tfevents*"))
    assert [path.stat().st_size for path in copies] == [run.file.stat().st_size], copies
    return ours, taken(cpu, lambda: bare(run.file))


def mlflow_row(folder: Path, points: int) -> tuple[float, float]:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    long_run(folder / "runs", points)
    server = MlflowServer(folder / "server").start()
    try:
        client = MlflowClient(tracking_uri=server.url)
        told: list[str] = []
        codes: list[int] = []
        ours = taken(
            time.monotonic, lambda: codes.append(feed(folder / "runs", f"mlflow:{server.url}", (), told.append))
        )
        assert codes == [0], told
        run_id = client.create_run(client.create_experiment("bare")).info.run_id
        values = [Metric(tag, i / 2, 10**12 + i, i) for i in range(points // len(TAGS)) for tag in TAGS]

        def batches() -> None:
            for start in range(0, len(values), _BATCH):
                client.log_batch(run_id, metrics=values[start : start + _BATCH])

        return ours, taken(time.monotonic, batches)
    finally:
        server.stop()


def report_row(folder: Path, _: int) -> tuple[float, float]:
    for number in range(200):
        run = FakeRun(folder / "runs", name=f"tiny-{number:08x}")
        run.attempt()
        for step in range(100):
            for split in ("train", "validation"):
                append_line(run.dir.metrics, line(1, step + 1, 0.5 + step / 250, split))
        run.finish()
        write_json(run.dir.result, result())
    command = [
        str(Path(sys.executable).with_name("hpc")),
        "report",
        "--runs",
        str(folder / "runs"),
        "-o",
        str(folder / "report"),
    ]
    ours = taken(time.monotonic, lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    lines = sorted((folder / "runs").glob("*/metrics.jsonl"))
    return ours, taken(time.monotonic, lambda: [json.loads(text) for path in lines for text in path.open()])


ROWS = {"sync": (sync_row, 0.7), "mlflow": (mlflow_row, 0.8), "report": (report_row, None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ROWS, metavar="ROW", help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--points", type=int, default=POINTS)
    given = parser.parse_args()
    for name in [given.only] if given.only else ROWS:
        row, goal = ROWS[name]
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = row(Path(folder), given.points)
        told = f"ratio {theirs / ours:.2f} (goal {goal})" if goal else "goal: below 10 s on a quiet machine"
        print(f"{name:8} ours {ours:7.2f} s, bare {theirs:7.2f} s: {told}", flush=True)


if __name__ == "__main__":
    main()
