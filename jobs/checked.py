"""What jobs.check finds beyond the data files: models and tasks, and whether the loader keeps up with the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpc.errors import UserError
from hpc.experiment import Experiment
from jobs import waiting
from jobs.setup import check, prepare


def look_at(experiments: Mapping[int, Experiment], faults: dict[int, str]) -> dict[str, Any]:
    """Lines of what passed, was not checked, or needs care; a fault goes to `faults`. Plain JSON."""
    found: dict[str, dict[str, None]] = {"passed": {}, "unchecked": {}, "cautions": {}}
    for number, experiment in experiments.items():
        try:
            found["passed"] |= dict.fromkeys(check(experiment))
            word = waiting.compare(experiment, prepare(experiment))
            if word and not (word.kind == "unchecked" and found["unchecked"]):  # of many rows the first says enough
                found[word.kind] |= {word.text: None}
        except (UserError, ValueError) as error:
            faults[number] = str(error)
    return {kind: list(lines) for kind, lines in found.items()}
