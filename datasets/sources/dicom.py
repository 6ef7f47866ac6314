"""Reads DICOM: slices of a series or frames of one file as a volume in RAS; one frame without a place as an image.

Slices are sorted by their place along the normal of the slices, never by file name (PS3.3 section C.7.6.2). Standard:
dicom.nema.org. pydicom parses and decodes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets.sources.contract import Header, UnusableSource, Volume, library
from datasets.sources.dicomframes import Frame, Stack, frames_of, stack_frames
from datasets.sources.dicompixels import Pixels, decode, pixels_of
from datasets.sources.voxels import Turn, check_claim, compact, turn_to_ras

MAGIC_AT = 128
DEFLATED = "1.2.840.10008.1.2.1.99"
LAST_TAG = 0x00280010  # Rows: beyond it nothing is needed to tell series apart


@dataclass(frozen=True)
class Label:
    """What tells a file's series from others."""

    series: str
    """'' where the file does not say: it then stands alone"""
    number: str
    description: str
    pixels: bool


def sniff(path: Path) -> bool:
    """Whether a file's contents say that it is DICOM (PS3.10 section 7.1); False where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(MAGIC_AT)
            return file.read(4) == b"DICM"
    except OSError:
        return False


def label(path: Path) -> Label:
    """From the first groups of the header. A file that is not DICOM stands alone, and reading it gives the reason."""
    pydicom = library("pydicom", "pydicom", "DICOM")
    names = ("SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "NumberOfFrames", "Rows")
    wanted = [pydicom.tag.Tag(name) for name in names]
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _refuse_deflated(path)
            found: Any = pydicom.filereader.read_partial(
                file, stop_when=lambda tag, *_: tag > LAST_TAG, force=True, specific_tags=wanted
            )
            return Label(
                "" if int(found.get("NumberOfFrames") or 1) > 1 else str(found.get("SeriesInstanceUID") or ""),
                str(found.get("SeriesNumber") or ""),
                "".join(sign if sign.isalnum() else "_" for sign in str(found.get("SeriesDescription") or "")),
                "Rows" in found,
            )
    except Exception:  # pydicom over a stranger's file may raise anything
        return Label("", "", "", True)


@dataclass(frozen=True)
class _Layout:
    """How the frames of all files become one array."""

    pixels: Pixels
    stack: Stack
    turn: Turn | None
    """None of an image"""

    @property
    def header(self) -> Header:
        rows, columns = self.pixels.size
        if self.turn is None:
            return Header((self.pixels.channels, rows, columns), self.pixels.dtype, self.stack.affine)
        return Header((self.pixels.channels, *self.turn.shape), self.pixels.dtype, self.turn.affine)


def read_header(files: tuple[Path, ...]) -> Header:
    """Shape, dtype and affine from the headers of all files."""
    return _layout(files, [_open(path, pixels=False) for path in files]).header


def read_volume(files: tuple[Path, ...]) -> Volume:
    """The voxels, rescaled; integers stay integers where slope and intercept are.

    UnusableSource for slices that are missing, doubled, uneven or of several series, and for codecs without decoder.
    """
    opened: list[Any] = [_open(path, pixels=True) for path in files]
    layout = _layout(files, opened)
    frames, pixels = layout.stack.frames, layout.pixels
    data = np.empty((len(frames), *pixels.size, pixels.channels), pixels.dtype)
    whole: dict[int, Any] = {}
    for place, frame in enumerate(frames):
        if frame.file not in whole:
            whole = {frame.file: decode(opened[frame.file], pixels)}
            opened[frame.file] = None  # its undecoded pixels
        data[place] = pixels.scale(whole[frame.file][frame.index], frame.slope, frame.intercept)
    if layout.turn is None:
        return Volume(compact(data[0].transpose(2, 0, 1), pixels.dtype), layout.stack.affine)
    return Volume(compact(layout.turn.view(data.transpose(3, 2, 1, 0)), pixels.dtype), layout.turn.affine)


def _layout(files: tuple[Path, ...], opened: Sequence[Any]) -> _Layout:
    claimed = sum(_claimed(data) for data in opened)
    stored = sum(path.stat().st_size for path in files)
    check_claim(claimed, stored, compressed=any(_syntax(data).is_compressed for data in opened))
    frames: list[Frame] = []
    for number, (path, data) in enumerate(zip(files, opened, strict=True)):
        frames += frames_of(number, path.name, data)
    pixels = pixels_of(opened, [path.name for path in files], frames)
    stack = stack_frames(frames, opened[0])
    rows, columns = pixels.size
    turn = turn_to_ras(stack.affine, (columns, rows, len(frames))) if stack.volume else None
    return _Layout(pixels, stack, turn)


def _open(path: Path, pixels: bool) -> Any:
    """A file's dataset, with a transfer syntax even where old files name none."""
    pydicom = library("pydicom", "pydicom", "DICOM")
    _refuse_deflated(path)
    data = pydicom.dcmread(path, stop_before_pixels=not pixels, force=True)
    if "Rows" not in data or "Columns" not in data:
        kind = getattr(data.get("SOPClassUID"), "name", None)
        if kind is None and not sniff(path):
            raise UnusableSource("it is not DICOM, whatever its name says")
        raise UnusableSource(f"it has no pixels ({kind or 'no SOP class'}); leave it out")
    if "TransferSyntaxUID" not in data.file_meta:
        implicit, little = data.original_encoding
        plain = pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else plain
    return data


def _refuse_deflated(path: Path) -> None:
    """UnusableSource for a wholly deflated file: pydicom would inflate it without a limit."""
    pydicom = library("pydicom", "pydicom", "DICOM")
    if sniff(path) and pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID") == DEFLATED:
        raise UnusableSource("it is deflated as a whole, which is not read; write it plain: dcmconv +te IN OUT")


def _syntax(data: Any) -> Any:
    return data.file_meta.TransferSyntaxUID


def _claimed(data: Any) -> int:
    bits = int(data.BitsAllocated) * int(data.get("SamplesPerPixel", 1)) * int(data.get("NumberOfFrames") or 1)
    if data.get("PhotometricInterpretation") == "YBR_FULL_422" and not _syntax(data).is_compressed:
        bits = bits * 2 // 3
    return bits * int(data.Rows) * int(data.Columns) // 8
