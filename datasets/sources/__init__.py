"""Sources of samples: NIfTI, DICOM, NRRD, NumPy, TIFF and image files, found, described and read in one way.

`find` names them, `header` tells shape, dtype and affine without reading voxels, `read` gives the voxels. The promises
are in datasets/sources/contract.py.
"""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import numpy as np

from datasets.sources import arrays, dicom, images, nifti, nrrd, tiff
from datasets.sources.contract import SUFFIXES, Header, NotASource, Source, UnusableSource, Volume, split_name
from datasets.sources.finding import find
from datasets.sources.voxels import check_values, fill_missing

__all__ = [
    "SUFFIXES",
    "Header",
    "NotASource",
    "Source",
    "UnusableSource",
    "Volume",
    "all_files",
    "describe",
    "find",
    "header",
    "read",
    "split_name",
]

READERS: dict[str, Any] = {"nifti": nifti, "dicom": dicom, "nrrd": nrrd, "tiff": tiff, "numpy": arrays, "image": images}
LONGEST = 300
"""characters of a reason"""
SAME_PLACE = 1e-3
"""mm, or part of a voxel's size, that the affines of two channels may differ by"""

Found = TypeVar("Found")


def header(source: Source) -> Header:
    """Shape, dtype and affine as `read` will give them; no voxels are read. UnusableSource with the reason."""
    if not source.channels:
        return _header(source, source.files)
    heads = [_header(source, (file,)) for file in source.files]
    for file, head in zip(source.files, heads, strict=True):
        _match(source.files[0], heads[0], file, head)
    dtype = np.result_type(*(head.dtype for head in heads))
    return Header((len(heads), *heads[0].shape[1:]), dtype, heads[0].affine)


def read(source: Source, nan: float | None = None) -> Volume:
    """All voxels of a source, `nan` in place of NaN. UnusableSource with the reason.

    Values that are infinite or huge are one, and NaN without `nan`.
    """
    if not source.channels:
        return _volume(source, source.files, nan)
    head = header(source)
    data, filled = np.empty(head.shape, head.dtype), 0
    for number, file in enumerate(source.files):
        one = _volume(source, (file,), nan)
        data[number], filled = one.data[0], filled + one.filled
    return Volume(data, head.affine, filled)


def all_files(source: Source) -> tuple[Path, ...]:
    """The files of a source, and those that a header among them names. UnusableSource for a header that may not."""
    detached = [nrrd.data_file(path) for path in source.files if path.suffix.lower() == ".nhdr"]
    return (*source.files, *(path for path in detached if path))


def describe(source: Source) -> dict[str, Any]:
    """Manifest entry: name, size in bytes, sha256; of several files their sum, and of their bytes in order."""
    digest = hashlib.sha256()
    size = 0
    for path in all_files(source):
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
                size += len(block)
    return {"name": source.path.name, "size": size, "sha256": digest.hexdigest()}


def _header(source: Source, files: tuple[Path, ...]) -> Header:
    found: Header = _worded(READERS[source.kind].read_header, files)
    return found


def _volume(source: Source, files: tuple[Path, ...], nan: float | None) -> Volume:
    found: Volume = _worded(READERS[source.kind].read_volume, files)
    if nan is not None:
        data, filled = fill_missing(found.data, nan)
        found = replace(found, data=data, filled=filled)
    check_values(found.data)
    return found


def _worded(reader: Callable[[tuple[Path, ...]], Found], files: tuple[Path, ...]) -> Found:
    """What a reader returns; whatever a library raises over a stranger's file becomes one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return reader(files)
    except NotASource:
        raise
    except UnusableSource as error:
        raise UnusableSource(_line(str(error))) from error
    except MemoryError as error:
        raise UnusableSource("it does not fit in this machine's memory") from error
    except Exception as error:
        raise UnusableSource(f"broken data ({_line(str(error) or type(error).__name__)})") from error


def _line(text: str) -> str:
    """One printable line of bearable length: what a file holds may stand in it."""
    printable = "".join(sign if sign.isprintable() else " " for sign in text)
    return shorten(printable, LONGEST, placeholder=" ...")


def _match(first: Path, wanted: Header, file: Path, found: Header) -> None:
    """UnusableSource unless two channels lie on one grid, one channel each."""
    if found.shape[0] != 1:
        raise UnusableSource(f"{file.name} has {found.shape[0]} channels; a channel is a file with one")
    if found.shape != wanted.shape:
        sizes = (
            f"{path.name} ({'x'.join(map(str, head.shape[1:]))})" for path, head in ((first, wanted), (file, found))
        )
        raise UnusableSource(f"its channels differ in shape: {' and '.join(sizes)}; resample one")
    size = np.linalg.norm(wanted.affine[:3, :3], axis=0).min()
    corners = np.array([(0, 0, 0, 1), (*(found.shape[1:] if len(found.shape) == 4 else (0, 0, 0)), 1)]).T
    if not np.allclose(wanted.affine @ corners, found.affine @ corners, atol=max(SAME_PLACE, 0.01 * size)):
        raise UnusableSource(f"its channels lie in different places: {first.name} and {file.name}; resample one")
