"""The layouts of a volume file as they are written: read back by our reader and by h5py, in parts and after a kill."""

import itertools
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from datasets import codecs, open_volumes
from datasets.drafts import Places, Plan, allocate, complete, encode_sample, write_sample
from datasets.writer import VolumeWriter
from tests.volume_files import SHAPE, decode_stored, label_map, volume, write

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = {
    "contiguous": {},
    "samples in chunks": {"chunk": SHAPE[1:]},
    "patches": {"chunk": (4, 4, 8)},
    **{codec: {"codec": codec} for codec in codecs.CODECS},
    **{f"{codec} patches": {"codec": codec, "chunk": (3, 9, 4)} for codec in codecs.CODECS},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_comes_back_by_its_chunk_table_and_by_h5py(name, tmp_path):
    path = write(tmp_path / "x.h5", **LAYOUTS[name])
    shard = open_volumes(path).shards[0]
    assert (shard.inputs.offset is None) == (name != "contiguous")
    for row in range(4):
        assert np.array_equal(decode_stored(path, shard.inputs, row, SHAPE, np.int16), volume(row))
        assert np.array_equal(decode_stored(path, shard.targets, row, SHAPE[1:], np.uint8), label_map(row))
    with h5py.File(path) as file:
        assert all(np.array_equal(file["inputs"][row], volume(row)) for row in range(4))
        assert all(np.array_equal(file["targets"][row], label_map(row)) for row in range(4))
        assert file["inputs"].chunks == (
            None if name == "contiguous" else (1, 2, *LAYOUTS[name].get("chunk", SHAPE[1:]))
        )
        assert file["targets"].attrs.keys() == set()


def test_the_table_of_patch_chunks(tmp_path):
    chunks = open_volumes(write(tmp_path / "x.h5", chunk=(4, 4, 8))).shards[0].inputs.chunks
    assert (chunks.shape, chunks.grid, chunks.codec) == ((2, 4, 4, 8), (1, 2, 3, 2), None)
    assert chunks.offsets.shape == chunks.sizes.shape == (4, 12) and (chunks.sizes == 2 * 128 * 2).all()
    assert len(np.unique(chunks.offsets)) == 48


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_volumes_of_different_shapes(tmp_path, task):
    shapes = [(2, 3, 4, 5), (2, 6, 1, 2), (2, 5, 5, 5), (2, 1, 1, 1)]
    path = write(tmp_path / "r.h5", task=task, shapes=shapes)
    volumes = open_volumes(path)
    shard = volumes.shards[0]
    assert (
        volumes.ragged and volumes.channels == 2 and volumes.spatial_axes == 3 and "different shapes" in repr(volumes)
    )
    assert [volumes.sample_shape(row) for row in range(4)] == shapes
    with pytest.raises(ValueError, match=r"different shapes; train on patches: data\.patch"):
        _ = volumes.shape
    with h5py.File(path) as file:
        for row, shape in enumerate(shapes):
            start, count = shard.tables["offsets"][row], int(np.prod(shape))
            assert np.array_equal(file["inputs"][start : start + count].reshape(shape), volume(row, shape))
            if task == "segmentation":
                part = file["targets"][start // 2 : (start + count) // 2].reshape(shape[1:])
                assert np.array_equal(part, label_map(row, shape))
    assert (shard.targets is None) == (task == "classification")


def test_shards_of_different_shapes_are_one_file(tmp_path):
    first = write(tmp_path / "a.h5", num=1, shapes=[(2, 3, 4, 5)])
    with VolumeWriter(
        tmp_path / "b.h5", shape=None, dtype="int16", class_names=["bg", "fg"], num_samples=1, task="segmentation"
    ) as writer:
        writer.add(volume(1, (2, 2, 2, 2)), label_map(1, (2, 2, 2, 2)), id="other")
    volumes = open_volumes([first, tmp_path / "b.h5"])
    assert [volumes.sample_shape(row) for row in range(2)] == [(2, 3, 4, 5), (2, 2, 2, 2)]


def test_two_dimensional_images(tmp_path):
    with VolumeWriter(
        tmp_path / "i.h5", shape=(3, 8, 9), dtype="uint8", num_samples=1, class_names="a", codec="zstd"
    ) as writer:
        writer.add(np.arange(216, dtype=np.uint8).reshape(3, 8, 9), 0, id="only")
    volumes = open_volumes(tmp_path / "i.h5")
    assert volumes.spatial_axes == 2 and volumes.shape == (3, 8, 9) and volumes.source_shape.tolist() == [[8, 9]]


def test_foreground_lies_at_its_offset(tmp_path):
    table = np.random.default_rng(0).integers(-1, 630, (4, 2, 5)).astype(np.int32)
    path = write(tmp_path / "f.h5", foreground=table)
    offset, count = open_volumes(path).shards[0].foreground
    assert count == 5
    found = np.fromfile(path, np.int32, 2 * 2 * 5, offset=offset + 2 * 2 * 5 * 4)
    assert np.array_equal(found.reshape(2, 2, 5), table[2:])


def columns(num, samples):
    rows = {"ids": [f"s{row}" for row in range(num)], "groups": [f"g{row}" for row in range(num)]}
    rows |= {"split": np.zeros(num, np.uint8), "affine": np.tile(np.eye(4), (num, 1, 1))}
    rows |= {"scale": np.ones((num, 2)), "offset": np.zeros((num, 2)), "source_shape": np.ones((num, 3))}
    sums = [zlib.crc32(target.tobytes(), zlib.crc32(data.tobytes())) for data, target in samples]
    return rows | {"checksums": sums}


def plan_of(kind, num, **options):
    shapes = np.array([(2, 3 + row, 4, 5) for row in range(num)]) if kind == "ragged" else None
    shape = None if kind == "ragged" else SHAPE
    return Plan(dtype="int16", task="segmentation", num_samples=num, shape=shape, shapes=shapes, **options)


@pytest.mark.parametrize("kind", ["contiguous", "ragged"])
def test_processes_write_rows_of_a_draft_and_a_kill_costs_nothing(tmp_path, kind):
    draft, path, num = tmp_path / ".x.draft", tmp_path / "x.h5", 6
    plan = plan_of(kind, num)
    places = allocate(draft, plan)
    script = (
        "import os, sys\n"
        "from datasets.drafts import *; from tests.test_writer import *\n"
        f"plan = plan_of({kind!r}, {num}); draft = os.open({str(draft)!r}, os.O_RDWR)\n"
        "for row in map(int, sys.argv[1:]):\n"
        "    shape = plan.sample_shape(row)\n"
        f"    write_sample(draft, plan, {places!r}, row, volume(row, shape), label_map(row, shape))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    for rows in (["4", "1"], ["0", "5"]):
        done = subprocess.run([sys.executable, "-c", script, *rows], cwd=ROOT, check=False, timeout=60)
        assert done.returncode == -signal.SIGKILL
    with h5py.File(draft, "r+") as file:  # a finish that was killed half way
        file.create_dataset("ids", data=np.arange(100_000))
    os.truncate(draft, draft.stat().st_size - 5000)
    assert allocate(draft, plan) == places
    with draft.open("r+b") as file:
        for row in (2, 3):
            shape = plan.sample_shape(row)
            write_sample(file.fileno(), plan, places, row, volume(row, shape), label_map(row, shape))
    samples = [(volume(row, plan.sample_shape(row)), label_map(row, plan.sample_shape(row))) for row in range(num)]
    complete(draft, path, plan, columns(num, samples), class_names=["bg", "fg"])
    assert list(tmp_path.iterdir()) == [path]
    volumes = open_volumes(path)
    shard = volumes.shards[0]
    assert shard.inputs.offset == places.inputs and (kind == "ragged" or places.inputs % 4096 == 0)
    with h5py.File(path) as file:
        stored = file["inputs"][()].reshape(-1)
        assert np.array_equal(stored, np.concatenate([data.ravel() for data, _ in samples]))
        assert np.array_equal(
            file["targets"][()].reshape(-1), np.concatenate([target.ravel() for _, target in samples])
        )


@pytest.mark.parametrize(("codec", "chunk"), [(None, (4, 4, 4)), ("zstd", None), ("bitshuffle-lz4", (2, 9, 10))])
def test_encoded_chunks_are_handed_over_in_any_order(tmp_path, codec, chunk):
    plan = plan_of("chunked", 5, codec=codec, chunk=chunk)
    samples = [(volume(row), label_map(row)) for row in range(5)]
    draft, path = tmp_path / ".x.draft", tmp_path / "x.h5"
    draft.write_bytes(b"rubbish of a killed finish")
    assert allocate(draft, plan) == Places(None, None)
    encoded = [[(row, *chunk) for chunk in encode_sample(plan, *samples[row])] for row in (3, 0, 4, 1, 2)]
    every = list(itertools.chain.from_iterable(encoded))[::-1]
    complete(draft, path, plan, columns(5, samples), class_names=["bg", "fg"], chunks=every)
    with h5py.File(path) as file:
        assert all(np.array_equal(file["inputs"][row], samples[row][0]) for row in range(5))
        assert all(np.array_equal(file["targets"][row], samples[row][1]) for row in range(5))
    assert open_volumes(path).shards[0].inputs.chunks.codec == codec


def test_a_chunk_that_was_not_handed_over_is_found_when_opening(tmp_path):
    plan = plan_of("chunked", 2, chunk=(4, 4, 4))
    samples = [(volume(row), label_map(row)) for row in range(2)]
    draft, path = tmp_path / ".x.draft", tmp_path / "x.h5"
    allocate(draft, plan)
    every = [(row, *chunk) for row in range(2) for chunk in encode_sample(plan, *samples[row])]
    complete(draft, path, plan, columns(2, samples), class_names=["bg", "fg"], chunks=every[:-1])
    with pytest.raises(ValueError, match=r"x\.h5: inputs has not all of its 36 chunks"):
        open_volumes(path)


PLANS = {
    "dtype": ({"dtype": "int32", "shape": SHAPE}, "dtype int32 cannot be stored; use uint8, int16"),
    "task": ({"task": "regression", "shape": SHAPE}, "task 'regression' is unknown"),
    "axes": ({"shape": (1, 2, 3, 4, 5)}, "two or three spatial axes"),
    "empty": ({"shape": (1, 0, 3, 4)}, r"need \(C, \*spatial\)"),
    "chunk too large": ({"shape": SHAPE, "chunk": (8, 9, 10)}, "no box within volumes"),
    "chunk of other axes": ({"shape": SHAPE, "chunk": (2, 2)}, "no box within volumes"),
    "codec": ({"shape": SHAPE, "codec": "gzip"}, "codec 'gzip' is unknown; use blosc2-lz4"),
    "ragged in chunks": ({"shapes": np.ones((2, 4), int), "codec": "zstd"}, "stored contiguous"),
    "too few shapes": ({"shapes": np.ones((3, 4), int)}, "3 shapes for 2 samples"),
    "other channels": ({"shapes": np.array([(1, 2, 2, 2), (2, 2, 2, 2)])}, "not all of one channel number"),
}


@pytest.mark.parametrize("case", PLANS)
def test_what_cannot_be_stored_is_refused_at_once(case):
    options, message = PLANS[case]
    with pytest.raises(ValueError, match=message):
        Plan(**({"dtype": "int16", "task": "classification", "num_samples": 2} | options))


def test_columns_that_do_not_fit_are_refused(tmp_path):
    plan, draft = plan_of("contiguous", 2), tmp_path / ".x.draft"
    allocate(draft, plan)
    good = columns(2, [(volume(0), label_map(0)), (volume(1), label_map(1))])
    for change, message in (
        ({"scale": np.ones(2)}, r"column scale has shape \(2,\), not \(2, 2\)"),
        ({"ids": ["a", "a"]}, "'a' occurs twice"),
        ({"ids": ["a", "b\0"]}, "cannot be stored"),
        ({"targets": [0, 1]}, "columns targets: missing, or not those of segmentation"),
        ({"groups": ["g", "g"], "split": [0, 2]}, "group 'g' is in train and test"),
    ):
        with pytest.raises(ValueError, match=message):
            complete(draft, tmp_path / "x.h5", plan, good | change, class_names=["bg", "fg"])
    assert draft.exists() and not (tmp_path / "x.h5").exists()


def test_a_full_disk_is_found_before_the_first_sample(tmp_path):
    plan = Plan(dtype="float32", task="classification", num_samples=2**20, shape=(1, 4096, 4096, 64))
    with pytest.raises(ValueError, match=r"MB free, the file needs [\d,]+ more"):
        allocate(tmp_path / ".x.draft", plan)
    assert list(tmp_path.iterdir()) == []
