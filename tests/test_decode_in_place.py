"""Large compressed chunks are decoded where the page cache holds them: the same bytes, and no memory kept."""

from pathlib import Path

import numpy as np
import pytest

from datasets import open_volumes, stored
from datasets.reading import BadSample, Reader
from datasets.writer import VolumeWriter

SHAPE = (1, 96, 96, 96)


def volume(number):
    return np.random.default_rng(number).integers(0, 4000, SHAPE).astype(np.int16)


@pytest.fixture(scope="module", params=["blosc2-lz4", "bitshuffle-lz4", "zstd"])
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "v.h5"
    with VolumeWriter(path, shape=SHAPE, dtype="int16", num_samples=6, class_names=["a"], codec=request.param) as out:
        for number in range(6):
            out.add(volume(number), 0, id=f"s{number}")
    return path


def mapped_kb(path):
    """Of the memory map of a file, what counts as this process' memory."""
    lines = Path("/proc/self/smaps").read_text().split("\n")
    first = [number for number, line in enumerate(lines) if line.endswith(str(path))]
    return sum(int(next(line for line in lines[number:] if line.startswith("Rss:")).split()[1]) for number in first)


def read_all(path):
    volumes, found = open_volumes(path), []
    with Reader(volumes) as reader:
        for sample in range(6):
            out = np.empty(SHAPE, np.int16)
            reader.read(sample, stored.bytes_of(out), None)
            found.append(out)
        return found, mapped_kb(path)


@pytest.mark.parametrize("flag", [stored._NOWAIT, 0])
def test_the_same_voxels_with_and_without_a_copy(path, flag, monkeypatch):
    monkeypatch.setattr(stored, "_NOWAIT", flag)
    taken = list[bool]()
    whole = stored.OpenFile.in_memory
    monkeypatch.setattr(
        stored.OpenFile, "in_memory", lambda *at: (taken.append((there := whole(*at)) is not None), there)[1]
    )
    found, kept = read_all(path)
    assert all(np.array_equal(data, volume(number)) for number, data in enumerate(found))
    assert taken == [flag != 0] * 6
    assert kept < 1000  # of 6 times some 1,300


def test_what_the_page_cache_lacks_is_read(path, monkeypatch):
    def preadv(descriptor, buffers, offset, flags=0):
        if flags:
            raise BlockingIOError
        return whole(descriptor, buffers, offset)

    whole = stored.os.preadv
    monkeypatch.setattr(stored.os, "preadv", preadv)
    found, kept = read_all(path)
    assert all(np.array_equal(data, volume(number)) for number, data in enumerate(found)) and kept == 0


def test_a_file_cut_short_meanwhile_is_an_error_not_a_signal(path):
    volumes = open_volumes(path)
    with Reader(volumes) as reader:
        content = path.read_bytes()
        out = stored.bytes_of(np.empty(SHAPE, np.int16))
        try:
            with path.open("r+b") as file:
                file.truncate(volumes.shards[0].inputs.chunks.offsets[3, 0] + 300_000)
            with pytest.raises(OSError, match=r"was cut short while it was read.*'s3'") as error:
                reader.read(3, out, None)
        finally:
            with path.open("r+b") as file:
                file.write(content)
        assert not isinstance(error.value, BadSample)
