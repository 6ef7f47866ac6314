"""Event files of one run from one end to the other, so that a TensorBoard that is open there is never misled.

- Only whole records whose checksums fit, appended in place: a viewer keeps its file open and its place in it.
- In the order in which TensorBoard reads them, an older file fully before a newer one: a viewer that meets older steps
  later forgets the newer ones.
- What the source has written anew comes under a new name (`.r001` behind the old one); the old one gets a hidden name.
- What comes late for an older file makes the newer ones come again, under a new name, without being sent again.
- The cursor is written after the bytes are on the disk, and before a name is changed: it may end at any byte.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hpc.errors import UserError
from hpc.logs.blocks import Block, last_event, whole_records
from hpc.logs.cursor import (
    SETTLE_S,
    FileCursor,
    RunCursor,
    delivered_name,
    generation_of,
    is_damage,
    replaced_name,
    waiting_name,
)
from hpc.logs.ends import End, names
from hpc.logs.records import Ending

BLOCK = 4 << 20
"""Bytes that are read, verified, appended and put down in the cursor at a time."""


class DestinationFailed(Exception):
    """The destination refuses what is written; in a sentence."""


class Foreign(Exception):
    """The destination holds another run of this name."""


class _WrittenAnew(Exception):
    """The source's bytes are not those that were delivered."""


@dataclass(frozen=True)
class Listed:
    """One run as the source listed it."""

    run: str
    sweep: bool
    events: dict[str, tuple[int, ...]]
    """Size, time (ns) and inode of each event file, by its path in the run."""
    others: dict[str, list[int]]
    """Size and time (ns) of each other file that is carried."""
    big: list[tuple[str, int]]
    """Files that are too large to be carried."""
    ended: bool
    phase: str

    @staticmethod
    def of(told: dict[str, Any]) -> Listed:
        events: dict[str, tuple[int, ...]] = {name: tuple(stat) for name, *stat in told["events"]}
        others = {name: [size, changed] for name, size, changed in told["others"]}
        big = [(name, size) for name, size in told["big"]]
        for name in (told["run"], *events, *others):  # another machine says so: nothing may lead out of the folder
            if not name or name.startswith("/") or {"", ".", ".."} & set(name.split("/")):
                raise UserError(f"{name!r}: the source lists what is no path inside a folder")
        return Listed(told["run"], told["sweep"], events, others, big, told["ended"], told["phase"])

    @property
    def newest(self) -> float:
        """When an event file was last written, seconds since 1970; 0 without any."""
        return max((stat[1] for stat in self.events.values()), default=0) / 1e9


