"""`hpc sync --status`: of each run what there is, what each sink has confirmed of it, and how old that is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc.errors import UserError, nearest
from hpc.logs import cursor, positions
from hpc.logs.blocks import last_event, whole_records
from hpc.logs.cursor import SETTLE_S, is_damage
from hpc.logs.following import size as in_bytes
from hpc.logs.positions import Position
from hpc.logs.records import Ending
from hpc.rundir import RunDir, all_runs, read_json
from hpc.units import short_time

TITLES = ("run", "bytes", "records", "last step", "age", "whole", "confirmed")
_BLOCK = 4 << 20
_LONG_S = 7 * 86400


@dataclass(frozen=True)
class Held:
    """What one sink has of one run."""

    sink: str
    bytes: int
    records: int
    last_step: int | None
    age_s: float | None
    """Since the sink confirmed it; None where it has confirmed nothing."""
    complete: bool
    behind: int
    """Bytes of whole records here that it has not confirmed."""


@dataclass(frozen=True)
class RunStatus:
    """One run. Ages in seconds."""

    run: str
    bytes: int
    """Of whole records in its event files."""
    rest: int
    """Bytes behind them: unfinished, or damaged."""
    damaged: dict[str, int]
    """Event files with a hole, a flipped byte or a torn tail that nobody completes any more: the byte where that is."""
    records: int
    last_step: int | None
    age_s: float | None
    """Since an event file was last written; None without any."""
    ended: bool
    source: str
    """Where it was synced from; empty of a run that was made here."""
    lag_s: float | None
    """Since the source was last looked at; None of a run that was made here."""
    missing: int
    """Bytes that the source had then, and that are not here."""
    sinks: tuple[Held, ...] = field(default=())

    @property
    def confirmed(self) -> bool:
        """Whether every sink has all of it, and so have we of the source; never of what is damaged."""
        if self.damaged:
            return False
        return not self.missing and bool(self.sinks or self.source) and not any(one.behind for one in self.sinks)


@dataclass(frozen=True)
class Found:
    """All runs of a folder."""

    folder: Path
    runs: tuple[RunStatus, ...]

    @property
    def exit_code(self) -> int:
        """0 where all is confirmed, 1 where something is behind or known to nobody."""
        return int(not all(run.confirmed for run in self.runs))

    @property
    def sentence(self) -> str:
        behind = [run.run for run in self.runs if not run.confirmed]
        if not self.runs:
            return f"no runs in {self.folder}"
        if not behind:
            return f"all of {len(self.runs)} runs is confirmed"
        shown = ", ".join(behind[:3]) + (f" and {len(behind) - 3} more" if len(behind) > 3 else "")
        words = f"{len(behind)} of {len(self.runs)} runs are not confirmed: {shown}; carry them with 'hpc sync'"
        damaged = [run.run.rpartition("/")[2] for run in self.runs if run.damaged]
        words += f"; {len(damaged)} damaged: 'hpc fsck {damaged[0]}' tells more" if damaged else ""
        silent = self._silent()
        return words + (f"; a sink that is gone for good: --status --forget {silent[0]!r}" if silent else "")

    def _silent(self) -> list[str]:
        """Sinks that are behind and have confirmed nothing for long."""
        held = [one for run in self.runs for one in run.sinks]
        lately = {one.sink for one in held if one.age_s is not None and one.age_s < _LONG_S}
        return sorted({one.sink for one in held if one.behind} - lately)

    def as_dict(self) -> dict[str, Any]:
        runs = [{**asdict(run), "confirmed": run.confirmed} for run in self.runs]
        return {"folder": str(self.folder), "confirmed": not self.exit_code, "runs": runs}


def forget(folder: Path, sink: str) -> str:
    """Ask no more for what a sink has; in a sentence. Raises UserError for one that nothing is known of."""
    known = sorted({position.sink for position in positions.read(folder)})
    if sink not in known:
        raise UserError(f"--forget {sink}: {folder} knows no such sink; {nearest(sink, known)}")
    return f"{sink} is forgotten with what it confirmed of {positions.forget(folder, sink)} runs; it is left as it is"


def look(folder: Path) -> Found:
    """Raises UserError without the folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of runs")
    known: dict[str, list[Position]] = {}
    for position in positions.read(folder):
        known.setdefault(position.run, []).append(position)
    sources = dict(_sources(folder))
    sinks = {position.sink for several in known.values() for position in several}
    runs = {run.path.resolve(): run for run in all_runs(folder)}  # a link beside its run is no other run
    return Found(folder, tuple(_status(folder, run, known, sources, sinks) for run in runs.values()))


def _sources(folder: Path) -> Iterator[tuple[str, tuple[cursor.RunCursor, float]]]:
    """Of each run that was synced into this folder its cursor, and when its source was last looked at."""
    for inner in sorted((folder / cursor.FOLDER).glob("????????")):
        try:
            texts = {path.name: path.read_text() for path in inner.glob("*.json")}
            looked = float(read_json(inner / "source.json").get("looked", 0))
        except (OSError, UserError):
            continue
        for name, one in cursor.parse(texts).items():
            yield name, (one, looked)


