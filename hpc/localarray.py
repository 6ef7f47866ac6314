"""A job array where there is no SLURM: `python -m hpc.localarray SWEEP --rows 0-39` runs the rows' script in turn.

As many at a time as the sweep's cap allows and as this machine has cores, memory and GPUs for; each has GPUs of its
own. TERM, INT and USR2 go to the rows that run; after TERM or INT no other is started. Rows end with this process.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from hpc import after, instances
from hpc.experiment import load
from hpc.parent import end_with_parent
from hpc.preempt import NOTICE, STOP_SIGNALS, ExitCode
from hpc.rundir import RunDir
from hpc.sweepdir import SweepDir, numbers

_POLL_S = 0.1
_DEAF_S = 10.0
"""A row's shell that does not catch a signal after so long is sent it all the same."""


class Row:
    """The script of one row, running."""

    def __init__(self, script: Path, index: int, gpus: list[str], output: tuple[Path, Path]) -> None:
        environ = {**os.environ, "HPC_STEP": "local", "HPC_ARRAY_TASK_ID": str(index)}
        if gpus:
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        with output[0].open("ab") as out, output[1].open("ab") as err:
            self._shell = subprocess.Popen(
                ["bash", str(script)],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # Ctrl-C in a terminal reaches the rows once, through this process
                preexec_fn=end_with_parent,
            )
        self._started = time.monotonic()
        self._untold: list[int] = []

    @property
    def ended(self) -> bool:
        return self._shell.poll() is not None

    def tell(self, number: int) -> None:
        self._untold.append(number)

    def deliver(self) -> None:
        """Send what is to be told once the shell catches it: before its traps are set it would only die of it."""
        deaf = time.monotonic() > self._started + _DEAF_S
        while self._untold and not self.ended and (deaf or _catches(self._shell.pid, self._untold[0])):
            self._shell.send_signal(self._untold.pop(0))


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    try:
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError:
        return True  # no such file here, or the process is gone
    return not caught or bool(int(caught[1], 16) >> (number - 1) & 1)


class Controller:
    """The rows of a sweep, some at a time."""

    def __init__(self, sweep: SweepDir, rows: list[int]) -> None:
        self._sweep, self._waiting = sweep, list(rows)
        self._runs, self._chunks = sweep.rows(), sweep.chunks()
        self._slots, self._gpus = capacity(sweep)
        self._running: dict[int, Row] = {}
        """By slot."""
        self._heard: list[int] = []
        self.ended = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.ended = self.ended or number != NOTICE
        self._heard.append(number)

    def run(self) -> None:
        """Until every row has ended, or after TERM or INT those that run."""
        while self._running or (self._waiting and not self.ended):
            for slot in range(self._slots):
                if slot not in self._running and self._waiting and not self.ended:
                    self._start(self._waiting.pop(0), slot)
            self._pass_on()
            time.sleep(_POLL_S)
            self._running = {slot: row for slot, row in self._running.items() if not row.ended}

    def _pass_on(self) -> None:
        while self._heard:
            number = self._heard.pop(0)
            for row in self._running.values():
                row.tell(number)
        for row in self._running.values():
            row.deliver()

    def _start(self, number: int, slot: int) -> None:
        chunk = next(chunk for chunk in self._chunks if chunk.first <= number < chunk.first + chunk.count)
        run, job = self._runs[number], str(os.getppid())
        output = run.output(job, "0"), run.output(job, "0", "err")
        gpus = self._gpus[slot] if self._gpus else []
        try:
            run.logs.mkdir(exist_ok=True)
            self._running[slot] = Row(self._sweep.script(chunk.number), number - chunk.first, gpus, output)
        except OSError as error:  # its folder is gone, or the disk is full: the others go on
            print(f"row {number}, {run.name}, cannot be started: {error}", file=sys.stderr)


def capacity(sweep: SweepDir) -> tuple[int, list[list[str]]]:
    """Rows at a time, and the GPUs of each slot (none where none are asked for)."""
    launch = load(sweep.rows()[0].experiment)[0].launch
    instance = instances.find(launch.instance)
    request = instance.request(launch)
    slots = min(instance.cpus // request.cpus, int(instance.mem_gb / request.mem_gb))
    if cap := sum(chunk.parallel or 0 for chunk in sweep.chunks() if chunk.after is None):
        slots = min(slots, cap)
    if not request.gpus:
        return max(1, slots), []
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
    end_with_parent()  # submitit's controller, which `hpc cancel` ends and `hpc ls` looks for
    controller = Controller(SweepDir(options.sweep), numbers(options.rows))
    if not after.wait([RunDir(path) for path in options.after], given_up=lambda: controller.ended):
        return ExitCode.CRASH
    controller.run()
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
