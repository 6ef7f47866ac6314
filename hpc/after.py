"""Runs that wait for others: SLURM's dependencies, and `python -m hpc.after RUN... -- COMMAND` where there is no SLURM.

The command takes the place of the waiting process, so that who ends the one also ends the other.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hpc import ledger
from hpc.errors import UserError
from hpc.preempt import ExitCode
from hpc.rundir import RunDir
from hpc.sweepdir import SweepDir

_POLL_S = 1.0


def options(names: Sequence[str], runs: Path, cluster: str) -> list[str]:
    """What a submission to `cluster` is given to start after these runs and sweeps have finished.

    On SLURM one --dependency, here the runs' folders; runs that are finished already count no more.
    Raises UserError for a run that neither runs nor is finished, or that runs on the other cluster.
    """
    waited = [status for name in names for status in _waited(name, runs, cluster)]
    if cluster == "local":
        return [str(run.path) for run, _ in waited]
    jobs = dict.fromkeys(status.job for _, status in waited)
    return dependency(list(jobs)) if jobs else []


def _waited(name: str, runs: Path, cluster: str) -> list[tuple[RunDir, ledger.Status]]:
    """The run, or the sweep's rows, of this name that are not finished yet."""
    try:
        found = ledger.find(runs, name)
    except UserError as error:
        raise UserError(f"--after {name}: {error}") from None
    several = found.rows() if isinstance(found, SweepDir) else [found]
    both = zip(several, ledger.statuses(several), strict=True)
    waited = [(run, status) for run, status in both if status.state != "finished"]
    for run, status in waited:
        if not status.live:
            again = f"'hpc resume {found.name}' first"
            raise UserError(f"--after {name}: {run.name} is {status.state}, so it will not finish; {again}")
        if status.cluster != cluster:
            raise UserError(f"--after {name}: {run.name} runs on {status.cluster}, and this one would on {cluster}")
    return waited


def dependency(jobs: Sequence[str]) -> list[str]:
    """sbatch's options to start when all of these have ended well, and to end when one cannot any more."""
    return [f"--dependency=afterok:{':'.join(jobs)}", "--kill-on-invalid-dep=yes"]


def wait(runs: Sequence[RunDir], given_up: Callable[[], bool] = lambda: False) -> bool:
    """Wait until all runs are finished; False as soon as one ends otherwise, or the waiting is given up."""
    left = list(runs)
    while left and not given_up():
        for run, status in zip(list(left), ledger.statuses(left), strict=True):
            if status.state == "finished":
                left.remove(run)
            elif not status.live:
                print(f"not started: {run.name}, which it was to follow, is {status.state}", file=sys.stderr)
                return False
        if left:
            time.sleep(_POLL_S)
    return not left


def main() -> None:
    runs, command = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    if not wait([RunDir(path) for path in runs]):
        sys.exit(ExitCode.CRASH)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and its successor would
        signal.signal(number, signal.SIG_DFL)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
