"""The bytes of a gzip stream in two goes, first the header, then what it announces: never more, however it is made."""

import zlib
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.sources.contract import UnusableSource

GZIP_MAGIC = b"\x1f\x8b"
GZIP_WINDOW = 31  # zlib's word for: a gzip header and trailer, CRC checked
PIECE = 1 << 18
"""bytes that go in and come out at a time: they stay in the core's cache, and in memory that is used again"""

try:
    from isal import isal_zlib
except ImportError:
    isal_zlib = None  # type: ignore[assignment]

fastest: Any = isal_zlib or zlib
"""isal has two to three times zlib's rate"""


class Gunzip:
    """Bytes of a gzip file (several members in a row are one stream) as they are asked for.

    Raises the library's error for damaged data and a wrong CRC, UnusableSource for a stream that ends early or late.
    """

    def __init__(self, raw: bytes) -> None:
        self._raw, self._fed = memoryview(raw), 0
        self._tail: bytes = b""  # fed, and not consumed yet
        self._member: Any = None
        self.taken = 0

    def take(self, count: int) -> NDArray[np.uint8]:
        """Exactly `count` bytes."""
        out, done = np.empty(count, np.uint8), 0
        while missing := count - done:
            more = self._more()
            part = self._some(missing)
            if not part and not more:
                raise UnusableSource(f"broken data (the stream ends after {self.taken:,} bytes, {missing:,} too early)")
            out[done : done + len(part)] = np.frombuffer(part, np.uint8)
            done += len(part)
            self.taken += len(part)
        return out

    def finish(self) -> None:
        """UnusableSource if anything follows; makes the library check the CRC."""
        while (more := self._more()) or self._inside():
            if self._some(1):
                raise UnusableSource(f"broken data (more than the {self.taken:,} bytes that its header announces)")
            if self._inside() and not more:
                raise UnusableSource(f"broken data (cut off after {self.taken:,} bytes, before the checksum)")

    def _inside(self) -> bool:
        return self._member is not None and not self._member.eof

    def _more(self) -> bool:
        """Something is left to feed; zeros that pad the file's end count as nothing."""
        if self._inside():
            return bool(self._tail) or self._fed < len(self._raw)
        pieces = (self._raw[start : start + PIECE] for start in range(self._fed, len(self._raw), PIECE))
        return any(bytes(piece).strip(b"\0") for piece in chain([self._tail], pieces))

    def _some(self, most: int) -> bytes:
        """Up to `most` bytes, b'' possible."""
        if not self._inside():
            self._member = fastest.decompressobj(GZIP_WINDOW)
        fed = self._tail or self._raw[self._fed : self._fed + PIECE]
        self._fed += 0 if self._tail else len(fed)
        part: bytes = self._member.decompress(fed, min(most, PIECE))
        self._tail = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
        return part
