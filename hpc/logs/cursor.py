"""How far each event file of a run has been delivered: kept at the destination, and written only after an fsync there.

<destination>/.hpc-sync/<8 hex digits of the source>/<the run's path, / as %2F>.json, and source.json with the last look
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hpc.logs.positions import digits
from hpc.logs.records import Ending

FOLDER = ".hpc-sync"
"""At the destination; a dot in front, so it is taken for no run."""
LOCK = f"{FOLDER}/lock"
ASIDE = f"{FOLDER}/rsync"
"""Where rsync writes what it then renames."""

SETTLE_S = 60
"""Of a file that has not changed for so long, a network file system shows all there is, and its writer is gone."""


def is_damage(ending: str, settled: bool) -> bool:
    """Whether what lies behind the last whole record of a file will not come right any more by itself."""
    return ending == Ending.FLIPPED or (settled and ending != Ending.COMPLETE)


@dataclass
class FileCursor:
    """One event file."""

    generation: int = 0
    """How often it was delivered anew under another name."""
    size: int = 0
    """Bytes delivered: whole records."""
    records: int = 0
    last_step: int | None = None
    wall_time: float = 0.0
    """Of the last record, seconds since 1970."""
    before: str | None = None
    """Fingerprint of the delivered bytes; None: nothing delivered."""
    seen: tuple[int, ...] = ()
    """Size, time and inode of the source when it was last read to its end."""
    ending: str = Ending.COMPLETE
    """What stood behind the last whole record then."""
    held: bool = False
    """What is delivered waits under a hidden name for an older file."""
    verified: bool = False
    """The whole file was compared after the run's end."""


@dataclass
class RunCursor:
    """One run, or the files of a sweep beside its rows."""

    source: str
    run: str
    files: dict[str, FileCursor] = field(default_factory=dict)
    """By path in the run folder."""
    others: dict[str, list[int]] = field(default_factory=dict)
    """Size and time (ns) of the other files as they were carried."""
    ended: bool = False
    behind: int = 0
    """Bytes that the source had and we had not, at the last look."""
    pruned: float = 0.0
    """When 'hpc prune' took it away here; it is not carried again."""

    def text(self) -> str:
        return json.dumps(asdict(self))

    def delivered(self) -> dict[str, FileCursor]:
        """The event files that are at the destination, by their path in its folder of runs."""
        return {
            f"{self.run}/{waiting_name(name) if known.held else delivered_name(name, known.generation)}": known
            for name, known in self.files.items()
            if known.size
        }


def folder_of(source: str) -> str:
    """Where the cursors of one source are kept, at the destination."""
    return f"{FOLDER}/{digits(source)}"


def parse(texts: Mapping[str, str]) -> dict[str, RunCursor]:
    """Cursors by run; a damaged one counts as none, and what is there is then compared with the source."""
    found = (_parse(text) for text in texts.values())
    return {one.run: one for one in found if one}


def _parse(text: str) -> RunCursor | None:
    try:
        told: dict[str, Any] = json.loads(text)
        files = {str(name): FileCursor(**one) for name, one in told.pop("files").items()}
        for one in files.values():
            one.seen = tuple(one.seen)
            one.size, one.generation = int(one.size), int(one.generation)
        return RunCursor(files=files, **told)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def delivered_name(name: str, generation: int) -> str:
    """The name at the destination: it sorts behind the source's own, and before a later attempt's."""
    return f"{name}.r{generation:03d}" if generation else name


def generation_of(name: str, there: str) -> int | None:
    """Which generation of a source's event file a name at the destination is; None of another file."""
    if there == name:
        return 0
    suffix = there.removeprefix(f"{name}.r")
    return int(suffix) if suffix != there and len(suffix) == 3 and suffix.isdecimal() else None


def waiting_name(name: str) -> str:
    """Hidden, and no event file to any reader: it waits for an older file."""
    return _hidden(name, "later")


def replaced_name(name: str, generation: int, again: int = 0) -> str:
    """Hidden, and no event file to any reader: the source has written another file of this name."""
    return _hidden(name, f"replaced-{generation}" + (f"-{again}" if again else ""))


def _hidden(name: str, word: str) -> str:
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}.{word}.{base.replace('tfevents', 'tf-events')}"
