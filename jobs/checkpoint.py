"""Checkpoints: one folder per save, complete when its manifest is there and its sums fit; no pickle is ever loaded.

Tensors are safetensors, all else is JSON. Order of writes: a temporary folder in the same parent, each file written and
fsync'd, the manifest last, fsync, rename, fsync the parent. A file whose fsync failed is lost: nothing is built on it.
Readers trust no link: they take the newest folder whose sums fit and quarantine the others. Every byte is read once:
what was verified is what is loaded. All storage calls are plain `os.` functions: the fault tests make each one fail.
"""
# ruff: noqa: PTH102, PTH104, PTH108, PTH116

from __future__ import annotations

import errno
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc.errors import UserError
from hpc.rundir import fsync_folder
from jobs import durable, tensorfile
from jobs.durable import Damaged, StorageError

__all__ = [
    "Checkpoint",
    "Damaged",
    "Snapshot",
    "StorageError",
    "load_newest",
    "name_of",
    "newest_first",
    "prune",
    "readable",
    "set_aside",
    "step_of",
    "sweep",
    "verify",
]

_LOG = logging.getLogger(__name__)
_MODEL, _OPTIMIZER, _STATE, _MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
_TRAINED = "trained.safetensors"
"""Only where the weights in _MODEL are an average of those that are trained."""
_FORMAT = 2
_NAME = re.compile(r"g(\d{3,})-s(\d{8,})")
_ASIDE, _TRASH = re.compile(r"\.g(\d{3,})-s\d{8,}\.\d+"), re.compile(r"\.trash-.+")
_LARGEST_MANIFEST = 64 << 20
_SUM_AT = b'{\n "sum": "'
_NO_SUM = b"00000000"
_REASON = "reason.txt"
_TRIES, _PAUSE_S = 3, 1.0
"""Of reading where the storage says EIO."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose bytes are in memory and have been compared with their sums."""

    path: Path
    manifest: dict[str, Any]
    _contents: dict[str, Tensor] = field(repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def model(self) -> dict[str, Tensor]:
        """The weights to evaluate, as views of this checkpoint's memory: `load_state_dict` copies them.

        With train.ema they are the average; training goes on from `trained()`.
        """
        return self._tensors(_MODEL)

    def trained(self) -> dict[str, Tensor]:
        """The weights that the optimizer has left, as `model` gives its own."""
        return self._tensors(_TRAINED if _TRAINED in self._contents else _MODEL)

    def optimizer(self) -> dict[str, Any]:
        """A state_dict with memory of its own: an optimizer keeps the tensors that it loads."""
        tensors = {key: value.clone() for key, value in self._tensors(_OPTIMIZER).items()}
        try:
            return dict(tensorfile.together(self._state()["optimizer"], tensors))
        except (ValueError, TypeError, KeyError) as error:
            raise Damaged(f"{self.name}: {_STATE} is not what a checkpoint holds ({error})") from None

    def state(self) -> dict[str, Any]:
        return dict(self._state()["state"])

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return tensorfile.read(self._contents[name])
        except ValueError as error:
            raise Damaged(f"{self.name}: {name} is not what a checkpoint holds ({error})") from None

    def _state(self) -> dict[str, Any]:
        try:
            content = json.loads(self._contents[_STATE].numpy().tobytes())
            return {"state": dict(content["state"]), "optimizer": dict(content["optimizer"])}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise Damaged(f"{self.name}: {_STATE} is not what a checkpoint holds ({error})") from None


def name_of(generation: int, step: int) -> str:
    """Sorts by generation, then step; the generation grows with every start, so no name is used twice."""
    return f"g{generation:03d}-s{step:08d}"


# Writing.


class Snapshot:
    """What one save writes, in memory that the next one uses again. Pinned: for tensors on a GPU."""

    def __init__(self, pinned: bool = False) -> None:
        self.pages = tensorfile.Pages(pinned)
        self.name, self.step, self._generation = "", 0, 0
        self._state, self._about = b"", {}  # type: bytes, dict[str, Any]

    def take(
        self,
        generation: int,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Any],
        state: Mapping[str, Any],
        facts: Mapping[str, Any],
        trained: Mapping[str, Tensor] | None = None,
    ) -> Snapshot:
        """Copy all of it; the caller may go on changing it. `facts` go into the manifest, `state` beside the weights.

        `model`: the weights to evaluate; `trained`: those that are trained, where they are others. Raises TypeError for
        what is neither a tensor nor JSON.
        """
        moments: dict[str, Tensor] = {}
        plain = tensorfile.apart(dict(optimizer), moments)
        self._state = json.dumps({"state": state, "optimizer": plain}).encode()
        self._about = json.loads(json.dumps({"format": _FORMAT, "generation": generation, "step": step, **facts}))
        weights = {_MODEL: model} if trained is None else {_MODEL: model, _TRAINED: trained}
        self.pages.fill({**weights, _OPTIMIZER: moments})
        self.name, self.step, self._generation = name_of(generation, step), step, generation
        return self

    def write(self, folder: Path, attempt: int = 0, before_commit: Callable[[], object] = lambda: None) -> Path:
        """One try, under a temporary name that no other try has; `before_commit` may raise to leave nothing behind.

        Raises OSError; then there is no checkpoint of this name.
        """
        aside, final = folder / f".{self.name}.{attempt}", folder / self.name
        durable.make_folder(folder)
        self._clear(folder)
        if os.path.lexists(final):  # a rename that may not last, and could not be taken back
            _take_back(final)
        try:
            os.mkdir(aside, 0o700)
            files = {name: durable.write(aside / name, content) for name, content in self._files()}
            manifest = _with_sum({**self._about, "files": files})
            durable.write(aside / _MANIFEST, memoryview(manifest))
            fsync_folder(aside)
            before_commit()
            os.rename(aside, final)
        except BaseException:
            durable.remove_quietly(aside)
            raise
        try:
            fsync_folder(folder)
        except OSError:
            with suppress(OSError):
                _take_back(final)
            raise
        return final

    def _clear(self, folder: Path) -> None:
        """Remove what tries have left aside; never what a newer generation is writing: this one may be fenced by then.

        Raises OSError for those of its own generation, which would become more and more.
        """

        def left(name: str, older: bool) -> bool:
            found = _ASIDE.fullmatch(name)
            return found is not None and (
                int(found[1]) < self._generation if older else int(found[1]) == self._generation
            )

        try:
            durable.remove_all(folder, partial(left, older=True))
        except OSError as error:
            _LOG.warning("what an earlier attempt left in %s cannot be removed: %s", folder, error)
        durable.remove_all(folder, partial(left, older=False))

    def _files(self) -> Iterator[tuple[str, memoryview]]:
        yield from self.pages.files.items()
        yield _STATE, memoryview(self._state)


