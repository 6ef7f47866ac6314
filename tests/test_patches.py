"""Reading in every layout: whole samples and boxes against NumPy, the same pixels for any ranks, threads and stops."""

import errno
import hashlib
import itertools
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets import Loader, open_volumes
from datasets.patches import Patches
from datasets.reading import BadSample, DamagedSample, Reader
from datasets.sampling import Share
from datasets.stored import bytes_of
from datasets.writer import VolumeWriter
from tests import layouts
from tests.layouts import LAYOUTS, TRAIN, VALIDATION, label_map, shape_of, volume

PATCH = (4, 6, 8)
AUGMENT = {"flip": [0, 1, 2], "scale": 0.1, "noise": 0.1}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    return {name: layouts.write(folder / f"{number}.h5", name) for number, name in enumerate(LAYOUTS)}


@pytest.fixture(scope="module")
def opened(files):
    return {name: open_volumes(path) for name, path in files.items()}


@pytest.fixture(scope="module")
def readers(opened):
    readers = {name: Reader(volumes) for name, volumes in opened.items()}
    yield readers
    for reader in readers.values():
        reader.close()


def read_patch(reader, sample, start, size):
    inputs, maps = np.empty((2, *size), np.int16), np.empty(size, np.uint8)
    reader.read_patch(sample, start, size, bytes_of(inputs), bytes_of(maps))
    return inputs, maps


