"""The codecs against HDF5's own filters, in both directions, and against damaged bytes."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401 - h5py reads its filters from now on
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import codecs

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(1, 1, 1), (2, 3, 5), (1, 33, 47, 51), (3, 100, 101)]


def as_bytes(data):
    return memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8))


def make(kind, shape, dtype):
    random = np.random.default_rng(len(shape))
    if kind == "smooth":
        return np.cumsum(random.integers(-3, 4, shape), axis=-1).astype(dtype)
    if kind == "noise":
        return random.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]
    return np.full(shape, 7 if kind == "constant" else 0, dtype)


def decoded(codec, source, like):
    target = np.full(like.nbytes, 0xA5, np.uint8)
    codecs.decode(codec, memoryview(source), memoryview(target), like.itemsize)
    return target.tobytes()


@pytest.mark.parametrize("kind", ["smooth", "noise", "constant", "zero"])
@pytest.mark.parametrize("codec", codecs.CODECS)
def test_what_one_side_writes_the_other_reads(codec, kind, tmp_path):
    number, values = codecs.to_filter(codec)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for case, (shape, dtype) in enumerate((shape, dtype) for shape in SHAPES for dtype in ("uint8", "int16", "f4")):
            data = make(kind, shape, dtype)
            options = {"chunks": (1, *shape), "compression": number, "compression_opts": values}
            dataset = file.create_dataset(str(case), (2, *shape), dtype, **options)
            encoded = codecs.encode(codec, as_bytes(data), data.itemsize)
            assert len(encoded) <= codecs.encoded_bound(data.nbytes)
            assert decoded(codec, encoded, data) == data.tobytes()
            start = (0,) * len(shape)
            dataset.id.write_direct_chunk((0, *start), encoded)
            dataset[1] = data
            file.flush()
            assert dataset[0].tobytes() == data.tobytes()
            mask, theirs = dataset.id.read_direct_chunk((1, *start))
            assert mask == 0 and decoded(codec, theirs, data) == data.tobytes()
            plist = dataset.id.get_create_plist()
            assert codecs.by_filter(*plist.get_filter(0)[::2][:2]) == codec


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=1, max_size=5000), st.sampled_from(codecs.CODECS), st.sampled_from([1, 2, 4]))
def test_any_bytes_come_back(content, codec, itemsize):
    data = np.frombuffer(content * itemsize, np.uint8)
    encoded = codecs.encode(codec, memoryview(data), itemsize)
    target = np.empty(data.size, np.uint8)
    codecs.decode(codec, memoryview(encoded), memoryview(target), itemsize)
    assert target.tobytes() == data.tobytes()


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_another_size_than_the_target_is_refused_before_decoding(codec):
    encoded = codecs.encode(codec, as_bytes(np.arange(4000, dtype=np.int16)), 2)
    for size in (0, 2, 7998, 8002, 80_000):
        target = np.full(size, 0xA5, np.uint8)
        with pytest.raises(ValueError, match="damaged"):
            codecs.decode(codec, memoryview(encoded), memoryview(target), 2)
        assert (target == 0xA5).all()


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_every_cut_is_refused(codec):
    data = np.cumsum(np.random.default_rng(0).integers(-3, 4, 3000)).astype(np.int16)
    encoded = codecs.encode(codec, as_bytes(data), 2)
    for length in [*range(0, len(encoded), 7), len(encoded) - 1]:
        with pytest.raises(ValueError, match="damaged"):
            codecs.decode(codec, memoryview(encoded[:length]), memoryview(np.empty(data.nbytes, np.uint8)), 2)


def test_a_chunk_that_would_load_a_plugin_is_refused():
    encoded = bytearray(codecs.encode("blosc2-lz4", as_bytes(np.arange(4000, dtype=np.int16)), 2))
    header = int.from_bytes(encoded[11:15], "big")
    for place, value in ((2, 0xD5), (21, 37), (16, 6), (31, 0x01), (31, 0x40), (30, 1)):
        bad = bytearray(encoded)
        bad[header + place] = value  # codec, filters and flags of the chunk
        with pytest.raises(ValueError, match=r"unknown|special"):
            codecs.decode("blosc2-lz4", memoryview(bad), memoryview(np.empty(8000, np.uint8)), 2)


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_thousands_of_damaged_chunks_neither_crash_nor_reach_over_the_ends(codec):
    command = [sys.executable, "-m", "tests.fuzz_codecs", codec, "2000", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert sum(seen.values()) == 2000 and seen["refused"] > 1000


def test_an_unknown_codec_names_the_known_ones():
    with pytest.raises(ValueError, match="'gzip' is unknown; use blosc2-lz4, blosc2-zstd, zstd, bitshuffle-lz4"):
        codecs.encode("gzip", memoryview(b"ab"), 1)
    assert codecs.by_filter(1, (4,)) is None and codecs.by_filter(codecs.BLOSC2, (1, 0, 2, 8, 5, 1, 0)) is None


def test_without_hdf5plugin_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[compress\]'"):
        codecs.require_library()


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_threads_decode_side_by_side(codec):
    """Each has its decompressor, and a damaged chunk in one of them spoils no other, nor the next."""
    data = [np.cumsum(np.random.default_rng(number).integers(-3, 4, 20_000)).astype(np.int16) for number in range(8)]
    chunks = [codecs.encode(codec, as_bytes(item), 2) for item in data]

    def work(number):
        if number % 5 == 0:
            with pytest.raises(ValueError, match="damaged"):
                decoded(codec, chunks[number % 8][:-9], data[number % 8])
        return decoded(codec, chunks[number % 8], data[number % 8]) == data[number % 8].tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(200)))
