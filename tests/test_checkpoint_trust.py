"""Checkpoints that an intruder has touched: no planted pickle is executed, no link followed, no foreign file read."""

import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.errors import UserError
from jobs import checkpoint
from jobs.checkpoint import Damaged
from tests.test_checkpoint import FILES, loads, put


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


class Canary:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def seal(manifest: dict[str, Any]) -> bytes:
    """A manifest with a fitting sum: sums protect from disks, not from people."""
    text = json.dumps({"sum": "0" * 8, **manifest}, indent=1)
    return text.replace("0" * 8, f"{zlib.crc32(text.encode()):08x}", 1).encode()


def forge(path: Path) -> None:
    """Make the manifest fit the files as they are now."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("sum")
    for name in FILES[:3]:
        content = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "crc32": [zlib.crc32(content)] if content else []}
    (path / "manifest.json").write_bytes(seal(manifest))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["pickle", "torch.save"])
@pytest.mark.parametrize("forged", [False, True])
def test_a_planted_pickle_is_never_executed(folder: Path, tmp_path: Path, name: str, form: str, forged: bool) -> None:
    canary, path = tmp_path / "canary", put(folder, 8)
    if form == "pickle":
        (path / name).write_bytes(pickle.dumps(Canary(canary), protocol=2))
    else:
        torch.save({"state": Canary(canary)}, path / name)
    if forged and name != "manifest.json":
        forge(path)
        found = checkpoint.verify(path)
        with pytest.raises(Damaged, match=name):
            dict(zip(FILES, (found.model, found.optimizer, found.state), strict=False))[name]()
    else:
        with pytest.raises(Damaged):
            checkpoint.verify(path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary), protocol=2))
    assert canary.exists(), "the canary itself is dead"


def test_a_manifest_with_foreign_content_is_damaged(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret")
    path = put(folder, 8)
    good = json.loads((path / "manifest.json").read_text())
    good.pop("sum")
    (path / "manifest.json").write_bytes(seal(good))
    checkpoint.verify(path)
    entry = {"size": 6, "crc32": [zlib.crc32(b"secret")]}
    for change in (
        {"files": {}},
        {"files": []},
        {"files": dict.fromkeys(FILES, 5)},
        {"files": {str(outside): entry, "../../outside": entry}},
        {"step": "x"},
        {"step": 1e999},
        {"generation": None},
        {"format": 1},
        {"files": {name: {**entry, "size": -6} for name in FILES}},
        {"files": {name: {**entry, "size": 1 << 60} for name in FILES}},
        {"files": {name: {**entry, "crc32": []} for name in FILES}},
        {"files": {name: {**entry, "crc32": "6"} for name in FILES}},
    ):
        (path / "manifest.json").write_bytes(seal({**good, **change}))
        with pytest.raises(Damaged):
            checkpoint.verify(path)
    for content in ("", "[]", "3", "null", '"text"', "[" * 100_000):
        (path / "manifest.json").write_text(content)
        with pytest.raises(Damaged):
            checkpoint.verify(path)


@pytest.mark.parametrize(
    "header",
    [
        {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "wv"},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [1 << 62], "data_offsets": [0, 1 << 64]}},
        {"w": {"dtype": "O", "shape": [2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}},
        {"w": 3},
        [],
    ],
)
def test_a_forged_header_reads_no_foreign_memory(folder: Path, header: Any) -> None:
    path = put(folder, 8)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    (path / FILES[0]).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    forge(path)
    with pytest.raises(Damaged, match=FILES[0]):
        checkpoint.verify(path).model()


def test_what_others_may_write_is_refused_in_one_line_with_a_remedy(folder: Path) -> None:
    path = put(folder, 8)
    for place, was in ((path, 0o700), (path / FILES[1], 0o600), (path / FILES[3], 0o600), (folder, 0o700)):
        assert place.stat().st_mode & 0o777 == was
        for mode in (was | 0o020, was | 0o002):
            place.chmod(mode)
            with pytest.raises(
                UserError, match=rf"{place.name} can be written by others .mode 0{mode:o}.*chmod -R go-w"
            ):
                loads(folder)
        place.chmod(was)
    assert loads(folder) and not (folder.parent / "quarantine").exists()


def test_what_somebody_else_owns_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(folder, 8)
    if os.geteuid():
        monkeypatch.setattr(os, "geteuid", lambda: 12345)  # who is not root cannot give files away
    else:
        os.chown(path, 12345, 12345)
    with pytest.raises(UserError, match=r"belongs to .*: .*copy it to have your own"):
        loads(folder)


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    path = put(folder, 8)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link"):
        loads(folder)
    path.unlink()
    (folder / ".g001-s00000009.0").symlink_to(elsewhere)  # planted where the next one is written
    put(folder, 9)
    assert sorted(item.name for item in elsewhere.iterdir()) == sorted(FILES)
    assert not list(folder.glob(".*"))


def test_own_files_are_for_the_owner_alone_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        path = put(folder, 8)
        (put(folder, 9) / FILES[0]).unlink()
        loads(folder)
    finally:
        os.umask(before)
    ours = [folder, path, *path.iterdir(), folder.parent / "quarantine", *(folder.parent / "quarantine").rglob("*")]
    assert {item.stat().st_mode & 0o777 for item in ours if item.is_dir()} == {0o700}
    assert {item.stat().st_mode & 0o777 for item in ours if item.is_file()} == {0o600}
