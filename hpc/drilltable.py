"""What a drill tells: a table with a line for each way to stop a run, what is safe here, and what to type next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpc import stepledger
from hpc.drilling import Road
from hpc.drillproof import SAMPLES, Report, Rules, Stop
from hpc.units import short_time

DROP = ("queued", "attempts", "seconds lost", "saved in")
"""Columns that a narrow terminal leaves out, the first one first."""
_SHOWN = 3
EVERY = "train.checkpoint_every=1s"
"""The drill's own, unless another is given: a kill waits for a save since the last one."""
_FAR_S = 10.0


def rows(reports: Sequence[Report], rules: Rules) -> list[dict[str, str]]:
    """A line for the undisturbed run, and for each way in which others were stopped."""
    lines = []
    for told in reports:
        roads = list(dict.fromkeys(stop.road for stop in told.stops))
        if not roads:
            lines.append(_line(told, told.name, [], rules))
        for road in roads:
            several = [stop for stop in told.stops if stop.road is road]
            lines.append(_line(told, road.words, several, rules))
    silent = {title for title in lines[0] if not any(line[title] for line in lines)}  # no queue here, say
    return [{title: text for title, text in line.items() if title not in silent} for line in lines]


def _line(told: Report, name: str, stops: list[Stop], rules: Rules) -> dict[str, str]:
    seen = [stop for stop in stops if stop.back]
    saved = [stop.saved_s for stop in seen if stop.saved_s is not None]
    budget = rules.budgets.get(stops[0].road, 0.0) if stops else 0.0
    return {
        "stopped by": name,
        "back": f"{len(seen)}/{len(stops)}" if stops else "",
        "attempts": str(told.attempts),
        "steps lost": _sum([stop.steps_lost for stop in seen]),
        "seconds lost": _sum([stop.seconds_lost for stop in seen if stop.seconds_lost is not None]),
        "queued": _sum([stop.queued_s for stop in seen if stop.queued_s is not None]),
        "saved in": f"{max(saved):.2f} of {budget:g} s" if saved else "",
        "result": told.result,
    }


def _sum(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.1f}" if isinstance(value, float) else str(value) for value in values)
    return f"{sum(values):.0f}, most {max(values):.0f}"


@dataclass(frozen=True)
class Verdict:
    """What is safe on this cluster, what is not, and what to type next."""

    good: bool
    words: str
    command: str


def verdict(reports: Sequence[Report], rules: Rules, submit: str, again: str) -> Verdict:
    """`submit`: the command that starts the experiment for real; `again`: the drill's own, without --steps."""
    safe = [words for told in reports[1:] if not told.faults for words in _safe(told, rules)]
    bad = [f"{told.name}: {fault}" for told in reports for fault in told.faults]
    bad += [f"{s.road} at step {s.step}: {fault}" for told in reports for s in told.stops for fault in s.faults]
    late, far = sum(told.late for told in reports), rules.every_s > _FAR_S
    untried = [f"{road} ({why})" for told in reports for road, why in told.refused.items()]
    parts = [f"safe here: {'; '.join(safe)}"] if safe else []
    if bad:
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        parts.append(f"NOT safe here: {'; '.join(bad[:_SHOWN])}{more}")
    if late:
        run = "the end of so short a run" if not far else f"a run whose saves are {short_time(rules.every_s)} apart"
        parts.append(f"not shown: {late} stop{'s' * (late > 1)} came after {run}")
    if untried:
        parts.append(f"not possible here: {'; '.join(untried)}")
    if any(told.result == SAMPLES for told in reports):
        parts.append("Weights differ by design: train.deterministic is off here; 'run' makes them equal")
    if bad:
        faulty = next(told for told in reports if told.faults or any(stop.faults for stop in told.stops))
        command = f"hpc why {faulty.run.path}"
    elif late:
        command = f"{again} {EVERY}" if far else f"{again} --steps {_longer(reports)}"
    else:
        command = submit
    return Verdict(not (bad or late), ". ".join(parts), command)


def _safe(told: Report, rules: Rules) -> list[str]:
    """In words each road of a run on which nothing went wrong."""
    clean = [stop for stop in told.stops if stop.back and stop.road.clean and not stop.faults]
    kills = [stop for stop in told.stops if stop.back and not stop.road.clean and not stop.faults]
    words = []
    if clean:
        saved = max(stop.saved_s or 0.0 for stop in clean)
        names = ", ".join(dict.fromkeys(stop.road for stop in clean))
        least = min(rules.budgets[stop.road] for stop in clean)
        words.append(f"{names} (no step lost, saved within {saved:.2f} s of {least:g} s)")
    if kills:
        most = max(stop.steps_lost for stop in kills)
        costs = f"{most} steps lost at most; in a real run as much as is done in {short_time(rules.own_every_s)}"
        words.append(f"{Road.KILL} ({len(kills)} of {len(told.stops)} came back, {costs})")
    return words


def _longer(reports: Sequence[Report]) -> int:
    """Steps that would do: four times as many, in tens."""
    done = max((stepledger.read(told.run).last for told in reports), default=0)
    return max(math.ceil(done * 4 / 10) * 10, 100)


def as_dict(reports: Sequence[Report], rules: Rules, told: Verdict) -> dict[str, Any]:
    """For drill.json and --json."""
    return {
        "good": told.good,
        "verdict": told.words,
        "next": told.command,
        "bit_identical_promised": rules.promised,
        "checkpoint_every_s": rules.every_s,
        "budgets_s": dict(rules.budgets),
        "runs": [{**asdict(one), "run": str(one.run.path)} for one in reports],
    }
