"""What a sink is: a tracker's server to which a run is replayed from its files. hpc/logs/sinks/replay.py drives it.

The promise of each sink (tests/test_sinks.py holds MLflow's to it):
- what is sent twice is there once: a point is known by its name, step, wall time and value;
- the notes of a run (a few short texts) are kept by the server, beside the points that they speak of;
- a run is found by its key alone, whoever sent it, and from whichever copy of its folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

RUNNING, FINISHED, FAILED, KILLED, WAITING = "running", "finished", "failed", "killed", "waiting"
"""The states that a sink is told."""


class SinkError(Exception):
    """One run could not be sent: one line for people. The others may go on."""


class SinkGone(SinkError):
    """The server does not answer: no other run can be sent either."""


class Point(NamedTuple):
    """One value of a series."""

    tag: str
    """As it was logged."""
    step: int
    wall_ms: int
    """Milliseconds since 1970: when it was logged, so that a replay sends the same."""
    value: float


@dataclass(frozen=True)
class About:
    """What a sink is told of a run beside its series; all of it is read from the run's folder."""

    key: str
    name: str
    experiment: str
    started_ms: int
    ended_ms: int | None
    state: str
    """One of the states above."""
    parameters: Mapping[str, str]
    tags: Mapping[str, str]
    files: Mapping[str, Path] = field(default_factory=dict)
    """What is kept as artifacts, by the path that it has there."""


@dataclass
class Remote:
    """A run as the server has it."""

    id: str
    version: int
    """1, and one more each time that lost steps had been sent and the run was sent anew."""
    state: str
    ended_ms: int | None
    notes: dict[str, str]
    """Our own, without their prefix."""
    parameters: dict[str, str]


class Sink(Protocol):
    name: str
    """As shown to people, without credentials: mlflow:http://127.0.0.1:5000."""

    def find(self, about: About) -> Remote | None:
        """The newest version of the run; older ones that are still there are retired. Raises SinkError."""

    def create(self, about: About, after: Remote | None) -> Remote:
        """A new run, or the version after this one, which is retired and keeps what people wrote beside it."""

    def describe(self, remote: Remote, about: About) -> None:
        """Parameters and tags: what is new or has changed."""

    def points(self, remote: Remote, points: Sequence[Point], notes: Mapping[str, str]) -> None:
        """Some points, then the notes."""

    def artifacts(self, remote: Remote, folder: Path, notes: Mapping[str, str]) -> None:
        """All files below a folder, then the notes."""

    def state(self, remote: Remote, about: About) -> None:
        """The run's state, where it is another."""

    def has_others(self, remote: Remote, points: Iterable[Point]) -> bool:
        """Whether the server has points of the run that are none of these."""

    def close(self) -> None: ...
