"""Room on the node's own disk for what is on its way to the shared one: a nameless file, gone with its process."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence

_LOG = logging.getLogger(__name__)
MOST_BYTES = 1 << 30


class Spool:
    """Chunks of bytes, kept until all of them are taken. For one thread at a time."""

    def __init__(self, folders: Sequence[str]) -> None:
        """In the first of the folders that takes a file; without any, `put` refuses everything."""
        self._file = next((file for folder in folders if (file := _open(folder)) is not None), None)
        self._end = 0
        self._kept = 0

    def put(self, chunk: bytes) -> int | None:
        """Where it lies, for `take`; None where there is no room."""
        if self._file is None or self._end + len(chunk) > MOST_BYTES:
            return None
        place, rest = self._end, memoryview(chunk)
        try:
            while rest:
                rest = rest[os.pwrite(self._file, rest, place + len(chunk) - len(rest)) :]
        except OSError as error:
            _LOG.info("the node's disk keeps no more events: %s", error)
            return None
        self._end, self._kept = place + len(chunk), self._kept + 1
        return place

    def take(self, place: int, length: int) -> bytes:
        """Raises OSError."""
        assert self._file is not None
        chunk = os.pread(self._file, length, place)
        self.forget()
        if len(chunk) < length:
            raise OSError(f"the node's disk has lost {length - len(chunk)} bytes of events")
        return chunk

    def forget(self) -> None:
        """A chunk that is not taken."""
        self._kept -= 1
        if not self._kept:
            self._end = 0

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _open(folder: str) -> int | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.dup(file.fileno())
    except OSError:
        return None
