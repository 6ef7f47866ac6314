"""Checkpoints under every fault a disk, a kill or an intruder makes: found, quarantined, never loaded, never lost."""

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs import checkpoint
from jobs.checkpoint import Checkpoint, Damaged, StorageError
from tests.tiny_run import CONTEXT, in_child

FILES = ("model.safetensors", "optimizer.pt", "state.json", "manifest.json")
FACTS = {"world_size": 2, "data": "f" * 64}
MUTATIONS_PER_FILE = 40


def tensors(step: int) -> dict[str, Tensor]:
    """A few kilobytes of every kind, a function of the step alone."""
    torch.manual_seed(step)
    return {
        "fp32": torch.randn(40, 30),
        "bf16": torch.randn(33, 5).bfloat16(),
        "fp16": torch.randn(7).half(),
        "fp64": torch.randn(3, dtype=torch.float64),
        "strided": torch.randn(12, 8).t(),
        "count": torch.tensor(step),
        "mask": torch.rand(9) > 0.5,
        "int8": torch.arange(-5, 5, dtype=torch.int8),
        "extremes": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "empty": torch.empty(0, 3),
    }


def moments(step: int) -> dict[str, Any]:
    parameter = nn.Parameter(tensors(step)["fp32"].clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.square().sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def put(folder: Path, step: int, generation: int = 1) -> Path:
    state = {"best": None, "sums": {"loss": (step / 3).hex()}}
    return checkpoint.save(folder, generation, step, tensors(step), moments(step), state, FACTS)


def bytes_of(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], list[int]]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).tolist()


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(bytes_of(found[key]) == bytes_of(wanted[key]) for key in wanted)


def loads(folder: Path, keep_bad: bool = False) -> Checkpoint | None:
    return checkpoint.load_newest(folder, folder.parent / "quarantine", keep_bad)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


# What is written is what is read.


def test_every_kind_of_tensor_comes_back_bit_for_bit(folder: Path) -> None:
    path = put(folder, 7)
    found = checkpoint.verify(path)
    assert same(found.model(), tensors(7))
    written, read = moments(7), found.optimizer()
    assert read["param_groups"] == written["param_groups"]
    assert same(read["state"][0], written["state"][0])
    assert found.state() == {"best": None, "sums": {"loss": (7 / 3).hex()}}
    assert (found.name, found.step, found.manifest["world_size"]) == ("g001-s00000007", 7, 2)


def test_tied_weights_are_saved_and_load_into_a_tied_model(folder: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    model = tied()
    found = checkpoint.verify(checkpoint.save(folder, 1, 1, model.state_dict(), {}, {}, {}))
    again = tied()
    again.load_state_dict(found.model())
    assert same(again.state_dict(), model.state_dict())


def test_views_of_one_tensor_are_saved_apart(folder: Path) -> None:
    whole = torch.arange(12.0)
    model = {"head": whole[:4], "tail": whole[4:], "all": whole}
    assert same(checkpoint.verify(checkpoint.save(folder, 1, 1, model, {}, {}, {})).model(), model)


def test_the_manifest_is_written_last_and_every_file_is_synced_before_the_rename(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        calls.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        sync(descriptor)

    def record_rename(path: Path, target: Path) -> Path:
        calls.append(f"rename to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    put(folder, 7)
    aside = f".g001-s00000007.{os.getpid()}"
    files = [f"sync {name}" for name in FILES]
    assert calls == [*files, f"sync {aside}", "rename to g001-s00000007", "sync checkpoints"]


def test_a_name_is_never_written_twice(folder: Path) -> None:
    path = put(folder, 7)
    before = path.stat().st_ino, (path / FILES[0]).stat().st_mtime_ns
    checkpoint.save(folder, 1, 7, tensors(8), {}, {}, {})
    assert before == (path.stat().st_ino, (path / FILES[0]).stat().st_mtime_ns)
    assert same(checkpoint.verify(path).model(), tensors(7))


def test_names_sort_by_generation_then_step_past_their_padding(folder: Path) -> None:
    names = [(1, 5), (2, 3), (999, 1), (1000, 0), (1000, 99_999_999), (1000, 100_000_000)]
    for number in names:
        (folder / checkpoint.name_of(*number)).mkdir(parents=True)
    for other in (".g001-s00000009.77", "g1-s2", "g001-s00000009.tmp", ".trash-g001-s00000009", "notes"):
        (folder / other).mkdir()
    (folder / "g009-s00000009").write_text("a file, not a folder")
    assert [path.name for path in checkpoint.newest_first(folder)] == [
        checkpoint.name_of(*number) for number in reversed(names)
    ]


# Damage.


def flip(content: bytearray, chance: random.Random) -> None:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def truncate(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(len(content)) :]


def zero_page(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content)) // 512 * 512
    content[start : start + 512] = bytes(len(content[start : start + 512]))


def zero_tail(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content))
    content[start:] = bytes(len(content) - start)


def grow(content: bytearray, chance: random.Random) -> None:
    content.extend(chance.randbytes(1 + chance.randrange(40)))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mutate", [flip, truncate, zero_page, zero_tail, grow])
def test_no_mutation_of_any_file_is_silent(
    folder: Path, name: str, mutate: Callable[[bytearray, random.Random], None]
) -> None:
    path = put(folder, 7) / name
    good, silent = path.read_bytes(), []
    for seed in range(MUTATIONS_PER_FILE):
        content = bytearray(good)
        mutate(content, random.Random(f"{name}{mutate.__name__}{seed}"))
        if content == good:
            continue
        path.write_bytes(content)
        try:
            checkpoint.verify(path.parent)
            if name != "manifest.json" or json.loads(content) != json.loads(good):
                silent.append(seed)  # trailing white space of the manifest says nothing
        except Damaged as reason:
            assert "\n" not in str(reason) and path.parent.name in str(reason)
    assert not silent, f"{mutate.__name__} of {name} unnoticed with seeds {silent}"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["flipped", "empty", "missing", "a folder", "unreadable link"])
