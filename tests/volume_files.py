"""Small volume files of every layout for tests, and their samples read back by what opening a file has found."""

import h5py
import numpy as np

from datasets import codecs
from datasets.writer import VolumeWriter

SHAPE = (2, 7, 9, 10)


def volume(number, shape=SHAPE, dtype=np.int16):
    return np.cumsum(np.random.default_rng(number).integers(-9, 10, shape), axis=-1).astype(dtype)


def label_map(number, shape=SHAPE):
    return (volume(number, shape)[0] > 0).astype(np.uint8)


def write(path, num=4, task="segmentation", shapes=None, **options):
    settings = {"dtype": "int16", "class_names": ["bg", "fg"], "num_samples": num, "task": task} | options
    with VolumeWriter(path, shape=None if shapes else SHAPE, **settings) as writer:
        for number in range(num):
            shape = shapes[number] if shapes else SHAPE
            target = label_map(number, shape) if task == "segmentation" else number % 2
            writer.add(volume(number, shape), target, id=f"s{number}", scale=0.5)
    return path


def decode_stored(path, stored, row, shape, dtype):
    """A sample by the offsets and sizes that opening has found."""
    content = path.read_bytes()
    if stored.offset is not None:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(content, dtype, offset=stored.offset + row * size, count=int(np.prod(shape))).reshape(
            shape
        )
    chunks, whole = stored.chunks, np.zeros(shape, dtype)
    for number, place in enumerate(np.ndindex(*chunks.grid)):
        start, size = chunks.offsets[row, number], chunks.sizes[row, number]
        room = np.empty(chunks.shape, dtype)
        if chunks.codec:
            target = memoryview(room.reshape(-1).view(np.uint8))
            codecs.decode(chunks.codec, memoryview(content)[start : start + size], target, room.itemsize)
        else:
            room = np.frombuffer(content[start : start + size], dtype).reshape(chunks.shape)
        box = tuple(slice(at * step, (at + 1) * step) for at, step in zip(place, chunks.shape, strict=True))
        cut = whole[box]
        cut[...] = room[tuple(map(slice, cut.shape))]
    return whole


def old_format(path, **options):
    """The same file with the structures of HDF5 1.0, which have no checksums of their own."""
    write(path.with_name("new.h5"))
    with h5py.File(path.with_name("new.h5")) as source, h5py.File(path, "w", libver="earliest") as file:
        for name, dataset in source.items():
            file.create_dataset(name, data=dataset[()], **(options if name == "inputs" else {}))
        file.attrs.update(source.attrs)
    return path
