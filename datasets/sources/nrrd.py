"""Reads NRRD (.nrrd, and .nhdr with its data file beside it) in RAS; an axis that is not of space becomes channels.
Writes what was predicted of one, on its own grid.

Format: teem.sourceforge.net/nrrd/format.html. pynrrd parses the header; the voxels are read here, bounded by it.
"""

import bz2
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.sources.contract import Header, UnusableSource, Volume, library
from datasets.sources.packed import Gunzip
from datasets.sources.voxels import Turn, check_claim, check_shape, compact, packable, turn_to_ras

TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
ENDIAN = {"little": "<", "big": ">", None: "|"}
ENCODINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
IN_MM = {"mm": 1.0, "millimeter": 1.0, "m": 1000.0, "cm": 10.0, "um": 0.001, "µm": 0.001, "micron": 0.001, "nm": 1e-6}
SPACES = {
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
}
"""space -> signs that bring its world to RAS; others are taken as RAS"""
_LEVEL = 4
_OF_AXES = {"space directions": None, "spacings": np.nan, "units": "", "kinds": "list"}
"""Fields of a value for each axis, and that of an axis which is not of space."""
SPATIAL_KINDS = ("domain", "space", "none", "???")


@dataclass(frozen=True)
class _Layout:
    """Where the voxels lie and how they are meant."""

    file: Path
    offset: int
    """of the voxels in the file, or of the compressed stream"""
    skip: int
    """bytes before the voxels in the decompressed stream"""
    encoding: str
    shape: tuple[int, ...]
    """as stored, first axis fastest"""
    stored: np.dtype[Any]
    spatial: list[int]
    channel: int | None
    turn: Turn | None
    """None of a 2D image"""
    affine: NDArray[np.float64]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.stored.itemsize

    @property
    def channels(self) -> int:
        return 1 if self.channel is None else self.shape[self.channel]


def read_header(files: tuple[Path, ...]) -> Header:
    """Shape, dtype and affine in RAS, from the header alone."""
    layout = _layout(files[0])
    spatial = layout.turn.shape if layout.turn else tuple(layout.shape[axis] for axis in reversed(layout.spatial))
    return Header((layout.channels, *spatial), packable(layout.stored), layout.affine)


def read_volume(files: tuple[Path, ...]) -> Volume:
    """The voxels (C, x, y, z), or (C, H, W) where there are two axes of space."""
    layout = _layout(files[0])
    data: NDArray[Any] = np.frombuffer(_voxels(layout), layout.stored).reshape(layout.shape, order="F")
    if layout.channel is None:
        view = data[None]
    else:
        view = np.moveaxis(data, layout.channel, 0)
    view = layout.turn.view(view) if layout.turn else view.swapaxes(1, 2)
    return Volume(compact(view, packable(layout.stored)), layout.affine)


def file_like(path: Path, values: NDArray[Any], classes: bool = False) -> bytes:
    """Values on the grid of an NRRD file, as `read_volume` gives it, as the bytes of one that lies where it lies.

    values: (x, y, z) in RAS or (H, W); with `classes` (K, ...), and the file's first axis is that of the classes.
    Space, origin, directions (or spacings), their units and the order of the axes are those of the file.
    """
    with path.open("rb") as file:
        head = library("nrrd", "pynrrd", "NRRD").read_header(file)
    layout = _layout(path)
    stored = values if classes else values[None]
    stored = layout.turn.undo(stored) if layout.turn else stored.swapaxes(1, 2)
    kept = {name: head[name] for name in ("space", "space dimension", "space origin") if name in head}
    if "space units" in head:
        kept["space units"] = [str(unit).strip('"').replace("µ", "u") for unit in head["space units"]]  # ASCII
    for name, none in _OF_AXES.items():
        if name in head:
            own = [head[name][axis] for axis in layout.spatial]
            kept[name] = [np.full_like(own[0], np.nan) if none is None else none, *own] if classes else own
    if "kinds" not in kept:
        kept["kinds"] = ["list"] * classes + ["domain"] * len(layout.spatial)
    written = io.BytesIO()
    stored, kept["encoding"] = stored if classes else stored[0], "gzip"
    library("nrrd", "pynrrd", "NRRD").write(written, stored, kept, compression_level=_LEVEL)
    text, _, content = written.getvalue().partition(b"\n\n")
    lines = [line for line in text.split(b"\n") if not line.startswith(b"#")]  # the time of day is in them
    return b"\n".join(lines) + b"\n\n" + content


