"""What a scalar costs the training: `python -m tests.bench.tracking` (`make bench-tracking`).

Ours and torch's SummaryWriter log the same values in one process, turn by turn: the time of the call on the training
thread, and with the time until all is on the disk. The slow disk sleeps in each write.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from hpc.rundir import RunDir
from jobs.tracking import Tracker
from tests.faults.shim import WRITES, Call, Shim

STEPS, TAGS, TURNS = 2_000, 5, 5
SLOW_S = 0.02
GOAL_US = 50


def _values(step: int) -> dict[str, float]:
    return {f"step/value{tag}": step / 100 + tag for tag in range(TAGS)}


def _ours(folder: Path) -> tuple[Callable[[int], None], Callable[[], None]]:
    tracker = Tracker(RunDir(folder), 1, 0)
    return lambda step: tracker.scalars(step, _values(step)), lambda: tracker.close(600)


def _theirs(folder: Path) -> tuple[Callable[[int], None], Callable[[], None]]:
    writer = SummaryWriter(str(folder / "tb"), purge_step=0)

    def log(step: int) -> None:
        for tag, value in _values(step).items():
            writer.add_scalar(tag, value, step)

    return log, writer.close


def _play(make: Callable[[Path], Any], steps: int) -> tuple[float, float, float]:
    """Microseconds a scalar: the mean and the 99th percentile of the steps' calls, and with the closing."""
    with tempfile.TemporaryDirectory() as folder:
        log, close = make(Path(folder))
        took, began = [], time.perf_counter()
        for step in range(steps):
            before = time.perf_counter()
            log(step)
            took.append((time.perf_counter() - before) / TAGS * 1e6)
        close()
        return (
            statistics.mean(took),
            sorted(took)[int(steps * 0.99)],
            (time.perf_counter() - began) / steps / TAGS * 1e6,
        )


def _slow(call: Call) -> None:
    if call.name in WRITES:
        time.sleep(SLOW_S)


def _slow_disk(make: Callable[[Path], Any]) -> tuple[float, float, float]:
    with Shim(Path(tempfile.gettempdir()), _slow):
        return _play(make, STEPS // 4)


def main() -> int:
    rows: dict[str, list[tuple[float, float, float]]] = {"ours": [], "SummaryWriter": []}
    for _ in range(TURNS):
        rows["ours"].append(_play(_ours, STEPS))
        rows["SummaryWriter"].append(_play(_theirs, STEPS))
    print(f"microseconds a scalar, {STEPS} steps of {TAGS} tags, median of {TURNS} turns, {os.cpu_count()} cores")
    print(f"{'':28}{'call, mean':>12}{'call, 99 %':>12}{'all, closed':>13}")
    for name, found in rows.items():
        _print(name, found)
    _print(f"ours, writes sleep {1000 * SLOW_S:.0f} ms", [_slow_disk(_ours)])
    mean = statistics.median(one[0] for one in rows["ours"])
    print(f"goal: below {GOAL_US} us on the training thread: {'met' if mean < GOAL_US else 'missed'}")
    return 0


def _print(name: str, found: list[tuple[float, float, float]]) -> None:
    mean, late, whole = (statistics.median(one[place] for one in found) for place in range(3))
    print(f"{name:28}{mean:12.1f}{late:12.1f}{whole:13.1f}")


if __name__ == "__main__":
    sys.exit(main())
