"""Volume files from strangers: links out, bombs, filters, wild offsets, odd types are refused in one line."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from datasets import codecs, open_volumes
from datasets.layout import VolumeFileError
from datasets.trust import opened
from tests.volume_files import SHAPE, label_map, old_format, volume, write

ROOT = Path(__file__).resolve().parent.parent
NUM = 4
INPUTS = np.stack([volume(number) for number in range(NUM)])
MAPS = np.stack([label_map(number) for number in range(NUM)])


def edit(action):
    def change(path):
        with h5py.File(path, "r+") as file:
            action(file, path)

    return change


def swap(name, make):
    """Replace a dataset by what `make(file)` creates under its name."""

    def action(file, path):
        del file[name]
        make(file)

    return edit(action)


def stored(name, data, **options):
    return swap(name, lambda file: file.create_dataset(name, data=data, **options))


def attribute(name, value, **options):
    return edit(lambda file, path: file.attrs.create(name, value, **options))


def empty(name, shape, dtype="int16", **options):
    """A dataset that is announced and never written."""
    return swap(name, lambda file: file.create_dataset(name, shape, dtype, **options))


def soft_link(file):
    file["other"] = INPUTS
    file["inputs"] = h5py.SoftLink("/other")


def circle(file):
    file["group"] = h5py.SoftLink("/targets")
    file["targets"] = h5py.SoftLink("/group")


def virtual(file):
    plan = h5py.VirtualLayout(INPUTS.shape, "int16")
    plan[:] = h5py.VirtualSource("/etc/passwd", "inputs", INPUTS.shape)
    file.create_virtual_dataset("inputs", plan)


def one_chunk_missing(file):
    dataset = file.create_dataset("inputs", INPUTS.shape, "int16", chunks=(1, *SHAPE))
    dataset[:3] = INPUTS[:3]


def unfiltered_chunk(file):
    import hdf5plugin

    dataset = file.create_dataset("inputs", INPUTS.shape, "int16", chunks=(1, *SHAPE), **hdf5plugin.Zstd())
    for row in range(NUM):
        dataset.id.write_direct_chunk((row, 0, 0, 0, 0), INPUTS[row].tobytes(), filter_mask=1)


def own_filter(file):
    """A filter that no one knows, as a plugin would have it."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((1, *SHAPE))
    plist.set_filter(40_000, h5py.h5z.FLAG_OPTIONAL, ())
    kind, space = h5py.h5t.NATIVE_INT16, h5py.h5s.create_simple(INPUTS.shape)
    dataset = h5py.Dataset(h5py.h5d.create(file.id, b"inputs", kind, space, plist))
    for row in range(NUM):
        dataset.id.write_direct_chunk((row, 0, 0, 0, 0), INPUTS[row].tobytes())


def compact(file):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    h5py.h5d.create(file.id, b"split", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((NUM,)), plist)


def zstd_bomb(file):
    """Small chunks that become 64 MiB each."""
    codecs.require_library()
    shape = (NUM, 2, 256, 256, 256)
    number, values = codecs.to_filter("zstd")
    options = {"chunks": (1, 2, 256, 256, 256), "compression": number, "compression_opts": values}
    dataset = file.create_dataset("inputs", shape, "int16", **options)
    chunk = codecs.encode("zstd", memoryview(bytes(2**26)), 2)
    for row in range(NUM):
        dataset.id.write_direct_chunk((row, 0, 0, 0, 0), chunk)


def user_block(path):
    content = path.read_bytes()
    path.write_bytes(bytes(512) + content)


def odd_offset(file, path):
    file["shapes"][3], file["offsets"][3] = (2, 3, 4, 4), 361


