"""The loader's contract: order by arithmetic, the same batches for any threads and ranks, memory safe to hold."""

import gc
import itertools
import os
import shutil
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets import Loader, open_volumes
from datasets.augment import Augment
from datasets.order import Stream, epoch_order, uniforms
from datasets.writer import VolumeWriter

SHAPE = (2, 4, 5, 6)
TRAIN, VALIDATION = 23, 11
FIXED_ORDER = [8, 2, 4, 1, 3, 6, 5, 0, 7, 9]
FIXED_DRAWS = [0.30473767871605484, 0.5423652765562208]


def volume(number):
    return np.random.default_rng(number).integers(-900, 900, SHAPE).astype(np.int16)


def label_map(number):
    return np.random.default_rng(number).integers(0, 3, SHAPE[1:]).astype(np.uint8)


def write(path, numbers=range(TRAIN + VALIDATION), task="classification"):
    targets = {
        "classification": lambda number: number % 3,
        "multilabel": lambda number: [number & 1, number >> 1 & 1, number >> 2 & 1],
        "segmentation": label_map,
    }[task]
    options = {"shape": SHAPE, "dtype": "int16", "num_samples": len(numbers), "class_names": ["a", "b", "c"]}
    with VolumeWriter(path, task=task, **options) as writer:
        for number in numbers:
            split = "train" if number < TRAIN else "validation"
            scale, offset = (0.01 + number / 100, 0.5), (-1.0, number)
            writer.add(volume(number), targets(number), id=f"s{number}", split=split, scale=scale, offset=offset)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "scans.h5")


@pytest.fixture(scope="module")
def volumes(path):
    return open_volumes(path)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not loader_threads()


def loader_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


def open_descriptors():
    return {entry.name for entry in Path("/proc/self/fd").iterdir() if entry.exists()}


def numbers(loader):
    """Sample numbers of the batches of one epoch."""
    return [batch.samples.tolist() for batch in loader]


def test_a_batch_holds_what_was_written(volumes):
    for batch in Loader(volumes, batch_size=4):
        assert batch.inputs.dtype == torch.int16 and batch.inputs.shape == (4, *SHAPE)
        assert batch.targets.dtype == batch.samples.dtype == torch.int64
        for row, sample in enumerate(batch.samples.tolist()):
            assert np.array_equal(batch.inputs[row], volume(sample))
            assert batch.targets[row] == sample % 3


@pytest.mark.parametrize("task", ["multilabel", "segmentation"])
def test_other_kinds_of_target(tmp_path, task):
    volumes = open_volumes(write(tmp_path / "v.h5", range(9), task))
    for batch in Loader(volumes, batch_size=4, verify=1.0):
        assert batch.targets.dtype == torch.uint8
        for row, sample in enumerate(batch.samples.tolist()):
            wanted = label_map(sample) if task == "segmentation" else volumes.targets[sample]
            assert np.array_equal(batch.targets[row], wanted) and np.array_equal(batch.inputs[row], volume(sample))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch_size=st.integers(1, VALIDATION),
    world_size=st.integers(1, 5),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
    shuffle=st.booleans(),
    split=st.sampled_from(["train", "validation"]),
)
def test_ranks_and_threads_never_change_a_global_batch(volumes, batch_size, world_size, threads, seed, shuffle, split):
    options = {"split": split, "batch_size": batch_size, "seed": seed, "shuffle": shuffle}
    alone = numbers(Loader(volumes, threads=1, **options))
    ranks = [
        numbers(Loader(volumes, rank=rank, world_size=world_size, threads=threads, **options))
        for rank in range(world_size)
    ]
    for step, whole in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        woven = [sample for column in itertools.zip_longest(*parts) for sample in column if sample is not None]
        assert woven == whole
    assert {len(rank) for rank in ranks} == {len(alone)}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch_size=st.integers(1, 11), epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_sample_comes_once_per_epoch(volumes, batch_size, epochs, seed):
    shuffled = Loader(volumes, "train", batch_size, seed)
    ordered = Loader(volumes, "validation", batch_size, seed)
    for _ in range(epochs):
        drawn = list(itertools.chain(*numbers(shuffled)))
        assert len(drawn) == len(set(drawn)) == TRAIN // batch_size * batch_size and set(drawn) <= set(range(TRAIN))
        assert list(itertools.chain(*numbers(ordered))) == list(range(TRAIN, TRAIN + VALIDATION))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch_size=st.integers(1, 9), epoch=st.integers(0, 2), data=st.data())
