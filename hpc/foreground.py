"""What a terminal sees of a run: `hpc train` (the batch script in the foreground) and `hpc logs`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hpc import ledger
from hpc.attempt import record_submission
from hpc.preempt import STOP_SIGNALS
from hpc.rundir import RunDir, read_json

_POLL_S = 0.3


def train(run: RunDir) -> int:
    """Run job.sbatch under bash, its output to the terminal and to the run's log; the script's exit code."""
    environ = {**os.environ, "HPC_STEP": "local"}
    # Ctrl-C reaches the script through us, once: it stops the ranks, which save and leave.
    process = subprocess.Popen(
        ["bash", str(run.script)], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    record_submission(run, "local", str(process.pid))
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _: process.send_signal(received))
    assert process.stdout is not None
    with run.output(str(process.pid), "0").open("ab", buffering=0) as log:
        for line in process.stdout:
            log.write(line)
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
    return process.wait()


def print_logs(run: RunDir, follow: bool) -> None:
    """Print all task outputs in the order of their jobs; with `follow`, what comes later too, until the run ends."""
    offsets: dict[Path, int] = {}
    shown: Path | None = None
    while True:
        live = follow and ledger.live(ledger.status(run).state)
        for path in sorted(run.logs.glob("*_log.*")):
            shown = _print_new(path, offsets, shown)
        if not live:
            break
        time.sleep(_POLL_S)
    if not offsets:
        submit = read_json(run.submit)
        print(f"{run.name}: no output yet (job {submit.get('job', 'not submitted')})", file=sys.stderr)


def _print_new(path: Path, offsets: dict[Path, int], shown: Path | None) -> Path | None:
    """Print what a file has beyond its offset, under its name when another was shown last; the file shown last."""
    with path.open("rb") as file:
        file.seek(offsets.get(path, 0))
        text = file.read()
    if not text:
        return shown
    if shown != path:
        print(f"==> {path.name} <==")
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    offsets[path] = offsets.get(path, 0) + len(text)
    return path
