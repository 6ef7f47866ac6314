"""Checkpoints: one folder per save, complete when its manifest is there and its sums fit; no pickle is ever loaded.

Weights are safetensors, the optimizer's state loads with weights_only=True, all else is JSON. Order of writes: a
temporary folder in the same parent, each file written and fsync'd, the manifest last, fsync, rename, fsync the parent.
Readers trust no link: they take the newest folder whose sums fit and quarantine the others.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from hpc.rundir import fsync_folder

_MODEL, _OPTIMIZER, _STATE, _MANIFEST = "model.safetensors", "optimizer.pt", "state.json", "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"g(\d{3,})-s(\d{8,})")


class StorageError(OSError):
    """A checkpoint could not be written or read; the older ones are as they were."""


class Damaged(ValueError):
    """A checkpoint whose bytes are not those that were written; the message says which file and how."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose sums have been compared."""

    path: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def model(self) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self.path / _MODEL)

    def optimizer(self) -> dict[str, Any]:
        return dict(torch.load(self.path / _OPTIMIZER, weights_only=True, map_location="cpu"))

    def state(self) -> dict[str, Any]:
        return dict(json.loads((self.path / _STATE).read_text()))


def name_of(generation: int, step: int) -> str:
    """Sorts by generation, then step; the generation grows with every start, so no name is used twice."""
    return f"g{generation:03d}-s{step:08d}"


def save(
    folder: Path,
    generation: int,
    step: int,
    model: dict[str, Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    facts: dict[str, Any],
) -> Path:
    """Write one checkpoint; `facts` (world size, fingerprints) go into the manifest. Raises StorageError."""
    final = folder / name_of(generation, step)
    if final.exists():
        return final
    aside = folder / f".{final.name}.{os.getpid()}"
    try:
        aside.mkdir(parents=True)
        buffer = io.BytesIO()
        torch.save(optimizer, buffer)
        files = {
            _MODEL: _write(aside / _MODEL, safetensors.torch.save(_apart(model))),
            _OPTIMIZER: _write(aside / _OPTIMIZER, buffer.getbuffer()),
            _STATE: _write(aside / _STATE, json.dumps(state).encode()),
        }
        manifest = {"format": _FORMAT, "generation": generation, "step": step, **facts, "files": files}
        _write(aside / _MANIFEST, json.dumps({**manifest, "sum": _sum(manifest)}, indent=1).encode())
        fsync_folder(aside)
        aside.rename(final)
        fsync_folder(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(error.errno, f"checkpoint not written: {error.strerror}", str(final)) from error
    return final


def _apart(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each in memory of its own: safetensors refuses tied weights and views of one tensor."""
    weights: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, value in model.items():
        weight = value.detach().cpu().contiguous()
        storage = weight.untyped_storage().data_ptr()
        weights[key] = weight.clone() if storage in taken else weight
        taken.add(storage)
    return weights


def _write(path: Path, content: bytes | memoryview) -> dict[str, int]:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(content), "crc32": zlib.crc32(content)}


def _sum(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def verify(path: Path) -> Checkpoint:
    """Read every byte and compare. Raises Damaged."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        claimed = manifest.pop("sum")
        if claimed != _sum(manifest) or manifest["format"] != _FORMAT:
            raise ValueError("its own sum does not fit")
        expected = name_of(int(manifest["generation"]), int(manifest["step"]))
        # Our own names: a manifest's entry never chooses a path.
        files = {name: dict(manifest["files"][name]) for name in (_MODEL, _OPTIMIZER, _STATE)}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise Damaged(f"{path.name}: {_MANIFEST} is missing or damaged ({error})") from None
    if path.name != expected:
        raise Damaged(f"{path.name}: its manifest belongs to {expected}")
    for name, claimed in files.items():
        _compare(path, name, claimed)
    return Checkpoint(path, manifest)


def _compare(path: Path, name: str, claimed: dict[str, int]) -> None:
    try:
        crc, size = 0, 0
        with (path / name).open("rb") as file:
            while block := file.read(1 << 22):
                crc, size = zlib.crc32(block, crc), size + len(block)
    except OSError as error:
        raise Damaged(f"{path.name}: {name} cannot be read ({error.strerror})") from None
    if size != claimed.get("size"):
        raise Damaged(f"{path.name}: {name} has {size} bytes, not {claimed.get('size')}")
    if crc != claimed.get("crc32"):
        raise Damaged(f"{path.name}: {name} has changed since it was written (CRC-32)")


def newest_first(folder: Path) -> Iterator[Path]:
    """Finished checkpoint folders by (generation, step), the newest first."""
    found = [(match, path) for path in folder.glob("g*") if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    for _, path in sorted(found, key=lambda pair: tuple(int(part) for part in pair[0].groups()), reverse=True):
        yield path


def load_newest(folder: Path, quarantine: Path, keep_bad: bool = False) -> Checkpoint | None:
    """The newest checkpoint whose sums fit; None when there never was one.

    A bad one moves to `quarantine` with its reason (not with `keep_bad`, for readers beside a live job). When some
    exist but none is good, raises Damaged: a run never starts afresh in silence.
    """
    reasons = []
    for path in newest_first(folder):
        try:
            return verify(path)
        except Damaged as reason:
            reasons.append(str(reason))
            if not keep_bad:
                _quarantine(path, quarantine, str(reason))
    past = sorted(path.name for path in quarantine.glob("g*")) if quarantine.is_dir() else []
    if reasons or past:
        raise Damaged(
            f"no good checkpoint in {folder} ({'; '.join(reasons) or f'{len(past)} in {quarantine}'}): restore one "
            f"from a copy, or start a new run with 'hpc submit'"
        )
    return None


def _quarantine(path: Path, quarantine: Path, reason: str) -> None:
    quarantine.mkdir(exist_ok=True)
    target, count = quarantine / path.name, 1
    while target.exists():  # one brought back from a copy has gone bad again
        count += 1
        target = quarantine / f"{path.name}.{count}"
    path.rename(target)
    (target / "reason.txt").write_text(reason + "\n")
    fsync_folder(quarantine)


def prune(folder: Path, keep: int, protect: set[str]) -> None:
    """Delete all but the newest `keep` verified ones and those named; only once the newest has been read back."""
    kept = 0
    for path in list(newest_first(folder)):
        if kept < keep:
            try:
                verify(path)
                kept += 1
            except Damaged:
                continue  # for the reader that quarantines it; it counts for nothing here
        elif path.name not in protect:
            trash = path.with_name(f".trash-{path.name}")
            path.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed writer left aside; called by the holder of the run's lease, before its first save."""
    for path in folder.glob(".*"):
        shutil.rmtree(path, ignore_errors=True)