def test_seeking_is_the_same_as_skipping(volumes, batch_size, epoch, data):
    loader = Loader(volumes, batch_size=batch_size, seed=7)
    step = data.draw(st.integers(0, len(loader)))
    epochs = [numbers(loader) for _ in range(epoch + 2)]
    fresh = Loader(volumes, batch_size=batch_size, seed=7, threads=3)
    fresh.seek(epoch=epoch, step=step)
    assert numbers(fresh) == epochs[epoch][step:]
    assert (fresh.epoch, fresh.step) == (epoch + 1, 0)
    assert numbers(fresh) == epochs[epoch + 1]


def test_epochs_and_seeds_give_other_orders(volumes):
    loader = Loader(volumes, batch_size=5)
    first, second = numbers(loader), numbers(loader)
    assert first != second != numbers(Loader(volumes, batch_size=5, seed=1))
    assert numbers(Loader(volumes, batch_size=5)) == first
    assert numbers(Loader(volumes, batch_size=5, seed=2**64 - 1)) != numbers(
        Loader(volumes, batch_size=5, seed=2**64 - 2)
    )


def test_the_order_is_fixed_for_ever():
    """Change this, and no run can be resumed or repeated with the order it had."""
    assert epoch_order(10, seed=3, epoch=2, shuffle=True).tolist() == FIXED_ORDER
    assert uniforms(3, 2, Stream.AUGMENT, 2, sample=5).tolist() == FIXED_DRAWS


def test_a_broken_off_epoch_goes_on_where_it_was_left(volumes):
    whole = numbers(Loader(volumes, batch_size=4))
    loader = Loader(volumes, batch_size=4)
    for count, _ in enumerate(loader, start=1):
        if count == 2:
            break
    assert (loader.epoch, loader.step) == (0, 2)
    assert numbers(loader) == whole[2:]
    assert loader.epoch == 1


def test_a_rank_may_get_nothing_of_the_last_batch(volumes):
    loader = Loader(volumes, "validation", batch_size=10, rank=3, world_size=4, dtype=torch.float32)
    sizes = [batch.inputs.shape for batch in loader]
    assert sizes == [(2, *SHAPE), (0, *SHAPE)] and len(loader) == 2


def test_more_threads_than_samples(tmp_path):
    volumes = open_volumes(write(tmp_path / "v.h5", range(2)))
    assert sorted(numbers(Loader(volumes, batch_size=2, threads=16))[0]) == [0, 1]


def test_normalised_intensities_are_stored_times_scale_plus_offset(volumes):
    for dtype in (torch.float32, torch.bfloat16):
        for batch in Loader(volumes, batch_size=3, dtype=dtype):
            for row, sample in enumerate(batch.samples.tolist()):
                scale, offset = (
                    table[sample][:, None, None, None].astype(np.float32) for table in (volumes.scale, volumes.offset)
                )
                wanted = torch.from_numpy(volume(sample).astype(np.float32) * scale + offset).to(dtype)
                assert torch.equal(batch.inputs[row], wanted)


def test_shards_are_one_data_set(volumes, tmp_path):
    half = 15
    shards = [write(tmp_path / "a.h5", range(half)), write(tmp_path / "b.h5", range(half, TRAIN + VALIDATION))]
    for whole, part in zip(Loader(volumes, batch_size=4), Loader(open_volumes(shards), batch_size=4), strict=True):
        assert torch.equal(whole.inputs, part.inputs) and torch.equal(whole.targets, part.targets)


