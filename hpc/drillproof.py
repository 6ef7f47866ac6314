"""What the runs of a drill prove: what each stop has cost, and whether a stopped run ended as the undisturbed one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc import stepledger
from hpc.drilling import FINISHED, Injection, Road, Way
from hpc.rundir import RunDir, read_json, read_lines
from hpc.stepledger import Ledger

EQUAL, SAMPLES = "bit-identical", "samples equal"
_BLOCK = 1 << 22
_SLACK_S = 1.0
"""So late a step or a save may be seen."""


@dataclass(frozen=True)
class Rules:
    """What the runs of a drill are held to."""

    promised: bool
    """Whether a resumed run must end bit-identical."""
    budgets: Mapping[Road, float]
    """Seconds from each signal to SIGKILL."""
    every_s: float
    """train.checkpoint_every of the drill."""
    own_every_s: float
    """That of the experiment itself."""
    queued: bool
    """Whether a restart waits in SLURM's queue."""


@dataclass(frozen=True)
class Stop:
    """What one stop did to its run."""

    road: Road
    step: int
    """The last step before it."""
    effect: bool
    """False where the run was over before it was heard."""
    back: bool
    steps_lost: int = 0
    seconds_lost: float | None = None
    """Until the run did a new step, or was finished: all that a stop costs."""
    queued_s: float | None = None
    """Of these the wait between the end of one attempt and the start of the next."""
    saved_s: float | None = None
    """Of a clean stop: from the signal to a checkpoint that is durable."""
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """One of the runs of a drill."""

    name: str
    run: RunDir
    attempts: int
    stops: list[Stop]
    refused: dict[str, str]
    """Roads that are not possible here, and why."""
    result: str
    """How the run ended, against the undisturbed one."""
    faults: list[str]
    """Of the run as a whole."""
    late: int = 0
    """Stops for which the run was over too soon."""

    @property
    def good(self) -> bool:
        return not (self.faults or self.late or any(stop.faults for stop in self.stops))


class Record:
    """What the files of a run say of its attempts."""

    def __init__(self, run: RunDir) -> None:
        self.events = run.read_events()
        self._saves = [event for event in self.events if event["event"] == "checkpoint"]
        self.generations = run.last_generation()
        self.finished = run.result.exists()
        self._span: dict[int, tuple[int, int]] = {}
        for generation in range(1, self.generations + 1):
            steps = [line["step"] for line in read_lines(stepledger.path(run, generation, 0)) if "step" in line]
            if steps:
                self._span[generation] = steps[0], steps[-1]

    def find(self, kind: str, generation: int) -> dict[str, Any] | None:
        """The first event of this kind in an attempt."""
        return next((e for e in self.events if e["event"] == kind and e["generation"] == generation), None)

    def lost(self, generation: int) -> int:
        """Steps of an attempt that a later one did again, or that are missing."""
        later = [first for attempt, (first, _) in self._span.items() if attempt > generation]
        return self._span[generation][1] - (later[0] - 1) if later else 0

    def resumed_at(self, generation: int) -> int:
        """The steps that were done as the next attempt began its first one."""
        later = [first - 1 for attempt, (first, _) in self._span.items() if attempt > generation]
        return later[0] if later else self._span[generation][1]

    def saved(self, generation: int) -> int:
        """The step of the newest checkpoint that was durable as an attempt ended, 0 for none."""
        return max((int(save["step"]) for save in self._saves if save["generation"] <= generation), default=0)

    def save_of(self, generation: int, step: int) -> dict[str, Any] | None:
        """The save of this step in an attempt."""
        return next((e for e in self._saves if e["generation"] == generation and e["step"] >= step), None)

    @property
    def longest_save_s(self) -> float:
        return max((float(save.get("seconds", 0)) for save in self._saves), default=0.0)


def report(way: Way, golden: Way, rules: Rules) -> Report:
    """Look at a run, and compare it with the undisturbed one (which is compared with nothing)."""
    record = Record(way.run)
    stops = [_stop(one, record, rules) for one in way.sent]
    refused = {one.road.words: one.refused for one in way.injections if one.refused}
    effective = sum(stop.effect for stop in stops)
    ignored = sum(one.ignored for one in way.sent)
    late = len(way.injections) - len(refused) - effective - ignored if way.ended == FINISHED else 0
    faults = [] if way.ended == FINISHED else [f"it did not finish ({way.ended})"]
    if (more := record.generations - 1 - effective) > 0:
        faults.append(f"{more} attempt{'s'[: more > 1]} more than the drill caused")
    if way is golden and not faults:
        faults += _reference_faults(way.run)
    words = faults[0] if faults else "the reference"
    if way is not golden and not faults:
        words, faults = compare(way.run, golden.run, rules.promised) if golden.ended == FINISHED else ("", [])
    return Report(way.name, way.run, record.generations, stops, refused, words, faults, late)


