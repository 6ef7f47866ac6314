"""Opens an HDF5 file from a stranger: nothing outside it is read, no plugin is loaded, no claim is believed.

What is read is decided from the headers: every dataset must lie in the file, whole, in plain contiguous bytes, before
an array of its size is made; its bytes are then read without HDF5. Compressed chunks: `datasets.chunks`.
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from datasets.checksum import crc32

SIGNATURE = b"\x89HDF\r\n\x1a\n"
"""first bytes of an HDF5 file"""
MAX_NAMES = 65_536
"""items of a list in an attribute"""
_BLOCK = 1 << 20


class VolumeFileError(ValueError):
    """A file that cannot be used as a volume file; the message is one line with the reason and the remedy."""


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """The file, for reading, without lock and without plugins. Whatever HDF5 says of it becomes a VolumeFileError."""
    if not path.is_file():
        what = "is a folder, not an HDF5 file" if path.is_dir() else "does not exist"
        raise VolumeFileError(f"{path} {what}; make one with 'hpc pack SRC... -o {path.with_suffix('.h5')}'")
    try:
        if not is_hdf5(path):
            raise VolumeFileError(f"{path} is not an HDF5 file; make one with 'hpc pack SRC... -o FILE.h5'")
        with _no_plugins(), h5py.File(path, "r", locking=False) as file:
            yield file
    except VolumeFileError:
        raise
    except PermissionError as error:
        raise VolumeFileError(f"{path} cannot be read: {error.strerror}; ask its owner") from error
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, ArithmeticError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise VolumeFileError(f"{path} is cut short or damaged: copy or pack it again (HDF5: {reason})") from error


def is_hdf5(path: Path) -> bool:
    """Whether a regular file begins as HDF5 does (a user block before it is not taken)."""
    if not path.is_file():  # a device or a pipe: reading could wait for ever
        return False
    with path.open("rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def file_identity(status: os.stat_result) -> tuple[int, int, int]:
    """Inode, size and modification time in ns."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def own_dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset whose data lie in this file: no link, no external storage, no virtual dataset, a type NumPy has."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise VolumeFileError(f"{path}: {name} is a link to elsewhere; pack all samples into one file, or give shards")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise VolumeFileError(f"{path}: {name} is not a dataset; pack it again")
    if dataset.external is not None or dataset.is_virtual:
        raise VolumeFileError(f"{path}: the data of {name} lie outside the file; pack all samples into one file")
    try:
        dataset.dtype  # noqa: B018
    except TypeError as error:
        raise VolumeFileError(f"{path}: {name} has a type that is not read ({error}); pack it again") from error
    return dataset


def plain_offset(path: Path, dataset: h5py.Dataset) -> int:
    """Where the bytes of a contiguous dataset begin in the file, all of them within it."""
    name, plist = dataset.name.lstrip("/"), dataset.id.get_create_plist()
    if plist.get_layout() != h5py.h5d.CONTIGUOUS or plist.get_nfilters():
        raise VolumeFileError(f"{path}: {name} is chunked, compressed or compact, not plain bytes; pack it again")
    needed, size = dataset_bytes(dataset), path.stat().st_size
    if needed > size:
        raise VolumeFileError(
            f"{path} is cut short or damaged: {name} claims {needed} bytes, the file has {size}; copy or pack it again"
        )
    offset, stored = dataset.id.get_offset(), dataset.id.get_storage_size()
    if offset is None or stored != needed:
        raise VolumeFileError(f"{path}: {name} was never written, or only in part; pack it again")
    if offset + needed > size:
        raise VolumeFileError(f"{path} is cut short: {name} ends past its {size} bytes; copy or pack it again")
    return int(offset)


def dataset_bytes(dataset: h5py.Dataset) -> int:
    """Bytes that the header claims, in whole numbers of any size."""
    return int(math.prod(dataset.shape) * dataset.dtype.itemsize)


def read_bytes(path: Path, offset: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """An array of plain bytes in a file; read-only. VolumeFileError when the file ends before."""
    count = math.prod(shape)
    table = np.fromfile(path, dtype, count, offset=offset)
    if len(table) != count:
        raise VolumeFileError(f"{path} was cut short while it was read; copy or pack it again")
    table = table.reshape(shape)
    table.flags.writeable = False
    return table


def file_checksum(path: Path, offset: int, size: int) -> int:
    """CRC-32 of a part of a file, read piece by piece."""
    found = 0
    with path.open("rb") as file:
        file.seek(offset)
        while size > 0 and (block := file.read(min(size, _BLOCK))):
            found, size = crc32(block, found), size - len(block)
    return found


def read_attribute(path: Path, file: h5py.File, name: str) -> Any:
    """An attribute of the root: one number or text, or a list of texts. Other types are refused before it is read."""
    handle = h5py.h5a.open(file.id, name.encode())
    text = handle.get_type().get_class() == h5py.h5t.STRING
    known = text or handle.get_type().get_class() == h5py.h5t.INTEGER
    fits = handle.shape == () or (text and len(handle.shape) == 1 and handle.shape[0] <= MAX_NAMES)
    if not known or not fits or handle.get_storage_size() > path.stat().st_size:
        raise VolumeFileError(f"{path}: attribute {name} is not a number, a text or a list of texts; pack it again")
    value = file.attrs[name]
    if not text:
        return int(value)
    lines = [value] if handle.shape == () else list(value)
    lines = [line.decode(errors="surrogateescape") if isinstance(line, bytes) else str(line) for line in lines]
    if any("\udc80" <= letter <= "\udcff" for line in lines for letter in line):
        raise VolumeFileError(f"{path}: attribute {name} is not UTF-8; pack it again")
    return lines[0] if handle.shape == () else lines


def read_text(path: Path, file: h5py.File, name: str) -> str:
    """An attribute of the root that is one text."""
    value = read_attribute(path, file, name)
    if not isinstance(value, str):
        raise VolumeFileError(f"{path}: attribute {name} is not a text; pack it again")
    return value


def read_json(path: Path, file: h5py.File, name: str, kind: type[Any]) -> Any:
    """An attribute that holds a JSON text of a list or a dict."""
    value = json.loads(read_text(path, file, name))
    if not isinstance(value, kind):
        raise VolumeFileError(f"{path}: attribute {name} is not a JSON {kind.__name__}; pack it again")
    return value


@contextmanager
def _no_plugins() -> Iterator[None]:
    """HDF5 finds no plugin meanwhile: opening a file never runs code that a file or $HDF5_PLUGIN_PATH names."""
    folders = [h5py.h5pl.get(number) for number in range(h5py.h5pl.size())]
    for _ in folders:
        h5py.h5pl.remove(0)
    try:
        yield
    finally:
        for folder in folders:
            h5py.h5pl.append(folder)
