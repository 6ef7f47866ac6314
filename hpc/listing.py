"""The lines of `hpc ls`: runs, sweeps as one line each, and the rows of a sweep with what differs between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hpc.ledger import Status, count_states
from hpc.records import between_rows, read_delta
from hpc.rundir import RunDir
from hpc.tables import NARROW
from hpc.units import short_time

_WIDE = ("attempts", "job", "changed")
"""Columns that a narrow terminal never shows."""
DROP_OF_RUNS = ("changed", "attempts", "job", "epoch", "best", "step", "")
DROP_OF_SWEEPS = ("changed", "best")
DROP_OF_ROWS = ("changed", "job", "epoch", "step", "", "best")


def run_lines(statuses: Iterable[Status], width: int) -> list[dict[str, str]]:
    """One line per run."""
    lines = [{"run": status.run, **_progress(status), "": _detail(status)} for status in statuses]
    hidden = _WIDE if width < NARROW else ()
    return [{title: text for title, text in line.items() if title not in hidden} for line in lines]


def _progress(status: Status) -> dict[str, str]:
    return {
        "state": status.state,
        "epoch": str(status.epoch),
        "step": str(status.step),
        "best": status.metric,
        "attempts": str(status.attempts),
        "job": f"{status.cluster} {status.job}".strip(),
        "changed": f"{short_time(status.age_s)} ago",
    }


def _detail(status: Status) -> str:
    return " ".join(status.detail.split())


def sweep_line(name: str, rows: Sequence[Status]) -> dict[str, str]:
    """One line for all rows of a sweep."""
    return {
        "sweep": name,
        "rows": f"{len(rows)} rows: {count_states(rows)}",
        "best": best_in_words(rows),
        "changed": f"{short_time(min((row.age_s for row in rows), default=0.0))} ago",
    }


def best_row(rows: Sequence[Status]) -> int | None:
    """The row whose monitored metric is best, None before the first evaluation."""
    known = [(row.best, number) for number, row in enumerate(rows) if row.best is not None]
    if not known:
        return None
    choose = min if rows[known[0][1]].direction == "min" else max
    best = choose(value for value, _ in known)
    return next(number for value, number in known if value == best)


def best_in_words(rows: Sequence[Status]) -> str:
    best = best_row(rows)
    return "" if best is None else f"{rows[best].metric} (row {best})"


def row_lines(runs: Sequence[RunDir], statuses: Sequence[Status]) -> list[dict[str, str]]:
    """One line per row of a sweep; the experiment's name is the same in all, so the id is shown alone."""
    lines = []
    for number, (status, text) in enumerate(zip(statuses, deltas_in_words(runs), strict=True)):
        progress = _progress(status)
        del progress["attempts"]
        state = progress.pop("state")
        head = {"run": status.run.rpartition("-")[2], "row": str(number), "state": state, "differs in": text}
        lines.append({**head, **progress, "": _detail(status)})
    return lines


def deltas_in_words(runs: Sequence[RunDir]) -> list[str]:
    """seed=3 lr=0.001: what differs between these runs, under the shortest names that tell it apart."""
    deltas = between_rows([read_delta(run) for run in runs])
    names = _short(list(deltas[0])) if deltas else {}
    return [" ".join(f"{names[key]}={_value(value)}" for key, value in delta.items()) for delta in deltas]


def _short(keys: Sequence[str]) -> dict[str, str]:
    last = [key.rpartition(".")[2] for key in keys]
    return {key: key if last.count(end) > 1 else end for key, end in zip(keys, last, strict=True)}


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")