def _reference_faults(run: RunDir) -> list[str]:
    known = stepledger.read(run)
    if not known.steps:
        return ["it kept no step ledger"]
    return [f"{known.lost} steps were done twice"] if known.lost else []


def _stop(one: Injection, record: Record, rules: Rules) -> Stop:
    effect = record.generations > one.generation
    back = effect and one.back is not None
    if not back:
        gone = effect or not record.finished
        faults = ["the run did not come back"] * gone + ["the run went on as if nothing had been sent"] * one.ignored
        return Stop(one.road, one.step, effect, back, faults=faults)
    assert one.back is not None
    lost = record.lost(one.generation)
    saved = _saved_s(one, record) if one.road.clean else None
    told = Stop(
        road=one.road,
        step=one.step,
        effect=True,
        back=True,
        steps_lost=lost,
        seconds_lost=round(one.back - one.sent, 1),
        queued_s=_queued_s(one.generation, record) if rules.queued else None,
        saved_s=saved,
    )
    told.faults.extend(_clean_faults(told, rules) if one.road.clean else _kill_faults(one, told, record, rules))
    return told


def _saved_s(one: Injection, record: Record) -> float | None:
    """From the signal, as a rank heard it, to the durable save; None where there was no clean stop, or no save."""
    heard = record.find("signal", one.generation)
    save = record.save_of(one.generation, int(heard["step"])) if heard else None
    if heard is None or save is None:
        return None
    since = float(heard.get("received") or heard["time"])
    return round(max(float(save["time"]) - since, 0.0), 2)  # that step may have been saved before the signal came


def _queued_s(generation: int, record: Record) -> float | None:
    end, start = record.find("end", generation), record.find("start", generation + 1)
    return round(max(start["time"] - end["time"], 0.0), 1) if end and start else None


def _clean_faults(stop: Stop, rules: Rules) -> list[str]:
    faults = [f"{stop.steps_lost} steps were lost"] if stop.steps_lost else []
    if stop.saved_s is None:
        return [*faults, "it was not stopped cleanly"]
    if stop.saved_s > rules.budgets[stop.road]:
        faults.append(f"saved after {stop.saved_s:.1f} s, and SIGKILL comes after {rules.budgets[stop.road]:g} s")
    return faults


def _kill_faults(one: Injection, stop: Stop, record: Record, rules: Rules) -> list[str]:
    """At most one interval may be lost: with the save itself, and where no save is made (a validation), that too."""
    faults = []
    saved, resumed = record.saved(one.generation), record.resumed_at(one.generation)
    if resumed < saved:
        faults.append(f"it went on from step {resumed}, and step {saved} was saved")
    most = rules.every_s + 2 * record.longest_save_s + one.longest_s + _SLACK_S
    if one.work_s is not None and one.work_s > most:
        lost = f"{one.work_s:.1f} s of work ({stop.steps_lost} steps)"
        faults.append(f"{lost} were lost, and {most:.1f} s is the most that may be")
    return faults


def compare(found: RunDir, golden: RunDir, promised: bool) -> tuple[str, list[str]]:
    """In words how a finished run compares with the undisturbed one, and what should be equal and is not."""
    mine, other = stepledger.read(found), stepledger.read(golden)
    faults = _ledger_faults(mine, other, promised)
    here, there = _content(found), _content(golden)
    unequal = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if not here:
        faults.append("there is no checkpoint at its end")
    if promised:
        faults += [f"{name} at the end differs" for name in unequal]
        if not unequal and _evaluations(found) != _evaluations(golden):
            faults.append("its metrics differ")
    if faults:
        return f"not equal: {faults[0]}", faults
    if promised or not (unequal or stepledger.differences(mine, other)):
        return EQUAL, []
    return SAMPLES, []


def _ledger_faults(mine: Ledger, other: Ledger, promised: bool) -> list[str]:
    return stepledger.differences(mine, other, weights=promised) if other.steps else ["no step ledger was kept"]


def _content(run: RunDir) -> dict[str, Any]:
    """Of each file of tensors in the last checkpoint the SHA-256, and what the manifest claims of it.

    What is JSON there names its attempt. The manifest is the one that lists files.
    """
    name = run.newest_checkpoint()
    if name is None:
        return {}
    paths = sorted((run.checkpoints / name).iterdir())
    told = [read_json(path) for path in paths if path.suffix == ".json"]
    claims: dict[str, Any] = next((one["files"] for one in told if isinstance(one.get("files"), dict)), {})
    return {path.name: (_sha256(path), claims.get(path.name)) for path in paths if path.suffix != ".json"}


def _sha256(path: Path) -> str:
    told = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            told.update(block)
    return told.hexdigest()


def _evaluations(run: RunDir) -> list[Any]:
    return [(line["step"], line["split"], line["metrics"]) for line in run.read_metrics()]
