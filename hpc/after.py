"""Runs that wait for others: SLURM's dependencies, and `python -m hpc.after RUN...` where there is no SLURM."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hpc import ledger
from hpc.errors import UserError
from hpc.rundir import RunDir, find_run
from hpc.sweepdir import SweepDir, find_sweep

_POLL_S = 1.0


def options(names: Sequence[str], runs: Path, cluster: str) -> list[str]:
    """What a submission to `cluster` is given to start after these runs and sweeps have finished.

    On SLURM one --dependency, here the runs' folders; runs that are finished already count no more.
    Raises UserError for a run that neither runs nor is finished, or that runs on the other cluster.
    """
    waited: list[ledger.Status] = []
    paths: list[str] = []
    for name in names:
        sweep = find_sweep(runs, name)
        for run in sweep.rows() if isinstance(sweep, SweepDir) else [find_run(runs, name)]:
            status = ledger.status(run)
            if status.state == "finished":
                continue
            if not ledger.live(status.state):
                raise UserError(f"--after {name}: {run.name} is {status.state}, so it will not finish; resume it first")
            if status.cluster != cluster:
                raise UserError(f"--after {name}: {run.name} runs on {status.cluster}, and this one would on {cluster}")
            waited.append(status)
            paths.append(str(run.path))
    if cluster == "local":
        return paths
    return dependency([status.job for status in waited]) if waited else []


def dependency(jobs: Sequence[str]) -> list[str]:
    """sbatch's options to start when all of these have ended well, and to end when one cannot any more."""
    return [f"--dependency=afterok:{':'.join(jobs)}", "--kill-on-invalid-dep=yes"]


def wait(runs: Sequence[RunDir]) -> bool:
    """Wait until all runs are finished; False as soon as one ends otherwise."""
    left = list(runs)
    while left:
        for run, status in zip(list(left), ledger.statuses(left), strict=True):
            if status.state == "finished":
                left.remove(run)
            elif not ledger.live(status.state):
                print(f"not started: {run.name}, which it was to follow, is {status.state}", file=sys.stderr)
                return False
        if left:
            time.sleep(_POLL_S)
    return True


if __name__ == "__main__":
    sys.exit(not wait([RunDir(path) for path in sys.argv[1:]]))