def test_chunked_files_give_the_same_batches(path, volumes, tmp_path):
    chunked = tmp_path / "chunked.h5"
    shutil.copy(path, chunked)
    with h5py.File(chunked, "r+") as file:
        data = file["inputs"][()]
        del file["inputs"]
        file.create_dataset("inputs", data=data, chunks=(1, *SHAPE))
    other = open_volumes(chunked)
    assert other.shards[0].inputs.offset is None and other.verify() == []
    for a, b in zip(Loader(volumes, batch_size=4), Loader(other, batch_size=4, threads=3, verify=1.0), strict=True):
        assert torch.equal(a.inputs, b.inputs)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_batches_that_are_held_stay_right(volumes, dtype):
    loader = Loader(volumes, batch_size=2, threads=2, dtype=dtype)
    held = list(loader)
    copies = [batch.inputs.clone() for batch in held]
    list(loader), list(loader)
    for batch, copy in zip(held, copies, strict=True):
        assert torch.equal(batch.inputs, copy)
        if dtype is None:
            assert np.array_equal(batch.inputs[1], volume(int(batch.samples[1])))


@pytest.mark.parametrize(
    "keep",
    [lambda tensor: tensor[1, 0], lambda tensor: tensor.flatten(), lambda tensor: tensor.numpy()[0, 1]],
    ids=["view", "flat", "numpy"],
)
def test_a_view_alone_keeps_its_memory(volumes, keep):
    loader = Loader(volumes, batch_size=2)
    views, copies = [], []
    for batch in loader:
        views.append(keep(batch.inputs))
        copies.append(views[-1].copy() if isinstance(views[-1], np.ndarray) else views[-1].clone())
    del batch
    list(loader)
    assert all(np.array_equal(view, copy) for view, copy in zip(views, copies, strict=True))


def test_memory_is_used_again_when_nobody_looks(volumes):
    loader = Loader(volumes, batch_size=2, threads=2)
    for _ in loader:
        pass
    places = {batch.inputs.data_ptr() for _ in range(3) for batch in loader}
    assert len(places) < len(loader)
    lean = set()
    for batch in loader:
        lean.add(batch.inputs.data_ptr())
        del batch
    assert len(lean) < len(places)  # the loader itself keeps no batch
    held = list(loader)
    assert len({batch.inputs.data_ptr() for batch in held}) == len(loader)
    del held
    for _ in loader:
        pass
    assert len(loader._ring.slots) <= len(places) + 3  # grown for the held ones, then given back


def test_breaking_off_again_and_again_takes_no_more_memory(volumes):
    loader = Loader(volumes, batch_size=2)
    sizes = set()
    for _ in range(8):
        loader.seek(0)
        next(iter(loader))
        sizes.add(len(loader._ring.slots))
    assert max(sizes) <= 4


def test_breaking_off_joins_the_threads(volumes):
    loader = Loader(volumes, batch_size=2, threads=3)
    for _ in loader:
        assert loader_threads()
        break
    assert not loader_threads()


def test_an_exception_in_the_users_loop_joins_the_threads_by_close(volumes):
    loader = Loader(volumes, batch_size=2, threads=3)
    with pytest.raises(ZeroDivisionError), loader:
        for _ in loader:
            _ = 1 / 0
    assert not loader_threads()


def test_collecting_an_iteration_joins_the_threads(volumes):
    batches = iter(Loader(volumes, batch_size=2, threads=3))
    next(batches)
    assert loader_threads()
    del batches
    gc.collect()
    assert not loader_threads()


def test_a_new_iteration_or_a_seek_ends_the_running_one(volumes):
    loader = Loader(volumes, batch_size=2)
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    assert next(first, None) is None and loader.step == 2
    loader.seek(epoch=4)
    assert next(second, None) is None and (loader.epoch, loader.step) == (4, 0)


def test_descriptors_are_closed(volumes):
    gc.collect()
    before = open_descriptors()
    loader = Loader(volumes, batch_size=2)
    list(loader)
    once = open_descriptors()
    next(iter(loader))
    assert open_descriptors() == once > before, "files stay open between epochs"
    loader.close()
    assert open_descriptors() == before
    list(loader)
    del loader
    gc.collect()
    assert open_descriptors() == before