def _take_back(final: Path) -> None:
    """A rename that may not last is none: the name is free for the next try."""
    trash = final.with_name(f".trash-{final.name}")
    durable.remove_quietly(trash)
    os.rename(final, trash)
    durable.remove_quietly(trash)


def _with_sum(manifest: dict[str, Any]) -> bytes:
    """The manifest's text; its first entry is the sum of the text with zeros in the sum's place."""
    text = json.dumps({"sum": _NO_SUM.decode(), **manifest}, indent=1).encode()
    return _SUM_AT + f"{zlib.crc32(text):08x}".encode() + text[len(_SUM_AT) + len(_NO_SUM) :]


# Reading.


def verify(path: Path) -> Checkpoint:
    """Read every byte once and compare. Raises Damaged; UserError for one that others could have written; StorageError
    where the storage does not answer, which says nothing about the checkpoint.
    """
    manifest, files = _manifest(path)
    contents = {}
    for name, claimed in files.items():
        with durable.opened(path, name) as descriptor:
            durable.check_size(path, name, claimed, descriptor)
            contents[name] = torch.empty(claimed["size"], dtype=torch.uint8)
            durable.compare(path, name, claimed, descriptor, contents[name].numpy().data)
    return Checkpoint(path, manifest, contents)


def readable(path: Path, cancelled: Callable[[], bool] = lambda: False) -> bool:
    """Whether the disk gives back every byte, in little memory; of no worth when `cancelled` meanwhile."""
    try:
        for name, claimed in _manifest(path)[1].items():
            with durable.opened(path, name) as descriptor:
                durable.check_size(path, name, claimed, descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # the disk's bytes, not the page cache's
                durable.compare(path, name, claimed, descriptor, None, cancelled)
    except (Damaged, UserError):
        return False
    return True


def _manifest(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The manifest and its entries of our own files: an entry never chooses a path."""
    try:
        durable.refuse_foreign(path.parent, os.stat(path.parent))
        durable.refuse_foreign(path, os.lstat(path))
    except OSError as error:
        raise durable.fault(path, _MANIFEST, error) from None
    with durable.opened(path, _MANIFEST) as descriptor:
        try:
            text = bytearray(min(os.fstat(descriptor).st_size, _LARGEST_MANIFEST))
            durable.fill(memoryview(text), descriptor, 0)
            end = len(_SUM_AT) + len(_NO_SUM)
            claimed, text[len(_SUM_AT) : end] = bytes(text[len(_SUM_AT) : end]), _NO_SUM
            if claimed != f"{zlib.crc32(text):08x}".encode():
                raise ValueError("its own sum does not fit")
            manifest = json.loads(text)
            del manifest["sum"]
            if manifest.pop("format") != _FORMAT:
                raise ValueError(f"only format {_FORMAT} is read")
            expected = name_of(int(manifest["generation"]), int(manifest["step"]))
            names = [_MODEL, _OPTIMIZER, _STATE, *([_TRAINED] if _TRAINED in manifest["files"] else [])]
            files = {name: dict(manifest["files"][name]) for name in names}
            for entry in files.values():
                blocks = len(range(0, entry["size"], durable.BLOCK))
                if len(entry["crc32"]) != blocks or not all(isinstance(part, int) for part in entry["crc32"]):
                    raise ValueError("its sums are not one for each block")
        except OSError as error:
            raise durable.fault(path, _MANIFEST, error) from None
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
            raise Damaged(f"{path.name}: {_MANIFEST} is damaged ({error})") from None
    if path.name != expected:
        raise Damaged(f"{path.name}: its manifest belongs to {expected}")
    return manifest, files


# The folder of all of them.


def newest_first(folder: Path) -> Iterator[Path]:
    """Finished checkpoint folders by (generation, step), the newest first."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _NAME.fullmatch(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return
    for name in sorted(names, key=_order, reverse=True):
        yield folder / name


def step_of(name: str) -> int:
    """The step of a checkpoint by its folder's name."""
    return _order(name)[1]


def _order(name: str) -> tuple[int, int]:
    found = _NAME.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def load_newest(folder: Path, quarantine: Path, keep_bad: bool = False) -> Checkpoint | None:
    """The newest checkpoint whose sums fit; None when there never was one.

    A bad one moves to `quarantine` with its reason (not with `keep_bad`, for readers beside a live job). When some
    exist but none is good, raises Damaged: a run never starts afresh in silence. UserError and StorageError: as verify.
    """
    reasons, unread = [], None
    for path in newest_first(folder):
        try:
            return _patiently(path)
        except StorageError as error:
            if error.errno != errno.EIO:
                raise
            unread = error  # an older one may be read; this one may be well after all
        except Damaged as reason:
            reasons.append(str(reason))
            if not keep_bad:
                _try_to_set_aside(path, quarantine, str(reason))
    if unread:
        raise unread
    past = [path.name for path in newest_first(quarantine)]
    if reasons or past:
        raise Damaged(
            f"no good checkpoint in {folder} ({'; '.join(reasons) or f'{len(past)} in {quarantine}'}): restore one "
            f"from a copy, or start a new run with 'hpc submit'"
        )
    return None


def _patiently(path: Path) -> Checkpoint:
    """An error of the storage often passes: it is asked again."""
    for _ in range(_TRIES - 1):
        try:
            return verify(path)
        except StorageError as error:
            if error.errno != errno.EIO:
                raise
        time.sleep(_PAUSE_S)
    return verify(path)


def _try_to_set_aside(path: Path, quarantine: Path, reason: str) -> None:
    """One that stays where it is does no harm: its sums are compared whenever it is read."""
    try:
        set_aside(path, quarantine, reason)
    except OSError as error:
        _LOG.warning("%s; moving it to %s failed (%s), so it is passed over where it is", reason, quarantine, error)


def set_aside(path: Path, quarantine: Path, reason: str) -> None:
    """Move a checkpoint to `quarantine`, with the reason."""
    durable.make_folder(quarantine)
    target, count = quarantine / path.name, 1
    while os.path.lexists(target):  # one brought back from a copy has gone bad again
        count += 1
        target = quarantine / f"{path.name}.{count}"
    os.rename(path, target)
    with suppress(FileNotFoundError):
        os.unlink(target / _REASON)
    durable.write(target / _REASON, memoryview(f"{reason}\n".encode()))
    fsync_folder(quarantine)
    fsync_folder(path.parent)


def prune(
    folder: Path,
    keep: int,
    protect: set[str],
    keeps: Callable[[int], bool] = lambda step: False,
    verified: set[str] | None = None,
    before_delete: Callable[[], object] = lambda: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Delete all but the newest `keep` verified ones, the names in `protect`, and the steps that `keeps` is true of.

    Those in `verified` are not read again; those read here are added. Raises OSError.
    """
    verified = set() if verified is None else verified
    kept, doomed = 0, []
    for path in newest_first(folder):
        if kept < keep:
            good = path.name in verified or readable(path, cancelled)
            if cancelled():
                return
            if good:
                verified.add(path.name)
                kept += 1
        elif path.name not in protect and not keeps(_order(path.name)[1]):
            doomed.append(path)
    if doomed:
        before_delete()
        for path in doomed:
            trash = path.with_name(f".trash-{path.name}")
            durable.remove_quietly(trash)
            os.rename(path, trash)
        fsync_folder(folder)  # or a power cut could leave their names and not their files
    durable.remove_all(folder, _TRASH.fullmatch)


def sweep(folder: Path) -> None:
    """Remove what a killed writer left aside; called by the holder of the run's lease, before its first save."""
    with suppress(OSError):
        durable.remove_all(folder, re.compile(f"{_ASIDE.pattern}|{_TRASH.pattern}").fullmatch)
