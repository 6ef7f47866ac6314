"""One fault: what is done to a run, and what must come of it. The table is tests/faults/table.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """A row of the table. `play(folder, number)` does it once, in an empty folder; `number` is the seed.

    It raises AssertionError where the expectation does not hold, and gives what it measured in a few words, for the
    line that is printed: `0 steps lost, 1.4 s to save`.
    """

    id: str
    """A1 to G10, as in docs/reliability.md."""
    injection: str
    expectation: str
    play: Callable[[Path, int], str]
    here: int = 1
    """How often `make test` plays it."""
    soak: int = 1
    """How often `make soak` does."""
    cluster: bool = False
    """Whether it needs SLURM."""
