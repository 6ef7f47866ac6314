"""What a prediction into a folder has done so far, a line for each file: the same command goes on after a stop.

DIR/predict.json says what was asked, DIR/.predict.jsonl what is done. A folder of another request is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets.sources import Source, all_files
from hpc.errors import UserError
from hpc.rundir import append_line, read_json, read_lines, write_json

REQUEST = "predict.json"
_DONE = ".predict.jsonl"


def identity(source: Source) -> str:
    """Names, sizes and times of a source's files: where it changes, they are predicted again. Raises OSError."""
    try:
        files = all_files(source)
    except Exception:  # a broken header: reading it tells the reason
        files = source.files
    told = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


class PredictJournal:
    """The folder's state. Lines are {"id", "identity", ...}, whatever the predictions need to be told again.

    Nothing is written before `begin`, so that a request of which nothing came leaves no trace.
    """

    def __init__(self, folder: Path, request: dict[str, Any], tables: Iterable[str], force: bool) -> None:
        """Raises UserError where the folder holds something else, unless `force`."""
        self._folder, self._file = folder, folder / _DONE
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
        told = read_json(folder / REQUEST) if (folder / REQUEST).exists() else {}
        before = read_lines(self._file)
        if told.get("key") != key and not force:
            if told and before:
                raise UserError(
                    f"{folder} holds the predictions of another request (other runs, checkpoints or options): name "
                    f"another folder by -o, or replace them with --force"
                )
            if there := next((folder / name for name in tables if (folder / name).exists() and not told), None):
                raise UserError(f"{there} is there already, and not of this command: -o another folder, or --force")
        self._anew, self._request = told.get("key") != key or force, {"key": key, **request}
        lines = [] if self._anew else before
        self._writing = {str(name) for line in lines for name in line.get("writing", ())}
        self.done = {str(line["id"]): line for line in lines if "id" in line and "identity" in line}

    def begin(self, paths: Iterable[Path] = ()) -> None:
        """From here on the folder is of this request, and these files are its own, should a stop come before `add`."""
        if self._anew:
            self._anew = False
            self._file.unlink(missing_ok=True)
            write_json(self._folder / REQUEST, self._request)
        if names := [str(path.relative_to(self._folder)) for path in paths]:
            append_line(self._file, {"writing": names})

    def finished(self, id: str, seen: str) -> bool:
        """Whether this source, as it is now, is done, and its file is there."""
        line = self.done.get(id)
        return line is not None and line["identity"] == seen and self._there(line)

    def _there(self, line: dict[str, Any]) -> bool:
        return all((self._folder / name).is_file() for name in line.get("files", ()))

    def owns(self, path: Path) -> bool:
        """Whether a file in the folder was written for an earlier line."""
        names = self._writing | {name for line in self.done.values() for name in line.get("files", ())}
        return any(self._folder / name == path for name in names)

    def add(self, line: dict[str, Any]) -> None:
        append_line(self._file, line)
        self.done[str(line["id"])] = line

    def lines(self) -> list[dict[str, Any]]:
        """All that is done, in the order of ids; files that somebody removed are left out."""
        return [self.done[id] for id in sorted(self.done) if self._there(self.done[id])]
