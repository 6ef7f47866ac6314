"""`hpc fsck RUN`: reads every record of a run's event files and says which files are damaged, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hpc.errors import UserError
from hpc.logs.salvage import Damage, Fault, survey
from hpc.logs.series import event_files

TITLES = ("file", "records", "bytes", "last step", "state")


class State(StrEnum):
    """The first fault of a file (hpc.logs.salvage.Fault), or none."""

    COMPLETE = "complete"
    TORN = "torn"
    ZEROS = "zeros"
    PAYLOAD = "flipped payload"
    HEADER = "flipped header"
    DUPLICATE = "duplicate"
    FOREIGN = "foreign"


_WORDS = {
    State.TORN: "a record without its end",
    State.ZEROS: "a hole of zero bytes (NFS may fill it: read again later)",
    State.PAYLOAD: "a record with flipped bytes",
    State.HEADER: "a header with flipped bytes",
    State.DUPLICATE: "records that stand there already",
    State.FOREIGN: "a record that is no event",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One event file."""

    file: str
    """Relative to the checked folder."""
    records: int
    """Whole records before the first fault."""
    size: int
    """Bytes."""
    valid: int
    """Bytes up to the end of the last whole record before the first fault."""
    last_step: int | None
    """Highest step of a summary, salvaged ones too; None without any."""
    state: State
    """The first fault."""
    salvaged: int
    """Whole records that a repair would keep, in the whole file."""
    damages: tuple[Damage, ...]
    """All faults, in their order."""
    writing: bool = False
    """The run is live, and its writer may go on with what is torn."""

    @property
    def damaged(self) -> bool:
        return self.state is not State.COMPLETE and not (self.writing and self.state is State.TORN)

    @property
    def sentence(self) -> str:
        """The state in words, with what a repair would keep and lose."""
        if self.state is State.COMPLETE:
            return "complete"
        if not self.damaged:
            return f"torn tail of {self.size - self.valid} bytes: the run is writing"
        told = [f"byte {one.begin}: {_WORDS[State(one.fault.value)]}, {_lost(one)}" for one in self.damages[:_MOST]]
        more = len(self.damages) - _MOST
        told += [f"{more} more faults"] * (more > 0)
        return "; ".join([*told, f"{self.salvaged} whole records can be kept"])


_MOST = 5


def _lost(one: Damage) -> str:
    size = f"{one.end - one.begin} bytes"
    if one.fault is Fault.DUPLICATE:
        return f"{size}, nothing lost"
    if one.after_step is None or one.before_step is None:
        after = "the beginning" if one.after_step is None else f"step {one.after_step}"
        return f"{size} lost after {after}" if one.before_step is None else f"{size} lost before step {one.before_step}"
    return f"{size} lost between steps {one.after_step} and {one.before_step}"


def check(folder: Path, writing: bool = False) -> list[Finding]:
    """Findings of all event files in and under `folder`, by folder and attempt; `writing`: of a live run.

    Raises UserError without a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of event files; 'hpc ls' lists the runs")
    inner = sorted(path for path in folder.rglob("*") if path.is_dir())
    return [check_file(path, folder, writing) for one in (folder, *inner) for path in event_files(one)]


def check_file(path: Path, folder: Path, writing: bool = False) -> Finding:
    """Reads one file to its end, past its faults; memory: its largest record, and 8 bytes per record."""
    found = survey(path)
    damages = tuple(found.damages)
    state = State(damages[0].fault.value) if damages else State.COMPLETE
    name = str(path.relative_to(folder))
    return Finding(name, found.first, found.size, found.valid, found.last_step, state, found.records, damages, writing)


def rows(findings: Iterable[Finding]) -> list[tuple[str, str, str, str, str]]:
    """The findings as a table under TITLES."""
    return [
        (one.file, str(one.records), str(one.size), "-" if one.last_step is None else str(one.last_step), one.sentence)
        for one in findings
    ]


def exit_code(findings: Iterable[Finding]) -> int:
    """1 where a file is damaged, a torn tail of an ended run included; else 0."""
    return int(any(one.damaged for one in findings))
