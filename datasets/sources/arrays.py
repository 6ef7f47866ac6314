"""Reads NumPy's .npy and .npz: two axes are an image (H, W), three a volume (x, y, z), four have channels first.

Format: numpy.lib.format. Pickles are never loaded. Of several arrays in an .npz, the one called data, image or arr_0.
"""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from datasets.sources.contract import Header, UnusableSource, Volume
from datasets.sources.voxels import check_claim, check_shape, compact, packable

KEYS = ("data", "image", "arr_0")


@dataclass(frozen=True)
class _Layout:
    """An array's header: shape as stored, whether in Fortran order, dtype as stored."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def with_channels(self) -> tuple[int, ...]:
        return self.shape if len(self.shape) == 4 else (1, *self.shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


def read_header(files: tuple[Path, ...]) -> Header:
    """Shape and dtype from the array's header; the affine is the identity."""
    with _opened(files[0]) as (file, stored, compressed):
        layout = _layout(file, stored, compressed)
    return Header(layout.with_channels, packable(layout.dtype), np.eye(4))


def read_volume(files: tuple[Path, ...]) -> Volume:
    """The array as (C, x, y, z) or (1, H, W). UnusableSource for objects, other numbers of axes, bombs, cut files."""
    with _opened(files[0]) as (file, stored, compressed):
        layout = _layout(file, stored, compressed)
        data: NDArray[Any] = np.empty(layout.nbytes // layout.dtype.itemsize, layout.dtype)
        _fill(file, data.view(np.uint8).data)
        if file.read(1):
            raise UnusableSource("broken data (bytes follow the end of the array)")
    view = data.reshape(layout.shape, order="F" if layout.fortran else "C").reshape(layout.with_channels)
    return Volume(compact(view, packable(layout.dtype)), np.eye(4))


def _fill(file: IO[bytes], rest: memoryview) -> None:
    while rest.nbytes:
        part = file.readinto(rest[: 2**20])  # type: ignore[attr-defined]
        if not part:
            raise UnusableSource(f"broken data (it ends {rest.nbytes:,} bytes too early)")
        rest = rest[part:]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], int, bool]]:
    """The stream of the array, the bytes that it takes in the file, and whether those are compressed."""
    if path.suffix.lower() == ".npy":
        with path.open("rb") as file:
            yield file, path.stat().st_size, False
        return
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(_member(archive.namelist()))
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others inflate without a limit
            raise UnusableSource(f"its zip method {member.compress_type} is not NumPy's; save it by savez_compressed")
        size = min(member.compress_size, path.stat().st_size)
        with archive.open(member) as file:
            yield file, size, member.compress_type != zipfile.ZIP_STORED


def _member(names: list[str]) -> str:
    arrays = [name for name in names if name.endswith(".npy")]
    for key in KEYS:
        if f"{key}.npy" in arrays:
            return f"{key}.npy"
    if len(arrays) != 1:
        keys = ", ".join(name.removesuffix(".npy") for name in arrays[:8]) or "none"
        raise UnusableSource(f"which of its arrays? It holds {keys}; keep one, or call it {' or '.join(KEYS[:2])}")
    return arrays[0]


def _layout(file: IO[bytes], stored: int, compressed: bool) -> _Layout:
    try:
        version = np.lib.format.read_magic(file)
    except ValueError as error:
        raise UnusableSource("it is not a NumPy array, whatever its name says") from error
    if version not in ((1, 0), (2, 0)):
        raise UnusableSource(f"its format is {version[0]}.{version[1]}: records with names, not voxels")
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    layout = _Layout(*reader(file))
    if layout.dtype.hasobject:
        raise UnusableSource("it holds Python objects (a pickle), which are never loaded; save numbers")
    packable(layout.dtype)
    if len(layout.shape) not in (2, 3, 4):
        raise UnusableSource(
            f"it has {len(layout.shape)} axes {layout.shape}; (H, W), (x, y, z) or (C, x, y, z) is read"
        )
    check_shape(layout.shape)
    check_claim(layout.nbytes, stored, compressed)
    return layout
