"""What one run does otherwise than another: their resolved experiments side by side, and their data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hpc.experiment import flatten
from hpc.journal.rundata import RunData
from hpc.metrics import UNDEFINED

SEED = "train.seed"
_DATA, _OWN = "data fingerprint", "own code"
_OF_SNAPSHOT = re.compile(r"^file:.*/code/(?=own\d*/)")
"""Where a run has its copy of the user's own model: each run has one of its own."""
_LABELS = frozenset({"name"})
"""What says nothing of the training."""
_PLACE = "launch."


def changes(run: RunData, first: RunData) -> dict[str, tuple[str, str]]:
    """{dotted key: (of `first`, of `run`)} of what differs between the two, where the job runs last.

    Of a run without an experiment (a foreign or damaged one) what it says that it differs in from its base.
    """
    if not (run.experiment and first.experiment):
        return from_base(run)
    mine, theirs = settings(run), settings(first)
    for key in (_DATA, _OWN):  # a run that has not begun knows no data, one whose logs alone are here no code
        if not (key in mine and key in theirs):
            mine.pop(key, None), theirs.pop(key, None)
    keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    return {key: (theirs.get(key, UNDEFINED), mine.get(key, UNDEFINED)) for key in sorted(keys, key=_order)}


def from_base(run: RunData) -> dict[str, tuple[str, str]]:
    """The same against the experiment's base, as far as it is known: the base's own values are not."""
    return {key: (UNDEFINED, spelt(value)) for key, value in flatten(run.delta).items()}


def settings(run: RunData) -> dict[str, str]:
    """{dotted key: value as it is written in an override} of all that decides what a run comes to, and where it ran."""
    flat = flatten(run.experiment)
    found = {key: spelt(value) for key, value in flat.items() if key not in _LABELS and value != {}}
    told = {_DATA: str(run.data.get("fingerprint") or "")[:12], _OWN: run.own_code}
    return {**found, **{key: value for key, value in told.items() if value}}


def spelt(value: Any) -> str:
    """As in an override; the keys of mappings in lists sorted."""
    if isinstance(value, str):
        return _OF_SNAPSHOT.sub("file:", value)
    return json.dumps(value, default=str, ensure_ascii=False, sort_keys=True)


def listed(found: Mapping[str, tuple[str, str]], at_most: int | None = None) -> str:
    """As overrides on the command line are written; what is gone is `without KEY`."""
    shown = [f"without {key}" if mine == UNDEFINED else f"{key}={mine}" for key, (_, mine) in found.items()][:at_most]
    more = [f"{len(found) - len(shown)} more below"] if len(found) > len(shown) else []
    return ", ".join(shown + more) or "nothing"


def _order(key: str) -> tuple[bool, str]:
    return key.startswith(_PLACE), key
