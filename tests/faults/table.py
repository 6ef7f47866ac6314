"""The fault table: all rows. `python -m tests.faults.table` writes them into docs/reliability.md."""

import re
from pathlib import Path

from tests.faults.failures import FAILURES
from tests.faults.fault import Fault
from tests.faults.layouts import LAYOUTS
from tests.faults.preemption import PREEMPTION
from tests.faults.starts import STARTS
from tests.faults.storage import FAULTS as STORAGE


def _place(fault: Fault) -> tuple[str, int]:
    """A2 before A10."""
    return fault.id[0], int(fault.id.split()[0][1:])


FAULTS = sorted([*PREEMPTION, *STORAGE, *LAYOUTS, *FAILURES, *STARTS], key=_place)
DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "reliability.md"
_PLACE = re.compile(r"(?<=<!-- rows -->\n).*(?=<!-- end of rows -->)", re.DOTALL)


def document(text: str) -> str:
    """docs/reliability.md with the rows as they are now."""
    head = "| | What is done | What must come of it | Where | Plays: test, soak |\n|--|--|--|--|--|\n"
    rows = [
        f"| {fault.id} | {fault.injection} | {fault.expectation} | {'SLURM' if fault.cluster else 'here'} | "
        f"{fault.here}, {fault.soak} |\n"
        for fault in FAULTS
    ]
    return _PLACE.sub(lambda _: head + "".join(rows), text)


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
