"""Reads NIfTI-1 and -2 (.nii, .nii.gz) in RAS; intensities as the header says, the fourth or fifth axis as channels.

Format: nifti.nimh.nih.gov, nifti1.h and nifti2.h. The header is parsed by nibabel, the voxels are not: they are read
once, decompressed by isal if it is there, and copied once.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from datasets.sources.contract import Header, UnusableSource, Volume
from datasets.sources.packed import GZIP_MAGIC, Gunzip
from datasets.sources.voxels import Turn, check_claim, check_range, check_shape, compact, packable, turn_to_ras

START = 64 * 2**10
"""bytes of a file that hold its header, compressed or not"""
SIZES: Any = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
IN_MM = {"meter": 1000.0, "micron": 0.001}
"""lengths of the header's unit; most headers have mm, or none"""
MAGIC = {348: slice(344, 348), 540: slice(4, 8)}
QUIET = logging.getLogger(f"{__name__}.nibabel")  # nibabel tells its own logger what it mends
QUIET.addHandler(logging.NullHandler())
QUIET.propagate = False


@dataclass(frozen=True)
class _Layout:
    """Where the voxels lie in the (decompressed) file and how they are meant."""

    shape: tuple[int, ...]
    """(i, j, k, C) in Fortran order"""
    stored: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    turn: Turn

    @property
    def dtype(self) -> np.dtype[Any]:
        scaled = (self.slope, self.intercept) != (1.0, 0.0)
        return np.dtype(np.float32) if scaled else packable(self.stored)

    @property
    def claimed(self) -> int:
        return self.offset + int(np.prod(self.shape, dtype=object)) * self.stored.itemsize


def read_header(files: tuple[Path, ...]) -> Header:
    """Shape, dtype and affine in RAS, from the start of the file."""
    with files[0].open("rb") as file:
        layout = _layout(file.read(START), files[0].stat().st_size)
    return Header((layout.shape[3], *layout.turn.shape), layout.dtype, layout.turn.affine)


def read_volume(files: tuple[Path, ...]) -> Volume:
    """The voxels (C, x, y, z): dtype as stored, or float32 where the header scales."""
    read_header(files)  # a claim is refused before the file is read whole
    raw = files[0].read_bytes()
    layout = _layout(raw[:START], len(raw))
    held: bytes | NDArray[np.uint8] = raw
    if raw.startswith(GZIP_MAGIC):
        stream = Gunzip(raw)
        held = stream.take(layout.claimed)
        stream.finish()
        del stream
    del raw
    if len(held) > layout.claimed:
        raise UnusableSource(f"broken data ({len(held):,} bytes, but its header announces {layout.claimed:,})")
    count = int(np.prod(layout.shape))
    data: NDArray[Any] = np.frombuffer(held, layout.stored, count, layout.offset).reshape(layout.shape, order="F")
    if (layout.slope, layout.intercept) != (1.0, 0.0):
        check_range(data, layout.slope, layout.intercept)
    view = layout.turn.view(data.transpose(3, 0, 1, 2))
    return Volume(compact(view, layout.dtype, layout.slope, layout.intercept), layout.turn.affine)


def own_header(path: Path) -> Any:
    """The header as nibabel has it, whether the file is compressed or not, whatever its name says."""
    with path.open("rb") as file:
        start = file.read(START)
    return _header(_block(Gunzip(start) if start.startswith(GZIP_MAGIC) else None, start))


def _header(block: bytes) -> Any:
    header = SIZES[len(block)](block, check=False)
    header.check_fix(logger=QUIET)
    return header


def _layout(start: bytes, size: int) -> _Layout:
    """From the first bytes of a file of `size` bytes. UnusableSource for a claim that it cannot hold."""
    compressed = start.startswith(GZIP_MAGIC)
    layout = _parse(_block(Gunzip(start) if compressed else None, start))
    check_claim(layout.claimed, size, compressed)
    return layout


def _block(stream: Gunzip | None, raw: bytes) -> bytes:
    """The binary header, 348 or 540 bytes long as its first four bytes say."""
    if not raw:
        raise UnusableSource("the file is empty (0 bytes)")
    first = bytes(stream.take(4)) if stream else raw[:4]
    sizes = {int.from_bytes(first, order) for order in ("little", "big")} & set(SIZES)
    if len(first) < 4 or not sizes:
        raise UnusableSource(f"it is not NIfTI, whatever its name says: it starts with {first!r}")
    (size,) = sizes
    block = first + bytes(stream.take(size - 4)) if stream else raw[:size]
    magic = block[MAGIC[size]]
    if magic in (b"ni1\0", b"ni2\0"):
        raise UnusableSource("it is half of an .hdr/.img pair; convert it to one .nii.gz first")
    if magic not in (b"n+1\0", b"n+2\0"):
        raise UnusableSource(f"it is not NIfTI, whatever its name says: its magic is {magic!r}")
    return block


def _parse(block: bytes) -> _Layout:
    header = _header(block)
    shape = _four_axes(tuple(int(axis) for axis in header.get_data_shape()))
    stored = np.dtype(header.get_data_dtype())
    packable(stored)
    slope, intercept = header.get_slope_inter()
    affine = np.asarray(header.get_best_affine(), np.float64)
    affine[:3] *= IN_MM.get(header.get_xyzt_units()[0], 1.0)
    turn = turn_to_ras(affine, shape[:3])
    offset = int(header.get_data_offset())
    if offset < len(block):
        raise UnusableSource(f"broken data (its voxels start at byte {offset}, inside the header)")
    return _Layout(shape, stored, offset, slope or 1.0, intercept or 0.0, turn)


def _four_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(i, j, k, C) of a header's three to seven axes: one of those after the third may be longer than 1."""
    check_shape(shape)
    long = [axis for axis in shape[3:] if axis > 1]
    if len(shape) < 3 or len(long) > 1:
        hint = "pick one of its volumes or one component first" if long else "a volume has three axes"
        raise UnusableSource(f"it is {len(shape)}D {shape}; {hint}")
    return (*shape[:3], long[0] if long else 1)
