"""Reads DICOM: a series of slices, or one file of one or many frames, as a volume in RAS; images without a place."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.sources.contract import library

MAGIC_AT = 128
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
    failures = (pydicom.errors.InvalidDicomError, OSError, EOFError, ValueError, KeyError, TypeError, struct.error)
    try:
        with path.open("rb") as file:
            found: Any = pydicom.filereader.read_partial(
                file, stop_when=lambda tag, *_: tag > LAST_TAG, force=True, specific_tags=wanted
            )
            return Label(
                "" if int(found.get("NumberOfFrames") or 1) > 1 else str(found.get("SeriesInstanceUID") or ""),
                str(found.get("SeriesNumber") or ""),
                "".join(sign if sign.isalnum() else "_" for sign in str(found.get("SeriesDescription") or "")),
                "Rows" in found,
            )
    except (*failures, NotImplementedError, AttributeError):
        return Label("", "", "", True)