def box(array, start, size):
    """By an index for each voxel, held at the edge."""
    extent = array.shape[-3:]
    indices = [np.clip(np.arange(a, a + n), 0, most - 1) for a, n, most in zip(start, size, extent, strict=True)]
    return array[(..., *np.ix_(*indices))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_samples_are_what_was_written(layout, opened):
    volumes = opened[layout]
    assert volumes.verify() == []
    for number in (0, 7, TRAIN + VALIDATION - 1):
        inputs, target = volumes.read(number)
        assert np.array_equal(inputs, volume(number, layout)) and np.array_equal(target, label_map(number, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sample=st.integers(0, TRAIN + VALIDATION - 1),
    start=st.tuples(*[st.integers(-14, 26)] * 3),
    size=st.tuples(*[st.integers(1, 13)] * 3),
)
def test_a_box_is_the_numpy_slice_with_the_edge_repeated(layout, readers, sample, start, size):
    inputs, maps = read_patch(readers[layout], sample, start, size)
    assert np.array_equal(inputs, box(volume(sample, layout), start, size))
    assert np.array_equal(maps, box(label_map(sample, layout), start, size))


# Order and pixels are a function of (seed, epoch, sample, view).


def batch_hashes(loader, epoch=1, step=0):
    """One digest of a step: (position in the global batch, digest) of each sample."""
    loader.seek(epoch, step)
    for batch in loader:
        rows = zip(batch.samples.tolist(), batch.inputs.numpy(), batch.targets.numpy(), strict=True)
        yield [(s, hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()) for s, x, y in rows]


def woven(volumes, world_size, threads, **options):
    """The steps of an epoch as global batches, put together from all ranks."""
    ranks = []
    for rank in range(world_size):
        ranks.append(list(batch_hashes(Loader(volumes, rank=rank, world_size=world_size, threads=threads, **options))))
    return [[entry for row in zip(*step, strict=True) for entry in row] for step in zip(*ranks, strict=True)]


WAYS = {
    "whole": {"dtype": torch.float32, "augment": AUGMENT},
    "patch": {"dtype": torch.float32, "augment": AUGMENT, "patch": PATCH, "foreground": 0.5, "views": 2},
    "stored": {"patch": PATCH, "sampler": "weighted", "weights": 1.0 + np.arange(TRAIN + VALIDATION) % 3},
}


# Volumes of different shapes make no batch.
PLAYED = [(layout, way) for layout in LAYOUTS for way in WAYS if (layout, way) != ("ragged", "whole")]


@pytest.mark.parametrize(("layout", "way"), PLAYED)
def test_ranks_threads_and_stops_change_no_pixel(layout, way, opened):
    volumes, options = opened[layout], {"batch_size": 4, "seed": 5, "verify": 0.3, **WAYS[way]}
    golden = woven(volumes, 1, 1, **options)
    assert len({digest for step in golden for _, digest in step}) > len(golden)
    for world_size, threads in ((1, 0), (1, 3), (2, 1), (4, 0), (4, 3)):
        assert woven(volumes, world_size, threads, **options) == golden, (world_size, threads)
    for step in range(len(golden) + 1):
        assert list(batch_hashes(Loader(volumes, threads=3, **options), step=step)) == golden[step:]


def test_layouts_of_one_shape_give_the_same_batches(opened):
    options = {"batch_size": 4, "seed": 5, **WAYS["patch"]}
    digests = {str(woven(volumes, 1, 2, **options)) for layout, volumes in opened.items() if layout != "ragged"}
    assert len(digests) == 1


# Where patches lie.


def test_patches_are_boxes_of_their_sample_anywhere_in_it(opened):
    for layout in ("contiguous", "ragged"):
        volumes, seen = opened[layout], set()
        loader = Loader(volumes, batch_size=TRAIN, patch=PATCH, threads=0)
        for _ in range(12):
            for batch in loader:
                for sample, inputs, maps in zip(batch.samples.tolist(), batch.inputs, batch.targets, strict=True):
                    found = find(inputs.numpy(), volume(sample, layout))
                    assert np.array_equal(maps, box(label_map(sample, layout), found, PATCH))
                    seen.add((sample, found))
        assert len(seen) > 12 * TRAIN * 0.9
        if layout == "contiguous":
            assert {start for _, (start, _, _) in seen} == set(range(6))


def find(patch, whole):
    """Start of the patch in the volume, centred on an axis that is no longer than it."""
    room = [most - size for most, size in zip(whole.shape[1:], patch.shape[1:], strict=True)]
    starts = [range(free + 1) if free > 0 else [free // 2] for free in room]
    corners = [(x, y, z) for x in starts[0] for y in starts[1] for z in starts[2]]
    return next(corner for corner in corners if np.array_equal(box(whole, corner, patch.shape[1:]), patch))


def test_without_shuffling_the_patch_is_the_centre(opened):
    for layout in ("contiguous", "ragged"):
        for size in (PATCH, (20, 1, 30)):
            loader = Loader(opened[layout], "validation", batch_size=3, patch=size)
            for _ in range(2):
                for batch in loader:
                    for sample, inputs in zip(batch.samples.tolist(), batch.inputs, strict=True):
                        start = [(a - b) // 2 for a, b in zip(shape_of(sample, layout)[1:], size, strict=True)]
                        assert np.array_equal(inputs, box(volume(sample, layout), start, size))


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_foreground_is_in_its_exact_share_of_the_patches(share, opened):
    """With a small patch, others hold foreground by chance alone."""
    holding = total = 0
    by_class = np.zeros(4)
    loader = Loader(opened["ragged"], batch_size=1, patch=(1, 1, 1), foreground=share, views=8, threads=0)
    for batch in loader:
        total += 1
        holding += int(batch.targets.any())
        if int(batch.samples) % 2 == 0:
            by_class[int(batch.targets)] += 1
    chance = np.mean([label_map(number, "ragged").astype(bool).mean() for number in range(TRAIN)])
    assert holding >= int(share * total) and holding <= share * total + 5 + 3 * chance * total
    if share == 1.0:
        assert by_class[3] == 0 and 0.5 < by_class[1] / by_class[2] < 2  # drawn by class, not by voxel


def test_a_foreground_voxel_lies_anywhere_in_its_patch(tmp_path):
    path, voxel = tmp_path / "one.h5", (3, 5, 6)
    places = np.array([[[-1], [np.ravel_multi_index(voxel, (9, 10, 11))]]], np.int32)
    options = {"shape": (1, 9, 10, 11), "dtype": "int16", "num_samples": 1, "class_names": ["nothing", "lesion"]}
    with VolumeWriter(path, task="segmentation", foreground=places, **options) as writer:
        writer.add(np.zeros((1, 9, 10, 11), np.int16), np.zeros((9, 10, 11), np.uint8), id="s")
    volumes, offsets = open_volumes(path), set()
    patches = Patches(volumes, (3, 3, 3), seed=0, drawn=True)
    with Reader(volumes) as reader:
        for key in range(600):
            start = patches.start(reader, 0, 0, key, foreground=True)
            offsets.add(tuple(a - b for a, b in zip(voxel, start, strict=True)))
    assert offsets == {(x, y, z) for x in range(3) for y in range(3) for z in range(3)}


@pytest.mark.parametrize("layout", ["contiguous", "ragged"])
def test_places_drawn_ahead_are_those_of_each_patch_alone(layout, opened):
    volumes = opened[layout]
    patches = Patches(volumes, (9, 6, 40), seed=2**64 - 1, drawn=True)
    samples, views = np.arange(4000) % len(volumes), np.arange(4000) // len(volumes)
    shares = [Share(samples[n : n + 3], views[n : n + 3], np.arange(n, n + 3)) for n in range(0, 3999, 3)]
    with Reader(volumes) as reader:
        for share, places in itertools.islice(patches.planned(7, iter(shares)), 0, None, 40):
            for sample, view, start in zip(share.samples.tolist(), share.views.tolist(), places.starts, strict=True):
                assert tuple(start) == patches.start(reader, 7, sample, sample + view * len(volumes), foreground=False)
                room = np.array(volumes.sample_shape(sample)[1:]) - patches.size
                assert all(0 <= a <= free or (free < 0 and a == free // 2) for a, free in zip(start, room, strict=True))


def test_what_was_read_before_a_bad_sample_is_handed_over(tmp_path):
    path = layouts.write(tmp_path / "v.h5", "contiguous", "classification")
    volumes = open_volumes(path)
    damage(path, volumes, 7)
    for threads in (1, 3):
        seen = []
        with pytest.raises(DamagedSample, match="number 7"):
            for batch in Loader(volumes, batch_size=1, verify=1.0, threads=threads, shuffle=False):
                seen += batch.samples.tolist()
        assert seen == list(range(7))


def test_whole_volumes_of_different_shapes_come_one_by_one(opened):
    volumes = opened["ragged"]
    for dtype in (None, torch.float32):
        samples = []
        for rank in range(2):
            for batch in Loader(volumes, "validation", batch_size=2, rank=rank, world_size=2, dtype=dtype, verify=1.0):
                number = int(batch.samples)
                wanted = volume(number, "ragged")
                assert np.array_equal(batch.targets[0], label_map(number, "ragged"))
                if dtype is None:
                    assert np.array_equal(batch.inputs[0], wanted)
                else:
                    assert np.allclose(batch.inputs[0], wanted * np.float32(0.01) + np.float32(0.5))
                samples.append(number)
        assert sorted(samples) == list(range(TRAIN, TRAIN + VALIDATION))


REFUSED = [
    ("ragged", {"batch_size": 2}, r"volumes of different shapes: give patch, or batch_size 1"),
    ("contiguous", {"foreground": 0.3}, "foreground has no effect without patch"),
    ("contiguous", {"patch": (4, 4)}, r"patch \[4, 4\] must be 3 sizes of 1 or more"),
    ("contiguous", {"patch": (4, 0, 4)}, r"patch \[4, 0, 4\] must be 3 sizes of 1 or more"),
    ("contiguous", {"patch": PATCH, "foreground": 1.5}, "foreground 1.5 is a share"),
    ("contiguous", {"patch": PATCH, "foreground": 0.5, "split": "validation"}, "foreground 0.5 has no effect where"),
    ("contiguous", {"on_bad_sample": "pass"}, "on_bad_sample 'pass' is unknown; use stop or skip"),
]


@pytest.mark.parametrize(("layout", "options", "message"), REFUSED)
def test_patches_that_cannot_work_are_refused(layout, options, message, opened):
    with pytest.raises(ValueError, match=message):
        Loader(opened[layout], **{"batch_size": 1, **options})


def test_foreground_without_stored_voxels_is_refused(tmp_path):
    volumes = open_volumes(layouts.write(tmp_path / "c.h5", "contiguous", "classification"))
    with pytest.raises(ValueError, match="needs stored voxels of each class"):
        Loader(volumes, batch_size=1, patch=PATCH, foreground=0.5)


# What is broken.


def test_a_file_cut_short_ends_patches_by_an_error_not_by_a_signal(tmp_path):
    """Between two reads: what is cut off while a thread copies from the memory map is a SIGBUS, see datasets.stored."""
    for layout in LAYOUTS:
        path = layouts.write(tmp_path / "v.h5", layout)
        loader = Loader(open_volumes(path), batch_size=1, patch=PATCH, threads=0)
        batches = iter(loader)
        next(batches)
        os.truncate(path, path.stat().st_size // 3)
        with pytest.raises(OSError, match=r"v\.h5 was cut short while it was read: .* within sample 's\d+' \(number"):
            list(batches)
        path.unlink()


def damage(path, volumes, sample):
    stored, row = volumes.shards[0].inputs, sample
    offset = stored.chunks.offsets[row, 0] + 40 if stored.offset is None else stored.offset + row * volume(0).nbytes
    with path.open("r+b") as file:
        file.seek(int(offset))
        file.write(b"\x55\xaa\x55" * 9)
    os.utime(path, ns=(volumes.shards[0].identity[2],) * 2)


BAD = [("contiguous", {}), ("contiguous", {"patch": PATCH}), ("blosc2-lz4", {}), ("patch chunks, zstd", {})]


@pytest.mark.parametrize(("layout", "options"), BAD)
def test_a_bad_sample_is_replaced_by_one_of_its_class_whoever_reads_it(layout, options, tmp_path, caplog):
    path = layouts.write(tmp_path / "v.h5", layout, "classification")
    volumes = open_volumes(path)
    for sample in (4, 6):
        damage(path, volumes, sample)
    options = {"batch_size": 4, "verify": 1.0, **options}
    with pytest.raises(DamagedSample, match=r"v\.h5: sample 's[46]' \(number [46]\) is damaged"):
        list(Loader(volumes, **options))
    skipping = Loader(volumes, on_bad_sample="skip", **options)
    golden = [batch.samples.tolist() for batch in skipping]
    clean = [[int(s) for s in step] for step in orders(volumes)]
    assert {4, 6} & set(itertools.chain(*clean)) == {sample for sample, _ in skipping.skipped}
    for step, wanted in zip(golden, clean, strict=True):
        for sample, planned in zip(step, wanted, strict=True):
            assert sample not in (4, 6) and sample % 3 == planned % 3
            assert sample == planned or planned in (4, 6)
    assert all("is damaged" in reason and "v.h5" in reason for _, reason in skipping.skipped)
    assert sum("sample skipped" in line for line in caplog.messages) == len(skipping.skipped) > 0
    ranks = [Loader(volumes, rank=r, world_size=2, threads=3, on_bad_sample="skip", **options) for r in range(2)]
    parts = [[batch.samples.tolist() for batch in rank] for rank in ranks]
    assert [[a for row in zip(*step, strict=True) for a in row] for step in zip(*parts, strict=True)] == golden
    assert sorted(itertools.chain(*(rank.skipped for rank in ranks))) == sorted(skipping.skipped)


def orders(volumes):
    from datasets.order import epoch_order

    return epoch_order(TRAIN, 0, 0, shuffle=True)[: TRAIN // 4 * 4].reshape(-1, 4)


def test_where_all_are_bad_it_ends_after_all(tmp_path):
    path = layouts.write(tmp_path / "v.h5", "contiguous", "classification")
    volumes = open_volumes(path)
    for sample in range(TRAIN):
        damage(path, volumes, sample)
    with pytest.raises(DamagedSample, match="is damaged"):
        list(Loader(volumes, batch_size=4, verify=1.0, on_bad_sample="skip"))


def test_a_file_that_is_gone_or_cut_short_stops_even_with_skip(tmp_path):
    path = layouts.write(tmp_path / "v.h5", "contiguous", "classification")
    loader = Loader(open_volumes(path), batch_size=1, on_bad_sample="skip")
    batches = iter(loader)
    next(batches)
    os.truncate(path, 5000)
    with pytest.raises(OSError, match="was cut short"):
        list(batches)
    path.unlink()
    with pytest.raises(OSError, match=r"v\.h5"):
        list(loader)


@pytest.mark.parametrize("options", [{}, {"patch": PATCH}], ids=["whole", "patch"])
def test_a_disk_that_fails_names_the_sample_and_may_be_passed_over(options, tmp_path, monkeypatch):
    layout = "patch chunks, zstd"  # boxes of contiguous files come from a memory map
    volumes = open_volumes(layouts.write(tmp_path / "v.h5", layout, "classification"))
    first, last = volumes.shards[0].inputs.chunks.offsets[5, [0, -1]]
    whole = os.preadv

    def failing(descriptor, buffers, offset):
        if first <= offset <= last:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(BadSample, match=r"v\.h5: sample 's5' \(number 5\) cannot be read: Input/output error"):
        list(Loader(volumes, batch_size=1, **options))
    loader = Loader(volumes, batch_size=1, on_bad_sample="skip", **options)
    assert 5 not in [int(batch.samples) for batch in loader]
    assert [sample for sample, _ in loader.skipped] == [5]
