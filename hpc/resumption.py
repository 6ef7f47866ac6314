"""`hpc resume`: runs and rows of sweeps that have ended without a result are submitted again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from hpc import arrays, ledger, plan, submission
from hpc.errors import UserError
from hpc.rundir import RunDir, all_runs, find_run
from hpc.sweepdir import SweepDir, find_sweep


def named(names: Sequence[str], runs: Path) -> Iterator[str]:
    """Resume these runs and sweeps; a line for each. Raises UserError for one that there is nothing to resume of."""
    for name in names:
        sweep = find_sweep(runs, name)
        yield _rows(sweep) if sweep is not None else _run(find_run(runs, name))


def stopped(runs: Path) -> Iterator[str]:
    """Resume every run that was stopped or lost (preempted where SLURM cancels, node failure); a line for each."""
    found = all_runs(runs)
    ended = [run for run, s in zip(found, ledger.statuses(found), strict=True) if s.state in ("stopped", "lost")]
    if not ended:
        yield f"no run in {runs} was stopped or lost"
    sweeps = {run.path.parent for run in ended if run.in_sweep}
    for path in sorted(sweeps):
        yield _rows(SweepDir(path), [run.name for run in ended if run.path.parent == path])
    for run in ended:
        if not run.in_sweep:
            yield _run(run)


def _run(run: RunDir) -> str:
    now = ledger.status(run)
    if now.state == "damaged":
        raise UserError(f"{run.name} is damaged: {now.detail}")
    if ledger.live(now.state) or now.state == "finished":
        raise UserError(f"{run.name} is {now.state}: nothing to resume")
    newest = run.newest_checkpoint()
    cluster = _cluster(run)
    job = submission.submit(run, cluster)
    whence = f"goes on from checkpoint {newest}" if newest else "from the start: it has no checkpoint yet"
    return f"{run.name}  job {job.job_id} ({cluster})  {whence}"


def _rows(sweep: SweepDir, wanted: Sequence[str] | None = None) -> str:
    """Resume the rows that are neither finished nor under way, or of these the wanted, as one array."""
    runs = sweep.rows()
    states = [status.state for status in ledger.statuses(runs)]
    open_rows = [
        row
        for row, (run, state) in enumerate(zip(runs, states, strict=True))
        if state not in ("finished", "damaged") and not ledger.live(state) and (wanted is None or run.name in wanted)
    ]
    if not open_rows:
        told = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        raise UserError(f"{sweep.name}: nothing to resume ({told})")
    cluster = _cluster(runs[open_rows[0]])
    jobs = arrays.submit(sweep, cluster, open_rows)
    return f"{sweep.name}  {len(open_rows)} of {len(runs)} rows  job {', '.join(jobs)} ({cluster})"


def _cluster(run: RunDir) -> str:
    experiment, _ = plan.reopen(run)
    return submission.choose_cluster(experiment.launch.cluster)
