"""The volume file: what was written is read back; what is broken, foreign or half written is refused in one line."""

import os
import pickle
import shutil
import tracemalloc
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from datasets import open_volumes
from datasets.drafts import Plan, allocate, complete
from datasets.layout import VolumeFileError
from datasets.writer import VolumeWriter

SHAPE = (2, 3, 4, 5)


def volume(number):
    return np.random.default_rng(number).integers(-500, 500, SHAPE).astype(np.int16)


def write(path, numbers=range(6), scale=(0.5, 2.0), **options):
    settings = {"shape": SHAPE, "dtype": "int16", "class_names": ["a", "b"], "num_samples": len(numbers)} | options
    with VolumeWriter(path, **settings) as writer:
        for number in numbers:
            split = ("train", "validation", "test")[number % 3]
            writer.add(volume(number), number % 2, id=f"s{number}", group=f"g{number}", split=split, scale=scale)
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "scans.h5", packing={"patch": None}, source=[{"name": "s0.nii", "size": 3, "sha256": "x"}])


def test_round_trip(path):
    volumes = open_volumes(path)
    assert (volumes.shape, volumes.dtype, len(volumes)) == (SHAPE, np.int16, 6)
    assert (volumes.task, volumes.class_names, volumes.orientation) == ("classification", ("a", "b"), "RAS")
    assert volumes.ids == tuple(f"s{number}" for number in range(6))
    assert volumes.groups[5] == "g5"
    assert volumes.targets.tolist() == [0, 1, 0, 1, 0, 1] and volumes.targets.dtype == np.int64
    assert volumes.indices("validation").tolist() == [1, 4]
    assert volumes.scale[3].tolist() == [0.5, 2.0] and volumes.offset[3].tolist() == [0.0, 0.0]
    assert volumes.packing == {"patch": None} and volumes.source[0]["name"] == "s0.nii"
    for number in range(6):
        inputs, target = volumes.read(number)
        assert np.array_equal(inputs, volume(number)) and target == number % 2
    assert volumes.verify() == []


def test_plain_h5py_reads_it_and_the_data_are_contiguous(path):
    with h5py.File(path) as file:
        assert np.array_equal(file["inputs"][2], volume(2))
        assert file["inputs"].chunks is None and file["inputs"].id.get_offset() is not None
        assert list(file.attrs["class_names"]) == ["a", "b"]
        expected = zlib.crc32(np.int64(0).tobytes(), zlib.crc32(volume(2).tobytes()))
        assert file["checksums"][2] == expected


def test_multi_hot_targets(tmp_path):
    names = ["x", "y", "z"]
    options = {"shape": (1, 8, 9), "dtype": "uint8", "class_names": names, "task": "multilabel", "num_samples": 1}
    with VolumeWriter(tmp_path / "m.h5", **options) as writer:
        writer.add(np.ones((1, 8, 9), np.uint8), [1, 0, 1], id="only")
    volumes = open_volumes(tmp_path / "m.h5")
    assert volumes.targets.tolist() == [[1, 0, 1]] and volumes.targets.dtype == np.uint8
    assert volumes.read(0)[1].tolist() == [1, 0, 1] and volumes.verify() == []


def test_label_maps(tmp_path):
    maps = np.random.default_rng(0).integers(0, 2, (3, 4, 5)).astype(np.uint8)
    options = {"shape": SHAPE, "dtype": "int16", "class_names": ["bg", "fg"], "num_samples": 1}
    with VolumeWriter(tmp_path / "s.h5", task="segmentation", **options) as writer:
        writer.add(volume(0), maps, id="only")
    volumes = open_volumes(tmp_path / "s.h5")
    assert np.array_equal(volumes.read(0)[1], maps) and volumes.verify() == []
    with pytest.raises(ValueError, match="read per sample"):
        _ = volumes.targets


def test_shards_behave_as_one_file(path, tmp_path):
    shards = [write(tmp_path / f"{name}.h5", numbers) for name, numbers in (("a", range(2)), ("b", range(2, 6)))]
    whole, parts = open_volumes(path), open_volumes(shards)
    assert parts.ids == whole.ids and parts.fingerprint == whole.fingerprint
    assert np.array_equal(parts.read(3)[0], whole.read(3)[0]) and parts.locate(2) == (1, 0)
    assert parts.verify() == []


def test_shards_that_do_not_fit_together_are_refused(path, tmp_path):
    other = write(tmp_path / "other.h5", range(6, 8), class_names=["a", "c"])
    with pytest.raises(VolumeFileError, match="shards must agree"):
        open_volumes([path, other])
    with pytest.raises(VolumeFileError, match="'s0' occurs twice"):
        open_volumes([path, path])


