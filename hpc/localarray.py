"""A job array where there is no SLURM: `python -m hpc.localarray SWEEP --rows 0-39` runs the rows' script in turn.

As many at a time as the sweep's cap allows and as this machine has cores and GPUs for; each has GPUs of its own.
TERM, INT and USR2 go to the rows that run; after TERM or INT no other is started.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from types import FrameType

from hpc import after, instances
from hpc.experiment import load
from hpc.preempt import NOTICE, STOP_SIGNALS, ExitCode
from hpc.rundir import RunDir
from hpc.sweepdir import SweepDir, numbers

_POLL_S = 0.1


class Controller:
    """The rows of a sweep, some at a time."""

    def __init__(self, sweep: SweepDir, rows: list[int]) -> None:
        self._sweep, self._runs, self._waiting = sweep, sweep.rows(), list(rows)
        self._slots, self._gpus = capacity(sweep)
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        """By slot."""
        self._ended = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._ended = self._ended or number != NOTICE
        for row in list(self._running.values()):
            row.send_signal(number)

    def run(self) -> int:
        """The highest exit code of all rows."""
        worst = 0
        while self._running or (self._waiting and not self._ended):
            for slot in range(self._slots):
                if slot not in self._running and self._waiting and not self._ended:
                    self._running[slot] = self._start(self._waiting.pop(0), slot)
            for slot, row in list(self._running.items()):
                if row.poll() is not None:
                    worst = max(worst, abs(row.returncode))
                    del self._running[slot]
            time.sleep(_POLL_S)
        return worst

    def _start(self, row: int, slot: int) -> subprocess.Popen[bytes]:
        chunk, index = self._sweep.place_of(row)
        environ = {**os.environ, "HPC_STEP": "local", "HPC_ARRAY_TASK_ID": str(index)}
        if self._gpus:
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[slot])
        run, job = self._runs[row], str(os.getpid())
        command = ["bash", str(self._sweep.script(chunk.number))]
        with run.output(job, "0").open("ab") as out, run.output(job, "0", "err").open("ab") as err:
            # A session of its own: Ctrl-C in a terminal reaches the rows once, through this process.
            return subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )


def capacity(sweep: SweepDir) -> tuple[int, list[list[str]]]:
    """Rows at a time, and the GPUs of each slot (none where none are asked for)."""
    launch = load(sweep.rows()[0].experiment)[0].launch
    instance = instances.find(launch.instance)
    request = instance.request(launch)
    slots = max(1, instance.cpus // request.cpus)
    cap = sum(chunk.parallel or 0 for chunk in sweep.chunks() if chunk.after is None)
    slots = min(slots, cap) if cap else slots
    if not request.gpus:
        return slots, []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(instance.gpus)]
    slots = max(1, min(slots, len(gpus) // request.gpus))
    return slots, [gpus[slot * request.gpus : (slot + 1) * request.gpus] for slot in range(slots)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hpc.localarray", description=__doc__)
    parser.add_argument("sweep")
    parser.add_argument("--rows", required=True, help="0-3,7")
    parser.add_argument("--after", action="append", default=[], help="a run that must be finished before")
    options = parser.parse_args()
    controller = Controller(SweepDir(options.sweep), numbers(options.rows))
    if not after.wait([RunDir(path) for path in options.after]):
        return ExitCode.CRASH
    return controller.run()


if __name__ == "__main__":
    sys.exit(main())
