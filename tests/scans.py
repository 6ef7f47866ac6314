"""Small real scans and tables for the tests of packing."""

import nibabel
import numpy as np

from jobs import pack

SPACING = np.array([1.0, 1.5, 2.0])


def world(shape=(9, 10, 11)):
    """A volume in RAS whose voxels say where they are: 100 x + 10 y + z."""
    x, y, z = np.indices(shape)
    return (100 * x + 10 * y + z).astype(np.int16)


def save(path, data, axes="RAS", affine=None):
    """Write RAS data in another stored orientation, anisotropic, with a shifted origin."""
    if affine is None:
        affine = np.diag([*SPACING, 1.0])
        affine[:3, 3] = (-3, 4, 5)
    image = nibabel.Nifti1Image(data, affine)
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    nibabel.save(image.as_reoriented(turn), path)
    return path


def noise(shape=(6, 7, 8), seed=0, high=900):
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.int16)


def table(path, rows, header="id,label"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def run(*arguments):
    """As the command line would: the exit code."""
    try:
        return pack.main([str(argument) for argument in arguments])
    except SystemExit as left:
        return left.code


def twelve(folder, shape=(6, 7, 8)):
    """Twelve volumes of two classes and six patients, and their table."""
    scans = folder / "scans"
    scans.mkdir()
    for number in range(12):
        save(scans / f"s{number:02d}.nii.gz", noise(shape, number))
    rows = [f"s{number:02d},{'sick' if number % 2 else 'well'},p{number // 2}" for number in range(12)]
    return scans, table(folder / "labels.csv", rows, "id,label,patient")
