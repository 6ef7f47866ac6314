"""`hpc resume`: runs and rows of sweeps that have ended without a result are submitted again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from hpc import after, arrays, ledger, plan, submission
from hpc.errors import UserError
from hpc.ledger import Status
from hpc.rundir import RunDir, all_runs
from hpc.sweepdir import SweepDir


def named(names: Sequence[str], runs: Path, follow: Sequence[str] = ()) -> Iterator[str]:
    """Resume these runs and sweeps, to start after those that they `follow`; a line for each.

    Raises UserError for an unknown name before any is resumed, for one that cannot be resumed after all others are.
    """
    targets = [ledger.find(runs, name) for name in names]
    return _each([partial(_resume, target, follow) for target in targets])


def stopped(runs: Path, follow: Sequence[str] = ()) -> Iterator[str]:
    """Resume every run that was stopped or lost (preempted where SLURM cancels, node failure); a line for each."""
    found = all_runs(runs)
    ended = [run for run, s in zip(found, ledger.statuses(found), strict=True) if s.state in ("stopped", "lost")]
    if not ended:
        return iter([f"no run in {runs} was stopped or lost"])
    sweeps = sorted({run.path.parent for run in ended if run.in_sweep})
    of_sweeps = [partial(_rows, SweepDir(path), [run.name for run in ended], follow) for path in sweeps]
    alone = [partial(_run, run, follow) for run in ended if not run.in_sweep]
    return _each([*of_sweeps, *alone])


def _each(resumptions: Iterable[Callable[[], str]]) -> Iterator[str]:
    """Every one, whatever becomes of the others."""
    faults = []
    for resume in resumptions:
        try:
            yield resume()
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))


def _resume(target: RunDir | SweepDir, follow: Sequence[str]) -> str:
    return _rows(target, None, follow) if isinstance(target, SweepDir) else _run(target, follow)


def _run(run: RunDir, follow: Sequence[str]) -> str:
    now = ledger.status(run)
    if now.state == "damaged":
        raise UserError(f"{run.name} is damaged: {now.detail}")
    if now.live or now.state == "finished":
        told = f" ({now.detail})" if now.detail else ""
        raise UserError(f"{run.name} is {now.state}{told}: nothing to resume")
    newest = run.newest_checkpoint()
    cluster = _cluster(run, now)
    job = submission.submit(run, cluster, after.options(follow, run.runs, cluster))
    whence = f"goes on from checkpoint {newest}" if newest else "from the start: it has no checkpoint yet"
    return f"{run.name}  job {job.job_id} ({cluster})  {whence}"


def _rows(sweep: SweepDir, wanted: Sequence[str] | None, follow: Sequence[str]) -> str:
    """Resume the rows that are neither finished nor under way, or of these the wanted, as one array."""
    runs = sweep.rows()
    now = ledger.statuses(runs)
    open_rows = [
        row
        for row, status in enumerate(now)
        if not status.live and status.state not in ("finished", "damaged") and (wanted is None or status.run in wanted)
    ]
    if not open_rows:
        raise UserError(f"{sweep.name}: nothing to resume ({ledger.count_states(now)})")
    first = open_rows[0]
    cluster = _cluster(runs[first], now[first])
    jobs = arrays.submit(sweep, cluster, open_rows, after.options(follow, sweep.path.parent, cluster))
    return f"{sweep.name}  {len(open_rows)} of {len(runs)} rows  job {', '.join(jobs)} ({cluster})"


def _cluster(run: RunDir, before: Status) -> str:
    experiment, _ = plan.reopen(run)
    cluster = submission.choose_cluster(experiment.launch.cluster)
    if cluster == "local" and before.cluster == "slurm" and experiment.launch.cluster == "auto":
        raise UserError(f"{run.name} was on SLURM, which does not answer: try again; 'hpc doctor' tells more")
    return cluster
