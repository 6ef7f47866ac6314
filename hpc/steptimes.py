"""Where the time of a training step goes: the names of its parts, and what they come to in words.

A line of metrics.jsonl, and result.json, hold `step_seconds` (mean seconds of each part and of the whole step),
`flops_per_second` of all ranks together, and `mfu`, the share that this is of their GPUs' peak (model FLOPs
utilisation, Chowdhery et al., arXiv 2204.02311).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hpc.metrics import is_finite

PHASES = {
    "data": "waiting for data",
    "host": "host",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "save": "saving",
}
"""Part of a step -> what people read. host is what is left: Python, augmentation, logging, agreeing with others."""
STEP = "step"
"""The whole step; its parts add up to it."""
SECONDS, FLOPS, MFU = TIMING = "step_seconds", "flops_per_second", "mfu"
_UNITS = ((1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"))


def typical(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of each figure over evaluations, under the same keys; without those that are never a number."""
    several, found = list(lines), dict[str, Any]()
    told = [line[SECONDS] for line in several if isinstance(line.get(SECONDS), Mapping)]
    if timed := [seconds for seconds in map(_numbers, told) if seconds]:
        found[SECONDS] = {key: statistics.median(one.get(key, 0.0) for one in timed) for key in (*PHASES, STEP)}
    for key in (FLOPS, MFU):
        if values := [line[key] for line in several if is_finite(line.get(key))]:
            found[key] = statistics.median(values)
    return found


def _numbers(told: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in told.items() if is_finite(value)}


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Of the sum of a step's parts; {} where that is 0."""
    whole = sum(seconds.get(phase, 0.0) for phase in PHASES)
    return {phase: seconds.get(phase, 0.0) / whole for phase in PHASES} if whole > 0 else {}


def rate(flops_per_second: float) -> str:
    """Of floating point operations, in the unit that fits."""
    size, unit = next(((size, unit) for size, unit in _UNITS if flops_per_second >= size), _UNITS[-1])
    return f"{flops_per_second / size:.3g} {unit}"


def compute(found: Mapping[str, Any]) -> str | None:
    """FLOP/s and MFU of `typical`, None where they are not known."""
    if FLOPS not in found:
        return None
    share = f", {found[MFU]:.1%} of the peak (MFU)".replace("%", " %") if MFU in found else ""
    return f"{rate(found[FLOPS])}{share}"


def lines(found: Mapping[str, Any]) -> list[str]:
    """`typical` for people; [] where nothing is known."""
    said: list[str] = []
    if parts := shares(found.get(SECONDS, {})):
        named = ", ".join(f"{PHASES[phase]} {share:.0%}".replace("%", " %") for phase, share in parts.items())
        said.append(f"step {milliseconds(found[SECONDS][STEP])}: {named}")
    if words := compute(found):
        said.append(f"computing {words}")
    return said


def milliseconds(seconds: float) -> str:
    """For people: 12.3 ms, 4.56 s."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def rows(found: Mapping[str, Any]) -> Sequence[tuple[str, float, float]]:
    """(part, seconds, share) of `typical`, in the order in which a step does them."""
    seconds = found.get(SECONDS, {})
    return [(PHASES[phase], seconds.get(phase, 0.0), share) for phase, share in shares(seconds).items()]
