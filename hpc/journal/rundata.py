"""One run as the journal sees it: the contents of its files, and the facts drawn from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from hpc import steptimes
from hpc.journal.compare import better, is_number, lower_is_better
from hpc.journal.content import CURVE_POINTS, Curve, evenly
from hpc.metrics import DEFAULT_MONITOR, by_difficulty, is_finite

Values = Mapping[str, Any]

_STATES = {
    "submit": "submitted, waits to start",
    "start": "started, no result yet",
    "checkpoint": "running, no result yet",
    "signal": "stopping, no result yet",
    "requeue": "requeued, waits to go on",
    "end": "ended without a result",
    "cancel": "cancelled",
}


_EPOCH = "epoch_seconds"
_PARTS = (("train", "train"), ("validation", "metrics"))
"""Split, and where a line has its metrics."""
_OF_ATTEMPT = ("start", "checkpoint", "signal", "requeue", "end", "failed")


@dataclass(frozen=True)
class RunData:
    """The files of one run as the caller read them; whatever a young or failed run does not have yet is empty."""

    run: str
    """The run's name with its id: unique in a report."""
    experiment: Values = field(default_factory=dict)
    """The resolved experiment."""
    delta: Values = field(default_factory=dict)
    """What it differs in from its base: {dotted key: value}, nested mappings too."""
    result: Values = field(default_factory=dict)
    """result.json; empty before the run has finished."""
    metrics: Sequence[Values] = ()
    """Lines {generation, time, step, epoch, split, metrics, samples_per_second...}, in the order of writing."""
    events: Sequence[Values] = ()
    """Lines {time, event, generation, ...}."""
    figures: Mapping[str, Path] = field(default_factory=dict)
    """PNG files by name."""
    evaluations: Mapping[str, Values] = field(default_factory=dict)
    """What `hpc evaluate` found, by name: test, test+flips-0, ..."""
    data: Values = field(default_factory=dict)
    """data.json."""
    parameters: int | None = None
    """Of the model; None of an older run."""
    used: Values = field(default_factory=dict)
    """The card of hpc.usage."""
    sweep: str = ""
    """The sweep that it is a row of."""
    commit: str = ""
    """Of the code that was submitted."""
    with_code: bool = True
    """Whether that code is here, and not the logs alone."""
    own_code: str = ""
    """Of the user's own models, see hpc.payload."""
    damage: Sequence[str] = ()
    """Files that could not be read, each with its fault."""
    typical: Values = field(default_factory=dict)
    """What a result would say of speed, waiting and attempts, where the lines that told it are no longer here."""
    drawn: tuple[Curve, ...] | None = None
    """The curves, where their lines are no longer here."""

    @property
    def finished(self) -> bool:
        return bool(self.result.get("finished"))

    def slim(self) -> RunData:
        """The same without the lines of its metrics but the best and the last: a report holds many runs at once."""
        typical = {"samples_per_second": self.speed, "waiting_share": self.waiting_share, **self.timing}
        ends = [line for line in (self.validation(self.best), self.validation(self.last)) if line]
        kept = [dict(line) for place, line in enumerate(ends) if line not in ends[:place]]
        typical |= {"attempts": self.attempts, _EPOCH: self.epoch_seconds}
        return replace(self, metrics=kept, typical=typical, drawn=self.curves)

    @cached_property
    def state(self) -> str:
        """In words; of a run without a result what its last event says, with the reason."""
        words, why = self._state
        return f"{words}{f' ({why})' if why else ''}{'; damaged' * bool(self.damage)}"

    @property
    def short_state(self) -> str:
        """Without the reason, which may be long."""
        return f"{self._state[0]}{'; damaged' * bool(self.damage)}"

    @property
    def _state(self) -> tuple[str, str]:
        if self.finished:
            return "finished", ""
        if not self.events:
            return "no result yet" if self.metrics else "not started", ""
        last = max(self.events, key=lambda event: float(event.get("time", 0)))
        words = _STATES.get(str(last.get("event")), "no result yet")
        why = last.get("reason", last.get("code"))
        return words, "" if why is None else str(why)

    @cached_property
    def validations(self) -> list[Values]:
        """Validation lines by step."""
        lines = [m for m in self.metrics if m.get("split", "validation") == "validation" and is_number(m.get("step"))]
        return sorted(lines, key=lambda line: int(line["step"]))

    @property
    def task(self) -> str:
        """Empty if unknown."""
        return str(self.result.get("task") or self.experiment.get("task") or "")

    @property
    def monitor(self) -> str:
        """The metric that names the best checkpoint."""
        named = self.result.get("monitor") or mapping(self.experiment.get("train")).get("monitor")
        if named:
            return str(named)
        seen = mapping(self.validations[-1].get("metrics")) if self.validations else {}
        default = DEFAULT_MONITOR.get(self.task, "accuracy")
        return "loss" if "loss" in seen and default not in seen else default

    @property
    def lower(self) -> bool:
        """Whether less is better of the monitored metric."""
        direction = self.result.get("direction")
        return direction == "min" if direction in ("min", "max") else lower_is_better(self.monitor)

    @cached_property
    def best(self) -> Values:
        """{epoch, step, metrics} of the best evaluation; empty where there is none."""
        if given := mapping(self.result.get("best")):
            return given
        best: Values = {}
        for line in self.validations:
            value = mapping(line.get("metrics")).get(self.monitor)
            if is_number(value) and (not best or better(value, best["metrics"][self.monitor], self.lower)):
                best = line
        return best

    @property
    def last(self) -> Values:
        """{epoch, step, metrics} of the last evaluation; empty where there is none."""
        return mapping(self.result.get("last")) or (self.validations[-1] if self.validations else {})

    def validation(self, moment: Values) -> Values:
        """The line {..., metrics, train} of an evaluation {step}, empty where there is none."""
        return next((line for line in self.validations if line["step"] == moment.get("step")), {})

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """Of the metrics of both splits, the monitored one first, the loss next."""
        if self.drawn is not None:
            return self.drawn
        lines = _thinned(self.validations, self.best.get("step"))
        steps = tuple(float(line["step"]) for line in lines)
        epochs = tuple(
            float(given) if is_number(given := line.get("epoch")) else step
            for line, step in zip(lines, steps, strict=True)
        )
        seen = {name: None for line in lines for name in mapping(line.get("metrics"))}
        parts = {split: [mapping(line.get(key)) for line in lines] for split, key in _PARTS}
        found = []
        for name in sorted(seen, key=lambda name: (name != self.monitor, name != "loss", name)):
            for split, several in parts.items():
                values = tuple(_point(one.get(name)) for one in several)
                if any(value is not None for value in values):
                    found.append(Curve(name, split, steps, epochs, values))
        return tuple(found)

    @property
    def per_class(self) -> list[Values]:
        """{name, support, precision, recall, f1 or dice...} of each class, the most difficult first."""
        return self.sorted_classes(self.result)

    def sorted_classes(self, told: Values) -> list[Values]:
        """The same of a result or an evaluation."""
        rows = [row for row in sequence(told.get("per_class")) if isinstance(row, Mapping)]
        return [rows[place] for place in by_difficulty(self.task, rows)]

    @property
    def class_names(self) -> list[str]:
        return [str(name) for name in sequence(self.result.get("class_names"))]

    @property
    def speed(self) -> Values:
        """Samples per second by split: the result's, else the median over the evaluations."""
        for told in (self.result, self.typical):
            if given := mapping(told.get("samples_per_second")):
                return given
        rates: dict[str, list[float]] = {}
        for line in self.validations:
            for split, rate in mapping(line.get("samples_per_second")).items():
                if is_number(rate) and rate:  # 0: not measured
                    rates.setdefault(split, []).append(rate)
        return {split: statistics.median(values) for split, values in rates.items()}

    @property
    def waiting_share(self) -> float | None:
        """Share of the training time spent waiting for data; None if unknown."""
        for told in (self.result, self.typical):
            if is_number(given := told.get("waiting_share")):
                return given
        shares = [share for line in self.validations if is_number(share := line.get("waiting_share"))]
        return statistics.median(shares) if shares else None

    @cached_property
    def timing(self) -> Values:
        """What is known of where the time of a step goes, see hpc.steptimes: the result's, else of the evaluations."""
        told: Iterator[Sequence[Values]] = iter([[self.result], [self.typical], self.validations])
        return next(filter(None, (steptimes.typical(lines) for lines in told)), {})

    @property
    def epoch_seconds(self) -> float | None:
        """From an evaluation to the next of the same attempt, by epoch, the median; None if unknown."""
        if _EPOCH in self.typical:
            return self.typical[_EPOCH]  # type: ignore[no-any-return]
        found = []
        timed = [line for line in self.validations if line.get("time") is not None]
        for one, other in pairwise(timed):
            seconds, epochs = (_between(one, other, key) for key in ("time", "epoch"))
            if one.get("generation") == other.get("generation") and seconds and epochs:
                found.append(seconds / epochs)
        return statistics.median(found) if found else None

    @property
    def attempts(self) -> int:
        """Starts of the job; several ranks may report one start."""
        seen = self._generations("start") | {int(line.get("generation", 1)) for line in self.metrics}
        given = self.result.get("attempts", self.typical.get("attempts"))
        return int(given) if is_finite(given) else len(seen)

    @property
    def preemptions(self) -> int:
        """Attempts that a signal stopped."""
        return len(self._generations("signal"))

    @property
    def requeues(self) -> int:
        return len(self._generations("requeue"))

    @property
    def tasks(self) -> int | None:
        """Tasks of the allocation, as the experiment asks for them; None if it does not say."""
        launch = mapping(self.experiment.get("launch"))
        numbers = (launch.get("nodes") or 1, launch.get("tasks_per_node") or launch.get("gpus") or 1)
        return math.prod(numbers) if launch and all(isinstance(number, int) for number in numbers) else None

    @property
    def jobs(self) -> list[str]:
        """Of SLURM, in the order of their starts."""
        told = [str(event["job"]) for event in self.events if event.get("event") == "start" and event.get("job")]
        return list(dict.fromkeys(told))

    @property
    def hosts(self) -> list[str]:
        """The first node of each attempt, each once."""
        told = [str(event["node"]) for event in self.events if event.get("event") == "start" and event.get("node")]
        return list(dict.fromkeys(told))

    @property
    def wall_seconds(self) -> float | None:
        """Of all attempts, from start to end: as sampled, else from their events; None if unknown."""
        if is_number(given := self.used.get("seconds")):
            return float(given)
        spans: dict[int, list[float]] = {}
        for event in self.events:
            if event.get("event") in _OF_ATTEMPT and is_number(event.get("time")):
                spans.setdefault(int(event.get("generation", 0)), []).append(float(event["time"]))
        found = sum(max(times) - min(times) for times in spans.values())
        return found or None

    @property
    def scores(self) -> dict[str, Any]:
        """Metrics of the best evaluation, and those that `hpc evaluate --split test` has found as `test METRIC`."""
        tested = mapping(mapping(self.evaluations.get("test")).get("metrics"))
        return {**mapping(self.best.get("metrics")), **{f"test {name}": value for name, value in tested.items()}}

    @property
    def seed(self) -> int | None:
        given = mapping(self.experiment.get("train")).get("seed")
        return given if isinstance(given, int) else None

    def _generations(self, kind: str) -> set[int]:
        return {int(event.get("generation", 0)) for event in self.events if event.get("event") == kind}


def mapping(value: Any) -> Values:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict | Mapping) else {}  # the first is asked in no time


def sequence(value: Any) -> Sequence[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else ()


def _between(one: Values, other: Values, key: str) -> float | None:
    """How much it grows; None if it does not."""
    begin, end = one.get(key), other.get(key)
    return end - begin if is_finite(begin) and is_finite(end) and end > begin else None


def _point(value: Any) -> float | None:
    return float(value) if is_finite(value) else None


def _thinned(lines: Sequence[Values], best_step: Any) -> Sequence[Values]:
    """At most CURVE_POINTS of them, evenly spaced, with the first and the last, and the best one."""
    best = {place for place, line in enumerate(lines) if line.get("step") == best_step}
    return [lines[place] for place in sorted(evenly(len(lines), CURVE_POINTS) | best)]
