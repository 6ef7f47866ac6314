"""Child process: opens and reads mutated volume files; `python -m tests.fuzz_volumes LAYOUT FOLDER COUNT SEED`.

Prints how many were refused when opened, found damaged by a checksum, read rightly, and read wrongly without notice.
"""

import json
import resource
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from datasets import open_volumes
from datasets.layout import VolumeFileError, sample_checksum
from tests.fuzz_codecs import mutate
from tests.volume_files import SHAPE, decode_stored, label_map, old_format, volume, write

NUM, MEMORY = 4, 3 << 30
SHAPES = [(2, 3, 4, 5), (2, 6, 1, 2), (2, 5, 5, 5), (2, 1, 1, 1)]
OPTIONS = {"patches": {"chunk": (4, 4, 8)}, "contiguous": {}, "ragged": {"shapes": SHAPES}}


def make(layout, path):
    if layout == "old":
        return old_format(path, chunks=(1, *SHAPE))
    return write(path, **OPTIONS.get(layout, {"codec": layout}))


def read(volumes, row):
    """A sample by what opening has found. ValueError for a damaged chunk."""
    shard, shape = volumes.shards[0], volumes.sample_shape(row)
    if not volumes.ragged:
        return (
            decode_stored(shard.path, shard.inputs, row, shape, volumes.dtype),
            decode_stored(shard.path, shard.targets, row, shape[1:], np.uint8),
        )
    first, count = int(shard.tables["offsets"][row]), int(np.prod(shape))
    content, size = shard.path.read_bytes(), volumes.dtype.itemsize
    inputs = np.frombuffer(content, volumes.dtype, count, shard.inputs.offset + first * size)
    target = np.frombuffer(content, np.uint8, count // shape[0], shard.targets.offset + first // shape[0])
    return inputs.reshape(shape), target.reshape(shape[1:])


def check(path, seen, layout):
    try:
        volumes = open_volumes(path)
    except VolumeFileError as error:
        assert "\n" not in str(error)
        seen["refused"] += 1
        return
    for row in range(volumes.num_samples):
        shape = SHAPES[row] if layout == "ragged" else SHAPE
        try:
            inputs, target = read(volumes, row)
        except ValueError:
            seen["damaged"] += 1
            return
        if sample_checksum(inputs.tobytes(), target.tobytes()) != volumes.checksums[row]:
            seen["damaged"] += 1
            return
        same = np.array_equal(inputs, volume(row, shape)) and np.array_equal(target, label_map(row, shape))
        if not same or volumes.ids[row] != f"s{row}" or (volumes.scale[row] != 0.5).any() or volumes.offset[row].any():
            seen["wrong"] += 1
            return
    seen["right"] += 1


def main(layout, folder, count, seed):
    path = make(layout, Path(folder) / "good.h5")
    good, random, seen = path.read_bytes(), np.random.default_rng(seed), Counter()
    check(path, seen, layout)
    assert seen == {"right": 1}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    bad = path.with_name("bad.h5")
    for _ in range(count - 1):
        content = mutate(random, good)
        start = int(random.integers(0, len(good)))
        if random.random() < 0.1:
            content = good[:start]
        elif random.random() < 0.1:
            content = good[:start] + bytes(min(4096, len(good) - start)) + good[start + 4096 :]
        bad.write_bytes(content)
        check(bad, seen, layout)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