@dataclass
class Told:
    """What one round did for one run."""

    size: int = 0
    """New bytes of event files."""
    records: int = 0
    damaged: int = 0
    """Event files that come up to their damage only."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Delivery:
    """One run, one round."""

    def __init__(
        self, source: End, dest: End, listed: Listed, cursor: RunCursor, now: float, save: Callable[[], None]
    ) -> None:
        """`now`: the source's clock, seconds since 1970. `save`: keeps the cursor at the destination."""
        self._source, self._dest, self._listed, self._cursor = source, dest, listed, cursor
        self._now, self._save = now, save
        self._there: dict[str, int] = {}
        self.told = Told()

    def deliver(self) -> Told:
        """Raises DestinationFailed, Foreign and Unreachable; a file that cannot be read is told as a problem."""
        if any(self._due(name) for name in self._listed.events):
            with self._writing():
                self._there = self._dest.look(self._cursor.run)
            for name in self._listed.events:
                self._tidy(name)
            for names in _folders(self._listed.events):
                self._folder(names)
        self._tell_damage()
        sizes = self._cursor.files
        self._cursor.behind = sum(
            max(stat[0] - (sizes[name].size if name in sizes else 0), 0) for name, stat in self._listed.events.items()
        )
        return self.told

    def _tell_damage(self) -> None:
        """In every round until it is repaired: a hole or a flipped byte, and what lies behind it, cannot be carried."""
        for name, stat in self._listed.events.items():
            known, run = self._cursor.files.get(name), self._cursor.run
            if known is None or known.seen != stat or known.ending == Ending.TORN:
                continue
            if is_damage(known.ending, self._listed.ended or self._settled(name)):
                self.told.damaged += 1
                where = f"{known.ending}, damaged at byte {known.size} of {stat[0]}"
                self.told.problems.append(f"{run}/{name}: {where}: hpc fsck {run.rpartition('/')[2]}")

    @property
    def finished(self) -> bool:
        """Whether the run has ended and all that can be had of its event files is here and has been compared."""
        known = [self._cursor.files.get(name) for name in self._listed.events]
        return self._listed.ended and all(one is not None and one.verified for one in known)

    def _due(self, name: str) -> bool:
        known = self._cursor.files.get(name)
        if known is None or known.seen != self._listed.events[name] or known.held or known.ending == Ending.ZEROS:
            return True
        return self._listed.ended and not known.verified and known.ending != Ending.FLIPPED

    def _folder(self, names: Sequence[str]) -> None:
        """The files of one folder, which TensorBoard shows as one run."""
        for index, name in enumerate(names):
            later = names[index + 1 :]
            try:
                known = self._known(name)
                if not self._due(name):
                    continue
                self._unhold(name, known)
                self._pull_whatever(name, known, later)
            except OSError as error:
                if error.errno != errno.ENOENT:  # gone since it was listed
                    self.told.problems.append(f"{self._cursor.run}/{name}: {error.strerror}")
                continue
            if later and not self._may_follow(name, known):
                self.told.notes.append(f"{later[0]} waits for the end of {name}")
                return

    def _may_follow(self, name: str, known: FileCursor) -> bool:
        if known.ending in (Ending.COMPLETE, Ending.FLIPPED):
            return True
        return self._settled(name)

    def _settled(self, name: str) -> bool:
        return self._now - self._listed.events[name][1] / 1e9 > SETTLE_S

    # --- what is there already --------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return f"{self._cursor.run}/{name}"

    def _active(self, name: str, known: FileCursor) -> str:
        return self._path(delivered_name(name, known.generation))

    def _known(self, name: str) -> FileCursor:
        """The cursor of a file; without one, what is there is compared with the source. Raises Foreign."""
        known = self._cursor.files.get(name)
        if known is None:
            known = self._adopt(name)
            self._cursor.files[name] = known
            self._save()
        there = waiting_name(name) if known.held else delivered_name(name, known.generation)
        if self._there.get(there, 0) < known.size:  # somebody has cut or removed it
            known.size, known.records, known.last_step, known.before = 0, 0, None, None
            known.seen, known.verified = (), False
        return known

    def _adopt(self, name: str) -> FileCursor:
        found = {g: size for there, size in self._there.items() if (g := generation_of(name, there)) is not None}
        if not found:
            return FileCursor()
        generation = max(found)
        size, path = found[generation], self._path(delivered_name(name, generation))
        with self._writing():
            here = self._dest.sum(path, size)
        if self._source.sum(self._path(name), size) != here:
            raise Foreign(f"{self._cursor.run}: the destination has another run of this name ({name} differs)")
        known = FileCursor(generation=generation)
        self._recount(name, known, size)
        return known

    def _recount(self, name: str, known: FileCursor, size: int) -> None:
        """Set the cursor to the last whole record of the first `size` bytes, that both ends have."""
        near = self._source if not self._source.place.host else self._dest
        path = self._path(name) if near is self._source else self._active(name, known)
        known.size, known.records, known.last_step = 0, 0, None
        buffer = b""
        while known.size + len(buffer) < size:
            at = known.size + len(buffer)
            data = near.read(path, at, min(BLOCK, size - at))[1]
            if not data:
                break
            block = whole_records(buffer := buffer + data)
            _advance(known, buffer, block)
            buffer = buffer[block.valid :]
        known.before = self._source.read(self._path(name), known.size, 0, fingerprint=True)[0]["print"]

    def _tidy(self, name: str) -> None:
        """Finish what was begun with the names of a file when a sync was killed."""
        known = self._cursor.files.get(name)
        if known is None:
            return
        active, waiting = delivered_name(name, known.generation), waiting_name(name)
        old = [there for there in self._there if (generation_of(name, there) or 0) < known.generation]
        old = [there for there in old if generation_of(name, there) is not None]
        if known.held and active in self._there and waiting not in self._there:
            known.held = False
        if known.held:
            if old and waiting not in self._there:
                self._move(old.pop(), waiting)
        elif waiting in self._there and active not in self._there and known.size:
            self._move(waiting, active)
        for there in old:
            self._replaced(name, there)

    def _replaced(self, name: str, there: str) -> None:
        """Out of TensorBoard's sight, and kept: the source's own may have been damaged."""
        generation, again = generation_of(name, there) or 0, 0
        while replaced_name(name, generation, again) in self._there:
            again += 1
        self._move(there, replaced_name(name, generation, again))

    def _move(self, there: str, to: str) -> None:
        with self._writing():
            self._dest.move(self._path(there), self._path(to))
        self._there[to] = self._there.pop(there)

    # --- newer files that must wait for an older one ----------------------------------------------------------------

    def _make_room(self, name: str, later: Sequence[str]) -> bool:
        """Before anything is added to a file: newer ones that were delivered already are hidden until it is whole.

        False where it may still change: once is enough.
        """
        files = self._cursor.files
        shown = [one for one in later if one in files and files[one].size and not files[one].held]
        if not shown:
            return True
        if not self._settled(name):
            self.told.notes.append(f"{name} has grown late: it comes when it has not changed for {SETTLE_S} s")
            return False
        for one in shown:
            files[one].held = True
            files[one].generation += 1
        self._save()
        for one in shown:
            self._tidy(one)
        return True

    def _unhold(self, name: str, known: FileCursor) -> None:
        """All older files are whole: show it again, under a name that a viewer has not seen."""
        if known.held:
            if (waiting := waiting_name(name)) in self._there:
                self._move(waiting, delivered_name(name, known.generation))
            known.held = False
            self._save()

    # --- bytes ------------------------------------------------------------------------------------------------------

    def _pull_whatever(self, name: str, known: FileCursor, later: Sequence[str]) -> None:
        try:
            self._pull(name, known, later)
            self._verify(name, known)
        except _WrittenAnew:
            if self._lost_there(name, known):
                return
            if not self._shrunk(name, known):
                if not self._make_room(name, later):
                    return
                self.told.notes.append(f"{name} was written anew: it comes under a new name")
                self._cursor.files[name] = fresh = FileCursor(generation=known.generation + 1)
                self._save()
                self._tidy(name)
                known.__dict__.update(fresh.__dict__)
                self._cursor.files[name] = known
                self._pull(name, known, later)
        stat = self._listed.events[name]
        if self._there.get(active := delivered_name(name, known.generation), 0) > known.size:
            with self._writing():  # a sync that was killed has put down more than the source holds now
                self._dest.call("cut", path=self._path(active), size=known.size)
        if self._listed.ended and known.ending == Ending.TORN:
            rest = stat[0] - known.size
            self.told.notes.append(f"{name}: torn, the last {rest} bytes are left out (see 'hpc fsck')")

    def _pull(self, name: str, known: FileCursor, later: Sequence[str]) -> None:
        buffer, first, ending = b"", bool(known.size), Ending.COMPLETE
        while True:
            told, data = self._source.read(self._path(name), known.size + len(buffer), BLOCK, fingerprint=first)
            if first and told["print"] != known.before:
                raise _WrittenAnew
            first = False
            block = whole_records(buffer := buffer + data)
            if block.valid:
                if not self._make_room(name, later):
                    return
                self._put(name, known, buffer, block)
                buffer = buffer[block.valid :]
            ending = block.ending
            if ending in (Ending.ZEROS, Ending.FLIPPED) or not data or known.size + len(buffer) >= told["size"]:
                break
        known.seen, known.ending = self._listed.events[name], str(ending)
        self._save()

    def _put(self, name: str, known: FileCursor, buffer: bytes, block: Block) -> None:
        active, at = delivered_name(name, known.generation), known.size
        with self._writing():
            told, _ = self._dest.call("put", buffer[: block.valid], path=self._path(active), at=at)
        _advance(known, buffer, block)
        known.before, known.verified = told["print"], False
        self._there[active] = max(self._there.get(active, 0), known.size)
        self.told.size += block.valid
        self.told.records += block.records
        self._save()

    def _verify(self, name: str, known: FileCursor) -> None:
        """Once after the run's end: the whole file."""
        if not self._listed.ended or known.ending not in (Ending.COMPLETE, Ending.TORN) or known.verified:
            return
        there = self._source.sum(self._path(name), known.size)
        if known.size:
            with self._writing():
                if there != self._dest.sum(self._active(name, known), known.size):
                    raise _WrittenAnew
        known.verified = True
        self._save()

    def _lost_there(self, name: str, known: FileCursor) -> bool:
        """A resumed attempt cuts its older files; without a new one a file is cut by accident, and ours stays."""
        size, more = self._listed.events[name][0], self._listed.events.keys() - self._cursor.files.keys()
        if not known.verified or not self._listed.ended or more or size >= known.size:
            return False
        self.told.damaged += 1
        self.told.problems.append(
            f"{self._cursor.run}/{name}: has {size} bytes at the source, {known.size} here that were compared when the "
            f"run had ended; what is here stays: copy it to the source, or remove it here, and sync again"
        )
        return True

    def _shrunk(self, name: str, known: FileCursor) -> bool:
        """A source that was cut, and is else what was delivered: cut it here, too, in place."""
        size = self._listed.events[name][0]
        if size >= known.size or not size:
            return False
        with self._writing():
            there = self._dest.sum(self._active(name, known), size)
        if self._source.sum(self._path(name), size) != there:
            return False
        self._recount(name, known, size)
        with self._writing():
            self._dest.call("cut", path=self._active(name, known), size=known.size)
        known.seen, known.verified = self._listed.events[name], False
        known.ending = str(Ending.COMPLETE if known.size == size else Ending.TORN)
        self._there[delivered_name(name, known.generation)] = known.size
        self.told.notes.append(f"{name} was cut to {size} bytes, and is so here")
        self._save()
        return True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What goes wrong at the destination ends the sync; at the source, it is told of one file."""
        try:
            yield
        except OSError as error:
            raise DestinationFailed(f"{error.filename or self._dest.place}: {error.strerror or error}") from None


def goes_on(one: Listed, cursor: RunCursor) -> bool:
    """Whether a run has more than it had when it was pruned here: then all of it comes again."""
    known = {name: file.seen[:1] for name, file in cursor.files.items()}
    if all(known.get(name) == tuple(stat[:1]) for name, stat in one.events.items()):
        return False
    cursor.files, cursor.others, cursor.pruned = {}, {}, 0.0
    return True


def strangers(source: End, dest: End, listed: Sequence[Listed], cursors: Mapping[str, RunCursor]) -> dict[str, str]:
    """Of these runs and sweeps those that are others than the destination's of their names: {run: why}.

    Known by their marks; without, by what was delivered of them, or an event file of both that begins alike. The rows
    of a sweep that is another, or one of whose rows is, stay behind with it: its list of rows names them all.
    """
    names = [one.run for one in listed]
    there = dest.marks(names)
    here = source.marks([name for name in names if there[name] is not None])
    found: dict[str, str] = {}
    for one in listed:
        mine, theirs, cursor = here.get(one.run), there[one.run], cursors.get(one.run)
        if mine and theirs:
            other = "it was first submitted or started another time" if not set(mine) & set(theirs) else ""
        elif theirs is None:
            if cursor and not cursor.pruned:  # removed there: it comes again, all of it
                cursor.files, cursor.others = {}, {}
            continue
        elif one.sweep or (cursor and cursor.files):
            continue
        else:
            other = _unlike(source, dest, one)
        if other:
            found[one.run] = f"{one.run}: the destination has another run of this name ({other})"
    sweeps = {one.run for one in listed if one.sweep}
    for sweep in {name.partition("/")[0] for name in found} & sweeps:
        why = found.get(sweep) or next(words for name, words in found.items() if name.startswith(f"{sweep}/"))
        found |= {name: why for name in names if name == sweep or name.startswith(f"{sweep}/")}
    return found


def _unlike(source: End, dest: End, one: Listed) -> str:
    """Whether two runs that tell nothing of themselves differ, by their files; what is of both is compared later."""
    there = {name: size for name, size in dest.look(one.run).items() if size and _visible(name)}
    if there:
        common = any(generation_of(name, other) is not None for name in one.events for other in there)
        return "" if common else f"it has {min(there)}"
    path = f"{one.run}/{names()['experiment']}"
    try:
        here, other = (end.read(path, 0, BLOCK)[1] for end in (source, dest))
    except OSError:  # not there, or told when it is carried
        return ""
    return "" if here == other else "another experiment"


def _visible(name: str) -> bool:
    base = name.rpartition("/")[2]
    return "tfevents" in base and not base.startswith(".")


def _advance(known: FileCursor, buffer: bytes, block: Block) -> None:
    if block.valid:
        step, when = last_event(buffer, block)
        known.size += block.valid
        known.records += block.records
        known.last_step = known.last_step if step is None else max(step, known.last_step or 0)
        known.wall_time = when or known.wall_time


def _folders(names: dict[str, Any]) -> list[list[str]]:
    """Event files by folder, in the order in which TensorBoard reads them: by name."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(name.rpartition("/")[0], []).append(name)
    return list(found.values())
