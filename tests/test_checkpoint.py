"""Checkpoints under every fault that a disk or an intruder makes: found, quarantined, never loaded, never lost."""

import errno
import math
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hpc.errors import UserError
from jobs import checkpoint, durable
from jobs.checkpoint import Checkpoint, Damaged, Snapshot, StorageError
from tests.tiny_run import in_child

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
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
    return write(folder, step, tensors(step), moments(step), state, generation)


def write(
    folder: Path, step: int, model: dict[str, Tensor], optimizer: dict[str, Any], state: Any = None, generation: int = 1
) -> Path:
    return Snapshot().take(generation, step, model, optimizer, state or {}, FACTS).write(folder)


def bytes_of(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], list[int]]:
    plain = tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
    return tensor.dtype, tuple(tensor.shape), plain.view(-1).view(torch.uint8).tolist()


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(bytes_of(found[key]) == bytes_of(wanted[key]) for key in wanted)


def loads(folder: Path, keep_bad: bool = False) -> Checkpoint | None:
    return checkpoint.load_newest(folder, folder.parent / "quarantine", keep_bad)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


# What is written is what is read.


def test_every_kind_of_tensor_comes_back_bit_for_bit(folder: Path) -> None:
    found = checkpoint.verify(put(folder, 7))
    assert same(found.model(), tensors(7))
    written, read = moments(7), found.optimizer()
    assert read["param_groups"] == written["param_groups"]
    assert same(read["state"][0], written["state"][0])
    assert found.state() == {"best": None, "sums": {"loss": (7 / 3).hex()}}
    assert (found.name, found.step, found.manifest["world_size"]) == ("g001-s00000007", 7, 2)


def test_a_fenced_writer_leaves_what_the_newer_one_is_writing(folder: Path) -> None:
    def refuse() -> None:
        raise UserError("the run is another's")

    def begin_a_save_of_the_first() -> None:
        first = Snapshot().take(1, 5, tensors(5), moments(5), {}, FACTS)
        with pytest.raises(UserError):
            first.write(folder, before_commit=refuse)

    second = Snapshot().take(2, 6, tensors(6), moments(6), {}, FACTS)
    second.write(folder, before_commit=begin_a_save_of_the_first)
    assert [path.name for path in folder.iterdir()] == ["g002-s00000006"]
    assert same(checkpoint.verify(folder / "g002-s00000006").model(), tensors(6))


def test_an_average_is_the_model_and_the_trained_weights_are_kept_beside_it(folder: Path) -> None:
    snapshot = Snapshot().take(1, 3, tensors(3), moments(3), {}, FACTS, tensors(4))
    path = snapshot.write(folder)
    found = checkpoint.verify(path)
    assert same(found.model(), tensors(3)) and same(found.trained(), tensors(4))
    alone = checkpoint.verify(put(folder, 5))
    assert same(alone.trained(), tensors(5)), "without an average the model is what is trained"
    file = path / "trained.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(Damaged, match=r"trained\.safetensors"):
        checkpoint.verify(path)


