"""`hpc prune`: takes away runs that a sink has confirmed, and that are older than asked; else nothing, and says why.

Right before anything is removed, every byte of it is compared with the sink's, by sums. What is only shown compares the
other files by their sizes. A server (mlflow:) answers for event files only, by what it confirmed and says now.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from hpc.errors import UserError
from hpc.ledger import look
from hpc.logs import cursor, positions
from hpc.logs.cursor import RunCursor, delivered_name
from hpc.logs.ends import End, LocalEnd, Place, Unreachable, end_of, here, place_of, portions, same_folder
from hpc.logs.positions import Position
from hpc.logs.salvage import survey
from hpc.logs.sinks import Sink, SinkError, SinkGone, is_sink, lacks, sink_of
from hpc.logs.sync import Carried, more_names
from hpc.rundir import RunDir, all_runs, locked, write_text
from hpc.rundir import rows as rows_of
from hpc.units import short_time

TITLES = ("run", "bytes", "files", "age", "what")
PARTS = ("logs", "checkpoints")
_OVER = frozenset(["finished", "failed", "cancelled", "lost"])
_TAKEN = ".pruned-"
_MEETING = f"{positions.FOLDER}/meeting"
"""Where it is tried whether a sink is the folder itself."""
_ITSELF = "is this folder itself"
_OTHER = " as it is here; remove it there, 'touch' it here, and sync again"
_Stats = dict[str, list[int]]
"""Of the files of a run, as a sink has them: size, and time (ns) where the sink is believed for what it confirmed."""


@dataclass
class Candidate:
    """One run, or a part of it."""

    run: RunDir
    name: str
    """Its path inside the runs folder."""
    age_s: float
    files: list[Path]
    """What would be removed."""
    size: int
    kept: str = ""
    """Why nothing is removed, in words; empty where it may go."""
    sink: str = ""
    """Who has it."""


def candidates(
    folder: Path, older_s: float, only: str | None, sink: str | None, unasked: bool = False
) -> list[Candidate]:
    """Every run of the folder, with the reason where it stays. Raises UserError.

    `unasked`: a folder that cannot be asked from here is believed for what it has confirmed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of runs")
    if only is not None and only not in PARTS:
        raise UserError(f"--only {only}: no such part; valid: {', '.join(PARTS)}")
    runs = all_runs(folder)
    known = positions.read(folder)
    if sink is not None and sink not in {one.sink for one in known}:
        told = ", ".join(sorted({one.sink for one in known})) or "none; feed one with 'hpc sync'"
        raise UserError(f"--sink {sink}: has confirmed nothing of {folder}; valid: {told}")
    with _Sinks(folder, unasked) as asked:
        found = [
            _candidate(folder, one.run, one.status.state, one.status.age_s, older_s, only, known, sink, asked)
            for one in look(runs)
        ]
        return found if only else _whole_sweeps(found, asked)


def _candidate(
    folder: Path,
    run: RunDir,
    state: str,
    age_s: float,
    older_s: float,
    only: str | None,
    known: Sequence[Position],
    sink: str | None,
    asked: _Sinks,
) -> Candidate:
    base = folder.resolve()
    name = run.path.relative_to(base).as_posix() if run.path.is_relative_to(base) else run.name
    found = Candidate(run, name, age_s, [], 0)
    if not run.path.is_relative_to(base) or any((folder / part).is_symlink() for part in _parts(name)):
        found.kept = "is a link to elsewhere"
        return found
    found.files = [path for start in _starts(run, only) for path in _files(start)]
    found.size = sum(path.lstat().st_size for path in found.files)
    newest = max((path.lstat().st_mtime for path in found.files), default=0.0)
    found.age_s = max(min(age_s, time.time() - newest), 0.0)
    if state not in _OVER:
        found.kept = state
    elif found.age_s < older_s:
        found.kept = f"is {short_time(found.age_s)} old"
    elif not found.files:
        found.kept = "has nothing of this"
    elif leads := _leads_away(run, found.files):
        found.kept = leads
    else:
        mine = [one for one in known if one.run == name and sink in (None, one.sink)]
        found.sink, found.kept = asked.who_has(found, mine, only)
    return found


def _parts(name: str) -> Iterator[str]:
    """a/b -> a, a/b"""
    parts = name.split("/")
    for count in range(1, len(parts) + 1):
        yield "/".join(parts[:count])


