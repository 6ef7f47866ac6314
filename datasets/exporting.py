"""Label maps and class probabilities as files that lie on their source's own grid, and of its own format but for DICOM.

    suffix, content = label_file(source, labels, affine)    # bytes; who writes them is the caller's matter

A NIfTI source gives its header: the orientation as stored, qform and sform with their codes, zooms and units; so does
NRRD, with its space, origin and directions. Of DICOM the file is NIfTI in RAS; .npy gives .npy, a TIFF stack a stack
with its spacing.
"""

import gzip
import io
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from datasets.sources import nifti, nrrd
from datasets.sources.contract import Source, library
from datasets.sources.voxels import turn_to_ras

nifti1: Any = nibabel.nifti1  # untyped
Affine = NDArray[np.float64]
GZIP_LEVEL = 4


def suffixes_of(source: Source, images: bool) -> tuple[str, str]:
    """Of the files that `label_file` and `probability_file` make for it; `images`: it has two axes."""
    if source.kind == "nrrd":
        return ".nrrd", ".nrrd"
    if source.kind == "numpy":
        return ".npy", ".npy"
    if source.kind == "tiff":
        return ".tif", ".npy"
    if images:
        return ".png", ".npy"
    suffix = ".nii" if source.files[0].name.lower().endswith(".nii") else ".nii.gz"
    return suffix, suffix


def label_file(source: Source, labels: NDArray[np.uint8], affine: Affine) -> bytes:
    """A map of class numbers, (x, y, z) in RAS or (rows, columns), as the bytes of a file on the source's grid.

    affine: (4, 4) of the source, from voxels in RAS order to mm.
    """
    suffix, _ = suffixes_of(source, labels.ndim == 2)
    if suffix == ".nrrd":
        return nrrd.file_like(source.files[0], labels)
    if suffix == ".npy":
        return _numpy(labels)
    if suffix == ".tif":
        return _tiff(labels, affine)
    if suffix == ".png":
        return _png(labels)
    return _nifti(source, labels[None], affine, suffix)


def probability_file(source: Source, values: NDArray[np.float32], affine: Affine) -> bytes:
    """(K, *spatial) as the bytes of a file: NIfTI with the classes on the fourth axis, NRRD with them on the first, or
    .npy (K, ...) where labels are neither.
    """
    _, suffix = suffixes_of(source, values.ndim == 3)
    if suffix == ".nrrd":
        return nrrd.file_like(source.files[0], values, classes=True)
    return _numpy(values) if suffix == ".npy" else _nifti(source, values, affine, suffix)


def _nifti(source: Source, values: NDArray[Any], affine: Affine, suffix: str) -> bytes:
    """values: (K, x, y, z); of one class the file has three axes."""
    if source.kind == "nifti":
        header = nifti.own_header(source.files[0])
        place = header.get_best_affine()
        turn = turn_to_ras(np.asarray(place, np.float64), header.get_data_shape()[:3])
        stored = turn.undo(values)
        header["pixdim"][4:] = 1
    else:
        stored, header, place = values, nifti1.Nifti1Header(), affine
        header.set_xyzt_units("mm")
    stored = stored[0] if len(stored) == 1 else np.moveaxis(stored, 0, -1)
    header.set_data_dtype(stored.dtype)
    header.set_data_shape(stored.shape)
    header.set_slope_inter(1, 0)
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = b""
    kind: Any = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    image = kind(stored, place, header)
    if source.kind != "nifti":
        image.set_sform(place, "scanner")
        image.set_qform(place, "scanner")
    content: bytes = image.to_bytes()
    return gzip.compress(content, GZIP_LEVEL, mtime=0) if suffix.endswith(".gz") else content


def _numpy(values: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _png(labels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    library("PIL.Image", "Pillow", "images").fromarray(labels).save(buffer, "PNG")
    return buffer.getvalue()


def _tiff(labels: NDArray[np.uint8], affine: Affine) -> bytes:
    """One page of rows and columns, or pages along z, with the spacing as ImageJ notes it."""
    tifffile = library("tifffile", "tifffile", "TIFF")
    first, second, third = (float(np.linalg.norm(affine[:3, axis])) for axis in range(3))
    buffer = io.BytesIO()
    about: dict[str, Any] = {"unit": "mm"}
    if labels.ndim == 2:
        pages, across = labels, (1 / second, 1 / first)
    else:
        pages, across = np.ascontiguousarray(labels.transpose(2, 1, 0)), (1 / first, 1 / second)
        about |= {"spacing": third, "axes": "ZYX"}
    tifffile.imwrite(buffer, pages, imagej=True, resolution=across, metadata=about)
    return buffer.getvalue()