def test_waiting_is_counted(volumes):
    loader = Loader(volumes, batch_size=2)
    assert loader.waited == 0.0
    list(loader)
    first = loader.waited
    list(loader)
    assert 0 < first < loader.waited


def damage(path, sample):
    with path.open("r+b") as file:
        file.seek(open_volumes(path).shards[0].inputs.offset + sample * volume(0).nbytes + 5)
        file.write(b"\x55\xaa\x55")


def test_verify_finds_a_damaged_sample_and_names_file_sample_and_command(tmp_path):
    path = write(tmp_path / "v.h5", range(20))
    damage(path, 13)
    loader = Loader(open_volumes(path), batch_size=2, verify=1.0)
    with pytest.raises(OSError, match=r"v\.h5: sample 's13' .* damaged.*'hpc inspect .*v\.h5 --verify'"):
        list(loader)
    list(Loader(open_volumes(path), batch_size=2))  # not asked for: not checked


def test_the_checked_share_is_drawn_anew_each_epoch(tmp_path):
    path = write(tmp_path / "v.h5", range(20))
    damage(path, 13)
    volumes = open_volumes(path)
    expected = [bool(uniforms(5, epoch, Stream.VERIFY, 20)[13] < 0.25) for epoch in range(24)]
    found = []
    for epoch in range(24):
        loader = Loader(volumes, batch_size=1, seed=5, verify=0.25)
        loader.seek(epoch)
        try:
            list(loader)
            found.append(False)
        except OSError:
            found.append(True)
    assert found == expected and 0 < sum(found) < 24


def test_a_file_cut_short_while_it_is_read_is_an_error_and_no_hang(tmp_path):
    path = write(tmp_path / "v.h5", range(20))
    loader = Loader(open_volumes(path), batch_size=1, shuffle=False)
    batches = iter(loader)
    next(batches)
    os.truncate(path, loader.volumes.shards[0].inputs.offset + 6 * volume(0).nbytes)
    with pytest.raises(OSError, match=r"v\.h5 was cut short while it was read"):
        list(batches)
    with pytest.raises(OSError, match="exchanged since it was opened"):
        list(loader)


def test_reads_that_return_less_are_continued(volumes, monkeypatch):
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: whole(descriptor, [buffers[0][:7]], offset))
    for batch in Loader(volumes, batch_size=4):
        assert all(np.array_equal(x, volume(int(s))) for x, s in zip(batch.inputs, batch.samples, strict=True))