def data_file(path: Path, head: Any = None) -> Path | None:
    """The file that holds the voxels of a detached header; None: the header's own.

    UnusableSource for one outside the header's folder (another user's file could be pulled in) and for lists of files.
    """
    if head is None:
        with path.open("rb") as file:
            head = library("nrrd", "pynrrd", "NRRD").read_header(file)
    name: str | None = head.get("data file", head.get("datafile"))
    if name is None:
        return None
    if name.startswith("LIST") or "%" in name:
        raise UnusableSource(
            f"its voxels lie in many files ({name}); join them: unu save -f nrrd -i IN.nhdr -o OUT.nrrd"
        )
    folder = path.parent.resolve()
    found = (folder / name).resolve()
    if not found.is_relative_to(folder):
        raise UnusableSource(f"its data file {name!r} lies outside its folder; put it beside the header")
    return found


def _voxels(layout: _Layout) -> bytes | NDArray[np.uint8]:
    with layout.file.open("rb") as file:
        file.seek(layout.offset)
        if layout.encoding == "raw":
            return file.read(layout.nbytes)
        raw = file.read()
    if layout.encoding == "gzip":
        stream = Gunzip(raw)
        stream.take(layout.skip)
        inflated = stream.take(layout.nbytes)
        stream.finish()
        return inflated
    with bz2.open(io.BytesIO(raw)) as packed:
        packed.read(layout.skip)
        voxels = packed.read(layout.nbytes)
        if len(voxels) < layout.nbytes or packed.read(1):
            raise UnusableSource(f"broken data (its header announces {layout.nbytes:,} bytes; the stream has others)")
    return voxels


def _layout(path: Path) -> _Layout:
    with path.open("rb") as file:
        if file.read(4) != b"NRRD":
            raise UnusableSource("it is not NRRD, whatever its name says")
        file.seek(0)
        head = library("nrrd", "pynrrd", "NRRD").read_header(file)
        position = file.tell()
    detached = data_file(path, head)
    stored = _dtype(head)
    shape = tuple(int(axis) for axis in head["sizes"])
    check_shape(shape)
    if len(shape) != head["dimension"]:
        raise UnusableSource(f"broken data (its dimension is {head['dimension']}, its sizes are {shape})")
    encoding = ENCODINGS.get(str(head["encoding"]).lower())
    if encoding is None:
        raise UnusableSource(f"its encoding {head['encoding']!r} is not read; use raw, gzip or bzip2")
    nbytes = int(np.prod(shape, dtype=object)) * stored.itemsize
    offset, skip = _start(head, detached or path, 0 if detached else position, encoding, nbytes)
    spatial, channel = _roles(head, len(shape))
    affine = _affine(head, spatial)
    turn = turn_to_ras(affine, tuple(shape[axis] for axis in spatial)) if len(spatial) == 3 else None
    return _Layout(
        detached or path, offset, skip, encoding, shape, stored, spatial, channel, turn, turn.affine if turn else affine
    )


def _dtype(head: Any) -> np.dtype[Any]:
    for name, words in TYPES.items():
        if str(head["type"]).lower() in words:
            if name[1] != "1" and head.get("endian") not in ("little", "big"):
                raise UnusableSource(f"its endian is {head.get('endian')!r}, not little or big")
            return np.dtype(ENDIAN[None if name[1] == "1" else head["endian"]] + name)
    raise UnusableSource(f"its voxels are of type {head['type']!r}; only integers and real numbers can be packed")