def test_a_group_in_two_splits_of_two_shards_is_refused(tmp_path):
    for split in ("train", "test"):
        with VolumeWriter(
            tmp_path / f"{split}.h5", shape=SHAPE, dtype="int16", num_samples=1, class_names="a"
        ) as writer:
            writer.add(volume(0), 0, id=split, group="donor1", split=split)
    with pytest.raises(ValueError, match="'donor1' is in train and test"):
        open_volumes([tmp_path / "train.h5", tmp_path / "test.h5"])


def test_an_open_volume_file_holds_no_handle_and_can_be_pickled(path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    volumes = open_volumes(path)
    volumes.read(0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    copy = pickle.loads(pickle.dumps(volumes))
    assert copy.fingerprint == volumes.fingerprint and np.array_equal(copy.read(1)[0], volume(1))


def test_the_fingerprint_follows_the_content(path, tmp_path):
    same = write(tmp_path / "same.h5")
    other = write(tmp_path / "other.h5", [0, 1, 2, 3, 5, 4])
    assert open_volumes(path).fingerprint == open_volumes(same).fingerprint != open_volumes(other).fingerprint
    brighter = write(tmp_path / "brighter.h5", scale=(0.5, 3.0))
    assert open_volumes(brighter).fingerprint != open_volumes(same).fingerprint, "the same voxels, read otherwise"


def test_a_flipped_byte_is_found(path):
    offset = open_volumes(path).shards[0].inputs.offset
    with path.open("r+b") as file:
        file.seek(offset + 4 * volume(0).nbytes + 17)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))
    assert open_volumes(path).verify() == [4]
    assert open_volumes(path).verify([0, 1]) == []


def edit(action):
    def change(path):
        with h5py.File(path, "r+") as file:
            action(file)

    return change


def swap(name, **new):
    """Replace a dataset by another of the same name."""

    def action(file):
        del file[name]
        file.create_dataset(name, **new)

    return edit(action)


def link_outside(path):
    shutil.copy(path, path.with_name("other.h5"))
    with h5py.File(path, "r+") as file:
        del file["inputs"]
        file["inputs"] = h5py.ExternalLink("other.h5", "/inputs")


def store_outside(path):
    raw = path.with_name("raw.bin")
    raw.write_bytes(bytes(6 * 240))
    swap("inputs", shape=(6, *SHAPE), dtype="int16", external=[(str(raw), 0, 6 * 240)])(path)


def relabel(file):
    file["targets"][0] = 1


