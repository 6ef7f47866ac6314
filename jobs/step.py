"""A run that does not train (step.yaml): packing or evaluation, by the payload's own command in a child process.

A stop signal ends the child, and the run is started again later: packing leaves no half file.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time

from hpc import yamlfile
from hpc.preempt import ExitCode, StopFlag
from hpc.rundir import RunDir, read_json, write_json

_POLL_S = 0.2
_GRACE_S = 20.0


def run(folder: RunDir, flag: StopFlag, generation: int) -> ExitCode:
    """Run the step to its end or to a stop; result.json when it is done."""
    step = yamlfile.read(folder.step)
    write_json(folder.state, {**read_json(folder.state), "phase": step["module"].removeprefix("jobs.")})
    command = [sys.executable, "-m", step["module"], *map(str, step["arguments"])]
    child = subprocess.Popen(command, cwd=step["folder"], preexec_fn=_hear)
    while child.poll() is None and not flag.cause:
        time.sleep(_POLL_S)
    time.sleep(_POLL_S if child.returncode else 0)  # what ended the child may reach us a moment later
    if flag.cause and child.returncode != ExitCode.DONE:
        return _stop(folder, child, flag.cause, generation)
    if child.returncode == ExitCode.DONE:
        write_json(folder.result, {"finished": True, "run": folder.name, "step": step["module"]})
        return ExitCode.DONE
    return ExitCode.BAD_INPUT if child.returncode == ExitCode.BAD_INPUT else ExitCode.CRASH


def _hear() -> None:
    """A child of this process is deaf to stop signals; this one has nothing to save and may be ended."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(folder: RunDir, child: subprocess.Popen[bytes], cause: str, generation: int) -> ExitCode:
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    write_json(folder.stop, {"generation": generation, "step": 0, "cause": cause})
    folder.event("signal", "rank0", generation, cause=cause)
    logging.info("stopped by %s: it starts anew", cause)
    return ExitCode.STOPPED
