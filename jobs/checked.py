"""What jobs.check finds beyond the data files: models, tasks, memory of a step, and whether the loader keeps up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from hpc.errors import UserError
from hpc.experiment import Experiment
from jobs import waiting
from jobs.memory_plan import MemoryPlan, NotPlanned, plan_memory
from jobs.setup import look

_LONG_S = 30
"""Of a sweep over many models, memory is looked at for so long: each takes a second or so."""


def look_at(experiments: Mapping[int, Experiment], faults: dict[int, str], details: bool) -> dict[str, Any]:
    """Lines of what passed, was not checked, or needs care, and the plan of one alone; a fault goes to `faults`.

    Plain JSON. details: see jobs.memory_plan.
    """
    found: dict[str, dict[str, None]] = {"passed": {}, "unchecked": {}, "cautions": {}}
    plans: list[MemoryPlan] = []
    unmeasured, late, deadline = "", 0, time.monotonic() + _LONG_S
    for number, experiment in experiments.items():
        try:
            seen = look(experiment)
            found["passed"] |= dict.fromkeys(seen.lines)
            word = waiting.compare(experiment, seen.parts)
            if word and word.kind == "unchecked":
                unmeasured = unmeasured or word.text  # of many rows the first says enough
            elif word:
                found[word.kind] |= {word.text: None}
            if time.monotonic() > deadline:
                late += 1
                continue
            plan = plan_memory(experiment, seen.parts, seen.model, details)
        except NotPlanned as error:
            found["unchecked"] |= {str(error): None}
        except (UserError, ValueError) as error:
            faults[number] = str(error)
        else:
            plans.append(plan)
            if plan.refusal:
                faults[number] = plan.refusal
    if late:
        found["unchecked"] |= {f"memory of {late} more rows, as each takes a second or so": None}
    if unmeasured:
        found["unchecked"] |= {unmeasured: None}
    return _told(found, plans, len(experiments) == 1)


def _told(found: dict[str, dict[str, None]], plans: list[MemoryPlan], alone: bool) -> dict[str, Any]:
    """With the memory of the fullest."""
    fullest = max(plans, key=lambda one: one.peak / one.capacity, default=None)
    lines = {kind: list(lines) for kind, lines in found.items()}
    if fullest:
        lines["passed"] += fullest.lines()
        lines["cautions"] += [fullest.caution] if fullest.caution else []
    return {**lines, "memory": fullest.as_dict() if fullest and alone else None}
