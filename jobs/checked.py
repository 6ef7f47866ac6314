"""What jobs.check finds beyond the data files: models and tasks, memory of a step, whether the loader keeps up."""

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
    passed: dict[str, None] = {}
    unchecked: dict[str, None] = {}
    plans: list[MemoryPlan] = []
    waits: dict[str, waiting.Word] = {}
    deadline, late = time.monotonic() + _LONG_S, 0
    for number, experiment in experiments.items():
        try:
            found = look(experiment)
            passed |= dict.fromkeys(found.lines)
            if time.monotonic() > deadline:
                late += 1
                continue
            if word := waiting.compare(experiment, found.parts):
                waits.setdefault("" if word.kind == "unchecked" else word.text, word)  # one says what to measure
            plan = plan_memory(experiment, found.parts, found.model, details)
        except NotPlanned as error:
            unchecked |= {str(error): None}
        except (UserError, ValueError) as error:
            faults[number] = str(error)
        else:
            plans.append(plan)
            if plan.refusal:
                faults[number] = plan.refusal
    if late:
        unchecked |= {f"memory of {late} more rows, as each takes a second or so": None}
    fullest = max(plans, key=lambda one: one.peak / one.capacity, default=None)
    return {
        "passed": [*passed, *(fullest.lines() if fullest else []), *_told(waits, "passed")],
        "unchecked": [*unchecked, *_told(waits, "unchecked")],
        "cautions": [*([fullest.caution] if fullest and fullest.caution else []), *_told(waits, "cautions")],
        "memory": fullest.as_dict() if fullest and len(experiments) == 1 else None,
    }


def _told(words: Mapping[str, waiting.Word], kind: str) -> list[str]:
    return [word.text for word in words.values() if word.kind == kind]