RAGGED, LABELS = {"shapes": [(2, 3, 4, 5)] * NUM}, {"task": "classification"}
MALFORMED = {
    # what leads out of the file, or in a circle
    "link to another dataset": (swap("inputs", soft_link), "inputs is a link to elsewhere"),
    "links in a circle": (swap("targets", circle), "targets is a link to elsewhere"),
    "hard link to the root": (swap("targets", lambda file: file.__setitem__("targets", file["/"])), "not a dataset"),
    "external link of a table": (
        swap("scale", lambda file: file.__setitem__("scale", h5py.ExternalLink("/etc/passwd", "/x"))),
        "no scale|scale is a link to elsewhere",
    ),
    "external storage of a table": (
        swap("checksums", lambda f: f.create_dataset("checksums", (4,), "u4", external=[("/etc/passwd", 0, 16)])),
        "the data of checksums lie outside the file",
    ),
    "virtual dataset": (swap("inputs", virtual), "the data of inputs lie outside the file"),
    # bombs
    "256 TiB contiguous": (
        LABELS,
        empty("inputs", (4, 2, 2**15, 2**15, 2**15)),
        r"inputs claims 562949953421312 bytes",
    ),
    "10^15 samples contiguous": (empty("inputs", (10**15, *SHAPE)), "has shape .4,., not .1000000000000000,"),
    "10^15 samples in chunks": (empty("inputs", (10**15, *SHAPE), chunks=(1, *SHAPE)), "has shape .4,., not"),
    "sizes that overflow": (LABELS, empty("inputs", (4, 2, 2**31, 2**31, 2**31)), r"claims \d{29} bytes|damaged"),
    "never written chunks": (empty("inputs", INPUTS.shape, chunks=(1, *SHAPE)), "has not all of its 4 chunks"),
    "10^15 chunks of a sample": (
        LABELS,
        empty("inputs", (4, 2, 10**5, 10**5, 10**5), chunks=(1, 2, 1, 1, 1)),
        "has not all of its 4000000000000000 chunks",
    ),
    "zstd bomb": (
        LABELS,
        swap("inputs", zstd_bomb),
        r"claims 268435456 bytes of samples in a file of \d+: more than 1000",
    ),
    "shapes claim more than there is": (
        RAGGED,
        stored("shapes", np.full((4, 4), 2**31) // [2**30, 1, 1, 1]),
        r"a volume claims \d{29} elements, inputs have 480",
    ),
    # chunks and filters
    "chunk over two samples": (stored("inputs", INPUTS, chunks=(2, *SHAPE)), r"is \(2, .*, not of one sample"),
    "chunk of one channel": (stored("inputs", INPUTS, chunks=(1, 1, *SHAPE[1:])), "with all channels"),
    "maps over two samples": (stored("targets", MAPS, chunks=(2, *SHAPE[1:])), "a chunk of targets is"),
    "chunk larger than the sample": (
        stored("inputs", INPUTS, chunks=(1, 2, 8, 9, 10), maxshape=(None,) * 5),
        r"a chunk of inputs is \(1, 2, 8, 9, 10\), not within one sample",
    ),
    "gzip": (stored("inputs", INPUTS, chunks=(1, *SHAPE), compression="gzip"), "HDF5 filter 1 deflate"),
    "lzf": (stored("inputs", INPUTS, chunks=(1, *SHAPE), compression="lzf"), "HDF5 filter 32000"),
    "shuffle": (stored("inputs", INPUTS, chunks=(1, *SHAPE), shuffle=True), "HDF5 filter 2 shuffle"),
    "fletcher32": (stored("inputs", INPUTS, chunks=(1, *SHAPE), fletcher32=True), "HDF5 filter 3 fletcher32"),
    "scale-offset": (stored("inputs", INPUTS, chunks=(1, *SHAPE), scaleoffset=4), "HDF5 filter 6 scaleoffset"),
    "two filters": (
        stored("inputs", INPUTS, chunks=(1, *SHAPE), compression="gzip", shuffle=True),
        "HDF5 filter 2 shuffle, 1 deflate",
    ),
    "a filter no one knows": (swap("inputs", own_filter), "HDF5 filter 40000 .*, which is not read; use blosc2-lz4"),
    "a chunk that skipped its filter": (
        swap("inputs", unfiltered_chunk),
        "a chunk of inputs lies outside it, or skipped",
    ),
    "a chunk missing": (swap("inputs", one_chunk_missing), "has not all of its 4 chunks"),
    "gzip on a table": (
        stored("checksums", np.zeros(4, "u4"), chunks=(4,), compression="gzip"),
        "checksums is chunked, compressed or compact",
    ),
    "compact table": (swap("split", compact), "split is chunked, compressed or compact"),
    "table never written": (empty("scale", (4, 2), "f4"), "scale was never written"),
    # types
    "texts of any length": (
        stored("ids", ["a", "b", "c", "d"], dtype=h5py.string_dtype()),
        "ids has dtype object, not text of up to 1024 bytes",
    ),
    "texts of any length, not UTF-8": (
        stored("groups", [b"\xff", b"b", b"c", b"d"], dtype=h5py.string_dtype()),
        "groups has dtype object",
    ),
    "texts of fixed length, not UTF-8": (stored("groups", np.array([b"\xff\xfe", b"b", b"c", b"d"])), "not all UTF-8"),
    "compound": (stored("split", np.zeros(4, [("a", "u1"), ("b", "i2")])), r"split has dtype \[.*, not uint8"),
    "references": (
        swap("checksums", lambda file: file.create_dataset("checksums", (4,), h5py.ref_dtype)),
        "checksums has dtype object",
    ),
    "big-endian inputs": (stored("inputs", INPUTS.astype(">i2")), "inputs are .* >i2; they must be"),
    "big-endian table": (stored("scale", np.ones((4, 2), ">f4")), "scale has dtype >f4, not float32"),
    "no data space": (swap("split", lambda file: file.create_dataset("split", data=h5py.Empty("u1"))), "not a dataset"),
    "maps of other shape": (stored("targets", MAPS[:, 1:]), r"targets are \(4, 6, 9, 10\) uint8, not \(4, 7, 9, 10\)"),
    "maps of int16": (stored("targets", MAPS.astype("i2")), "int16, not .* uint8"),
    # values
    "scale not a number": (stored("scale", np.full((4, 2), np.nan, "f4")), "not a finite number"),
    "another scale": (
        stored("scale", np.full((4, 2), 2, "f4")),
        "scale, offset or folds are not those it was packed with",
    ),
    "split out of range": (stored("split", np.full(4, 3, "u1")), "split holds 3; only 0, 1 and 2"),
    "foreground of other classes": (
        edit(lambda file, path: file.create_dataset("foreground", data=np.zeros((4, 3, 5), "i4"))),
        r"foreground has shape \(4, 3, 5\), not \(4, 2, 5\)",
    ),
    # attributes
    "format is a list": (attribute("format", [1, 1]), "attribute format is not a number, a text"),
    "class names not UTF-8": (
        attribute("class_names", [b"\xff", b"b"], dtype=h5py.string_dtype()),
        "attribute class_names is not UTF-8",
    ),
    "class names are one text": (attribute("class_names", "ab"), "not a list of names"),
    "a million class names": (attribute("class_names", ["x"] * 100_000), "attribute class_names is not a number"),
    "other class names": (attribute("class_names", ["fg", "bg"]), "tables are not those it was packed with"),
    "task is a number": (attribute("task", 1), "attribute task is not a text"),
    "packing is no JSON": (attribute("packing", "{"), "cut short or damaged"),
    "packing is a list": (attribute("packing", "[]"), "packing is not a JSON dict"),
    "packing is nested without end": (attribute("packing", "[" * 100_000), "cut short or damaged"),
    "fingerprint is opaque": (attribute("fingerprint", np.void(b"x" * 64)), "attribute fingerprint is not a number"),
    "huge attribute": (
        attribute("orientation", np.zeros(1_000_000, "f8")),
        "attribute orientation is not a number, a text",
    ),
    # the file itself
    "user block": (user_block, "is not an HDF5 file"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "does not exist"),
    # ragged
    "negative offset": (RAGGED, stored("offsets", np.array([-2, 0, 2, 4])), "offsets are not in order"),
    "offset over the end": (RAGGED, stored("offsets", np.array([0, 240, 480, 2**62])), "offsets are not in order"),
    "offsets overlap": (RAGGED, stored("offsets", np.array([0, 60, 120, 180])), "offsets are not in order"),
    "offset within a channel": (RAGGED, edit(odd_offset), "no multiples of the 2"),
    "an empty volume": (RAGGED, stored("shapes", np.array([(2, 3, 4, 5)] * 3 + [(2, 0, 4, 5)])), "an empty volume"),
    "other channels": (RAGGED, stored("shapes", np.array([(2, 3, 4, 5)] * 3 + [(1, 3, 4, 5)])), "of channels"),
    "no offsets": (RAGGED, edit(lambda file, path: file.__delitem__("offsets")), "damaged: no offsets"),
    "shapes of five axes": (RAGGED, stored("shapes", np.ones((4, 6), int)), r"shapes has shape \(4, 6\)"),
    "ragged in chunks": (
        RAGGED,
        swap("inputs", lambda file: file.create_dataset("inputs", data=np.zeros(480, "i2"), chunks=(1,))),
        "volumes of different shapes are in chunks",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_from_its_header(case, tmp_path):
    *options, damage, message = MALFORMED[case]
    path = write(tmp_path / "scans.h5", **(options[0] if options else {}))
    damage(path)
    tracemalloc.start()
    try:
        with pytest.raises(VolumeFileError, match=message) as caught:
            open_volumes(path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000 + 2 * min(path.stat().st_size, 10**7)
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and "scans.h5" in str(caught.value)


@pytest.mark.parametrize("place", [2**62, 2**64 - 2, "near the end"])
@pytest.mark.parametrize("layout", ["contiguous", "chunked"])
def test_an_offset_outside_of_the_file_is_refused(tmp_path, layout, place):
    path = old_format(tmp_path / "scans.h5", chunks=(1, *SHAPE) if layout == "chunked" else None)
    stored = open_volumes(path).shards[0].inputs
    offset = stored.offset if layout == "contiguous" else int(stored.chunks.offsets[2, 0])
    content, wild = path.read_bytes(), path.stat().st_size - 100 if place == "near the end" else place
    mark = b"\x03\x01" if layout == "contiguous" else b""  # the message of a contiguous layout, version 3
    old, new = (mark + number.to_bytes(8, "little") for number in (offset, wild))
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    with pytest.raises(VolumeFileError, match=r"cut short|damaged|never written"):
        open_volumes(path)


def test_no_plugin_is_looked_for_while_a_file_is_open(tmp_path):
    path = write(tmp_path / "scans.h5")
    h5py.h5pl.append(b"/somewhere")
    try:
        before = [h5py.h5pl.get(number) for number in range(h5py.h5pl.size())]
        with opened(path):
            assert h5py.h5pl.size() == 0
        assert [h5py.h5pl.get(number) for number in range(h5py.h5pl.size())] == before
    finally:
        h5py.h5pl.remove(h5py.h5pl.size() - 1)


PLUGIN = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void run(void) { fclose(fopen(getenv("CANARY"), "w")); }
int H5PLget_plugin_type(void) { return 0; }
const void *H5PLget_plugin_info(void) { return 0; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("read", "runs"), [("datasets.open_volumes(path)", False), ("h5py.File(path)['inputs'][0]", True)]
)
def test_a_planted_plugin_does_not_run(tmp_path, read, runs):
    """What $HDF5_PLUGIN_PATH holds is run by reading the file with h5py, and not by opening it as a volume file."""
    path, canary = write(tmp_path / "scans.h5", task="classification"), tmp_path / "canary"
    swap("inputs", own_filter)(path)
    (tmp_path / "plugin.c").write_text(PLUGIN)
    build = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "libplugin.so"), str(tmp_path / "plugin.c")]
    subprocess.run(build, check=True, timeout=60)
    environment = os.environ | {"HDF5_PLUGIN_PATH": str(tmp_path), "CANARY": str(canary)}
    code = f"import datasets, h5py; path = {str(path)!r}; {read}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 1 and canary.exists() == runs


@pytest.mark.parametrize("layout", ["contiguous", "ragged", "patches", "blosc2-lz4", "zstd", "bitshuffle-lz4", "old"])
def test_damaged_bytes_never_crash_nor_pass_for_others(layout, tmp_path):
    """F2: in a child with little memory, a hundred mutations of one small file."""
    command = [sys.executable, "-m", "tests.fuzz_volumes", layout, str(tmp_path), "100", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    assert seen.pop("wrong", 0) == 0 and sum(seen.values()) == 100 and seen["refused"] > 20
