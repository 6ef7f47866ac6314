"""`hpc sync SRC DEST`: runs from one machine to another, again and again, what is new alone."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc.errors import UserError
from hpc.logs import positions
from hpc.logs.cursor import ASIDE, LOCK, RunCursor, folder_of, parse
from hpc.logs.deliver import Delivery, DestinationFailed, Foreign, Listed, Told, goes_on, strangers
from hpc.logs.ends import End, Place, RemoteEnd, Unreachable, end_of, here, names, same_folder
from hpc.logs.positions import Position, quoted
from hpc.logs.records import Ending
from hpc.rundir import RunDir

RSYNC = "rsync"
_VANISHED, _PARTIAL = 24, 23  # rsync's exit codes
_SILENT_S = 120
_ELSEWHERE = "choose another destination, or remove it there"


class Busy(Exception):
    """Another sync writes to this destination; says who."""


@dataclass(frozen=True)
class Carried:
    """What is carried beside the event files."""

    more: tuple[str, ...] = ()
    """Of checkpoints, code and quarantine, what was asked for."""
    most: int = 100_000_000
    """Bytes of the largest other file that is carried unasked."""

    def fields(self) -> dict[str, Any]:
        return {"carried": carried_names(), "more": list(self.more), "most": self.most}


def carried_names() -> list[str]:
    """Files and folders of a run that are always carried; lists, report, fsck and board need no more."""
    run = RunDir("run")
    texts = [run.experiment, run.data, run.delta, run.step, run.script, run.submit, run.state, run.stop]
    folders = [run.events, run.logs, run.tensorboard, run.figures, run.predictions, run.usage, run.ledger]
    return [path.name for path in [*texts, run.metrics, run.result, run.autotune, *folders]]


def more_names() -> list[str]:
    """Folders that are carried only when they are asked for."""
    run = RunDir("run")
    return [run.checkpoints.name, run.code.name, run.quarantine.name]


@dataclass
class Line:
    """One run after a round, for people."""

    run: str
    phase: str
    ended: bool
    size: int
    """Bytes of event files delivered so far."""
    records: int
    last_step: int | None
    there_s: float | None
    """Age of the newest record at the source, in seconds; None without any."""
    here_s: float | None
    """Age of the newest record that was delivered."""
    behind: int
    """Bytes that are still missing."""
    damaged: int = 0
    """Event files that came up to their damage only."""


@dataclass
class Round:
    """What one round did."""

    lines: list[Line] = field(default_factory=list)
    size: int = 0
    """New bytes of event files."""
    records: int = 0
    others: int = 0
    """Other files that were carried."""
    moved: int = 0
    """Bytes over the wire, all told, of the frames."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Session:
    """Both ends, open and locked; `close` frees them."""

    def __init__(self, source: Place, dest: Place, carried: Carried, batch: bool = False) -> None:
        """Raises UserError, Unreachable, Busy."""
        if source.host and dest.host:
            raise UserError(f"{source} and {dest} are both elsewhere: run this on one of them")
        self._carried = carried
        self._touched: set[str] = set()
        """Runs of which other files were carried in this round."""
        self._same: dict[str, list[int] | None] = {}
        """Runs that are those of the destination, or are not there yet, with size and time of their experiment."""
        self._looked: set[str] = set()
        """Runs whose other files were looked for at the destination."""
        self.source = end_of(source, batch=batch)
        try:
            self.dest = end_of(dest, create=True, batch=batch)
        except BaseException:
            self.source.close()
            raise
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        source, dest = self.source, self.dest
        if not source.place.host and not dest.place.host:
            inner, outer = sorted((Path(source.root), Path(dest.root)), key=lambda path: -len(path.parts))
            if inner.is_relative_to(outer):
                raise UserError(f"{source.root} and {dest.root}: one is in the other; choose another destination")
        told, _ = dest.call("lock", path=LOCK, holder=f"{here()} (process {os.getpid()})")
        if told["taken"] is False:
            raise Busy(f"another sync writes to {dest.place}: {told['holder'] or 'somewhere'}")
        if same_folder(dest, source, ASIDE):
            raise UserError(f"{source.place} and {dest.place} are one folder; choose another destination")
        self.source_name = f"{source.place.host}:{source.root}" if source.place.host else f"{here()}:{source.root}"
        by_hand = dest.place.host or source.place.host
        # As the source's machine would name it: status and prune there ask by this name.
        self.sink = str(dest.place) if dest.place.host else f"{here()}:{dest.root}" if by_hand else dest.root
        self._cursors = parse(dest.load(folder_of(self.source_name)))
        self._confirmed = self._read_positions()
        self._aside = str(dest.call("fresh", path=ASIDE)[0]["path"])

    def _read_positions(self) -> dict[str, str]:
        folder = positions.folder_of(Path(), self.sink).as_posix()
        try:
            return {name: json.dumps(json.loads(text)) for name, text in self.source.load(folder).items()}
        except (OSError, ValueError):
            return {}

    def close(self) -> None:
        for end in (self.source, getattr(self, "dest", None)):
            if end:
                end.close()

    # --- one round --------------------------------------------------------------------------------------------------

    def round(self) -> Round:
        """Carry what is new. Raises DestinationFailed and Unreachable; what failed of single files is told."""
        began, moved = time.monotonic(), self.source.moved + self.dest.moved
        about, listing = self.source.call("list", **self._carried.fields())
        if about["run"]:
            raise UserError(f"{self.source.place} is a run: name the folder of runs that it is in")
        told, done = json.loads(zlib.decompress(listing)), Round()
        done.problems += [f"{name}: {why}" for name, why in told["denied"]]
        done.notes += [
            f"{name} is a link: it is not carried; sync the folder that it leads to" for name in told["links"]
        ]
        listed = self._without_strangers([Listed.of(one) for one in told["runs"]], done)
        self._touched = self._forget_lost([one for one in listed if one.run not in self._looked])
        kept = [one for one in listed if self._carry_events(one, told["now"], done)]
        failed = self._carry_others(kept, done)
        failed |= {name for name, _ in told["denied"]}
        for one in kept:
            self._confirm(one, failed, done)
        self._write("source", json.dumps({"source": self.source_name, "looked": told["now"]}))
        done.moved = self.source.moved + self.dest.moved - moved
        done.seconds = time.monotonic() - began
        return done

    def _without_strangers(self, listed: Sequence[Listed], done: Round) -> list[Listed]:
        """Each run is asked once; again when an event file is gone, or its experiment is another: it was made anew."""
        asked = [one for one in listed if self._is_new(one) or self._has_lost(one)]
        strange = strangers(self.source, self.dest, asked, self._cursors) if asked else {}
        self._same |= {one.run: _experiment(one) for one in asked if one.run not in strange}
        for run in strange:
            self._same.pop(run, None)
        done.problems += [f"{why}; {_ELSEWHERE}" for why in dict.fromkeys(strange.values())]
        return [one for one in listed if one.run not in strange]

    def _is_new(self, one: Listed) -> bool:
        return one.run not in self._same or self._same[one.run] != _experiment(one)

    def _has_lost(self, one: Listed) -> bool:
        cursor = self._cursors.get(one.run)
        return cursor is not None and any(name not in one.events for name in cursor.files)

    def _cursor(self, run: str) -> RunCursor:
        return self._cursors.setdefault(run, RunCursor(self.source_name, run))

    def _carry_events(self, one: Listed, now: float, done: Round) -> bool:
        """False of a run that is not to be carried at all."""
        cursor = self._cursor(one.run)
        if cursor.pruned and not goes_on(one, cursor):
            return False
        before = cursor.text()
        delivery = Delivery(self.source, self.dest, one, cursor, now, lambda: self._save(cursor))
        try:
            told = delivery.deliver()
        except Foreign as error:
            done.problems.append(f"{error}; {_ELSEWHERE}")
            return False
        cursor.ended = delivery.finished
        if cursor.text() != before:
            self._save(cursor)
        self._tell(one, cursor, told, now, done)
        return True

    def _tell(self, one: Listed, cursor: RunCursor, told: Told, now: float, done: Round) -> None:
        done.size += told.size
        done.records += told.records
        done.problems += told.problems
        done.notes += [f"{one.run}: {note}" for note in told.notes]
        if one.sweep:
            return
        files = cursor.files.values()
        newest = max((file.wall_time for file in files), default=0.0)
        done.lines.append(
            Line(
                run=one.run,
                phase=one.phase,
                ended=one.ended,
                size=sum(file.size for file in files),
                records=sum(file.records for file in files),
                last_step=max((file.last_step for file in files if file.last_step is not None), default=None),
                there_s=max(now - one.newest, 0.0) if one.events else None,
                here_s=max(now - newest, 0.0) if newest else None,
                behind=cursor.behind,
                damaged=told.damaged,
            )
        )

    def _save(self, cursor: RunCursor) -> None:
        self._write(quoted(cursor.run), cursor.text())

    def _write(self, name: str, text: str) -> None:
        try:
            self.dest.save(f"{folder_of(self.source_name)}/{name}.json", text)
        except OSError as error:
            raise DestinationFailed(f"{error.filename or self.dest.place}: {error.strerror or error}") from None

    # --- other files ------------------------------------------------------------------------------------------------

    def _carry_others(self, runs: Sequence[Listed], done: Round) -> set[str]:
        """One rsync for all that has changed; the paths that it could not carry."""
        changed = {
            f"{one.run}/{name}": (one, name, stat)
            for one in runs
            for name, stat in one.others.items()
            if self._cursor(one.run).others.get(name) != stat
        }
        failed = self._rsync(list(changed), done) if changed else set()
        for path, (one, name, stat) in changed.items():
            if path not in failed:
                self._cursor(one.run).others[name] = stat
                self._touched.add(one.run)
        done.others = len(changed) - len(failed)
        for run in sorted(self._touched):
            self._save(self._cursor(run))
        return failed

    def _forget_lost(self, runs: Sequence[Listed]) -> set[str]:
        """What was carried and is not at the destination any more, or has another size there, is to come again.

        The runs that have lost other files than event files; those are looked at anew.
        """
        here = [one.run for one in runs if not self._cursor(one.run).pruned]
        others = {f"{run}/{name}": (run, name) for run in here for name in self._cursor(run).others}
        events = {at: known for run in here for at, known in self._cursor(run).delivered().items()}
        there = self.dest.sizes([*others, *events]) if others or events else {}
        for path, known in events.items():
            if there[path] != known.size:
                known.seen = ()
        lost = [at for path, at in others.items() if there[path] != self._cursor(at[0]).others[at[1]][0]]
        for run, name in lost:
            del self._cursor(run).others[name]
        self._looked.update(one.run for one in runs)
        return {run for run, _ in lost}

    def _rsync(self, paths: Sequence[str], done: Round) -> set[str]:
        far = next((end for end in (self.source, self.dest) if isinstance(end, RemoteEnd)), None)
        command = [RSYNC, "--times", "--omit-dir-times", "--files-from=-", "--from0", "--no-implied-dirs"]
        command += ["--protect-args", f"--timeout={_SILENT_S}", f"--temp-dir={self._aside}"]
        if far:
            command += ["-e", " ".join(shlex.quote(part) for part in far.ssh)]
        command += ["--", _rsync_name(self.source), _rsync_name(self.dest)]
        listed = b"\0".join(os.fsencode(f"./{path}") for path in paths)  # rsync takes #name for a comment
        try:
            code, errors = _run(command, listed)
        except FileNotFoundError:
            raise UserError("rsync is not installed here; it carries all that is no event file") from None
        if code in (0, _VANISHED):
            return set()
        words = [line for line in errors.decode(errors="replace").splitlines() if line.startswith("rsync")]
        if code != _PARTIAL:
            raise DestinationFailed(words[0] if words else f"rsync ended with code {code}")
        return self._denied(paths, words, done)

    def _denied(self, paths: Sequence[str], words: Sequence[str], done: Round) -> set[str]:
        """What rsync names in its errors; all of it where it names nothing that we know."""
        failed = set()
        for line in words:
            match = re.search(r'"([^"]+)"', line)
            found = [path for path in paths if match and match[1].endswith(f"/{path}")]
            failed.update(found)
            if found:
                done.problems.append(f"{found[0]}: {line.rpartition(': ')[2]}")
        if not failed:
            done.problems += words[:1] or ["rsync could not carry some files"]
            return set(paths)
        return failed

    # --- what is confirmed ------------------------------------------------------------------------------------------

    def _confirm(self, one: Listed, failed: set[str], done: Round) -> None:
        """Write the position at the source, for status and prune there; a source that we may only read gets none."""
        cursor = self._cursor(one.run)
        files = {name: known.size for name, known in cursor.files.items() if name in one.events}
        sound = all(known.ending in (Ending.COMPLETE, Ending.TORN) for known in cursor.files.values())
        whole = not any(name.startswith(f"{one.run}/") for name in failed)
        position = Position(
            sink=self.sink,
            run=one.run,
            files=files,
            records=sum(known.records for known in cursor.files.values()),
            last_step=max((f.last_step for f in cursor.files.values() if f.last_step is not None), default=None),
            confirmed=round(time.time(), 3),
            complete=cursor.ended and sound and whole,
        )
        name = positions.path_of(Path(), self.sink, one.run)
        try:
            if one.run in self._touched and (position.complete or one.sweep):
                carried = positions.carried_path(Path(), self.sink, one.run)
                self.source.save(carried.as_posix(), json.dumps(cursor.others))
            if one.sweep or _same(self._confirmed.get(name.name), position):
                return
            self.source.save(name.as_posix(), json.dumps(asdict(position)))
        except OSError as error:
            note = f"{self.source.place}: positions are not kept there ({error.strerror})"
            done.notes += [note] if note not in done.notes else []
        self._confirmed[name.name] = json.dumps(asdict(position))


def _experiment(one: Listed) -> list[int] | None:
    return one.others.get(names()["experiment"])


def _run(command: Sequence[str], given: bytes) -> tuple[int, bytes]:
    """Exit code and stderr. Where we are stopped, it is told to end: killed, it would leave its other half at work."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe) as process:
        try:
            _, errors = process.communicate(given)
        except BaseException:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            raise
    return process.returncode, errors


def _same(text: str | None, position: Position) -> bool:
    """Whether a position says the same, but for the time."""
    return text is not None and {**json.loads(text), "confirmed": 0} == {**asdict(position), "confirmed": 0}


def _rsync_name(end: End) -> str:
    """A folder as rsync takes it; IPv6 addresses keep their brackets."""
    return f"{end.place.host}:{end.root}/" if end.place.host else f"{end.root}/"


__all__ = ["Busy", "Carried", "DestinationFailed", "Line", "Round", "Session", "Unreachable", "more_names"]
