"""`hpc resume`: runs and rows of sweeps that have ended without a result are submitted again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from hpc import after, arrays, ledger, plan, saves, submission
from hpc.attempt import check_trust
from hpc.errors import UserError
from hpc.instances import Request
from hpc.ledger import Status
from hpc.rundir import RunDir, all_runs
from hpc.sweepdir import SweepDir


def named(names: Sequence[str], runs: Path, follow: Sequence[str] = (), accept_data: bool = False) -> Iterator[str]:
    """Resume these runs and sweeps, to start after those that they `follow`; a line for each.

    `accept_data`: their next attempt may go on with data that have changed, once. Raises UserError for an unknown name
    before any is resumed, for one that cannot be resumed after all others are.
    """
    targets = [ledger.find(runs, name) for name in names]
    return _each([partial(_resume, target, follow, accept_data) for target in targets])


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


def _resume(target: RunDir | SweepDir, follow: Sequence[str], accept_data: bool) -> str:
    if isinstance(target, SweepDir):
        return _rows(target, None, follow, accept_data)
    return _run(target, follow, accept_data)


def _run(run: RunDir, follow: Sequence[str], accept_data: bool = False) -> str:
    now = ledger.status(run)
    if now.state == "damaged":
        raise UserError(f"{run.name} is damaged: {now.detail}")
    if now.live or now.state == "finished":
        told = f" ({now.detail})" if now.detail else ""
        raise UserError(f"{run.name} is {now.state}{told}: nothing to resume")
    newest = run.newest_checkpoint()
    cluster, request = _place(run, now)
    options = _options([run], run.runs, follow, cluster, request)
    _prepare([run], accept_data)
    job = submission.submit(run, cluster, options)
    whence = f"goes on from checkpoint {newest}" if newest else "from the start: it has no checkpoint yet"
    return f"{run.name}  job {job.job_id} ({cluster})  {whence}"


def _rows(sweep: SweepDir, wanted: Sequence[str] | None, follow: Sequence[str], accept_data: bool = False) -> str:
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
    first, chosen = open_rows[0], [runs[row] for row in open_rows]
    cluster, request = _place(runs[first], now[first])
    options = _options(chosen, sweep.path.parent, follow, cluster, request)
    _prepare(chosen, accept_data)
    jobs = arrays.submit(sweep, cluster, open_rows, options)
    return f"{sweep.name}  {len(open_rows)} of {len(runs)} rows  job {', '.join(jobs)} ({cluster})"


def _prepare(runs: Sequence[RunDir], accept_data: bool) -> None:
    """What is to be so before a submission. Raises UserError."""
    for run in runs:
        check_trust(run)
    for run in runs if accept_data else ():
        run.event("accept-data-change", "login")


def _options(runs: Sequence[RunDir], folder: Path, follow: Sequence[str], cluster: str, request: Request) -> list[str]:
    """What follows whom, and on SLURM notice enough for saves as long as theirs were."""
    notice = saves.signal_option(runs, request) if cluster == "slurm" else []
    return [*after.options(follow, folder, cluster), *notice]


def _place(run: RunDir, before: Status) -> tuple[str, Request]:
    """The cluster, and what is asked for there."""
    experiment, instance = plan.reopen(run)
    cluster = submission.choose_cluster(experiment.launch.cluster)
    if cluster == "local" and before.cluster == "slurm" and experiment.launch.cluster == "auto":
        raise UserError(f"{run.name} was on SLURM, which does not answer: try again; 'hpc doctor' tells more")
    return cluster, instance.request(experiment.launch)
