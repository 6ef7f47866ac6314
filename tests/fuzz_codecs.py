"""Child process: decodes mutated chunks between guard pages; `python -m tests.fuzz_codecs CODEC COUNT SEED`.

Source and target end at a page that may be neither read nor written: one byte too far ends the process by SIGSEGV.
Prints how many were refused, decoded wrongly and decoded rightly.
"""

import ctypes
import json
import mmap
import resource
import sys
from collections import Counter

import h5py
import hdf5plugin  # noqa: F401
import numpy as np

from datasets import codecs

PAGE = mmap.PAGESIZE
MEMORY = 2 << 30
CANARY = 0xA5


class Guarded:
    """Memory of some pages with a forbidden one on each side."""

    def __init__(self, pages):
        self._map = mmap.mmap(-1, (pages + 2) * PAGE)
        self.bytes = np.frombuffer(self._map, np.uint8)[PAGE:-PAGE]
        start = self.bytes.ctypes.data
        for place in (start - PAGE, start + pages * PAGE):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(place), PAGE, 0) == 0

    def last(self, size):
        return self.bytes[len(self.bytes) - size :]


def stored_chunks(codec, shape, data):
    """What our encoder makes, and what HDF5's filter makes of the same bytes."""
    yield codecs.encode(codec, memoryview(data.reshape(-1).view(np.uint8)), data.itemsize)
    number, values = codecs.to_filter(codec)
    with h5py.File(f"{codec}.h5", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset("x", data=data, chunks=shape, compression=number, compression_opts=values)
        file.flush()
        yield dataset.id.read_direct_chunk((0,) * data.ndim)[1]


def samples(random):
    for dtype in ("uint8", "int16", "float32"):
        for shape in ((1, 5, 7, 9), (2, 40, 33)):
            yield np.cumsum(random.integers(-3, 4, shape), axis=-1).astype(dtype)
    yield random.integers(0, 1 << 16, (1, 3, 20, 20)).astype(np.uint16).view(np.int16)
    yield np.zeros((1, 3, 20, 20), np.int16)


def mutate(random, good):
    """One to eight changes, mostly where the headers are: bits, bytes, numbers at their limits, cuts, repeats."""
    bad = bytearray(good)
    for _ in range(random.integers(1, 9)):
        reach = len(bad) if random.random() < 0.5 else min(len(bad), 160)
        place = int(random.integers(0, reach))
        kind = random.integers(0, 6)
        if kind == 0:
            bad[place] ^= 1 << int(random.integers(0, 8))
        elif kind == 1:
            bad[place] = int(random.choice([0, 1, 0x7F, 0x80, 0xFF]))
        elif kind == 2:
            bad[place : place + 4] = int(random.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, len(bad)])).to_bytes(
                4, str(random.choice(["little", "big"]))
            )
        elif kind == 3 and len(bad) > 8:
            del bad[place : place + int(random.integers(1, 64))]
        elif kind == 4:
            bad[place:place] = bad[: int(random.integers(1, 64))]
        else:
            bad[place : place + 8] = random.integers(0, 256, 8, np.uint8).tobytes()
        bad = bad or bytearray(b"\0")
    return bytes(bad)


def main(codec, count, seed):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    random, seen = np.random.default_rng(seed), Counter()
    chunks = [(data, chunk) for data in samples(random) for chunk in stored_chunks(codec, data.shape, data)]
    source_room, target_room = Guarded(8), Guarded(8)
    for number in range(count):
        data, good = chunks[number % len(chunks)]
        bad = good if number < len(chunks) else mutate(random, good)
        source, target = source_room.last(min(len(bad), 8 * PAGE)), target_room.last(data.nbytes)
        target_room.bytes[: -data.nbytes] = CANARY
        source[:] = np.frombuffer(bad, np.uint8)[: len(source)]
        try:
            codecs.decode(codec, memoryview(source), memoryview(target), data.itemsize)
        except ValueError:
            seen["refused"] += 1
        else:
            seen["right" if target.tobytes() == data.tobytes() else "wrong"] += 1
        assert (target_room.bytes[: -data.nbytes] == CANARY).all(), "written before the target"
        assert number >= len(chunks) or seen["right"] == number + 1, "a sound chunk was not decoded"
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
