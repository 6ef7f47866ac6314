"""metrics.jsonl as the journal reads it: once, past lines that are no evaluation, each of which is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from hpc.rundir import RunDir

_NAMED = 3
"""Lines that are told one by one."""


class Evaluated(RunDir):
    """A run's folder whose damaged lines of metrics cost those lines alone."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._left_out: list[str] = []

    @property
    def faults(self) -> list[str]:
        """At most one sentence, of what was read: which lines are left out, and why."""
        told, more = self._left_out[:_NAMED], len(self._left_out) - _NAMED
        words = ", ".join([*told, f"and {more} more"] if more > 0 else told)
        return [f"{self.metrics.name}: left out: {words}"] if told else []

    def read_metrics(self) -> list[dict[str, Any]]:
        """As RunDir has it, in a time that grows with the lines alone. Raises OSError."""
        return self._evaluations

    @cached_property
    def _evaluations(self) -> list[dict[str, Any]]:
        kept: dict[tuple[int, str], dict[str, Any]] = {}
        newest = 0
        for line in self._whole_lines():
            if line["generation"] < newest:
                continue
            last = line["step"] - (line["generation"] > newest)
            newest = line["generation"]
            while kept and next(reversed(kept))[0] > last:  # their steps rise
                kept.popitem()
            kept[line["step"], line["split"]] = line
        return [kept[key] for key in sorted(kept)]

    def _whole_lines(self) -> Iterator[dict[str, Any]]:
        texts = self.metrics.read_bytes().decode(errors="replace").split("\n") if self.metrics.exists() else [""]
        *ended, torn = texts
        for row, text in enumerate(ended, start=1):
            line = _parsed(text)
            if isinstance(line, dict):
                yield line
            elif text.strip():
                self._left_out.append(f"line {row} {line}")
        if isinstance(line := _parsed(torn), dict):  # else it may be in the writing
            yield line


def _parsed(text: str) -> dict[str, Any] | str:
    """An evaluation, or why it is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return "is no JSON (half a line?)"
    if not isinstance(line, dict):
        return f"holds {type(line).__name__}, not an object"
    for key in ("generation", "step"):
        if type(line.get(key)) is not int:
            return f"has no {key}" if key not in line else f"has {line[key]!r:.40} for its {key}, not a whole number"
    split = line.setdefault("split", "validation")
    return line if isinstance(split, str) else f"has {split!r:.40} for its split, not a name"
