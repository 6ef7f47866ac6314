"""The step ledger (`train.ledger: true`): what each rank did at each step, to prove a resumed run equal.

One line per step and rank: the step, the samples with the CRC-32 of their pixels after augmentation, the loss as a hex
float, every ten steps the CRC-32 of the weights. A step that was done again (after a kill, or a rollback) takes back
what followed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.rundir import RunDir, read_lines

Line = dict[str, Any]
_LOSS, _WEIGHTS, _SAMPLES, _SKIPPED = "loss", "weights", "samples", "skipped"


@dataclass(frozen=True)
class Ledger:
    """What counts of a run's steps, and what was taken back."""

    steps: dict[int, dict[int, Line]]
    """By step, then by rank: its last line."""
    lost: int
    """Steps that were done and had to be done again."""

    @property
    def last(self) -> int:
        return max(self.steps, default=0)


def line(step: int, samples: list[tuple[int, int]], loss: float, weights: int | None, skipped: bool) -> Line:
    """One line: `samples` are (number, CRC-32 of the pixels)."""
    written: Line = {"step": step, _SAMPLES: samples, _LOSS: float(loss).hex()}
    if weights is not None:
        written[_WEIGHTS] = weights
    return {**written, _SKIPPED: True} if skipped else written


def read(run: RunDir) -> Ledger:
    """The ledger of a run over all its attempts; empty where none was kept."""
    steps: dict[int, dict[int, Line]] = {}
    lost = 0
    for generation in _generations(run):
        attempt: dict[int, dict[int, Line]] = {}
        for rank, path in _files(run, generation):
            kept, taken_back = _kept(read_lines(path))
            lost += taken_back if rank == 0 else 0  # a rollback: all ranks went back together
            for step, entry in kept.items():
                attempt.setdefault(step, {})[rank] = entry
        first = min(attempt, default=None)
        again = [step for step in steps if first is not None and step >= first]
        lost += len(again)
        for step in again:
            del steps[step]
        steps |= attempt
    return Ledger(dict(sorted(steps.items())), lost)


def _kept(lines: list[Line]) -> tuple[dict[int, Line], int]:
    """Of one rank's attempt: the lines that count by step, and how many were taken back."""
    kept: dict[int, Line] = {}
    lost = 0
    for entry in lines:
        while kept and next(reversed(kept)) >= entry["step"]:
            kept.popitem()
            lost += 1
        kept[entry["step"]] = entry
    return kept, lost


def differences(found: Ledger, golden: Ledger, weights: bool = True) -> list[str]:
    """Sentences: where a run is not what the undisturbed one was; empty where it is.

    `weights`: compare losses and weights, too, which must be equal on the same layout only; the samples and their
    pixels are the same on any.
    """
    told = []
    missing, extra = sorted(golden.steps.keys() - found.steps.keys()), sorted(found.steps.keys() - golden.steps.keys())
    if missing:
        told.append(f"{len(missing)} steps are missing, the first is {missing[0]}")
    if extra:
        told.append(f"{len(extra)} steps too many, the first is {extra[0]}")
    keys = [_SAMPLES, _SKIPPED, *((_LOSS, _WEIGHTS) if weights else ())]
    for key in keys:
        wrong = [s for s in golden.steps if s in found.steps and _of(found, s, key) != _of(golden, s, key)]
        if wrong:
            told.append(f"{key}: {len(wrong)} steps differ, the first is {wrong[0]}")
    return told


def _of(ledger: Ledger, step: int, key: str) -> Any:
    """A step's samples over all ranks in their order; else each rank's value."""
    ranks = ledger.steps[step]
    if key == _SAMPLES:
        return sorted(tuple(pair) for entry in ranks.values() for pair in entry[_SAMPLES])
    if key == _SKIPPED:
        return any(entry.get(key) for entry in ranks.values())
    return {rank: entry.get(key) for rank, entry in ranks.items()}


def _generations(run: RunDir) -> list[int]:
    return sorted({int(path.name.split("-")[0]) for path in run.ledger.glob("[0-9]*-rank*.jsonl")})


def path(run: RunDir, generation: int, rank: int) -> Path:
    """The file of one rank's attempt."""
    return run.ledger / f"{generation:03d}-rank{rank}.jsonl"


def _files(run: RunDir, generation: int) -> list[tuple[int, Path]]:
    found = run.ledger.glob(f"{generation:03d}-rank*.jsonl")
    return sorted((int(path.stem.rpartition("-rank")[2]), path) for path in found)
