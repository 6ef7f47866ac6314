"""The bytes of a gzip stream in two goes, first the header, then what it announces: never more, however it is made."""

import zlib
from typing import Any

from datasets.sources.contract import UnusableSource

GZIP_MAGIC = b"\x1f\x8b"
GZIP_WINDOW = 31  # zlib's word for: a gzip header and trailer, CRC checked

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
        self._rest = raw
        self._member: Any = None
        self.taken = 0

    def take(self, count: int) -> bytes:
        """Exactly `count` bytes."""
        parts: list[bytes] = []
        missing = count
        while missing:
            part = self._some(missing)
            if not part and self._at_end():
                raise UnusableSource(f"broken data (the stream ends after {self.taken:,} bytes, {missing:,} too early)")
            parts.append(part)
            missing -= len(part)
            self.taken += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def finish(self) -> None:
        """UnusableSource if anything follows; makes the library check the CRC."""
        while not self._at_end():
            if self._some(1):
                raise UnusableSource(f"broken data (more than the {self.taken:,} bytes that its header announces)")
        if self._member is not None and not self._member.eof:
            raise UnusableSource(f"broken data (cut off after {self.taken:,} bytes, before the checksum)")

    def _at_end(self) -> bool:
        """Nothing can come any more; zeros that pad the file's end count as nothing."""
        inside = self._member is not None and not self._member.eof
        return not self._rest if inside else not self._rest.strip(b"\0")

    def _some(self, most: int) -> bytes:
        """Up to `most` bytes, b'' possible."""
        if self._member is None or self._member.eof:
            self._member = fastest.decompressobj(GZIP_WINDOW)
        part: bytes = self._member.decompress(self._rest, most)
        self._rest = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
        return part
