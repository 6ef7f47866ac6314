"""metrics.jsonl as the journal reads it: once, past lines that are no evaluation, each of which is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from hpc.rundir import RunDir, taken_back

_OF_HEAD = frozenset(["generation", "time", "epoch", "step", "split"])
_HEAD = re.compile(
    r'\{"generation": (\d{1,9}), (?:"time": (\d{1,12}(?:\.\d+)?), )?"epoch": (\d{1,9}), "step": (\d{1,12}), '
    r'"split": "(\w+)", "metrics": '
)
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
        """As RunDir has it. Raises OSError."""
        return [dict(line) for line in self.lines]

    @cached_property
    def lines(self) -> list[Mapping[str, Any]]:
        """The same, but each is parsed when more than its head is asked for. Raises OSError."""
        return taken_back(self._whole_lines())

    def _whole_lines(self) -> Iterator[Mapping[str, Any]]:
        texts = self.metrics.read_bytes().decode(errors="replace").split("\n") if self.metrics.exists() else [""]
        *ended, torn = texts
        for row, text in enumerate(ended, start=1):
            # Of half a line the braces do not match.
            if (head := _HEAD.match(text)) and text.endswith("}") and text.count("{") == text.count("}"):
                yield _Line(head, partial(self._rest, row))
                continue
            line = _parsed(text)
            if isinstance(line, dict):
                yield line
            elif text.strip():
                self._left_out.append(f"line {row} {line}")
        if isinstance(line := _parsed(torn), dict):  # else it may be in the writing
            yield line

    def _rest(self, row: int, text: str) -> dict[str, Any]:
        line = _parsed(text)
        if isinstance(line, dict):
            return line
        self._left_out.append(f"line {row} {line}")
        return {}


class _Line(Mapping[str, Any]):
    """An evaluation as jobs/tracking.py writes it: its head is known, the rest is parsed when it is asked for."""

    __slots__ = ("_head", "_parse", "_text", "_whole")

    def __init__(self, head: re.Match[str], parse: Callable[[str], dict[str, Any]]) -> None:
        generation, time, epoch, step, split = head.groups()
        self._head = {"generation": int(generation), "epoch": int(epoch), "step": int(step), "split": split}
        if time:
            self._head["time"] = float(time)
        self._text, self._parse = head.string, parse
        self._whole: dict[str, Any] | None = None

    def __getitem__(self, key: str) -> Any:
        return self._head[key] if key in _OF_HEAD else self._all[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Mapping has it by way of an exception."""
        return (self._head if key in _OF_HEAD else self._all).get(key, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def _all(self) -> dict[str, Any]:
        if self._whole is None:
            self._whole, self._text = {**self._parse(self._text), **self._head}, ""
        return self._whole


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
