"""Reads TIFF: one page as an image (C, H, W), a stack as a volume (C, x = columns, y = rows, z = pages).

Axes and sizes of a voxel come from ImageJ's or OME's metadata, else from the tags (centimetres only: inches are what
paint programs write for printers). Formats: TIFF 6.0; OME-TIFF specification; tifffile for both.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.sources.contract import Header, UnusableSource, Volume, library
from datasets.sources.packed import fastest
from datasets.sources.voxels import SURE_BYTES, check_claim, check_shape, compact, packable

PAGES, CHANNELS = "ZQI", "CS"
"""tifffile's letters; Q and I are pages of which nothing is said"""
ALPHA = (1, 2)
"""values of ExtraSamples (TIFF 6.0, section 18)"""
MILLIMETRES = {"m": 1e3, "cm": 10.0, "mm": 1.0, "nm": 1e-6} | dict.fromkeys(
    ("um", "µm", "μm", "\\u00B5m", "micron", "microns", "micrometer"), 1e-3
)
CENTIMETRE = 3
NONE, DEFLATE, PACKBITS = 1, (8, 32946), 32773
"""values of Compression; tifffile alone reads no others"""
DEFLATE_MOST = 1032
"""times that deflate can shrink (zlib.net, zlib_tech.html)"""


@dataclass(frozen=True)
class _Layout:
    series: Any
    axes: str
    """of the axes longer than 1, and always YX"""
    alphas: int
    """last samples that are no colours"""
    inverted: int | None
    """the largest value, of pages whose 0 is white"""
    affine: NDArray[np.float64]

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = self.sizes
        channels = sizes.get("S", sizes.get("C", 1)) - self.alphas
        pages = [sizes[axis] for axis in self.axes if axis in PAGES]
        if pages:
            return (channels, sizes["X"], sizes["Y"], pages[0])
        return (channels, sizes["Y"], sizes["X"])

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.series.axes, self.series.shape, strict=True))


def read_header(files: tuple[Path, ...]) -> Header:
    """Shape, dtype and affine from the tags."""
    with _opened(files[0]) as file:
        layout = _layout(file, files[0])
        return Header(layout.shape, packable(layout.series.dtype), layout.affine)


def read_volume(files: tuple[Path, ...]) -> Volume:
    """The voxels. UnusableSource for time series, several images, palettes, a codec that is not installed."""
    with _opened(files[0]) as file:
        layout = _layout(file, files[0])
        for page in layout.series.pages:
            if page is None or 0 in page.databytecounts:
                raise UnusableSource("broken data (some of its pages are not in the file)")
            if layout.series.keyframe.compression in DEFLATE:
                _refuse_bombs(file, page)
        data = layout.series.asarray(maxworkers=1)
    if layout.inverted is not None:
        data = np.subtract(data.dtype.type(layout.inverted), data)
    return Volume(compact(_view(layout, data), packable(data.dtype)), layout.affine)


def _view(layout: _Layout, data: NDArray[Any]) -> NDArray[Any]:
    """(C, X, Y, Z) or (C, Y, X) of an array whose axes are the series'."""
    data = data.reshape([layout.sizes[axis] for axis in layout.axes])
    order = [layout.axes.index(axis) for axis in _wanted(layout.axes)]
    view = data.transpose(order)
    if not set(CHANNELS) & set(layout.axes):
        view = view[None]
    return view[: len(view) - layout.alphas]


def _wanted(axes: str) -> str:
    channels = "".join(axis for axis in axes if axis in CHANNELS)
    pages = "".join(axis for axis in axes if axis in PAGES)
    return f"{channels}XY{pages}" if pages else f"{channels}YX"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    tifffile = library("tifffile", "tifffile", "TIFF")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it complains of becomes our reason
    try:
        with tifffile.TiffFile(path, _multifile=False) as file:  # OME metadata may name other files
            yield file
    except tifffile.TiffFileError as error:
        raise UnusableSource(f"it is not TIFF, whatever its name says, or it is broken ({error})") from error