def test_a_deleted_file_is_an_error(tmp_path):
    path = write(tmp_path / "v.h5", range(4))
    loader = Loader(open_volumes(path), batch_size=1)
    path.unlink()
    with pytest.raises(OSError, match=r"v\.h5"):
        list(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0 must be 1 or more"),
        ({"batch_size": 24}, "batch_size 24 is over the 23 samples of split 'train'"),
        ({"split": "val"}, "split 'val' is unknown"),
        ({"split": "test"}, r"no sample in split 'test' \(train 23, validation 11, test 0\)"),
        ({"rank": 2, "world_size": 2}, "rank 2 is outside"),
        ({"threads": -1}, "threads -1 must be 0 or more"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"verify": 2.0}, "verify 2.0 is a share"),
        ({"dtype": torch.int32}, "is no float"),
        ({"augment": {"noise": 0.1}}, "give dtype"),
        ({"augment": {"noize": 0.1}, "dtype": torch.float32}, "'noize' is unknown; did you mean 'noise'"),
        ({"augment": {"flip": [3]}, "dtype": torch.float32}, r"flip \[3\] must name spatial axes"),
        ({"augment": {"flip": 1}, "dtype": torch.float32}, "is not a list of axes"),
        ({"augment": {"scale": "much"}, "dtype": torch.float32}, "is not a number"),
        ({"augment": {"shift": -1}, "dtype": torch.float32}, "must be 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(volumes, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(volumes, **options)


@pytest.mark.parametrize("position", [(-1, 0), (0, -1), (0, 6)])
def test_positions_outside_are_refused(volumes, position):
    with pytest.raises(ValueError, match="an epoch has steps 0 to 5"):
        Loader(volumes, batch_size=4).seek(*position)


ALL = Augment(flip=(0, 1, 2), scale=0.2, shift=0.3, noise=0.1)


def pixels(loader):
    return {int(s): x.clone() for batch in loader for s, x in zip(batch.samples, batch.inputs, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_augmented_pixels_are_the_same_bits_in_any_layout(volumes, dtype):
    options = {"dtype": dtype, "augment": ALL, "seed": 9, "split": "validation", "shuffle": False}
    alone = pixels(Loader(volumes, batch_size=11, threads=1, **options))
    for batch_size, world_size, threads in ((1, 1, 4), (4, 1, 1), (6, 3, 2)):
        parts: dict[int, torch.Tensor] = {}
        for rank in range(world_size):
            layout = {"batch_size": batch_size, "rank": rank, "world_size": world_size, "threads": threads}
            parts |= pixels(Loader(volumes, **layout, **options))
        assert parts.keys() == alone.keys()
        assert all(torch.equal(parts[sample], alone[sample]) for sample in alone)


def test_augmentation_changes_with_epoch_and_seed_only(volumes):
    loader = Loader(volumes, batch_size=23, dtype=torch.float32, augment={"noise": 0.1})
    first, second = pixels(loader), pixels(loader)
    assert not any(torch.equal(first[sample], second[sample]) for sample in first)
    loader.seek(0)
    again = pixels(loader)
    assert all(torch.equal(first[sample], again[sample]) for sample in first)


def test_label_maps_follow_the_flips(tmp_path):
    path = tmp_path / "m.h5"
    options = {"shape": (1, 3, 4, 5), "dtype": "int16", "num_samples": 40, "class_names": [str(n) for n in range(60)]}
    maps = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    with VolumeWriter(path, task="segmentation", **options) as writer:
        for number in range(40):
            writer.add(maps[None].astype(np.int16), maps, id=str(number))
    loader = Loader(open_volumes(path), batch_size=40, dtype=torch.float32, augment={"flip": [0, 2]})
    batch = next(iter(loader))
    assert torch.equal(batch.inputs[:, 0].to(torch.uint8), batch.targets)
    seen = {int(corner) for corner in batch.targets[:, 0, 0, 0]}
    assert seen == {0, 4, 40, 44}  # no flip, either axis, both


def test_each_part_of_the_augmentation_has_its_size():
    inputs = torch.full((400, 1, 8, 8, 8), 2.0)
    samples = np.arange(400)
    scaled, _ = Augment(scale=0.1)(inputs.clone(), samples, 0, 0)
    shifted, _ = Augment(shift=0.5)(inputs.clone(), samples, 0, 0)
    noisy, _ = Augment(noise=0.2)(inputs.clone(), samples, 0, 0)
    assert 1.8 <= scaled.min() < 1.83 and 2.17 < scaled.max() <= 2.2 and scaled.flatten(1).std(dim=1).max() == 0
    assert 1.5 <= shifted.min() < 1.53 and 2.47 < shifted.max() <= 2.5
    spread = noisy.flatten(1).std(dim=1)
    assert spread.min() < 0.01 and 0.17 < spread.max() < 0.22
    assert torch.equal(Augment()(inputs.clone(), samples, 0, 0)[0], inputs)


def test_batches_of_another_device_are_copied_and_finished_there(volumes):
    """meta: no GPU is at hand; what is special to CUDA (stream, events) is not run here."""
    options = {"batch_size": 4, "threads": 2, "dtype": torch.bfloat16}
    for batch, wanted in zip(Loader(volumes, device="meta", **options), Loader(volumes, **options), strict=True):
        for name in ("inputs", "targets", "samples"):
            found, here = getattr(batch, name), getattr(wanted, name)
            assert found.device.type == "meta" and (found.shape, found.dtype) == (here.shape, here.dtype)
