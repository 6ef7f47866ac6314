"""Runs replayed to a tracker's server: `hpc sync RUNS mlflow:URI`. base.py has the interface, mlflow.py MLflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hpc.errors import UserError
from hpc.ledger import Status, look
from hpc.logs import positions
from hpc.logs.sinks.base import Sink, SinkError, SinkGone
from hpc.logs.sinks.facts import name_of
from hpc.logs.sinks.replay import Sent, lacks, replay
from hpc.rundir import RunDir, all_runs, find_run

KINDS = ("mlflow",)
_OTHERS = ("aim", "clearml", "comet", "neptune", "swanlab", "trackio", "wandb")
"""Trackers that are none of ours: before a colon they are not taken for hosts."""

__all__ = ["KINDS", "Sink", "SinkError", "SinkGone", "feed", "is_sink", "lacks", "refuse_others", "replay", "sink_of"]


def is_sink(text: str) -> bool:
    """Whether this names a server, and no folder or host."""
    return _tracker(text) in KINDS


def _tracker(text: str) -> str:
    """The tracker that is named before the first colon; empty of a folder or host."""
    name, colon, _ = text.partition(":")
    return name.lower() if colon and name.lower() in (*KINDS, *_OTHERS) else ""


def refuse_others(source: str, dest: str) -> None:
    """Raises UserError where a tracker is where none can be. What follows its name, maybe a key, is not repeated."""
    as_host = "a host of this name is me@{0}:path, a folder ./{0}:path"
    if kind := _tracker(source):
        words = f"hpc sync RUNS {KINDS[0]}:URI; {as_host.format(kind)}"
        raise UserError(f"{kind}: a tracker can only be DEST, as in {words}")
    if (kind := _tracker(dest)) in _OTHERS:
        valid = ", ".join(f"{one}:" for one in KINDS)
        raise UserError(f"{kind}: no such sink; valid: {valid}; {as_host.format(kind)}")


def sink_of(uri: str) -> Sink | None:
    """The sink of mlflow:http://...; None where this is a folder. Raises UserError."""
    if not is_sink(uri):
        return None
    from hpc.logs.sinks.mlflow import MlflowSink

    return MlflowSink(uri.partition(":")[2])


def feed(runs: Path, uri: str, names: Sequence[str], tell: Callable[[str], None]) -> int:
    """Send what a sink lacks of these runs (all, without names), a line for each that had something or failed.

    What is skipped is named with its reason. The exit code: 1 where a run could not be sent whole, as one whose event
    files are damaged, else 0. Raises UserError.
    """
    sink = sink_of(uri)
    if sink is None:
        raise UserError(f"{uri}: no such kind of server; valid: {', '.join(f'{kind}:URI' for kind in KINDS)}")
    chosen = _chosen(runs, names)
    if not chosen:
        tell(f"no runs in {runs}")
    failed = 0
    skipped: dict[str, list[str]] = {}
    try:
        for number, (run, seen) in enumerate(zip(chosen, look(chosen), strict=True)):
            try:
                if seen.records is None:
                    raise UserError(seen.status.detail)
                sent = replay(run, seen.status, sink, tell)
            except SinkGone as error:
                left = len(chosen) - number
                tell(f"{sink.name} {error}: {left} run{'s' * (left != 1)} not sent; the next sync goes on from here")
                return 1
            except (SinkError, UserError, OSError) as error:
                if isinstance(error, SinkError):  # the server does not have what it confirmed, as far as it says
                    positions.withdraw(runs, sink.name, name_of(run))
                tell(f"{run.name}: not sent: {' '.join(str(error).split())}")
                failed += 1
                continue
            if sent is None:
                skipped.setdefault(_unsent(seen.status), []).append(name_of(run))
                continue
            positions.write(runs, sent.position)
            _tell(run, sent, tell)
            failed += sent.damaged
        for why, several in skipped.items():
            tell(f"{', '.join(several)}: skipped: {why}")
    finally:
        sink.close()
    return int(failed > 0)


def _chosen(runs: Path, names: Sequence[str]) -> list[RunDir]:
    """All runs, or those of these names; the name of a sweep stands for its rows."""
    known = all_runs(runs)
    if not names:
        return known
    found: dict[Path, RunDir] = {}
    paths = {name_of(run): run for run in known}
    for name in names:
        rows = [run for run in known if run.in_sweep and run.path.parent.name == name]
        for run in rows or [paths.get(name) or find_run(runs, name)]:
            found[run.path] = run
    return list(found.values())


def _unsent(status: Status) -> str:
    state = f"{status.state}, {status.detail}" if status.detail else status.state
    return f"{state}; no record of its submission or start is here (events/)"


def _tell(run: RunDir, sent: Sent, tell: Callable[[str], None]) -> None:
    if not (sent.points or sent.files):
        return
    anew = "; sent anew: steps that were sent had been lost" if sent.anew else ""
    tell(f"{run.name}: {sent.points} points, {sent.files} files, to step {sent.position.last_step}{anew}")
