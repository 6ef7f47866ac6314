"""`hpc resume`: runs and rows of sweeps that have ended without a result are submitted again, with other requests, too.

Another request is an event before any file of the run is replaced. A command that is killed between the files, or whose
submission is in doubt, leaves a run whose next resumption completes it: its last word is an event without submission.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hpc import after, arrays, instances, ledger, plan, preflight, saves, submission
from hpc.attempt import check_trust
from hpc.errors import UserError
from hpc.experiment import Experiment, flatten, load
from hpc.instances import Instance, Request
from hpc.ledger import Status
from hpc.plan import Plan
from hpc.rundir import RunDir, all_runs, locked
from hpc.sweepdir import SweepDir

Report = Callable[[preflight.Findings], None]
_KEYS = "launch."


@dataclass(frozen=True)
class _Wish:
    """How runs are to go on."""

    follow: Sequence[str] = ()
    accept_data: bool = False
    overrides: Sequence[str] = ()
    report: Report | None = None


def named(
    names: Sequence[str],
    runs: Path,
    follow: Sequence[str] = (),
    accept_data: bool = False,
    overrides: Sequence[str] = (),
    report: Report | None = None,
) -> Iterator[str]:
    """Resume these runs and sweeps, to start after those that they `follow`; a line for each.

    `accept_data`: their next attempt may go on with data that have changed, once. `overrides`: launch.KEY=VALUE, of
    single runs; `report` is told what is found of that request. Raises UserError for an unknown name, or overrides that
    cannot be, before any is resumed; for one that cannot be resumed after all others are.
    """
    targets = [ledger.find(runs, name) for name in names]
    _refuse_overrides(overrides, targets)
    wish = _Wish(follow, accept_data, overrides, report)
    return _each([partial(_resume, target, wish) for target in targets])


def stopped(runs: Path, follow: Sequence[str] = ()) -> Iterator[str]:
    """Resume every run that was stopped or lost (preempted where SLURM cancels, node failure); a line for each."""
    found = all_runs(runs)
    ended = [run for run, s in zip(found, ledger.statuses(found), strict=True) if s.state in ("stopped", "lost")]
    if not ended:
        return iter([f"no run in {runs} was stopped or lost"])
    wish = _Wish(follow)
    sweeps = sorted({run.path.parent for run in ended if run.in_sweep})
    of_sweeps = [partial(_rows, SweepDir(path), [run.name for run in ended], wish) for path in sweeps]
    alone = [partial(_run, run, wish) for run in ended if not run.in_sweep]
    return _each([*of_sweeps, *alone])


def _refuse_overrides(overrides: Sequence[str], targets: Sequence[RunDir | SweepDir]) -> None:
    """What is no part of a request, and runs whose request is not theirs alone."""
    faults = []
    for target in targets if overrides else ():
        if isinstance(target, SweepDir) or target.in_sweep:
            what = "a sweep" if isinstance(target, SweepDir) else f"a row of {target.path.parent.name}"
            faults.append(
                f"{target.name} is {what}, whose rows share one request: 'hpc resume {target.name}' goes on with that"
            )
            continue
        faults += [
            f"{override.partition('=')[0]}: a run goes on with another {_KEYS}* alone; other settings are a new run: "
            f"'hpc submit {target.experiment} {override}', or a file with base: {target.experiment}"
            for override in overrides
            if not override.startswith(_KEYS)
        ]
    if faults:
        raise UserError("\n".join(faults))


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


def _resume(target: RunDir | SweepDir, wish: _Wish) -> str:
    return _rows(target, None, wish) if isinstance(target, SweepDir) else _run(target, wish)


def _run(run: RunDir, wish: _Wish) -> str:
    check_trust(run)
    with locked(run.lease):  # no attempt begins in between, and no other command resumes it
        now = ledger.status(run)
        _refuse(run, now, wish.overrides)
        unfinished = _unfinished(run)
        if unfinished or wish.overrides:
            return _with_another_request(run, now, unfinished, wish)
        cluster, request = _place(run, *plan.reopen(run), now)
        return _submit(run, cluster, _options([run], run.runs, wish, cluster, request))


def _refuse(run: RunDir, now: Status, overrides: Sequence[str]) -> None:
    told = f" ({now.detail})" if now.detail else ""
    if now.state == "damaged":
        raise UserError(f"{run.name} is damaged: {now.detail}")
    if now.live and overrides:
        raise UserError(
            f"{run.name} is {now.state}{told}: before it can ask for anything else, 'hpc cancel {run.name}'"
        )
    if now.live or now.state == "finished":
        raise UserError(f"{run.name} is {now.state}{told}: nothing to resume")
    saved = None if run.newest_checkpoint() or run.quarantine.is_dir() else run.saved_step()
    if saved is not None:  # the job would refuse, after its time in the queue
        raise UserError(
            f"{run.name} has saved step {saved}, and {run.checkpoints} is empty: restore a checkpoint from a copy, or "
            f"start anew with 'hpc submit {run.experiment}'"
        )


def _submit(run: RunDir, cluster: str, options: Sequence[str]) -> str:
    newest = run.newest_checkpoint()
    job = submission.submit(run, cluster, options)
    whence = f"goes on from checkpoint {newest}" if newest else "from the start: it has no checkpoint yet"
    return f"{run.name}  job {job.job_id} ({cluster})  {whence}"


def _with_another_request(run: RunDir, now: Status, unfinished: dict[str, Any], wish: _Wish) -> str:
    """Checked as a new submission is; a refusal, SLURM's as well, leaves the run as it was."""
    submission.check_place(run.path, run.script)
    before, _ = load(run.experiment)
    repeated = [f"{key}={json.dumps(new)}" for key, (_, new) in unfinished.items()]
    planned, changed = plan.anew(run, [*repeated, *wish.overrides])
    cluster, request = _place(run, planned.experiment, planned.instance, now)
    _check(planned, cluster, wish.report)
    options = _options([run], run.runs, wish, cluster, request)
    if not (unfinished or changed):
        return _submit(run, cluster, options)
    flat = flatten(before.as_dict())
    first = {key: old_value for key, (old_value, _) in unfinished.items()}
    changes = unfinished | {key: [first.get(key, flat.get(key)), new] for key, new in changed.items()}
    run.event("request", "login", changes=changes)
    try:
        with plan.replaced(planned, submission.Refused):
            line = _submit(run, cluster, options)
    except submission.Refused as refusal:
        if not unfinished:  # else what is there again may be half of a request: the next resumption completes it
            run.event("withdrawn", "login", reason=str(refusal))
        raise
    return "\n".join([line, *note(planned, before, request.world_size)])


