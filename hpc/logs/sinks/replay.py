"""One run replayed to a sink: what is new since the sink's own cursor, and nothing that may still be lost.

The cursor is a note of the run at the sink itself, so a sink that lost the run, or has an older copy of it, is told
what it lacks. Steps from the newest checkpoint on are held back while the run is live: an attempt that goes on from a
checkpoint takes back later ones, and a sink has no way to (docs/decisions/0015-a-sink-is-a-replay.md).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc.ledger import Status
from hpc.logs.event import as_kept
from hpc.logs.positions import Position
from hpc.logs.sinks import facts
from hpc.logs.sinks.base import About, Point, Remote, Sink
from hpc.logs.sinks.pending import Cursor, LostSteps, Pending
from hpc.rundir import RunDir

_BATCH = 1000
_MARKED_EVERY = 10_000
"""Points between two notes of the cursor."""
MOST_PICTURES = 200
"""Of one run, from its event files; figures/ has the last ones anyway."""
_CURSOR, _FILES, _PICTURES = "cursor", "files", "pictures"
_LONGEST_NOTE = 7000
_PICTURE_NAMES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif"}


@dataclass(frozen=True)
class Sent:
    """What one feed has sent of a run."""

    position: Position
    points: int
    files: int
    damaged: bool
    """The run is over, and its event files have a hole or flipped bytes: what lies behind them was not sent."""
    anew: bool
    """Lost steps had been sent: the sink has a new version of the run."""


def replay(run: RunDir, status: Status, sink: Sink, tell: Callable[[str], None]) -> Sent | None:
    """Send what the sink lacks of a run; None of one that has not begun. Raises SinkError, UserError, OSError."""
    events = run.read_events()
    about = facts.about(run, status, events)
    if about is None:
        return None
    return _Replay(run, status, sink, about, tell).send()


def lacks(run: RunDir, status: Status, sink: Sink) -> str:
    """What a sink lacks of a run's event files, in words; nothing where its own note says that it has all.

    Raises SinkError, UserError, OSError.
    """
    about = facts.about(run, status, run.read_events())
    remote = sink.find(about) if about else None
    if remote is None:
        return "does not have it any more"
    try:
        pending = Pending(run.tensorboard, _cursor(remote))
    except LostSteps:
        return "has other steps of it"
    whole = not pending.points(None) and not any(pending.pictures(None))
    return "" if whole else "lacks steps of it"


class _Replay:
    def __init__(self, run: RunDir, status: Status, sink: Sink, about: About, tell: Callable[[str], None]) -> None:
        self.run, self.status, self.sink, self.about, self.tell = run, status, sink, about, tell
        self.over = status.state in facts.OVER
        self.points = self.files = 0

    def send(self) -> Sent:
        found = self.sink.find(self.about)
        remote = found or self.sink.create(self.about, None)
        pending, remote, anew = self._open(remote)
        self.sink.describe(remote, self.about)
        below = None if self.over else facts.durable_step(self.run.read_events(), pending.restarts)
        cursor = self._send_points(remote, pending, below)
        self._send_files(remote, pending, below)
        self.sink.state(remote, self.about)
        self.sink.points(remote, (), {_CURSOR: _dumped(cursor)})
        return Sent(self._position(pending, cursor), self.points, self.files, self.over and bool(pending.damaged), anew)

    def _open(self, remote: Remote) -> tuple[Pending, Remote, bool]:
        """What is to be sent, and to which version of the run."""
        try:
            return Pending(self.run.tensorboard, _cursor(remote)), remote, False
        except LostSteps:
            pending = Pending(self.run.tensorboard, Cursor())
        true = [*pending.points(None), *self._only_in_metrics(pending)]
        if not self.sink.has_others(remote, true):
            return pending, remote, False
        return pending, self.sink.create(self.about, remote), True

    def _send_points(self, remote: Remote, pending: Pending, below: int | None) -> Cursor:
        points = pending.points(below)
        if self.over and (points or pending.cursor.below is not None):
            points += self._only_in_metrics(pending)
            points.sort(key=lambda point: (point.step, point.tag))
        for first in range(0, len(points), _BATCH):
            some = points[first : first + _BATCH]
            if first and first % _MARKED_EVERY == 0:
                halfway = pending.halfway(some[0].step, some[0].step - 1)
                self.sink.points(remote, (), {_CURSOR: _dumped(halfway)})
            self.sink.points(remote, some, {})
            self.points += len(some)
        return pending.after(below, max((point.step for point in points), default=-1))

    def _only_in_metrics(self, pending: Pending) -> list[Point]:
        """Evaluations that the event files lack, as where a full disk turned them off.

        Value and time are those that the event file would have: repaired, it has no other points.
        """
        told = list(facts.evaluations(self.run))
        if told and pending.cursor.start != (0, 0):
            pending = Pending(self.run.tensorboard, Cursor())
        return [
            Point(tag, step, round(when * 1000), as_kept(value))
            for tag, step, value, when in told
            if not pending.has(tag, step)
        ]

    def _send_files(self, remote: Remote, pending: Pending, below: int | None) -> None:
        """Files of the run that are new or other than those sent, and the pictures of the event files."""
        now = {name: _fingerprint(path) for name, path in self.about.files.items()}
        sent = _noted(remote, _FILES)
        new = {name: path for name, path in self.about.files.items() if sent.get(name) != now[name]}
        count = int(remote.notes.get(_PICTURES, "0") or 0)
        with tempfile.TemporaryDirectory(prefix="hpc-sink-") as temporary:
            folder = Path(temporary)
            for target, path in new.items():
                (folder / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / target)
            drawn = 0
            for picture, content in self._pictures(pending, below):
                if count + drawn >= MOST_PICTURES:
                    self.tell(f"{self.run.name}: more than {MOST_PICTURES} pictures; the later ones are left out")
                    break
                (folder / picture).parent.mkdir(parents=True, exist_ok=True)
                (folder / picture).write_bytes(content)
                drawn += 1
            if new or drawn:
                self.sink.artifacts(remote, folder, {_FILES: _note(now), _PICTURES: str(count + drawn)})
                self.files += len(new) + drawn

    def _pictures(self, pending: Pending, below: int | None) -> Iterator[tuple[str, bytes]]:
        """images/<tag>/<step>.png. Tags are paths already; what could leave the folder is replaced."""
        for tag, step, image in pending.pictures(below):
            suffix = next((end for head, end in _PICTURE_NAMES.items() if image.encoded.startswith(head)), ".bin")
            parts = ["".join(c if c.isalnum() or c in "-_. " else "_" for c in part) for part in tag.split("/")]
            safe = [part if part.strip(". ") else "_" for part in parts]
            yield "/".join(["images", *safe, f"{step:08d}{suffix}"]), image.encoded

    def _position(self, pending: Pending, cursor: Cursor) -> Position:
        for sentence in pending.damaged:
            self.tell(f"{self.run.name}: {sentence}; 'hpc fsck {self.run.name}' tells more")
        sizes = {str(path.relative_to(self.run.path)): size for path, size in pending.sizes(cursor.start)}
        whole = self.over and cursor.start == cursor.head and not pending.damaged and facts.finished_files(self.run)
        return Position(
            sink=self.sink.name,
            run=facts.name_of(self.run),
            files=sizes,
            records=cursor.records,
            last_step=cursor.last if cursor.last >= 0 else None,
            confirmed=time.time(),
            complete=whole,
        )


def _cursor(remote: Remote) -> Cursor:
    try:
        return Cursor.load(json.loads(remote.notes[_CURSOR]))
    except (KeyError, ValueError, TypeError):
        return Cursor()


def _dumped(cursor: Cursor) -> str:
    return json.dumps(cursor.dump(), separators=(",", ":"))


def _noted(remote: Remote, name: str) -> dict[str, str]:
    try:
        told = json.loads(remote.notes.get(name, "{}"))
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _note(files: dict[str, str]) -> str:
    """Of so many files that the note would be too long, those that fit: the others are sent again."""
    kept = dict(files)
    while len(text := json.dumps(kept, separators=(",", ":"))) > _LONGEST_NOTE:
        kept.popitem()
    return text


def _fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
