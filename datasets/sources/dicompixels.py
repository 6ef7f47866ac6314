"""The pixels of DICOM files: what all files of a series must share, the dtype that holds them, decoding, rescaling."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.sources.contract import UnusableSource, library
from datasets.sources.dicomframes import Frame

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
DECODERS = "pip install 'pylibjpeg[all]', or write them plain: gdcmconv --raw IN OUT"
SHARED = ("Rows", "Columns", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "PixelRepresentation")


@dataclass(frozen=True)
class Pixels:
    """What the frames of a series have in common."""

    size: tuple[int, int]
    """rows, columns"""
    photometric: str
    low: int
    """of the stored integers, by their number of bits"""
    high: int
    stored: np.dtype[Any]
    dtype: np.dtype[Any]
    """after rescaling"""

    @property
    def channels(self) -> int:
        return 3 if self.photometric in COLOUR else 1

    def scale(self, frame: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
        """(rows, columns, C) of what is stored, MONOCHROME1 turned so that more is brighter."""
        if self.photometric == "MONOCHROME1":
            frame = (self.high + self.low - frame.astype(np.int64)).astype(frame.dtype)
        if self.dtype.kind == "f":
            return frame if (slope, intercept) == (1.0, 0.0) else frame * np.float64(slope) + intercept
        found = frame.astype(self.dtype)  # sums wrap around, and the last one fits
        if slope != 1:
            found *= int(slope)
        if intercept:
            found += np.array(int(intercept)).astype(self.dtype)
        return found


def pixels_of(opened: Sequence[Any], names: Sequence[str], frames: Sequence[Frame]) -> Pixels:
    """UnusableSource where the files differ, or hold what cannot be packed or decoded here."""
    first = opened[0]
    for name, data in zip(names, opened, strict=True):
        for word in SHARED:
            if data.get(word) != first.get(word):
                raise UnusableSource(
                    f"its files differ in {word}: {names[0]} {first.get(word)}, {name} {data.get(word)}; "
                    "is a localiser among them? Split the series"
                )
        _check_decoder(data)
    photometric = str(first.get("PhotometricInterpretation"))
    if photometric not in (*GREY, *COLOUR):
        raise UnusableSource(
            f"its photometric interpretation {photometric} is not read; use {', '.join(GREY + COLOUR)}"
        )
    if "MOSAIC" in (first.get("ImageType") or ()):
        raise UnusableSource("its slices are tiled in one picture (Siemens mosaic); convert it: dcm2niix -o OUT FOLDER")
    if any("ModalityLUTSequence" in data for data in opened):
        raise UnusableSource("its values go through a lookup table (Modality LUT), which is not read")
    size = int(first.Rows), int(first.Columns)
    if 0 in size:
        raise UnusableSource(f"it is empty: {size} rows and columns")
    if photometric in COLOUR:
        stored = np.dtype(f"u{_colour_bits(first, photometric) // 8}")
        return Pixels(size, photometric, 0, int(np.iinfo(stored).max), stored, stored)
    return _grey(first, size, photometric, frames)


def _colour_bits(data: Any, photometric: str) -> int:
    if photometric == "PALETTE COLOR":
        return 8 if int(data.RedPaletteColorLookupTableDescriptor[2]) <= 8 else 16
    bits = int(data.BitsAllocated)
    if bits not in (8, 16, 32) or int(data.get("SamplesPerPixel", 1)) != 3 or int(data.get("PixelRepresentation", 0)):
        raise UnusableSource(
            f"its colours are {data.get('SamplesPerPixel')} samples of {bits} bits; read are 3, unsigned"
        )
    return bits


def _grey(data: Any, size: tuple[int, int], photometric: str, frames: Sequence[Frame]) -> Pixels:
    allocated = int(data.BitsAllocated)
    scales = {(frame.slope, frame.intercept) for frame in frames}
    if "PixelRepresentation" not in data and allocated in (32, 64):  # floats have none (PS3.3 section C.7.6.24)
        real = np.dtype(f"f{allocated // 8}")
        return Pixels(size, photometric, 0, 0, real, real if scales == {(1.0, 0.0)} else np.dtype(np.float32))
    bits, signed = int(data.get("BitsStored") or allocated), bool(data.get("PixelRepresentation", 0))
    if allocated not in (1, 8, 16, 32, 64) or not 1 <= bits <= allocated:
        raise UnusableSource(f"its pixels have {bits} bits in {allocated}; read are 1, 8, 16, 32 and 64")
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    stored = np.dtype(f"{'i' if signed else 'u'}{max(allocated // 8, 1)}")
    return Pixels(size, photometric, low, high, stored, _narrowest(stored, low, high, scales))


def _narrowest(stored: np.dtype[Any], low: int, high: int, scales: set[tuple[float, float]]) -> np.dtype[Any]:
    """The stored dtype or the smallest integers that hold all rescaled values; float32 where a slope is no integer."""
    if not all(float(value).is_integer() for scale in scales for value in scale):
        return np.dtype(np.float32)
    ends = [end * int(slope) + int(intercept) for slope, intercept in scales for end in (low, high)]
    for dtype in (stored, *map(np.dtype, ("i2", "i4", "u4", "i8", "u8"))):
        if np.iinfo(dtype).min <= min(ends) and max(ends) <= np.iinfo(dtype).max:
            return dtype
    return np.dtype(np.float32)


def decode(data: Any, pixels: Pixels) -> NDArray[Any]:
    """All frames of one file (frames, rows, columns, C), as stored, unused bits masked; colours as RGB."""
    pydicom = library("pydicom", "pydicom", "DICOM")
    try:
        found: NDArray[Any] = pydicom.pixels.pixel_array(data)
    except RuntimeError as error:
        if not data.file_meta.TransferSyntaxUID.is_compressed:
            raise
        said = " ".join(str(error).split())
        raise UnusableSource(f"its pixels cannot be decoded ({said[:160]}); cut off, or try {DECODERS}") from error
    if pixels.photometric == "PALETTE COLOR":
        found = pydicom.pixels.apply_color_lut(found, data)
    found = found.reshape(-1, *pixels.size, pixels.channels)
    if found.dtype.newbyteorder("=") != pixels.stored:
        raise UnusableSource(f"broken data (its pixels are {found.dtype}, its header says {pixels.stored})")
    return found


def _check_decoder(data: Any) -> None:
    """UnusableSource for a compression that nothing here decodes."""
    pydicom = library("pydicom", "pydicom", "DICOM")
    syntax = data.file_meta.TransferSyntaxUID
    try:
        ready = pydicom.pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        ready = False
    if not ready:
        raise UnusableSource(f"its pixels are {syntax.name} and no decoder is installed: {DECODERS}")