def _starts(run: RunDir, only: str | None) -> list[Path]:
    return {None: [run.path], "logs": [run.tensorboard, run.logs], "checkpoints": [run.checkpoints]}[only]


def _files(start: Path, without: Collection[Path] = ()) -> list[Path]:
    """Regular files and links below a folder, by path; no link is followed. Hidden ones are no one's loss."""
    if start.is_symlink():
        return [start]
    found = []
    for where, folders, names in os.walk(start):
        links = [name for name in folders if Path(where, name).is_symlink()]
        folders[:] = [name for name in folders if Path(where, name) not in without and not name.startswith(".")]
        found += [Path(where, name) for name in [*names, *links] if not name.startswith(".")]
    return sorted(found)


def _leads_away(run: RunDir, files: Sequence[Path]) -> str:
    """A link out of the run (out of its sweep, of a row): no sink has what it leads to, nor the link."""
    home = f"{run.path.parent if run.in_sweep else run.path}/"
    for path in files:
        if path.is_symlink() and not f"{(target := os.path.realpath(path))}/".startswith(home):
            return f"{path.relative_to(run.path)} is a link to {target}, and no sink has links; remove it first"
    return ""


def _whole_sweeps(found: list[Candidate], asked: _Sinks) -> list[Candidate]:
    """A sweep goes as a whole, or not: its list of rows names them all, and its code is theirs."""
    rows = [one for one in found if one.run.in_sweep]
    stays = {one.run.path.parent: one.name for one in rows if one.kept}
    for one in rows:
        sweep = one.run.path.parent
        if sweep not in stays and (missing := asked.missing_of_sweep(one.run, one.sink)):
            stays[sweep] = missing
        if not one.kept and sweep in stays:
            one.kept = f"its sweep stays: {stays[sweep]}"
    return found