BROKEN = {
    "not there": (lambda path: path.unlink(), "does not exist; make one with 'hpc pack"),
    "not hdf5": (lambda path: path.write_text("hello"), "is not an HDF5 file"),
    "empty": (lambda path: path.write_bytes(b""), "is not an HDF5 file"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 500), "cut short or damaged"),
    "cut in half": (lambda path: os.truncate(path, path.stat().st_size // 2), "cut short or damaged"),
    "half written": (edit(lambda file: file.attrs.__delitem__("format")), "half written"),
    "other format": (edit(lambda file: file.attrs.__setitem__("format", 1)), "has format 1, this version reads"),
    "no split": (edit(lambda file: file.__delitem__("split")), "damaged: no split"),
    "no classes": (edit(lambda file: file.attrs.__delitem__("class_names")), "no attribute class_names"),
    "short table": (swap("checksums", data=np.zeros(5, np.uint32)), r"shape \(5,\), not \(6,\)"),
    "wrong inputs": (swap("inputs", data=np.zeros((6, *SHAPE))), "inputs are .* float64"),
    "wrong classes": (edit(lambda file: file.attrs.__setitem__("class_names", ["a"])), "but 1 classes are named"),
    "relabelled": (edit(relabel), "not those it was packed with"),
    "external link": (link_outside, "link to elsewhere"),
    "external storage": (store_outside, "lie outside"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_a_sound_volume_file_is_refused_in_one_line(path, case):
    damage, message = BROKEN[case]
    damage(path)
    with pytest.raises(VolumeFileError, match=message) as caught:
        open_volumes(path)
    assert "\n" not in str(caught.value) and "scans.h5" in str(caught.value)


def test_a_file_exchanged_after_opening_is_refused(path, tmp_path):
    volumes = open_volumes(path)
    write(path, range(1, 7))
    with pytest.raises(OSError, match="exchanged since it was opened"):
        volumes.read(0)


def add_wrong_dtype(writer):
    writer.add(volume(0).astype(np.int32), 0, id="s0")


def add_wrong_class(writer):
    writer.add(volume(0), 2, id="s0")


def add_too_few(writer):
    writer.add(volume(0), 0, id="s0")


def add_leak(writer):
    writer.add(volume(0), 0, id="s0", group="p", split="train")
    writer.add(volume(1), 0, id="s1", group="p", split="test")


def stop(writer):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (add_wrong_dtype, ValueError, "int32; the file holds"),
        (add_wrong_class, ValueError, "target values 2 to 2; need 0 to 1"),
        (add_too_few, ValueError, "1 of 2 announced"),
        (add_leak, ValueError, "'p' is in train and test"),
        (stop, KeyboardInterrupt, None),
    ],
)
def test_an_error_leaves_nothing_behind_and_the_old_file_in_place(path, action, error, message):
    before = path.read_bytes()
    with (
        pytest.raises(error, match=message),
        VolumeWriter(path, shape=SHAPE, dtype="int16", num_samples=2, class_names=["a", "b"]) as writer,
    ):
        action(writer)
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == before


def test_the_name_appears_only_when_the_file_is_complete(tmp_path):
    path = tmp_path / "new.h5"
    with VolumeWriter(path, shape=SHAPE, dtype="int16", num_samples=1, class_names=["a"]) as writer:
        writer.add(volume(0), 0, id="s0")
        assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_split_is_refused(path):
    with pytest.raises(ValueError, match="split 'val' is unknown; use train, validation, test"):
        open_volumes(path).indices("val")


def test_fifty_thousand_samples_cost_some_bytes_each(tmp_path):
    num, draft = 50_000, tmp_path / "draft"
    plan = Plan(dtype="uint8", task="classification", num_samples=num, shape=(1, 2, 2, 2))
    rows = np.arange(num)
    columns = {"ids": [f"sample{row:06d}" for row in rows], "groups": [f"g{row // 4:06d}" for row in rows]}
    columns |= {
        "split": rows // 4 % 3,
        "targets": rows % 2,
        "checksums": np.zeros(num),
        "source_shape": [[2, 2, 2]] * num,
    }
    columns |= {"scale": np.ones((num, 1)), "offset": np.zeros((num, 1)), "affine": np.tile(np.eye(4), (num, 1, 1))}
    allocate(draft, plan)
    source = [{"name": f"sample{row:06d}.nii.gz", "size": 9, "sha256": "0" * 64} for row in rows]
    complete(draft, tmp_path / "many.h5", plan, columns, class_names=["a", "b"], source=source)
    del columns, source
    tracemalloc.start()
    volumes = open_volumes(tmp_path / "many.h5")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 60 * num and peak < 150 * num
    assert volumes.ids[44_444] == "sample044444" and volumes.groups[-1] == "g012499"
    assert len(volumes.source) == num and np.array_equal(volumes.affine[-1], np.eye(4))


def test_names_behave_as_a_tuple_of_texts(tmp_path):
    names = ["a", "grün", "x" * 40, "日本"]
    with VolumeWriter(tmp_path / "n.h5", shape=(1, 2, 2), dtype="uint8", num_samples=4, class_names="a") as writer:
        for name in names:
            writer.add(np.zeros((1, 2, 2), np.uint8), 0, id=name)
    ids = open_volumes(tmp_path / "n.h5").ids
    assert ids == tuple(names) and list(ids) == names and ids[1:3] == names[1:3] and ids[-1] == "日本"
    assert "grün" in ids and "b" not in ids and ids.index("日本") == 3
    assert ids != names[:3] and repr(ids[:1]) == "Names(a)"
    with h5py.File(tmp_path / "n.h5") as file:
        assert [name.decode() for name in file["ids"][()]] == names


def test_what_is_read_on_demand_is_of_the_same_file(path):
    volumes = open_volumes(path)
    assert volumes.source_shape.tolist() == [list(SHAPE[1:])] * 6
    write(path, range(1, 7))
    for name in ("affine", "source_shape", "source"):
        with pytest.raises(VolumeFileError, match="removed or exchanged since it was opened; start again"):
            getattr(volumes, name)


def test_shards_share_their_tables_with_the_whole(path, tmp_path):
    other = write(tmp_path / "other.h5", range(6, 8))
    volumes = open_volumes([path, other])
    assert volumes.affine.shape == (8, 4, 4) and len(volumes.source) == 1
    assert all(np.shares_memory(shard.tables["scale"], volumes.scale) for shard in volumes.shards)
