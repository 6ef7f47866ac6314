"""What a source is, one sample-to-be on disk, and what every format's reader promises.

A reader is a module with two functions, and tests/test_sources.py holds each to it over real files:
- `read_header(files) -> Header` reads no voxels (of a compressed file only its start) and refuses what `read_volume`
  would have to refuse for its size, shape or dtype;
- `read_volume(files) -> Volume` gives exactly that shape, dtype and affine.
Both raise UnusableSource with the reason, and may let a library's own error through: `datasets.sources` words it.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUFFIXES = {
    ".nii.gz": "nifti",
    ".nii": "nifti",
    ".dcm": "dicom",
    ".dicom": "dicom",
    ".ima": "dicom",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".npy": "numpy",
    ".npz": "numpy",
    ".ome.tif": "tiff",
    ".ome.tiff": "tiff",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".png": "image",
    ".jpg": "image",
    ".jpeg": "image",
    ".bmp": "image",
    ".webp": "image",
}
"""lower case -> kind; a longer suffix stands before the one it ends with"""


class NotASource(ValueError):
    """No such file, no format that is read, or its reader is not installed: the user's mistake."""


class UnusableSource(ValueError):
    """A source that cannot be packed; the message is the reason, without the file's name."""


class NotFinite(UnusableSource):
    """Voxels are NaN or infinite."""


@dataclass(frozen=True)
class Source:
    """One sample-to-be on disk, nothing read yet."""

    id: str
    files: tuple[Path, ...]
    """of a DICOM series many, of several channels one each, else one"""
    kind: str
    """nifti, dicom, nrrd, numpy, tiff or image"""
    folder: str
    """that holds it, relative to the entry it was found in ('' at its top or for a file given by name)"""
    channels: int = 0
    """number of files that are channels of one sample (files[i] is channel i), else 0"""

    @property
    def path(self) -> Path:
        """What messages name: the file, the first channel, or the folder of a series."""
        return self.files[0] if self.channels or len(self.files) == 1 else self.files[0].parent


@dataclass(frozen=True)
class Header:
    """What `read` will return: shape (C, x, y, z), or (C, H, W) of an image; affine (4, 4) from indices to mm, RAS."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    affine: NDArray[np.float64]


@dataclass(frozen=True)
class Volume:
    """Voxels (C, x, y, z) in RAS order, or (C, H, W) of an image, C order, native bytes; affine (4, 4) to mm."""

    data: NDArray[Any]
    affine: NDArray[np.float64]
    filled: int = 0
    """voxels that were NaN and were given a value"""


def split_name(name: str) -> tuple[str, str | None]:
    """A file's name without its suffix, and its kind; (name, None) where the suffix is not known."""
    for suffix, kind in SUFFIXES.items():
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)], kind
    return name, None


def library(module: str, package: str, format_name: str) -> Any:
    """An optional package, imported when it is needed. NotASource with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotASource(f"reading {format_name} needs {package}: pip install -e '.[formats]'") from error
