"""`hpc fsck RUN`: reads every record of a run's event files and says which files are damaged, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hpc.errors import UserError
from hpc.logs.event import EventError, decode
from hpc.logs.records import RecordReader
from hpc.logs.series import event_files

TITLES = ("file", "records", "bytes", "last step", "state")


class State(StrEnum):
    """Ending's four, and a file whose whole records are something else than events."""

    COMPLETE = "complete"
    TORN = "torn"
    ZEROS = "zeros"
    FLIPPED = "flipped"
    FOREIGN = "foreign"


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
    """Bytes up to the end of the last whole record: where the fault begins, if there is one."""
    last_step: int | None
    """Highest step of a summary; None without any."""
    state: State

    @property
    def damaged(self) -> bool:
        return self.state is not State.COMPLETE

    @property
    def sentence(self) -> str:
        """The state in words, with what to do."""
        rest = self.size - self.valid
        return {
            State.COMPLETE: "complete",
            State.TORN: f"torn tail: {rest} bytes of an unfinished record; nothing to do while the run is writing",
            State.ZEROS: f"zero hole at byte {self.valid}, {rest} bytes unread; read again later, NFS may fill it",
            State.FLIPPED: f"flipped bytes at byte {self.valid}, {rest} bytes unread; compare with another copy",
            State.FOREIGN: f"byte {self.valid} begins a record that is no event; TensorBoard did not write it",
        }[self.state]


def check(folder: Path) -> list[Finding]:
    """Findings of all event files in and under `folder`, by folder and attempt. Raises UserError without a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of event files; 'hpc ls' lists the runs")
    inner = sorted(path for path in folder.rglob("*") if path.is_dir())
    return [check_file(path, folder) for one in (folder, *inner) for path in event_files(one)]


def check_file(path: Path, folder: Path) -> Finding:
    """Reads one file to its end or its first fault; memory is bounded by its largest record."""
    reader = RecordReader(path)
    last: int | None = None
    for record in reader:
        try:
            event = decode(record.payload)
        except EventError:
            name = str(path.relative_to(folder))
            return Finding(name, reader.records - 1, reader.size, record.offset, last, State.FOREIGN)
        if event.values:
            last = max(event.step, last) if last is not None else event.step
    state = State(reader.ending.value)
    return Finding(str(path.relative_to(folder)), reader.records, reader.size, reader.valid, last, state)


def rows(findings: Iterable[Finding]) -> list[tuple[str, str, str, str, str]]:
    """The findings as a table under TITLES."""
    return [
        (one.file, str(one.records), str(one.size), "-" if one.last_step is None else str(one.last_step), one.sentence)
        for one in findings
    ]


def exit_code(findings: Iterable[Finding]) -> int:
    """1 where a file is damaged, a torn tail included; else 0."""
    return int(any(one.damaged for one in findings))
