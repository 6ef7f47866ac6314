"""Controller of submitted functions where there is no SLURM: `python -m hpc.functions.localmap FOLDER JOB SCRIPT ...`.

Runs the script that SLURM would get under bash, once per task and rank, some tasks at a time, each with GPUs of its
own; again after a checkpoint (submitit's exit code 144); and writes an error for whatever leaves no result.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from submitit.core.utils import JobPaths
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from hpc import trust
from hpc.functions.job import cancel_mark
from hpc.functions.step import dump

_POLL_S = 0.05
_GRACE_S = 10.0
"""Between TERM and KILL of a task that was cancelled."""


@dataclass
class Task:
    """One job, or one element of an array; `ranks` are the scripts that run for it."""

    job: str
    index: int | None
    slot: int = 0
    ranks: list[subprocess.Popen[bytes]] = field(default_factory=list)
    told: float | None = None
    """When it was told to end."""


class Controller:
    """Tasks in their order, at most one per slot at a time."""

    def __init__(self, folder: Path, script: Path, tasks: list[Task], num_ranks: int, gpus: Sequence[str]) -> None:
        """`gpus`: CUDA_VISIBLE_DEVICES of each slot."""
        self._folder, self._script, self._num_ranks, self._gpus = folder, script, num_ranks, gpus
        self._waiting, self._running = tasks, dict[int, Task]()
        self._stopped = False

    def run(self) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: self._stop())
        while self._waiting or self._running:
            for slot in range(len(self._gpus)):
                while self._waiting and slot not in self._running:
                    self._begin(self._waiting.pop(0), slot)
            for task in list(self._running.values()):
                self._look_after(task)
            time.sleep(_POLL_S)

    def _stop(self) -> None:
        self._stopped = True

    def _begin(self, task: Task, slot: int) -> None:
        if self._is_cancelled(task):
            self._write_errors(task, "cancelled before it started")
            return
        task.slot, self._running[slot] = slot, task
        self._start(task)

    def _start(self, task: Task) -> None:
        task.ranks = [self._start_rank(task, rank) for rank in range(self._num_ranks)]

    def _start_rank(self, task: Task, rank: int) -> subprocess.Popen[bytes]:
        paths = JobPaths(self._folder, task.job, rank)
        environ = {
            **os.environ,
            "HPC_STEP": "local",
            "CUDA_VISIBLE_DEVICES": self._gpus[task.slot],
            "SUBMITIT_LOCAL_JOB_ID": task.job,
            "SUBMITIT_LOCAL_NTASKS": str(self._num_ranks),
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_LOCALID": str(rank),
            "SUBMITIT_LOCAL_GLOBALID": str(rank),
        }
        if task.index is not None:
            environ["HPC_ARRAY_TASK_ID"] = str(task.index)
        with paths.stdout.open("ab") as out, paths.stderr.open("ab") as err:
            # A session of its own: one signal reaches the script and its launcher of ranks, and nobody else.
            command = ["bash", str(self._script)]
            return subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )

    def _look_after(self, task: Task) -> None:
        if None not in (codes := [rank.poll() for rank in task.ranks]):
            self._end(task, [code for code in codes if code is not None])
        elif self._is_cancelled(task):
            now = time.monotonic()
            if task.told is None or now > task.told + _GRACE_S:
                _signal(task, signal.SIGTERM if task.told is None else signal.SIGKILL)
                task.told = task.told or now

    def _end(self, task: Task, codes: list[int]) -> None:
        if LOCAL_REQUEUE_RETURN_CODE in codes and not self._is_cancelled(task):
            self._start(task)
            return
        worst = max(codes, key=abs)
        self._write_errors(task, "cancelled" if task.told else f"ended with exit code {worst} and left no result")
        del self._running[task.slot]

    def _is_cancelled(self, task: Task) -> bool:
        return self._stopped or cancel_mark(JobPaths(self._folder, task.job)).exists()

    def _write_errors(self, task: Task, reason: str) -> None:
        for rank in range(self._num_ranks):
            paths = JobPaths(self._folder, task.job, rank)
            if not paths.result_pickle.exists():
                dump(("error", f"job {task.job}: {reason}"), paths.result_pickle)


def _signal(task: Task, number: int) -> None:
    for rank in task.ranks:
        if rank.poll() is None:
            os.killpg(rank.pid, number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hpc.functions.localmap", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("job")
    parser.add_argument("script", type=Path)
    parser.add_argument("--count", type=int, help="tasks of an array; without it one job")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--gpus", nargs="+", default=[""], help="CUDA_VISIBLE_DEVICES of each slot")
    options = parser.parse_args()
    trust.check(options.script)
    single = [Task(options.job, None)]
    tasks = single if options.count is None else [Task(f"{options.job}_{i}", i) for i in range(options.count)]
    Controller(options.folder, options.script, tasks, options.ranks, options.gpus).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
