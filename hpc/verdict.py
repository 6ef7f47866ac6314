"""What follows the end of an attempt: a decision from what is known of this one and of those before it.

Nothing is read and nobody is asked here. Preemptions and clean stops are free, but for three in a row at the time limit
without a step: their limit is shorter than their start. The budget of a cause counts this run's failures of that cause
since its last new checkpoint or its last submission by hand; crashes, hangs and memory kills are counted together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpc.settings import Budgets

FINISHED, TOLD, STOPPED, BAD_INPUT, IN_VAIN = "finished", "told", "stopped", "bad input", "in vain"
NO_STEP = "no step"
"""A clean stop by the notice of the time limit, at the step where the attempt before had ended."""
CRASH, HANG, MEMORY, STORAGE, NODE = FAILURES = ("crash", "hang", "memory", "storage", "node")
"""What is tried again, until the budget of this name is used up."""
_PLURALS = {CRASH: "crashes", HANG: "hangs", MEMORY: "out of memory", STORAGE: "storage faults", NODE: "bad nodes"}
_SINGULARS = {CRASH: "crash", HANG: "hang", MEMORY: "out of memory", STORAGE: "storage fault", NODE: "bad node"}
_GATE = {CRASH, HANG, MEMORY}
"""What is counted together: the run's own failures, as which of them a fault shows is often chance."""
_NO_STEPS = 3
BACKOFF_S = (0, 60, 300)
"""Before the restarts after failures in a row; the last one for all that follow."""


@dataclass(frozen=True)
class Ending:
    """How an attempt has ended."""

    kind: str
    """One of FAILURES, or of the words before them."""
    words: str
    """For people."""
    obstacle: str = ""
    """Of a failure, why another attempt cannot be had, if so."""


@dataclass(frozen=True)
class Row:
    """The failures in a row before an attempt."""

    kinds: tuple[str, ...] = ()
    """The first one first."""
    step: int = 0
    """Of the last new checkpoint, 0 for none."""
    no_step: int = 0
    """Attempts that ended at the time limit without a step."""


@dataclass(frozen=True)
class Verdict:
    again: bool
    reason: str
    wait_s: int = 0
    """Until the next attempt may begin."""


def judge(run: str, ending: Ending, row: Row, budgets: Budgets) -> Verdict:
    """Whether the attempt is to be followed by another that we ask for, when, and why. `run`: its name."""
    if ending.kind == NO_STEP:
        return _without_step(run, ending, row)
    if ending.kind not in FAILURES:
        return Verdict(ending.kind == STOPPED, ending.words)
    if ending.obstacle:
        return Verdict(False, f"{ending.words}; {ending.obstacle}")
    kinds, allowed = [*row.kinds, ending.kind], int(getattr(budgets, ending.kind))
    own = _GATE if ending.kind in _GATE else {ending.kind}
    count = sum(kind in own for kind in kinds)
    if count > allowed:
        limit = f"launch.budgets.{ending.kind} is {allowed}"
        return Verdict(False, f"{tally(kinds, row.step)} ({limit}): {ending.words}; {_next(run)}")
    wait_s = BACKOFF_S[min(len(kinds), len(BACKOFF_S)) - 1]
    since = f" {_since(row.step)}" if row.step else ""
    later = f", in {wait_s} s" if wait_s else ""
    return Verdict(True, f"{ending.words}; restart {count} of {allowed}{since}{later}", wait_s)


def _without_step(run: str, ending: Ending, row: Row) -> Verdict:
    count = row.no_step + 1
    if count < _NO_STEPS:
        return Verdict(True, f"{ending.words}, where it began: {count} of {_NO_STEPS} attempts without a step")
    words = f"{count} attempts in a row ended at the time limit without a step: launch.time is too short for its start"
    return Verdict(False, f"{words}; 'hpc resume {run} launch.time=...' goes on with more")


def tally(kinds: Sequence[str], step: int) -> str:
    """3 crashes, 1 hang since step 120"""
    counts = Counter(kinds)
    parts = [f"{count} {'x ' * (kind == MEMORY)}{_name(kind, count)}" for kind, count in counts.items()]
    return f"{', '.join(parts)} {_since(step)}"


def _name(kind: str, count: int) -> str:
    return (_SINGULARS if count == 1 else _PLURALS)[kind]


def _since(step: int) -> str:
    return f"since step {step}" if step else "with nothing saved"


def _next(run: str) -> str:
    return f"'hpc why {run}' tells more, 'hpc resume {run}' goes on"


def without_advice(reason: str, run: str) -> str:
    """The reason without the commands that `hpc why` lists anyway."""
    return reason.removesuffix(f"; {_next(run)}").partition(f"; 'hpc resume {run}")[0]


def row_before(events: Iterable[Mapping[str, Any]], generation: int) -> Row:
    """The failures in a row before the end of this attempt, from the run's events in any order.

    An attempt that left no word of its end, as one that SLURM took down, counts neither way.
    """
    starts: dict[int, Mapping[str, Any]] = {}
    kinds: dict[int, str] = {}
    saved: dict[int, int] = {}
    ours: set[Any] = set()
    for event in events:
        number, what = int(event["generation"]), event["event"]
        if what == "start":
            starts[number] = event
        elif what == "end":
            kinds[number] = str(event.get("cause", ""))
        elif what == "checkpoint" and isinstance(event.get("step"), int):
            saved[number] = max(event["step"], saved.get(number, 0))
        elif what == "submit" and number:  # by the end of an attempt, where SLURM refuses to requeue
            ours.add(event.get("job"))
    row: list[str] = []
    step = no_step = 0
    for number in sorted(starts.keys() | kinds.keys() | saved.keys()):
        if number > generation:
            break
        if (begun := starts.get(number)) and not begun.get("restart") and begun.get("job") not in ours - {None}:
            row, no_step = [], 0
        if saved.get(number, 0) > step:
            row, step, no_step = [], saved[number], 0
        if number < generation and kinds.get(number) in FAILURES:
            row.append(kinds[number])
        no_step += number < generation and kinds.get(number) == NO_STEP
    return Row(tuple(row), step, no_step)


def last_step(events: Iterable[Mapping[str, Any]], generation: int) -> int:
    """Where the attempts before this one have left the run, by what the last of them that saved or stopped says."""
    steps: dict[int, int] = {}
    for event in events:
        number, step = int(event["generation"]), event.get("step", 0)
        if event["event"] in ("checkpoint", "signal") and number < generation and isinstance(step, int):
            steps[number] = max(step, steps.get(number, 0))
    return steps[max(steps)] if steps else 0
