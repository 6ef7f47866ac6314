"""What a sink is told of a run beside its series, read from the run's folder: key, parameters, tags, state, files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc import payload, yamlfile
from hpc.errors import UserError
from hpc.ledger import Status
from hpc.logs.sinks.base import FAILED, FINISHED, KILLED, RUNNING, WAITING, About
from hpc.metrics import is_finite
from hpc.rundir import RunDir, read_json

Events = Sequence[Mapping[str, Any]]

_STATES = {
    "finished": FINISHED,
    "failed": FAILED,
    "lost": FAILED,
    "cancelled": KILLED,
    "stopped": KILLED,
    "running": RUNNING,
    "requeued": RUNNING,
    "pending": WAITING,
}
OVER = frozenset(["finished", "failed", "lost", "cancelled"])
"""States after which nothing more is written, unless somebody resumes the run. A clean stop waits for that."""
_SHOWN_JOBS = 50


def about(run: RunDir, status: Status, events: Events) -> About | None:
    """None of a run that has not begun: it has nothing to send, and no key yet. Raises UserError."""
    if not events or status.state not in _STATES:
        return None
    experiment = yamlfile.read(run.experiment)
    began = float(events[0]["time"])
    ends = [float(event["time"]) for event in events if event["event"] in ("end", "cancel", "refused")]
    return About(
        key=f"{run.name}@{round(began * 1000)}",
        name=run.name,
        experiment=str(experiment.get("name") or run.name),
        started_ms=round(began * 1000),
        ended_ms=round((ends or [float(events[-1]["time"])])[-1] * 1000) if status.state in OVER else None,
        state=_STATES[status.state],
        parameters=flat(experiment),
        tags=_tags(run, status, events, experiment),
        files=_files(run),
    )


def flat(value: Any, name: str = "") -> dict[str, str]:
    """{"train.optimizer.lr": "0.003"}: one text per leaf, lists and empty objects as JSON, texts as they are."""
    if isinstance(value, dict) and value:
        return {
            key: text
            for part, inner in value.items()
            for key, text in flat(inner, f"{name}.{part}" if name else str(part)).items()
        }
    return {name: value if isinstance(value, str) and value else json.dumps(value, default=str)}


def durable_step(events: Events, restarts: Sequence[tuple[float, int]]) -> int:
    """Steps below this one are in a checkpoint that the next attempt will go on from, or one after it; 0: none are.

    Not the step of the checkpoint itself: its evaluation is made again where an attempt ended before it.
    `restarts`: wall time and step of each start in the event files.
    """
    told = [(float(event["time"]), str(event["event"]), event.get("step")) for event in events]
    told += [(when, "restart", step) for when, step in restarts]
    step = 0
    for _, kind, at in sorted(told, key=lambda one: one[0]):
        if not isinstance(at, int):
            continue
        if kind == "checkpoint":
            step = at
        elif kind in ("rollback", "restart"):
            step = min(step, at)
    return step


def _tags(run: RunDir, status: Status, events: Events, experiment: Mapping[str, Any]) -> dict[str, str]:
    launch = experiment.get("launch")
    jobs = [str(event["job"]) for event in events if event["event"] in ("submit", "start") and event.get("job")]
    found = {
        "state": status.state,
        "detail": " ".join(status.detail.split()),
        "attempts": str(max(int(event["generation"]) for event in events)),
        "cluster": status.cluster,
        "jobs": " ".join(list(dict.fromkeys(jobs))[-_SHOWN_JOBS:]),
        "instance": str(launch.get("instance") or "") if isinstance(launch, dict) else "",
        "task": str(experiment.get("task") or ""),
        "sweep": status.sweep,
        "commit": payload.commit(run.code, events),
    }
    return {name: text for name, text in found.items() if text}


def _files(run: RunDir) -> dict[str, Path]:
    """Of the run's own files those that people open."""
    single = (run.experiment, run.delta, run.script, run.metrics, run.result)
    figures = sorted(run.figures.glob("[!.]*")) if run.figures.is_dir() else []
    return {str(path.relative_to(run.path)): path for path in (*single, *figures) if path.is_file()}


def evaluations(run: RunDir) -> Iterator[tuple[str, int, float, float]]:
    """Tag, step, value and Unix time of metrics.jsonl, under the names of the event files."""
    for line in run.read_metrics():
        split, step, when = line.get("split"), line.get("step"), line.get("time")
        for prefix, metrics in ((split, line.get("metrics")), ("train", line.get("train"))):
            if not isinstance(metrics, dict) or not isinstance(step, int) or not isinstance(when, int | float):
                continue
            for name, value in metrics.items():
                if isinstance(value, float) or is_finite(value):
                    yield f"{prefix}/{name}", step, float(value), float(when)


def name_of(run: RunDir) -> str:
    """Its path inside the runs folder."""
    return f"{run.path.parent.name}/{run.name}" if run.in_sweep else run.name


def finished_files(run: RunDir) -> bool:
    """Whether result.json can be read, if it is there: it is written last. False while a copy of it is on its way."""
    try:
        return bool(read_json(run.result)) or not run.result.exists()
    except UserError:
        return False