def test_what_an_optimizer_holds_beside_tensors_keeps_its_type_and_every_bit(folder: Path) -> None:
    held = {
        "state": {0: {"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}, "n": 3}, 10: {}, "layer.weight": {"m": None}},
        "param_groups": [{"betas": (0.9, 1 / 3), "lr": torch.tensor(0.1), "params": [0, 10], "x": {"$": "tuple"}}],
        "extremes": [5e-324, -0.0, math.inf, math.nan, 2**70, True, "\u00fc"],
    }
    assert repr(checkpoint.verify(write(folder, 1, {}, held)).optimizer()) == repr(held)


@pytest.mark.parametrize("value", [torch.ones(1).to(torch.complex64), {1, 2}, {(1, 2): 3}, object()])
def test_what_is_neither_tensor_nor_json_is_refused_by_name(folder: Path, value: Any) -> None:
    with pytest.raises(TypeError, match=r"state\.0\.odd"):
        write(folder, 1, {}, {"state": {0: {"odd": value}}})


def test_tied_weights_are_saved_and_load_into_a_tied_model(folder: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    model = tied()
    again = tied()
    again.load_state_dict(checkpoint.verify(write(folder, 1, model.state_dict(), {})).model())
    assert same(again.state_dict(), model.state_dict())


def test_views_and_parameters_are_saved_as_they_look(folder: Path) -> None:
    whole = torch.arange(12.0)
    model = {"head": whole[:4], "tail": whole[4:], "turned": whole.view(3, 4).t(), "each": whole[::5], "all": whole}
    model |= {"expanded": torch.ones(1).expand(5), "negated": torch.tensor([1 + 2j]).conj().imag}
    model["parameter"] = nn.Parameter(whole.view(3, 4))
    assert same(checkpoint.verify(write(folder, 1, model, {})).model(), model)


def test_the_files_of_tensors_are_safetensors(folder: Path) -> None:
    path, written = put(folder, 7), moments(7)["state"][0]
    assert same(safetensors.torch.load_file(path / FILES[0]), tensors(7))
    assert same(safetensors.torch.load_file(path / FILES[1]), {f"state.0.{key}": written[key] for key in written})


def test_the_same_memory_serves_every_save_until_the_shapes_change(folder: Path) -> None:
    snapshot, contents = Snapshot(), []
    for step in range(1, 4):
        snapshot.take(1, step, tensors(step), moments(step) if step > 1 else {}, {}, FACTS).write(folder)
        contents.append(snapshot.pages.files["model.safetensors"])
    assert contents[0] is not contents[1]  # the first step gave the optimizer its state
    assert contents[1] is contents[2]
    for step, path in zip((3, 2, 1), checkpoint.newest_first(folder), strict=True):
        assert same(checkpoint.verify(path).model(), tensors(step))


def test_what_is_loaded_is_what_was_verified(folder: Path) -> None:
    path = put(folder, 7)
    found = checkpoint.verify(path)
    for name in FILES:
        (path / name).write_bytes(b"later")
    assert same(found.model(), tensors(7)) and found.state()["best"] is None
    one, other = found.optimizer()["state"][0], found.optimizer()["state"][0]
    one["exp_avg"].add_(1)  # an optimizer goes on with the tensors that it loads
    assert same(other, moments(7)["state"][0])


def test_the_manifest_is_written_last_and_every_file_is_synced_before_the_rename(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        calls.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        sync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        calls.append(f"rename to {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    put(folder, 7)
    files = [f"sync {name}" for name in FILES]
    aside = "sync .g001-s00000007.0"
    made = f"sync {folder.parent.name}"  # the folder of all checkpoints is new
    assert calls == [made, *files, aside, "rename to g001-s00000007", "sync checkpoints"]


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
            silent.append(seed)
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


def test_damage_in_any_block_of_a_large_file_is_found_in_its_place(folder: Path) -> None:
    size = 3 * durable.BLOCK
    path = write(folder, 1, {"large": torch.randint(0, 255, (size,), dtype=torch.uint8)}, {}) / FILES[0]
    good = path.read_bytes()
    for place in (0, 1, durable.BLOCK - 1, durable.BLOCK, 2 * durable.BLOCK + 5, len(good) - 1):
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), bytes([good[place] ^ 1]), place)
            start = place // durable.BLOCK * durable.BLOCK
            with pytest.raises(Damaged, match=f"CRC-32 of bytes {start} to"):
                checkpoint.verify(path.parent)
            assert not checkpoint.readable(path.parent)
            os.pwrite(file.fileno(), good[place : place + 1], place)
    assert checkpoint.readable(path.parent)
    blocks = [good[at : at + durable.BLOCK] for at in range(0, len(good), durable.BLOCK)]
    path.write_bytes(b"".join([blocks[0], blocks[2], blocks[1], *blocks[3:]]))
    with pytest.raises(Damaged):
        checkpoint.verify(path.parent)


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


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_storage_that_does_not_answer_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    put(folder, 4)
    put(folder, 8)
    real = getattr(os, call)

    def stale(place: Any, *rest: Any) -> Any:
        path = str(place) if call == "open" else str(Path(f"/proc/self/fd/{place}").readlink())
        if path.endswith(FILES[0]):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(place, *rest)

    monkeypatch.setattr(os, call, stale)
    with pytest.raises(StorageError, match=r"model\.safetensors cannot be read: Stale file handle \(ESTALE\)"):
        loads(folder)
    monkeypatch.undo()
    found = loads(folder)
    assert found and found.step == 8 and not (folder.parent / "quarantine").exists()


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


# A full disk.


def save_on_full_disks(folder: str, limits: list[int]) -> None:
    """In a process of its own; its code is the number of saves that failed."""
    failed = 0
    for step, limit in enumerate(limits, 8):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            put(Path(folder), step)
        except OSError:
            failed += 1
    os._exit(failed)


def test_a_disk_that_fills_at_any_byte_leaves_the_old_one_and_no_rubbish(folder: Path) -> None:
    put(folder, 4)
    biggest = max((put(folder, 8) / name).stat().st_size for name in FILES)
    shutil.rmtree(folder / "g001-s00000008")
    assert in_child(save_on_full_disks, str(folder), [0, 1000, biggest // 2, biggest - 1]) == 4
    assert [path.name for path in folder.iterdir()] == ["g001-s00000004"]
    assert checkpoint.verify(folder / "g001-s00000004").step == 4
    assert in_child(save_on_full_disks, str(folder), [biggest]) == 0
    assert checkpoint.verify(folder / "g001-s00000008").step == 8


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


def test_prune_keeps_milestones_and_reads_no_verified_one_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 8):
        put(folder, step)
    read: list[str] = []
    real = checkpoint.readable
    monkeypatch.setattr(checkpoint, "readable", lambda path, *rest: read.append(path.name) or real(path, *rest))
    verified = {"g001-s00000007"}
    checkpoint.prune(folder, 2, set(), lambda step: step % 3 == 0, verified)
    assert steps(folder) == [3, 6, 7]
    checkpoint.prune(folder, 2, set(), lambda step: step % 3 == 0, verified)
    assert read == ["g001-s00000006"] and verified == {"g001-s00000006", "g001-s00000007"}


def test_prune_deletes_nothing_without_the_lease_or_when_it_must_hurry(folder: Path) -> None:
    for step in range(1, 5):
        put(folder, step)

    def lost() -> None:
        raise UserError("held by another")

    with pytest.raises(UserError):
        checkpoint.prune(folder, 1, set(), before_delete=lost)
    checkpoint.prune(folder, 1, set(), cancelled=lambda: True)
    assert steps(folder) == [1, 2, 3, 4]
    checkpoint.prune(folder, 4, set(), before_delete=lost)  # nothing to delete: nobody asks


def test_the_newest_generation_counts_not_the_highest_step(folder: Path) -> None:
    put(folder, 9, generation=1)
    put(folder, 3, generation=2)
    found = loads(folder)
    assert found and (found.manifest["generation"], found.step) == (2, 3)


def test_sweep_removes_what_killed_writers_left_and_nothing_else(folder: Path) -> None:
    put(folder, 4)
    for name in (".g001-s00000008.1", ".trash-g001-s00000002", ".nfs000000000001"):
        (folder / name / "deep").mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"x" * 100)
    checkpoint.sweep(folder)
    assert sorted(path.name for path in folder.iterdir()) == [".nfs000000000001", "g001-s00000004"]
    checkpoint.sweep(folder / "not there")