class _Sinks:
    """Sinks that are folders, asked what they have."""

    def __init__(self, folder: Path, unasked: bool, summed: bool = False) -> None:
        """`summed`: all files are compared by their sums, not event files alone."""
        self._folder, self._unasked, self._summed = folder, unasked, summed
        self._ends: dict[str, tuple[End, dict[str, _Stats]] | str] = {}
        self._servers: dict[str, Sink | None] = {}
        """None: it does not answer."""

    def __enter__(self) -> _Sinks:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._ends.values():
            if not isinstance(one, str):
                one[0].close()

    def who_has(self, found: Candidate, known: Sequence[Position], only: str | None) -> tuple[str, str]:
        """The sink that has all of a candidate's files, or why there is none."""
        why = "is confirmed by no sink; 'hpc sync' feeds one"
        for position in known:
            if not position.complete:
                why = f"is not complete in {position.sink}"
                continue
            try:
                why = self._missing(position, found, only)
            except (Unreachable, OSError) as error:
                why = f"{position.sink} cannot be asked: {error}"
            if not why:
                return position.sink, ""
        return "", why

    def _missing(self, position: Position, found: Candidate, only: str | None) -> str:
        """What this sink lacks, in words; nothing where it has all."""
        if is_sink(position.sink):
            return self._by_its_word(position, found, only)
        end, held = self._held(position.sink, position.run)
        if isinstance(end, str):
            return end
        mine = {path.relative_to(found.run.path).as_posix(): path for path in found.files if not path.is_symlink()}
        others = {inside: path for inside, path in mine.items() if inside not in position.files}
        unlike = _unlike(others, held) or _compare_events(end, position, found)
        if not unlike and end and self._summed:
            unlike = _summed_unlike(end, position.run, others)
        return f"{unlike[0]} is not in {position.sink}{unlike[1]}" if unlike else ""

    def _held(self, sink: str, run: str) -> tuple[End | str | None, _Stats]:
        """The end to ask (None: it is believed; a sentence: it is not), and what it has of a run's other files."""
        end = self._end(sink)
        if not isinstance(end, str):
            return end[0], end[1].get(run, {})
        if end.endswith(_ITSELF):
            return end, {}
        if not self._unasked:
            return f"{end}; --unasked takes its word", {}
        try:
            carried = json.loads(positions.carried_path(self._folder, sink, run).read_text())
            return None, {name: [int(one) for one in stat] for name, stat in carried.items()}
        except (OSError, ValueError):
            return f"{sink} has left no list of what it has", {}

    def missing_of_sweep(self, row: RunDir, sink: str) -> str:
        """A file of a row's sweep, beside its rows, that this sink lacks."""
        sweep = row.path.parent
        end, held = self._held(sink, sweep.name)
        if isinstance(end, str):
            return end
        files = _files(sweep, without={one.path for one in rows_of(sweep)})
        if leads := _leads_away(row, files):
            return leads
        mine = {path.relative_to(sweep).as_posix(): path for path in files if not path.is_symlink()}
        unlike = _unlike(mine, held)
        if not unlike and end and self._summed:
            try:
                unlike = _summed_unlike(end, sweep.name, mine)
            except (Unreachable, OSError) as error:
                return f"{sink} cannot be asked: {error}"
        return f"{unlike[0]} is not in {sink}{unlike[1]}" if unlike else ""

    def _by_its_word(self, position: Position, found: Candidate, only: str | None) -> str:
        if only != "logs" or not self._unasked:
            return (
                f"{position.sink} has scalars and pictures of its event files alone: sync it to a folder, "
                f"or take its word by --only logs --unasked"
            )
        if lost := self._lost_by(position.sink, found.run):
            return f"{position.sink} {lost}"
        mine = {path: path.relative_to(found.run.path).as_posix() for path in found.files}
        found.files = [p for p, name in mine.items() if position.files.get(name, -1) >= p.lstat().st_size]
        found.size = sum(path.lstat().st_size for path in found.files)
        return "" if found.files else f"nothing of it is in {position.sink}"

    def _lost_by(self, name: str, run: RunDir) -> str:
        """What a server that answers lacks of a run now; one that does not answer is believed."""
        try:
            if name not in self._servers:
                self._servers[name] = None
                self._servers[name] = sink_of(name)
            server = self._servers[name]
            return lacks(run, look([run])[0].status, server) if server else ""
        except SinkGone:
            self._servers[name] = None
            return ""
        except SinkError as error:
            return f"does not tell what it has: {error}"
        except UserError:  # its client is not installed here
            return ""

    def _end(self, sink: str) -> tuple[End, dict[str, _Stats]] | str:
        """A sink, opened once, and what it has by run; why it cannot be asked."""
        if sink not in self._ends:
            self._ends[sink] = self._open(sink)
        return self._ends[sink]

    def _open(self, sink: str) -> tuple[End, dict[str, _Stats]] | str:
        place = place_of(sink.removeprefix(f"{here()}:"))
        try:
            end = end_of(place, batch=True)
            if same_folder(LocalEnd(Place("", str(self._folder))), end, _MEETING):
                end.close()
                return f"{sink} {_ITSELF}"
            everything = Carried(tuple(more_names()), 1 << 62)
            told = json.loads(zlib.decompress(end.call("list", **everything.fields())[1]))
        except (Unreachable, UserError, OSError) as error:
            return f"{sink} cannot be asked: {error}"
        files = {one["run"]: {name: [size] for name, size, *_ in one["others"]} for one in told["runs"]}
        return end, files


def _unlike(mine: Mapping[str, Path], held: _Stats) -> tuple[str, str] | None:
    """The first of these files that is missing there or has another size (and time, where it is known), and a word."""
    for inside, path in mine.items():
        stat, there = path.lstat(), held.get(inside, [-1])
        if there != [stat.st_size, stat.st_mtime_ns][: len(there)]:
            top = inside.split("/", maxsplit=1)[0]
            return inside, f" (hpc sync --with {top})" if top in more_names() else ""
    return None


def _summed_unlike(end: End, run: str, mine: Mapping[str, Path]) -> tuple[str, str] | None:
    """Likewise the first that has another content."""
    for some in portions({inside: path.lstat().st_size for inside, path in mine.items()}):
        sizes = {inside: mine[inside].lstat().st_size for inside in some}
        there = end.sums({f"{run}/{inside}": size for inside, size in sizes.items()})
        for inside, size in sizes.items():
            if there[f"{run}/{inside}"] != _sum(mine[inside], size):
                return inside, _OTHER
    return None


