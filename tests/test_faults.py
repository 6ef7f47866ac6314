"""Plays the fault table (tests/faults/table.py), several rows at a time; each row is a test of its own.

Each is played `here` times; under HPC_SOAK=1 `soak` times, and docs/soak.txt gets a line per row in the end.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import MEASURED
from tests.faults.fault import Fault
from tests.faults.table import DOCUMENT, FAULTS, document
from tests.slurm.cluster import obstacle, reap

SOAK = os.environ.get("HPC_SOAK") == "1"
TOLD = DOCUMENT.with_name("soak.txt")
AT_A_TIME = 4  # most of them wait most of their time
LONGEST_FIRST = ("A1 A3 A10", "A5 E1", "A6 A7", "D1")
NAMES = [f"{fault.id.replace(' ', '-')}-{number}" for number, fault in enumerate(FAULTS)]


@dataclass
class Plays:
    """A row's plays: what is under way, and what has come of it."""

    fault: Fault
    started: list["Future[tuple[str, float]]"] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        count = f"{len(self.measured)}/{len(self.started)}"
        told = worst(self.measured) if self.measured else ""
        return f"{self.name}{count:>9}  {told}  ({self.seconds:.0f} s at most)"

    @property
    def name(self) -> str:
        return f"{self.fault.id:9} {self.fault.injection:100} "


def worst(measured: Sequence[str]) -> str:
    """One text for all: each number is the highest of those at its place; where the words differ, one for each."""
    number, kinds = re.compile(r"\d+(?:\.\d+)?"), dict[tuple[str, ...], list[str]]()
    for text in measured:
        kinds.setdefault(tuple(number.split(text)), []).append(text)
    told = []
    for texts in kinds.values():
        highest = iter([max(column, key=float) for column in zip(*map(number.findall, texts), strict=True)])
        told.append(number.sub(lambda _, highest=highest: next(highest), texts[0]))  # type: ignore[misc]
    return " / ".join(told)


def told_with(text: str, table: Sequence[Plays]) -> str:
    """The lines of docs/soak.txt, those of the rows that were played now in the place of older ones."""
    lines = []
    for plays in table:
        older = next((line for line in text.splitlines() if line.startswith(plays.name)), None)
        lines.append(plays.line() if plays.measured or plays.failed else older)
    return "".join(f"{line}\n" for line in lines if line)


def _plays(fault: Fault) -> int:
    return fault.soak if SOAK else fault.here


def _timed(fault: Fault, folder: Path, seed: int) -> tuple[str, float]:
    started = time.monotonic()
    folder.mkdir(parents=True)
    return fault.play(folder, seed), time.monotonic() - started


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[list[Plays]]:
    """The plays of every row that is asked for, started; a row's test waits for its own."""
    base, table = tmp_path_factory.mktemp("faults"), [Plays(fault) for fault in FAULTS]
    asked = {item.name.partition("[")[2].rstrip("]") for item in request.session.items}
    wanted = [number for number, name in enumerate(NAMES) if name in asked]
    if obstacle():
        wanted = [number for number in wanted if not FAULTS[number].cluster]
    reap()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for number in sorted(wanted, key=lambda number: FAULTS[number].id not in LONGEST_FIRST):
            fault = FAULTS[number]
            for seed in range(_plays(fault)):
                folder = base / NAMES[number] / str(seed)
                table[number].started.append(pool.submit(_timed, fault, folder, seed))
        yield table
        pool.shutdown(cancel_futures=True)
    if SOAK:
        TOLD.write_text(told_with(TOLD.read_text() if TOLD.exists() else "", table))


def _mark(number: int) -> object:
    marks = [pytest.mark.slurm] if FAULTS[number].cluster else []
    return pytest.param(number, id=NAMES[number], marks=marks)


@pytest.mark.parametrize("number", [_mark(number) for number in range(len(FAULTS)) if _plays(FAULTS[number])])
def test_fault(number: int, stage: list[Plays], record_property: Callable[[str, object], None]) -> None:
    plays, fault = stage[number], FAULTS[number]
    for seed, play in enumerate(plays.started):
        try:
            measured, seconds = play.result()
        except Exception as error:  # the others of this row count all the same
            plays.failed.append(f"number {seed}: {type(error).__name__}: {error}")
        else:
            plays.measured.append(measured)
            plays.seconds = max(plays.seconds, seconds)
    record_property(MEASURED, plays.line())
    if plays.failed:
        told = [f"{fault.id} {fault.injection}: {fault.expectation}", *plays.failed]
        pytest.fail("\n\n".join(told), pytrace=False)


def test_the_document_lists_the_rows_as_they_are() -> None:
    text = DOCUMENT.read_text()
    assert document(text) == text, "write them anew: python -m tests.faults.table"


def test_the_line_of_a_row_tells_the_worst_of_its_plays() -> None:
    assert worst(["0 steps lost, save 0.4 s", "2 steps lost, save 0.11 s"]) == "2 steps lost, save 0.4 s"
    assert worst(["a 1", "b 7", "a 3"]) == "a 3 / b 7"


def test_a_soak_of_some_rows_leaves_the_lines_of_the_others() -> None:
    def lines(word: str, *numbers: int) -> list[Plays]:
        return [Plays(fault, measured=[word] if number in numbers else []) for number, fault in enumerate(FAULTS)]

    whole = told_with("", lines("<old>", *range(len(FAULTS))))
    assert whole.count("<old>") == len(FAULTS), "two rows have one name"
    text = told_with(whole, lines("<new>", 3, 7))
    assert (text.count("<old>"), text.count("<new>")) == (len(FAULTS) - 2, 2) and "<new>" in text.splitlines()[7]
