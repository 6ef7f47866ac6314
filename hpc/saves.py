"""How long the saves of runs took, from their events, and what follows for the notice that a job needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path

from hpc import yamlfile
from hpc.errors import UserError
from hpc.instances import Request
from hpc.preempt import NOTICE
from hpc.rundir import RunDir, all_runs
from hpc.template import notice_seconds
from hpc.units import percentile

_FACTOR, _MARGIN_S = 3, 30
_LATEST = 30
"""So many runs are looked at, the newest."""


def slow(took: Sequence[float]) -> float:
    """The seconds that a save mostly takes at most: their 95th percentile."""
    return percentile(took, 0.95)


def notice_for(slow_s: float) -> float:
    """The seconds ahead of its end at which a job must hear of it, for saves that are so slow, and the way to the next
    step."""
    return _FACTOR * slow_s + _MARGIN_S


def seconds(run: RunDir) -> list[float]:
    """What each save of a run took, over all its attempts."""
    saved = (event.get("seconds") for event in run.read_events() if event["event"] == "checkpoint")
    return [float(took) for took in saved if isinstance(took, int | float)]


def longest(runs: Path, models: Iterable[str]) -> tuple[float, str] | None:
    """The longest save of the newest runs with one of these models, and which run that was; None: there is none."""
    wanted, found = set(models), []
    for run in all_runs(runs)[: -_LATEST - 1 : -1]:
        if _model(run) in wanted and (took := seconds(run)):
            found.append((max(took), run.name))
    return max(found, default=None)


def _model(run: RunDir) -> str:
    try:
        model = yamlfile.read(run.experiment).get("model")
    except (UserError, OSError):
        return ""
    return str(model.get("name", "")) if isinstance(model, dict) else ""


def signal_option(runs: Iterable[RunDir], request: Request) -> list[str]:
    """sbatch's --signal where the script's notice of the time limit is too short for the saves that these runs took."""
    took = [time for run in runs for time in seconds(run)]
    if not took:
        return []
    needed = min(ceil(notice_for(slow(took))), request.time_s // 2)
    return [f"--signal={NOTICE.name.removeprefix('SIG')}@{needed}"] if needed > notice_seconds(request) else []
