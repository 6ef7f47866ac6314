"""Ways to do the same thing, timed in turn in one run; ratios of their medians beside a goal."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

MISSING = "not installed: pip install -e .[bench]"


@dataclass
class Comparison:
    """Rates of several ways over the same amount of work (`unit` per second)."""

    title: str
    amount: float
    unit: str = "GB/s"
    rates: dict[str, list[float]] = field(default_factory=dict)
    worked: dict[str, list[float]] = field(default_factory=dict)
    """seconds of all cores in this process: what other programs on the machine change least"""

    def run(self, ways: dict[str, Callable[[], object]], rounds: int, before: Callable[[], None] | None = None) -> None:
        """Each way once to warm up, then all in turn; `before` each run, not timed."""
        for way in ways.values():
            way()
        for _ in range(rounds):
            for name, way in ways.items():
                if before:
                    before()
                started, worked = time.perf_counter(), time.process_time()
                way()
                self.rates.setdefault(name, []).append(self.amount / (time.perf_counter() - started))
                self.worked.setdefault(name, []).append(time.process_time() - worked)

    def median(self, name: str) -> float:
        return statistics.median(self.rates[name])

    def print(self) -> None:
        print(f"\n{self.title}: {self.unit}, median (lowest to highest) of {len(next(iter(self.rates.values())))}")
        for name, rates in self.rates.items():
            print(f"  {name:<44}{self.median(name):>9.2f}  ({min(rates):.2f} to {max(rates):.2f})")

    def ceiling(self, bare: str, peer: str) -> None:
        """What the machine allows at most, beside the goal that it stands under."""
        if peer in self.rates:
            print(f"  {'':<6}  the most possible here: {bare} / {peer}: {self.median(bare) / self.median(peer):.2f}")

    def ratio(self, ours: str, peer: str, goal: float) -> None:
        """One line of the table; a peer that was not run is not installed."""
        if peer not in self.rates:
            print(f"  {'':<6}{ours} / {peer}: {MISSING}")
            return
        found = self.median(ours) / self.median(peer)
        work = statistics.median(self.worked[peer]) / statistics.median(self.worked[ours])
        alone = "" if "workers" in peer and "0 workers" not in peer else f" ({work:.2f} by CPU time)"
        print(f"  {'ok' if found >= goal else 'BELOW':<6}{ours} / {peer}: {found:.2f}{alone}, goal {goal:g}")