def test_a_bad_newest_one_is_quarantined_with_its_reason_and_the_one_before_loads(
    folder: Path, name: str, fault: str
) -> None:
    put(folder, 4)
    path = put(folder, 8) / name
    content = path.read_bytes()
    path.unlink()
    if fault == "flipped":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "a folder":
        path.mkdir()
    elif fault == "unreadable link":
        path.symlink_to(path)
    beside = loads(folder, keep_bad=True)
    assert beside and beside.step == 4 and path.parent.exists()
    found = loads(folder)
    assert found and found.step == 4 and same(found.model(), tensors(4))
    bad = folder.parent / "quarantine" / "g001-s00000008"
    assert name in (bad / "reason.txt").read_text()
    assert sorted(item.name for item in folder.iterdir()) == ["g001-s00000004"]


def test_files_of_another_checkpoint_do_not_pass(folder: Path) -> None:
    older, newer = put(folder, 4), put(folder, 8)
    for name in FILES[:3]:
        shutil.copy(newer / name, newer / f"{name}.bak")
        shutil.copy(older / name, newer / name)
        with pytest.raises(Damaged, match=name):
            checkpoint.verify(newer)
        shutil.move(newer / f"{name}.bak", newer / name)
    shutil.copytree(older, newer, dirs_exist_ok=True)
    with pytest.raises(Damaged, match="belongs to g001-s00000004"):
        checkpoint.verify(newer)


def test_when_all_are_bad_nothing_is_deleted_and_nothing_starts_afresh(folder: Path) -> None:
    for step in (4, 8):
        (put(folder, step) / "state.json").write_text("{}")
    for _ in range(2):  # and not the second time either
        with pytest.raises(Damaged, match="hpc submit"):
            loads(folder)
    kept = sorted(path.name for path in (folder.parent / "quarantine").rglob("model.safetensors"))
    assert len(kept) == 2


def test_none_was_ever_written(folder: Path) -> None:
    assert loads(folder) is None
    folder.mkdir()
    (folder / ".g001-s00000004.99").mkdir()
    assert loads(folder) is None


def test_a_checkpoint_brought_back_under_a_quarantined_name_can_go_bad_again(folder: Path) -> None:
    for _ in range(2):
        put(folder, 4)
        (put(folder, 8) / "state.json").write_text("{}")
        found = loads(folder)
        assert found and found.step == 4
    assert len(list((folder.parent / "quarantine").rglob("reason.txt"))) == 2


# An intruder.