def _compare_events(there: End | None, position: Position, found: Candidate) -> tuple[str, str] | None:
    """Every byte that the sink confirmed, in both places; and that no whole record is behind them."""
    cursors = [text for text in _cursors(there) if text.run == position.run] if there else []
    for name, size in position.files.items():
        mine = found.run.path / name
        if mine not in found.files:
            continue
        generation = next((one.files[name].generation for one in cursors if name in one.files), 0)
        path = f"{position.run}/{delivered_name(name, generation)}"
        here = mine.stat().st_size
        same = here >= size and (not there or there.sum(path, size) == _sum(mine, size))
        if not same:
            return name, _OTHER
        if here > size and any(end > size for _, end in survey(mine).kept):
            return name, " as it is here; it holds more, sync again"
    return None


def _cursors(end: End) -> Iterator[RunCursor]:
    for folder in end.call("folders", path=cursor.FOLDER)[0]["names"]:
        yield from cursor.parse(end.load(f"{cursor.FOLDER}/{folder}")).values()


def _sum(path: Path, size: int) -> str | None:
    return LocalEnd(Place("", str(path.parent))).sum(path.name, size)


def remove(
    folder: Path, chosen: Sequence[Candidate], older_s: float, only: str | None, unasked: bool = False
) -> Iterator[str]:
    """Remove what may go, each checked again right before; one sentence each."""
    yield from _sweep_up(folder)
    groups: dict[Path, list[Candidate]] = {}
    for one in chosen:
        path = one.run.path.parent if one.run.in_sweep and only is None else one.run.path
        groups.setdefault(path, []).append(one)
    for path, several in groups.items():
        try:
            yield _remove(folder, several, path, older_s, only, unasked)
        except (OSError, UserError, Unreachable) as error:
            yield f"{path.name} stays: {error}"


def _remove(
    folder: Path, several: Sequence[Candidate], path: Path, older_s: float, only: str | None, unasked: bool
) -> str:
    known = positions.read(folder)
    with _Sinks(folder, unasked, summed=True) as asked, ExitStack() as leases:
        for one in several:
            if not leases.enter_context(locked(one.run.lease, wait=False)):
                return f"{one.name} stays: another has its lease"
            now = look([one.run])[0].status
            again = _candidate(folder, one.run, now.state, now.age_s, older_s, only, known, one.sink, asked)
            if again.kept:
                return f"{one.name} stays: {again.kept}"
            if only:
                _unlink(again, only)
                return f"{one.name}: {only} removed, {one.sink} has them"
        if path != several[0].run.path and (missing := asked.missing_of_sweep(several[0].run, several[0].sink)):
            return f"{path.name} stays: {missing}"
        for one in several:
            _forget(folder, one.name)
        taken = path.with_name(f"{_TAKEN}{positions.quoted(path.name)}")
        path.rename(taken)  # at once out of every list; a kill leaves a hidden folder, which the next prune removes
        try:
            _clear(taken)
        except OSError as error:
            return f"{path.name} removed, {several[0].sink} has it; but {_left(taken, error)}"
    return f"{path.name} removed, {several[0].sink} has it"


def _unlink(one: Candidate, only: str) -> None:
    """Its files, and the folders that are empty then: one without a checkpoint in it would look like one."""
    for file in one.files:
        file.unlink()
    for start in _starts(one.run, only):
        for where, folders, _ in os.walk(start, topdown=False):
            for name in folders:
                with suppress(OSError):
                    Path(where, name).rmdir()


def _forget(folder: Path, run: str) -> None:
    """A run that was brought here from elsewhere is not brought again."""
    for inner in (folder / cursor.FOLDER).glob("????????"):
        path = inner / f"{positions.quoted(run)}.json"
        with suppress(OSError):
            for one in cursor.parse({path.name: path.read_text()}).values():
                one.pruned = round(time.time(), 3)
                write_text(path, one.text())


def _sweep_up(folder: Path) -> Iterator[str]:
    """What a killed prune left; a sentence for each that stays."""
    for path in folder.glob(f"{_TAKEN}*"):
        if path.is_dir() and not path.is_symlink():
            try:
                _clear(path)
            except OSError as error:
                yield _left(path, error)


def _clear(path: Path) -> None:
    """Remove a folder; what is read-only in it but ours goes, too. Raises OSError."""
    path.chmod(0o700)
    for where, folders, _ in os.walk(path):
        for inner in (Path(where, name) for name in folders):
            if not inner.is_symlink():
                inner.chmod(0o700)
    shutil.rmtree(path)


def _left(path: Path, error: OSError) -> str:
    return f"{path} could not be removed whole: {error.filename or ''}: {error.strerror or error}"
