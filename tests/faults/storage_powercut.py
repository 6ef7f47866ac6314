"""A power cut: the calls of a writer are recorded, and any state is made that a disk may be in when the power goes.

What was synced is there. Of the rest each change may be there or not, by itself: names of files (a rename is there as
a whole or not at all), and the bytes of files, cut short, as zeros, or with pages missing. A sync of a file that fails
loses its bytes: the kernel forgets the dirty pages, and the next sync says that all is well (fsyncgate, LWN 752063).
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.shim import SYNCS, WRITES, Call

PAGE = 4096
Choose = Callable[[int], int]
"""One of so many choices."""
Tree = dict[str, bytes | None]
"""Relative path to content; None for a folder."""


@dataclass
class _File:
    content: bytearray = field(default_factory=bytearray)
    kept: bytes = b""
    """What is on the disk for sure."""

    lost: bool = False
    """A sync of it has failed: nothing more is promised, whatever is written to it later."""


@dataclass
class _Change:
    """Of names in folders: each (folder, name) now stands for this, or for nothing."""

    entries: list[tuple[_Folder, str, _File | _Folder | None]]
    kept: bool = False


@dataclass
class _Folder:
    now: dict[str, _File | _Folder] = field(default_factory=dict)
    history: list[_Change] = field(default_factory=list)


class Disk:
    """The folder of a Shim, from its calls; give `record` as the shim's `after`."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.trace: list[tuple[Call, bool] | str] = []
        self.rewind()

    def record(self, call: Call, error: OSError | None) -> None:
        """A call that failed is kept where it was a sync, since that loses something."""
        if error is None or call.name in SYNCS:
            self.trace.append((call, error is None))

    def mark(self, word: str) -> None:
        """Something that was promised at this point."""
        self.trace.append(word)

    # Going through the record.

    def rewind(self) -> None:
        self.top = _Folder()
        self._handles: dict[int, _File | _Folder] = {}
        self._changes: list[_Change] = []

    def play(self, entry: tuple[Call, bool] | str) -> None:
        """Make one recorded call."""
        if isinstance(entry, str):
            return
        call, good = entry
        if call.name == "open":
            self._open(call)
        elif call.name in WRITES:
            file = self._file(call)
            end = call.offset + len(call.content)
            file.content.extend(bytes(max(0, end - len(file.content))))
            file.content[call.offset : end] = call.content
        elif call.name == "ftruncate":
            file = self._file(call)
            file.content = bytearray(file.content[: call.length].ljust(call.length, b"\0"))
        elif call.name in SYNCS:
            self._sync(self._handles[call.handle], good)
        elif call.name != "close":
            self._name(call)

    def _file(self, call: Call) -> _File:
        file = self._handles[call.handle]
        assert isinstance(file, _File)
        return file

    def _find(self, path: Path) -> tuple[_Folder, str]:
        folder = self.top
        parts = path.relative_to(self.root).parts
        for part in parts[:-1]:
            inner = folder.now[part]
            assert isinstance(inner, _Folder), path
            folder = inner
        return folder, parts[-1] if parts else ""

    def _open(self, call: Call) -> None:
        folder, name = self._find(call.path)
        if not name:
            self._handles[call.handle] = self.top
            return
        if name not in folder.now and call.flags & os.O_CREAT:
            self._change([(folder, name, _File())])
        found = folder.now.get(name)
        if found is None:  # written before the record began
            return
        if isinstance(found, _File) and call.flags & os.O_TRUNC:
            found.content = bytearray()
        self._handles[call.handle] = found

    def _name(self, call: Call) -> None:
        folder, name = self._find(call.path)
        if call.name == "mkdir":
            self._change([(folder, name, _Folder())])
        elif call.target is not None:
            into, other = self._find(call.target)
            self._change([(folder, name, None), (into, other, folder.now[name])])
        else:
            self._change([(folder, name, None)])

    def _change(self, entries: list[tuple[_Folder, str, _File | _Folder | None]]) -> None:
        change = _Change(entries)
        self._changes.append(change)
        for folder, name, thing in entries:
            folder.history.append(change)
            if thing is None:
                folder.now.pop(name, None)
            else:
                folder.now[name] = thing

    @staticmethod
    def _sync(thing: _File | _Folder, good: bool) -> None:
        if isinstance(thing, _File):
            if not good:
                thing.lost = True
            elif not thing.lost:
                thing.kept = bytes(thing.content)
            return
        for change in thing.history if good else []:
            change.kept = True

    # What may be there afterwards.

    def now(self) -> Tree:
        """As a process sees it, without a power cut."""
        return self._tree(self.top, lambda folder: folder.now, lambda file: bytes(file.content))

    def after_power_cut(self, choose: Choose) -> Tree:
        """One of the states that may be left."""
        there = {id(change) for change in self._changes if change.kept or choose(2)}
        contents: dict[int, bytes] = {}

        def names(folder: _Folder) -> dict[str, _File | _Folder]:
            found: dict[str, _File | _Folder] = {}
            for change in folder.history:
                for where, name, thing in change.entries if id(change) in there else []:
                    if where is folder and thing is None:
                        found.pop(name, None)
                    elif where is folder and thing is not None:
                        found[name] = thing
            return found

        def content(file: _File) -> bytes:
            return contents.setdefault(id(file), _left(file, choose))

        return self._tree(self.top, names, content)

    def _tree(
        self,
        folder: _Folder,
        names: Callable[[_Folder], dict[str, _File | _Folder]],
        content: Callable[[_File], bytes],
        prefix: str = "",
    ) -> Tree:
        tree: Tree = {}
        for name, thing in names(folder).items():
            if isinstance(thing, _File):
                tree[prefix + name] = content(thing)
            else:
                tree[prefix + name] = None
                tree |= self._tree(thing, names, content, f"{prefix}{name}/")
        return tree


def _left(file: _File, choose: Choose) -> bytes:
    """The bytes of a file after a power cut."""
    full = bytes(file.content)
    if full == file.kept:
        return full
    start = next((at for at, (new, old) in enumerate(zip(full, file.kept, strict=False)) if new != old), len(file.kept))
    kind = choose(5)
    if kind == 0 or (file.lost and kind == 1):
        return file.kept
    if kind == 1:
        return full
    if kind == 2:  # the size is there, the data are not (delayed allocation)
        return file.kept[:start] + bytes(len(full) - start)
    if kind == 3:
        return full[: start + choose(len(full) - start + 1)]
    pages = [
        full[at : at + PAGE] if choose(2) else bytes(len(full[at : at + PAGE])) for at in range(0, len(full), PAGE)
    ]
    return b"".join(pages)


def everything(count: int) -> int:
    """All that was written is there, synced or not."""
    return 1


def nothing(count: int) -> int:
    """Only what was synced is there."""
    return 0


def by_chance(seed: int) -> Choose:
    return random.Random(seed).randrange


def write(tree: Tree, root: Path) -> None:
    for name, content in sorted(tree.items()):
        if content is None:
            (root / name).mkdir(parents=True, exist_ok=True)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)


def read(root: Path) -> Tree:
    return {str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in root.rglob("*")}


def digest(tree: Tree) -> str:
    return hashlib.sha256(repr(sorted(tree.items())).encode()).hexdigest()