class Canary:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def forge(path: Path) -> None:
    """Make the manifest fit the files as they are now: sums protect against disks, not against people."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("sum")
    for name in FILES[:3]:
        content = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "crc32": zlib.crc32(content)}
    total = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps({**manifest, "sum": total}))


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
        read = {"model.safetensors": found.model, "optimizer.pt": found.optimizer, "state.json": found.state}[name]
        with pytest.raises(Exception):  # noqa: B017 - each format refuses in its own words
            read()
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
    entry = {"size": 6, "crc32": zlib.crc32(b"secret")}
    for change in (
        {"files": {}},
        {"files": []},
        {"files": dict.fromkeys(FILES, 5)},
        {"files": {str(outside): entry, "../../outside": entry}},
        {"step": "x"},
        {"step": 1e999},
        {"generation": None},
        {"format": 2},
    ):
        manifest = {**good, **change}
        total = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
        (path / "manifest.json").write_text(json.dumps({**manifest, "sum": total}))
        with pytest.raises(Damaged):
            checkpoint.verify(path)
    for content in ("[]", "3", "null", '"text"', "[" * 100_000):
        (path / "manifest.json").write_text(content)
        with pytest.raises(Damaged):
            checkpoint.verify(path)


# Killed, and full.


def save_for_ever(folder: str, generation: int) -> None:
    for step in range(1, 1_000_000):
        put(Path(folder), step, generation)
        checkpoint.prune(Path(folder), 2, set())


def test_kill_9_while_saving_always_leaves_one_that_loads(folder: Path) -> None:
    chance, seen = random.Random(5), 0
    put(folder, 0, 1)
    for generation in range(2, 17):
        child = CONTEXT.Process(target=save_for_ever, args=(str(folder), generation))
        child.start()
        deadline = time.monotonic() + 30
        while not list(folder.glob(f"g{generation:03d}-*")) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        seen += any(path.name.startswith(".") for path in folder.iterdir())
        checkpoint.sweep(folder)
        assert not list(folder.glob(".*"))
        found = loads(folder)
        assert found and found.manifest["generation"] == generation
        assert same(found.model(), tensors(found.step)) and same(
            found.optimizer()["state"][0], moments(found.step)["state"][0]
        )
    assert seen, "no kill hit a save: the test proves nothing"
    assert not (folder.parent / "quarantine").exists()


def save_on_a_full_disk(folder: str, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        put(Path(folder), 8)
    except StorageError as error:
        assert "g001-s00000008" in str(error)
        os._exit(74)
    os._exit(0)


def test_a_disk_that_fills_at_any_byte_leaves_the_old_one_and_no_rubbish(folder: Path) -> None:
    put(folder, 4)
    biggest = max((put(folder, 8) / name).stat().st_size for name in FILES)
    shutil.rmtree(folder / "g001-s00000008")
    for limit in (0, 100, 1000, biggest // 2, biggest - 1):
        assert in_child(save_on_a_full_disk, str(folder), limit) == 74
        assert [path.name for path in folder.iterdir()] == ["g001-s00000004"]
        found = loads(folder)
        assert found and found.step == 4
    assert in_child(save_on_a_full_disk, str(folder), biggest) == 0
    assert checkpoint.verify(folder / "g001-s00000008").step == 8


@pytest.mark.parametrize("nth", range(1, 14))
def test_any_failing_call_is_a_storage_error_that_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """The n-th call to mkdir, open, fsync or rename fails once, for every n."""
    put(folder, 4)
    calls = 0

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(5, "Input/output error")
            return real(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "open")):
            patch.setattr(owner, name, failing(getattr(owner, name)))
        context = pytest.raises(StorageError) if nth <= 12 else contextlib.nullcontext()
        with context:
            put(folder, 8)
    assert not list(folder.glob(".*"))
    found = loads(folder)
    assert found and found.step in ((4,) if nth < 12 else (8,)) and same(found.model(), tensors(found.step))


# Which ones are kept.


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-s")[1]) for path in checkpoint.newest_first(folder))


def spoil(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)


def test_prune_keeps_the_newest_and_the_protected(folder: Path) -> None:
    for step in range(1, 7):
        put(folder, step)
    checkpoint.prune(folder, 2, {"g001-s00000003"})
    assert steps(folder) == [3, 5, 6]
    assert not list(folder.glob(".*"))
    checkpoint.prune(folder, 2, {"g001-s00000003", "g009-s00000009"})
    assert steps(folder) == [3, 5, 6]


def test_prune_counts_only_verified_ones(folder: Path) -> None:
    paths = [put(folder, step) for step in range(1, 7)]
    spoil(paths[5])
    spoil(paths[3])
    checkpoint.prune(folder, 2, set())
    assert steps(folder) == [3, 4, 5, 6]
    found = loads(folder)
    assert found and found.step == 5


@pytest.mark.parametrize("good", range(1, 6))
def test_prune_never_deletes_the_last_verified_one(folder: Path, good: int) -> None:
    for step in range(1, 6):
        path = put(folder, step)
        if step != good:
            spoil(path)
    checkpoint.prune(folder, 1, set())
    found = loads(folder)
    assert found and found.step == good


def test_the_newest_generation_counts_not_the_highest_step(folder: Path) -> None:
    put(folder, 9, generation=1)
    put(folder, 3, generation=2)
    found = loads(folder)
    assert found and (found.manifest["generation"], found.step) == (2, 3)


def test_sweep_removes_what_killed_writers_left_and_nothing_else(folder: Path) -> None:
    put(folder, 4)
    for name in (".g001-s00000008.4711", ".trash-g001-s00000002"):
        (folder / name / "deep").mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"x" * 100)
    checkpoint.sweep(folder)
    assert [path.name for path in folder.iterdir()] == ["g001-s00000004"]
    checkpoint.sweep(folder / "not there")
