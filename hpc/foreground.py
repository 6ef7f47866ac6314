"""What a terminal sees of a run: `hpc train` (the batch script in the foreground) and `hpc logs`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hpc import ledger, runlogs
from hpc.attempt import record_submission
from hpc.preempt import STOP_SIGNALS
from hpc.rundir import RunDir, read_json
from hpc.runlogs import Printer
from hpc.sweepdir import submission_of

_POLL_S = 0.3
_SHOW_S = 0.1
_PIECE = 1 << 16
_ASK_S, _ASK_LEAST_S = 10.0, 2.0
"""How often SLURM is asked whether a run that is followed goes on; at least so far apart when its files change."""


def train(run: RunDir) -> int:
    """Run job.sbatch under bash, its output to the run's log and shown here; the script's exit code.

    The script writes the log itself: whatever becomes of this process and its terminal, it goes on and starts again.
    A terminal that is closed (HUP) asks for a clean stop, as Ctrl-C does; `nohup hpc train` goes on without one.
    """
    environ = {**os.environ, "HPC_STEP": "local"}
    for number in STOP_SIGNALS:  # a shell that starts us with & has us ignore INT, and bash cannot trap what is ignored
        signal.signal(number, signal.SIG_DFL)
    unnamed = run.logs / f".{os.getpid()}"
    with unnamed.open("wb") as output:
        # Ctrl-C reaches the script through us, once: it stops the ranks, which save and leave.
        process = subprocess.Popen(
            ["bash", str(run.script)], env=environ, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    log = unnamed.rename(run.output(str(process.pid), "0"))
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _: process.send_signal(received))
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda _, __: process.send_signal(signal.SIGTERM))
    record_submission(run, "local", str(process.pid))
    return _show(process, log)


def _show(process: subprocess.Popen[bytes], log: Path) -> int:
    """Print what the process writes to `log` until it has ended; its exit code."""
    with log.open("rb", buffering=0) as written:
        while True:
            ended = process.poll()  # before the last look: nothing comes after it
            while piece := written.read(_PIECE):
                _print(piece)
            if ended is not None:
                return ended
            time.sleep(_SHOW_S)


def _print(piece: bytes) -> None:
    try:
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    except OSError:  # the terminal or the pipe is gone: the run goes on, and its log
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def print_logs(run: RunDir, follow: bool = False, tail: int | None = None, rank: int | None = None) -> None:
    """Print all outputs in the order of their jobs; with `follow`, what comes later too, until the run ends.

    `tail`: of each file the last lines only. `rank`: of one task only. Raises UserError.
    """
    printer = Printer(tail)
    watch = _Watch(run)
    while True:
        live = follow and watch.live()
        printer.print_new(runlogs.files(run, rank))
        if not live:
            break
        time.sleep(_POLL_S)
    if printer.empty:
        job = submission_of(run).get("job")
        print(f"{run.name}: no output yet ({f'job {job}' if job else 'not submitted'})", file=sys.stderr)


class _Watch:
    """Whether a run is alive: SLURM is asked every 10 s, and soon after the run's own files have changed."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._seen: object = None
        self._at = float("-inf")
        self._every_s = 0.0
        self._live = True

    def live(self) -> bool:
        seen = _phase(self._run)
        since = time.monotonic() - self._at
        if since >= (min(_ASK_LEAST_S, self._every_s) if seen != self._seen else self._every_s):
            self._seen, self._at = seen, time.monotonic()
            status = ledger.statuses([self._run])[0]
            self._live, self._every_s = status.live, _ASK_S if status.cluster == "slurm" else 0.0
        return self._live


def _phase(run: RunDir) -> object:
    """What changes when an attempt begins or ends. Raises UserError for a damaged file."""
    state = read_json(run.state)
    return state.get("generation"), state.get("phase"), run.result.exists()