def _status(
    folder: Path,
    run: RunDir,
    known: dict[str, list[Position]],
    sources: dict[str, tuple[cursor.RunCursor, float]],
    sinks: set[str],
) -> RunStatus:
    name, now = _name(folder, run), time.time()
    mine = {position.sink: position for position in known.get(name, [])}
    origin, looked = sources.get(name, (None, 0.0))
    files = event_files(run)
    best = max(mine.values(), key=lambda position: position.size, default=None)
    whole, rest, records, last, damaged = _counted(run, files, best)
    held = [_held(sink, mine.get(sink), whole, now) for sink in sorted(sinks)]
    newest = max((path.stat().st_mtime for path in files), default=None)
    return RunStatus(
        run=name,
        bytes=sum(whole.values()),
        rest=rest,
        damaged=damaged,
        records=records,
        last_step=last,
        age_s=None if newest is None else max(now - newest, 0.0),
        ended=run.result.exists() or bool(origin and origin.ended),
        source=origin.source if origin else "",
        lag_s=max(now - looked, 0.0) if origin else None,
        missing=origin.behind if origin else 0,
        sinks=tuple(held),
    )


def _name(folder: Path, run: RunDir) -> str:
    """The run's path inside the folder; its own name where it is a link to elsewhere."""
    base = folder.resolve()
    return run.path.relative_to(base).as_posix() if run.path.is_relative_to(base) else run.name


def event_files(run: RunDir) -> list[Path]:
    """Every event file of a run, by path; hidden ones are none."""
    found = run.tensorboard.rglob("*tfevents*")
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def _held(sink: str, position: Position | None, whole: dict[str, int], now: float) -> Held:
    if position is None:
        return Held(sink, 0, 0, None, None, complete=False, behind=sum(whole.values()))
    behind = sum(max(size - position.files.get(name, 0), 0) for name, size in whole.items())
    age = max(now - position.confirmed, 0.0)
    return Held(sink, position.size, position.records, position.last_step, age, position.complete, behind)


def _counted(
    run: RunDir, files: list[Path], best: Position | None
) -> tuple[dict[str, int], int, int, int | None, dict[str, int]]:
    """Bytes of whole records by file, bytes behind them, records, last step, where files are damaged.

    Read on from what is confirmed.
    """
    names = {path: path.relative_to(run.path).as_posix() for path in files}
    starts = best.files if best and all(best.files.get(names[p], 0) <= p.stat().st_size for p in files) else {}
    records, last = (best.records, best.last_step) if best and starts else (0, None)
    whole, rest, damaged = {}, 0, {}
    for path, name in names.items():
        valid, more, step, ending = _scan(path, starts.get(name, 0))
        stat = path.stat()
        whole[name] = valid
        rest += max(stat.st_size - valid, 0)
        records += more
        last = last if step is None else max(step, last or 0)
        if is_damage(ending, run.result.exists() or time.time() - stat.st_mtime > SETTLE_S):
            damaged[name] = valid
    return whole, rest, records, last, damaged


def _scan(path: Path, start: int) -> tuple[int, int, int | None, Ending]:
    """Where the whole records from `start` on end, their number, the last step, and what lies behind them."""
    records, last, buffer, ending = 0, None, b"", Ending.COMPLETE
    with path.open("rb") as file:
        file.seek(start)
        while data := file.read(_BLOCK):
            block = whole_records(buffer := buffer + data)
            if block.valid:
                step, _ = last_event(buffer, block)
                last = step if last is None else max(step or 0, last)
            records, start, buffer = records + block.records, start + block.valid, buffer[block.valid :]
            ending = block.ending
            if ending in (Ending.ZEROS, Ending.FLIPPED):
                break
    return start, records, last, ending


def rows(found: Found) -> list[list[str]]:
    """Under TITLES."""
    return [
        [
            run.run,
            in_bytes(run.bytes),
            str(run.records),
            "-" if run.last_step is None else str(run.last_step),
            "-" if run.age_s is None else short_time(run.age_s),
            "damaged" if run.damaged else f"{in_bytes(run.rest)} more" if run.rest else "yes",
            "; ".join([*(_in_words(held, run) for held in run.sinks), *_origin(run)]) or "nowhere",
        ]
        for run in found.runs
    ]


def _in_words(held: Held, run: RunStatus) -> str:
    if held.behind:
        return f"{held.sink}: {in_bytes(held.behind)} behind"
    if held.age_s is None:
        return f"{held.sink}: nothing yet"
    word = "up to the damage" if run.damaged else "complete" if held.complete else "all"
    return f"{held.sink}: {word}, {short_time(held.age_s)} ago"


def _origin(run: RunStatus) -> list[str]:
    if not run.source or run.lag_s is None:
        return []
    missing = f"{in_bytes(run.missing)} behind" if run.missing else "all"
    return [f"from {run.source}: {missing}, {short_time(run.lag_s)} ago"]