def _refuse_bombs(file: Any, page: Any) -> None:
    """UnusableSource for a strip or tile that inflates to more than its page: tifffile would inflate it whole."""
    key = page.keyframe
    limit = max(key.nbytes, key.tilewidth * key.tilelength * key.tiledepth * key.samplesperpixel * 8)
    for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        if size * DEFLATE_MOST > SURE_BYTES:
            file.filehandle.seek(offset)
            if len(fastest.decompressobj().decompress(file.filehandle.read(size), limit + 1)) > limit:
                raise UnusableSource(f"its compressed parts hold more than the {limit:,} bytes of a page")


def _layout(file: Any, path: Path) -> _Layout:
    if len(file.series) != 1:
        shapes = ", ".join("x".join(map(str, series.shape)) for series in file.series[:3])
        raise UnusableSource(f"it holds {len(file.series)} images of their own ({shapes}); keep one")
    series, page = file.series[0], file.series[0].keyframe
    check_shape(series.shape)
    packable(series.dtype)
    axes = _axes(series)
    check_claim(series.nbytes, path.stat().st_size, compressed=page.compression != NONE)
    if page.compression not in (NONE, *DEFLATE, PACKBITS) and find_spec("imagecodecs") is None:
        codec = getattr(page.compression, "name", page.compression)
        raise UnusableSource(f"its codec {codec} needs imagecodecs: pip install imagecodecs, or store it as deflate")
    if page.photometric == 3:
        raise UnusableSource("its colours are a palette; convert it to RGB")
    alphas = sum(extra in ALPHA for extra in page.extrasamples) if "S" in axes else 0
    inverted = (1 << page.bitspersample) - 1 if page.photometric == 0 and series.dtype.kind in "bu" else None
    affine = np.eye(4)
    columns, rows, pages = _spacing(file, page)
    sizes = (columns, rows, pages) if set(axes) & set(PAGES) else (rows, columns, 1.0)
    affine[range(3), range(3)] = sizes
    return _Layout(series, axes, alphas, inverted, affine)


def _axes(series: Any) -> str:
    """The series' axes but those of one element. UnusableSource where they are no image and no volume."""
    long = "".join(axis for axis, size in zip(series.axes, series.shape, strict=True) if size > 1 or axis in "YX")
    known = set("YX" + PAGES + CHANNELS)
    several = [letters for letters in (PAGES, CHANNELS) if sum(axis in letters for axis in long) > 1]
    if set(long) - known or several or not {"Y", "X"} <= set(long):
        sizes = ", ".join(f"{axis} {size}" for axis, size in zip(series.axes, series.shape, strict=True))
        hint = "pick one time" if "T" in long else "read are pages (Z), rows, columns and one axis of channels"
        raise UnusableSource(f"its axes are {sizes}; {hint}")
    return long


def _spacing(file: Any, page: Any) -> tuple[float, float, float]:
    """mm between columns, rows and pages; 1 where the file does not say."""
    across = [float(value) if value > 0 else 0.0 for value in page.resolution]
    imagej: Any = file.imagej_metadata
    if imagej and str(imagej.get("unit")) in MILLIMETRES:
        unit = MILLIMETRES[str(imagej["unit"])]
        columns, rows = (unit / value if value else 1.0 for value in across)
        return columns, rows, unit * float(imagej.get("spacing", 1.0))
    if file.is_ome and file.ome_metadata:
        return _ome_spacing(file.ome_metadata)
    if page.resolutionunit == CENTIMETRE and all(across):
        return 10 / across[0], 10 / across[1], 1.0
    return 1.0, 1.0, 1.0


def _ome_spacing(text: str) -> tuple[float, float, float]:
    image = library("tifffile", "tifffile", "TIFF").xml2dict(text)["OME"]["Image"]
    pixels = (image[0] if isinstance(image, list) else image)["Pixels"]
    sizes = []
    for axis in "XYZ":
        unit = MILLIMETRES.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        size = pixels.get(f"PhysicalSize{axis}")
        sizes.append(float(size) * unit if size and unit else 1.0)
    return sizes[0], sizes[1], sizes[2]
