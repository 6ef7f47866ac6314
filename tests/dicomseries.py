"""CT series written with pydicom from NIfTI images, for the tests of reading and packing them."""

import nibabel
import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

RNG = np.random.default_rng(5)
LPS = np.diag([-1.0, -1, 1, 1])
VOXELS = RNG.integers(-1024, 3071, (12, 10, 7)).astype(np.int16)


def oblique():
    """Columns, rows, slices in RAS mm: turned about two axes, anisotropic, 12 bits of CT."""
    turn = nibabel.eulerangles.euler2mat(0.3, 0.2, -0.1)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.7, -0.8, 2.5])
    affine[:3, 3] = (80, 90, -40)
    return nibabel.Nifti1Image(VOXELS, affine)


def dataset(**words):
    """A file in memory with what every image needs."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.SeriesNumber, data.Modality = "1.2.3", 1, "CT"
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    for word, value in words.items():
        setattr(data, word, value)
    return data


def put(data, pixels, bits=None):
    """Pixels (rows, columns) or (frames, rows, columns)."""
    data.Rows, data.Columns = pixels.shape[-2:]
    data.BitsAllocated = 8 * pixels.dtype.itemsize
    data.BitsStored = bits or data.BitsAllocated
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    if pixels.ndim == 3:
        data.NumberOfFrames = len(pixels)
    return data


def slices(image, **words):
    """One dataset for each slice of a NIfTI image, in order."""
    voxels, affine = np.asarray(image.dataobj), LPS @ image.affine
    columns, rows = (affine[:3, axis] for axis in (0, 1))
    for number in range(voxels.shape[2]):
        data = dataset(InstanceNumber=number + 1, SliceThickness=99, **words)
        data.ImageOrientationPatient = [*columns / np.linalg.norm(columns), *rows / np.linalg.norm(rows)]
        data.ImagePositionPatient = list((affine @ (0, 0, number, 1))[:3])
        data.PixelSpacing = [np.linalg.norm(rows), np.linalg.norm(columns)]
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        yield put(data, (voxels[:, :, number].T + 1024).astype(np.uint16), 12)


def store(folder, written):
    """Under shuffled names without suffix."""
    folder.mkdir(exist_ok=True)
    for name, data in zip(RNG.permutation(100), written, strict=False):
        data.save_as(folder / f"IM{name:03d}", enforce_file_format=True)
    return folder
