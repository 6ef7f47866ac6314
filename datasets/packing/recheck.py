"""Bytes that an earlier start left in the work folder, compared with the sums in its journal before they are used."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets.checksum import crc32
from datasets.packing.journal import Finished, Piece

_BLOCK = 1 << 22
"""bytes that are read at once"""


def damaged(folder: Path, finished: Iterable[Finished], threads: int) -> set[str]:
    """Ids of the sources of which a byte differs, or is gone. Raises nothing: what cannot be read is damaged."""
    sources = list(finished)
    with ThreadPoolExecutor(threads) as pool:
        sound = pool.map(lambda source: _is_sound(folder, source), sources)
        return {source.id for source, whole in zip(sources, sound, strict=True) if not whole}


def _is_sound(folder: Path, source: Finished) -> bool:
    try:
        for entry in source.samples:
            found = _sum(folder / entry.file, (*entry.inputs, *entry.maps), 0)
            if entry.drawn is not None:
                name, *piece = entry.drawn
                found = _sum(folder / name, [(piece[0], piece[1])], found)
            if found != entry.written:
                return False
    except OSError:
        return False
    return True


def _sum(path: Path, pieces: Iterable[Piece], before: int) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, size in pieces:
            for at in range(start, start + size, _BLOCK):
                before = crc32(os.pread(descriptor, min(_BLOCK, start + size - at), at), before)
    finally:
        os.close(descriptor)
    return before