def _check(planned: Plan, cluster: str, report: Report | None) -> None:
    run, whole = planned.run, not planned.run.step.exists()  # a step of a pipeline may be to make the data file
    findings = preflight.check(planned.experiment, planned.instance, cluster, planned.script, run.runs, payload=whole)
    if findings.refusals:
        raise UserError("\n".join(f"{run.name}: {line}" for line in findings.refusals))
    if report:
        report(findings)


def _unfinished(run: RunDir) -> dict[str, Any]:
    """What was last to change of the request, {key: [before, after]}, where no submission since is recorded."""
    kinds = ("request", "withdrawn", "submit")
    told = [event for event in run.read_events() if event["event"] in kinds]
    return dict(told[-1]["changes"]) if told and told[-1]["event"] == "request" else {}


def note(planned: Plan, old: Experiment, ranks: int) -> Iterator[str]:
    """What another number of ranks than the old experiment's does to a run that has begun."""
    kind, run = planned.experiment.train.deterministic, planned.run
    try:
        before = instances.find(old.launch.instance).request(old.launch).world_size
    except UserError:  # its instance is not known here any more
        return
    if ranks != before and kind in ("run", "auto") and run.newest_checkpoint() and not run.step.exists():
        yield (
            f"{run.name}: {ranks} rank{'s' * (ranks > 1)} instead of {before}: the same samples and pixels, "
            f"but weights no longer the same bit for bit (train.deterministic is {kind}; layout would keep them)"
        )


def _rows(sweep: SweepDir, wanted: Sequence[str] | None, wish: _Wish) -> str:
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
    cluster, request = _place(runs[first], *plan.reopen(runs[first]), now[first])
    options = _options(chosen, sweep.path.parent, wish, cluster, request)
    jobs = arrays.submit(sweep, cluster, open_rows, options)
    return f"{sweep.name}  {len(open_rows)} of {len(runs)} rows  job {', '.join(jobs)} ({cluster})"


def _options(runs: Sequence[RunDir], folder: Path, wish: _Wish, cluster: str, request: Request) -> list[str]:
    """What follows whom, and on SLURM notice enough for saves as long as theirs were; then nothing is in the way.

    Raises UserError.
    """
    notice = saves.signal_option(runs, request) if cluster == "slurm" else []
    options = [*after.options(wish.follow, folder, cluster), *notice]
    for run in runs:
        check_trust(run)
    for run in runs if wish.accept_data else ():
        run.event("accept-data-change", "login")
    return options


def _place(run: RunDir, experiment: Experiment, instance: Instance, before: Status) -> tuple[str, Request]:
    """The cluster, and what is asked for there."""
    cluster = submission.choose_cluster(experiment.launch.cluster)
    if cluster == "local" and before.cluster == "slurm" and experiment.launch.cluster == "auto":
        raise UserError(f"{run.name} was on SLURM, which does not answer: try again; 'hpc doctor' tells more")
    return cluster, instance.request(experiment.launch)