def _start(head: Any, file: Path, position: int, encoding: str, nbytes: int) -> tuple[int, int]:
    """Offset in the file, and bytes to skip once it is decompressed. UnusableSource where the file cannot hold them."""
    lines = int(head.get("line skip", head.get("lineskip", 0)))
    skip = int(head.get("byte skip", head.get("byteskip", 0)))
    size = file.stat().st_size
    if lines < 0 or skip < (-1 if encoding == "raw" else 0):
        raise UnusableSource(f"broken data (line skip {lines}, byte skip {skip})")
    if lines:
        with file.open("rb") as opened:
            opened.seek(position)
            for _ in range(min(lines, size)):
                opened.readline()
            position = opened.tell()
    if encoding != "raw":
        check_claim(skip + nbytes, size, compressed=True)
        return position, skip
    offset = size - nbytes if skip == -1 else position + skip
    check_claim(max(offset, 0) + nbytes, size, compressed=False)
    if offset + nbytes < size:
        raise UnusableSource(f"broken data ({size:,} bytes, but its header announces {offset + nbytes:,})")
    return offset, 0


def _roles(head: Any, axes: int) -> tuple[list[int], int | None]:
    """The axes of space, and the one of channels if any: told by the directions, else by the kinds."""
    kinds = [str(kind).lower() for kind in head.get("kinds", ["domain"] * axes)]
    directions = head.get("space directions")
    if directions is not None:
        spatial = [axis for axis, row in enumerate(directions) if row is not None and np.isfinite(row).all()]
    else:
        spatial = [axis for axis, kind in enumerate(kinds) if kind in SPATIAL_KINDS]
    others = [axis for axis in range(axes) if axis not in spatial]
    if len(spatial) not in (2, 3) or len(others) > 1:
        raise UnusableSource(
            f"{len(spatial)} of its {axes} axes are of space (kinds: {' '.join(kinds)}); "
            "two or three are read, and one of channels"
        )
    if "complex" in kinds:
        raise UnusableSource("its voxels are complex; only integers and real numbers can be packed")
    return spatial, others[0] if others else None


def _unit(head: Any) -> float:
    """mm of the header's unit of length; mm where it names none. UnusableSource for one that is no length."""
    names = {str(name).strip('"').lower() for name in head.get("space units", ())} - {""}
    if len(names) > 1 or not names <= set(IN_MM):
        raise UnusableSource(f"its space units are {', '.join(sorted(names))}; give all in one of {', '.join(IN_MM)}")
    return IN_MM[names.pop()] if names else 1.0


def _affine(head: Any, spatial: list[int]) -> NDArray[np.float64]:
    """Index to mm in RAS; of a 2D image the sizes of its rows and columns on the diagonal."""
    directions, spacings = head.get("space directions"), head.get("spacings")
    affine = np.eye(4)
    if directions is not None and len(spatial) == 3:
        columns = np.array([directions[axis] for axis in spatial], np.float64).T
        if columns.shape != (3, 3):
            raise UnusableSource(f"its space has {len(columns)} dimensions; 3 are read")
        affine[:3, :3] = columns
        if "space origin" in head and np.isfinite(head["space origin"]).all():
            affine[:3, 3] = head["space origin"]
        affine[:3] *= _unit(head)
        return np.diag([*SPACES.get(str(head.get("space")).lower(), (1, 1, 1)), 1.0]) @ affine
    if directions is not None:
        sizes = [float(np.linalg.norm(directions[axis])) for axis in reversed(spatial)]
    elif spacings is not None:
        order = spatial if len(spatial) == 3 else spatial[::-1]
        sizes = [float(spacings[axis]) if np.isfinite(spacings[axis]) else 1.0 for axis in order]
    else:
        return affine
    affine[range(len(sizes)), range(len(sizes))] = sizes
    return affine
