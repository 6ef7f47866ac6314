"""Reads NIfTI files (.nii, .nii.gz) as three-dimensional volumes in RAS orientation, intensities as the header says."""

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

orientations: Any = nibabel.orientations  # untyped

SUFFIXES = (".nii.gz", ".nii")
LARGEST = float(np.finfo(np.float32).max)


class NotNifti(ValueError):
    """The file does not exist or its header is not NIfTI's."""


class UnusableVolume(ValueError):
    """A NIfTI file that cannot be packed; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Volume:
    """Voxels (x, y, z) in RAS order (x to the right, y to the front, z upwards) and the affine from indices to mm."""

    data: NDArray[Any]
    affine: NDArray[np.float64]


def volume_id(path: Path) -> str:
    """The file's name without .nii or .nii.gz."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def check_header(path: Path) -> None:
    """Raises NotNifti for a missing file or one without a NIfTI header; reads no voxels."""
    if not path.is_file():
        raise NotNifti(f"{path} does not exist; give .nii or .nii.gz files, or folders that hold some")
    _load(path)


def read_volume(path: Path) -> Volume:
    """The volume of a NIfTI file in RAS, dtype as stored, or float32 where the header scales.

    Raises NotNifti, or UnusableVolume for 4D files, colour or complex voxels, voxels that are NaN, infinite or beyond
    float32's range, and broken data.
    """
    image = _load(path)
    shape = image.shape[:3] if len(image.shape) > 3 and set(image.shape[3:]) == {1} else image.shape
    _check_shape(shape, image.get_data_dtype())
    try:
        data: NDArray[Any] = np.asanyarray(image.dataobj).reshape(shape)
        orientation = orientations.io_orientation(image.affine)
    except (OSError, EOFError, zlib.error, ValueError, np.linalg.LinAlgError) as error:
        raise UnusableVolume(f"broken data ({' '.join(str(error).split())})") from error
    if np.isnan(orientation).any():
        raise UnusableVolume("its affine is singular: no direction in space; repair the header")
    _check_values(data)
    scaled = (image.dataobj.slope, image.dataobj.inter) != (1.0, 0.0)
    data = data.astype(np.float32 if scaled else data.dtype.newbyteorder("="), copy=False)
    affine = image.affine @ orientations.inv_ornt_aff(orientation, shape)
    return Volume(np.ascontiguousarray(orientations.apply_orientation(data, orientation)), affine)


def describe_source(path: Path) -> dict[str, Any]:
    """Manifest entry of a file: name, size in bytes, sha256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "size": path.stat().st_size, "sha256": digest}


def _load(path: Path) -> Any:
    failures = (
        OSError,
        EOFError,
        ValueError,
        zlib.error,
        gzip.BadGzipFile,
        nibabel.filebasedimages.ImageFileError,
        nibabel.spatialimages.HeaderDataError,
    )
    try:
        image: Any = nibabel.load(path)
    except failures as error:
        raise NotNifti(f"{path} is not a NIfTI file ({' '.join(str(error).split())})") from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise NotNifti(f"{path} is {type(image).__name__}, not NIfTI; convert it to .nii.gz first")
    return image


def _check_shape(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if len(shape) != 3:
        hint = f"pick one of its {shape[3]} volumes first" if len(shape) == 4 else "a volume has three axes"
        raise UnusableVolume(f"it is {len(shape)}D {shape}; {hint}")
    if 0 in shape:
        raise UnusableVolume(f"it is empty: {shape}")
    if dtype.kind not in "iuf":
        raise UnusableVolume(f"its voxels are {dtype}; only integers and real numbers can be packed")


def _check_values(data: NDArray[Any]) -> None:
    if data.dtype.kind != "f":
        return
    if not np.isfinite(data).all():
        raise UnusableVolume(f"{np.count_nonzero(~np.isfinite(data))} voxels are NaN or infinite; repair or mask them")
    extreme = float(max(data.min(), data.max(), key=abs))
    if abs(extreme) > LARGEST:
        raise UnusableVolume(f"its value {extreme:g} is beyond float32's range of +-{LARGEST:.3g}; rescale or mask it")
