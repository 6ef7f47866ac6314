"""Event records on their way to the disk: taken in microseconds, written by a thread, one write and one fsync a flush.

A disk that is full, slow or broken costs the training nothing: records wait in memory (in a spool on the node where
one is given) and are written when the disk takes them again; the oldest go where there are too many.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs.event_file import VERSION, EventFile, beginning, cut_back
from jobs.spool import Spool

_LOG = logging.getLogger(__name__)
EVERY_S = 10.0
"""Seconds between two flushes that nobody has asked for."""
RETRY_S, LONGEST_RETRY_S = 30.0, 300.0
"""Until a disk that has refused is tried again: at first, and at most."""
LATE_S = 60.0
"""In a single write, before a warning."""
MOST_BYTES = 64 << 20
"""Of records that wait in memory."""
_BATCH = 8 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class _Cut:
    """From here on in a new file, older ones cut back to this step."""

    step: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    content: bytes | int
    """Whole records, or where they lie in the spool."""
    length: int
    records: int = 1


class EventsWriter:
    """Event files of one attempt, one at a time. Its methods may be called from any thread."""

    def __init__(
        self, folder: Path, suffix: str, step: int, held: Callable[[], bool], spool: Spool | None = None
    ) -> None:
        """step: that the run goes on from; held: whether this attempt still has the run, asked before each write."""
        self._folder, self._suffix, self._held, self._spool = folder, suffix, held, spool
        self.every = EVERY_S
        self._lock = threading.Condition()
        self._moving = threading.Lock()
        """Held while chunks leave the queue: they keep their order."""
        self._queue: deque[_Cut | _Chunk] = deque([_Cut(step)])
        self._bytes = self._dropped = self._asked = self._answered = 0
        self._closing = self._over = False
        self._threads: list[threading.Thread] = []
        self._busy_since: float | None = None
        self._told_late = False
        # Of the writing thread alone.
        self._cut: int | None = None
        self._head = b""
        self._file: EventFile | None = None
        self._batch: tuple[bytes, int] | None = None
        self._failures, self._retry_at = 0, 0.0

    # What the training calls.

    def put(self, record: bytes) -> None:
        """Microseconds, whatever the disk does."""
        with self._lock:
            if self._over or self._closing:
                return
            self._queue.append(_Chunk(record, len(record)))
            self._bytes += len(record)
            if self._bytes > MOST_BYTES:
                self._drop()
            if not self._threads:
                self._start()

    def cut(self, step: int) -> None:
        """What was put in of later steps is taken back."""
        with self._lock:
            if isinstance(self._queue[-1] if self._queue else None, _Cut):
                self._queue.pop()
            self._queue.append(_Cut(step))

    def flush(self, wait_s: float = 0.0) -> bool:
        """Write at once; whether that was tried within wait_s."""
        self._tell_late()
        with self._lock:
            if not self._threads or self._over:
                return True
            self._asked += 1
            mine = self._asked
            self._lock.notify_all()
            return self._lock.wait_for(lambda: self._answered >= mine or self._over, wait_s) if wait_s else False

    def close(self, wait_s: float) -> None:
        """A last try for what waits, for at most wait_s: a dead disk does not hold the node."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._lock.notify_all()
        until = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        left = self._waiting()
        if left or self._dropped:
            _LOG.warning("TensorBoard events end without %d records", left + self._dropped)

    def _waiting(self) -> int:
        with self._lock:
            queued = sum(one.records for one in self._queue if isinstance(one, _Chunk))
        return queued + (self._batch[1] if self._batch else 0)

    def _drop(self) -> None:
        """The oldest in memory, but no cut."""
        kept: deque[_Cut | _Chunk] = deque()
        while self._bytes > MOST_BYTES // 2 and self._queue:
            one = self._queue.popleft()
            if isinstance(one, _Chunk) and isinstance(one.content, bytes):
                self._bytes -= one.length
                self._dropped += one.records
            else:
                kept.append(one)
        self._queue.extendleft(reversed(kept))

    def _tell_late(self) -> None:
        since = self._busy_since
        if since is not None and time.monotonic() - since > LATE_S and not self._told_late:
            self._told_late = True
            _LOG.warning("TensorBoard events are late: a write has not ended for %.0f s", time.monotonic() - since)

    # The threads.

    def _start(self) -> None:
        loops = [self._write_on] + ([self._spool_on] if self._spool else [])
        self._threads = [threading.Thread(target=loop, name="events", daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    def _spool_on(self) -> None:
        while not self._closing and not self._over:
            with self._lock:
                self._lock.wait_for(lambda: self._closing or self._over, min(self.every, EVERY_S))
            with self._moving:
                self._to_spool()

    def _to_spool(self) -> None:
        """The queue's tail in memory becomes one chunk of the spool."""
        assert self._spool
        with self._lock:
            tail: list[_Chunk] = []
            for one in reversed(self._queue):
                if isinstance(one, _Cut) or isinstance(one.content, int):
                    break
                tail.insert(0, one)
        chunk = b"".join(one.content for one in tail if isinstance(one.content, bytes))
        if not chunk or (place := self._spool.put(chunk)) is None:
            return
        with self._lock:
            first = next((n for n, one in enumerate(self._queue) if one is tail[0]), None)
            if first is None:  # there were too many meanwhile
                self._spool.forget()
                return
            queued = list(self._queue)
            spooled = _Chunk(place, len(chunk), sum(one.records for one in tail))
            self._queue = deque([*queued[:first], spooled, *queued[first + len(tail) :]])
            self._bytes -= len(chunk)

    def _write_on(self) -> None:
        try:
            while not self._closing:
                with self._lock:
                    self._lock.wait_for(lambda: self._asked > self._answered or self._closing, self.every)
                    asked = self._asked
                self._deliver()
                with self._lock:
                    self._answered = asked
                    self._lock.notify_all()
            self._deliver()
        except Exception as error:
            _LOG.warning("TensorBoard events are off for the rest of this attempt: %r", error)
        finally:
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._over = True
            self._lock.notify_all()
        if self._file:
            self._file.close()
        if self._spool:
            with self._moving:
                self._spool.close()

    def _deliver(self) -> None:
        if time.monotonic() < self._retry_at and not self._closing:
            return
        self._busy_since = time.monotonic()
        try:
            while self._batch or (self._take() and self._batch):
                if not self._held():
                    self._batch = None
                    raise RuntimeError("a later attempt holds the run")
                self._append(self._batch[0])
                self._batch = None
            self._is_on()
        except OSError as error:
            self._is_off(error)
        finally:
            self._busy_since = None

    def _take(self) -> bool:
        """The next batch: whole records up to the next cut. What is once a batch stays as it is until it is written."""
        content: list[bytes] = []
        size = records = 0
        with self._moving:
            while size < _BATCH:
                with self._lock:
                    if not self._queue or (content and isinstance(self._queue[0], _Cut)):
                        break
                    if isinstance(self._queue[0], _Cut) and len(self._queue) == 1:
                        break  # a file begins with its first record
                    one = self._queue.popleft()
                    if isinstance(one, _Cut):
                        self._cut = one.step
                        continue
                    self._bytes -= one.length if isinstance(one.content, bytes) else 0
                if (records_of := self._content(one)) is None:
                    continue
                content.append(records_of)
                size, records = size + one.length, records + one.records
        self._batch = (b"".join(content), records) if content else None
        return bool(content)

    def _content(self, chunk: _Chunk) -> bytes | None:
        if isinstance(chunk.content, bytes):
            return chunk.content
        assert self._spool
        try:
            return self._spool.take(chunk.content, chunk.length)
        except OSError as error:
            _LOG.warning("%d events are lost on the node's own disk: %s", chunk.records, error)
            return None

    def _append(self, batch: bytes) -> None:
        if self._cut is not None:
            if self._file:
                self._file.close()
            # Values of lost steps go; those of the step that was saved stay. 0 on the first attempt, too.
            self._head = beginning(self._cut + 1 if self._cut else 0) + b"".join(cut_back(self._folder, self._cut))
            self._file = self._cut = None
        if self._file is None:
            self._file = EventFile(self._folder, self._suffix)
        self._file.append(self._head + batch)
        self._head = b""

    def _is_off(self, error: OSError) -> None:
        self._failures += 1
        wait = min(RETRY_S * 2 ** (self._failures - 1), LONGEST_RETRY_S)
        self._retry_at = time.monotonic() + wait
        if self._failures == 1:
            _LOG.warning("TensorBoard events are off for now, and tried again in %.0f s: %s", wait, error)
        elif self._file and error.errno not in _FULL:  # this file may be lost; another may not
            self._head = self._head or VERSION
            self._file.close()
            self._file = None

    def _is_on(self) -> None:
        if self._failures or self._dropped:
            _LOG.warning("TensorBoard events are written again; %d records were dropped", self._dropped)
        self._failures, self._dropped, self._told_late = 0, 0, False
