"""Thirty files that cannot be packed, of every format: a line for each with its reason, and the good one beside them.

After the fault table's row F4 and F3: wrong dtypes, NaN, empty axes, cut files, bombs, forged headers.
"""

import gzip
import io
import re
import resource
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from datasets import open_volumes
from tests.scans import noise, save, table

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (6, 7, 8)
LIMIT = 3 << 30
"""bytes of address space: a bomb that went off would end the process"""


def nifti(change=None, data=None, dtype=None, packed=True):
    """Bytes of a .nii.gz whose header (348 bytes) was changed."""
    image = nibabel.Nifti1Image(noise(SHAPE) if data is None else data, np.eye(4), dtype=dtype)
    raw = bytearray(image.to_bytes())
    if change:
        change(raw)
    return gzip.compress(bytes(raw)) if packed else bytes(raw)


def put(place, dtype, *values):
    def change(raw):
        stored = np.array(values, dtype).tobytes()
        raw[place : place + len(stored)] = stored

    return change


def no_directions(raw):
    put(252, "<i2", 0, 1)(raw)  # by the sform
    put(280, "<f4", *[0.0] * 12)(raw)


def with_value(value, dtype=np.float32):
    data = noise(SHAPE).astype(dtype)
    data[1, 2, 3] = value
    return data


def npy(data, **options):
    buffer = io.BytesIO()
    np.save(buffer, data, **options)
    return buffer.getvalue()


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npz_bomb():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        head = npy(np.zeros((1, 1, 1), np.uint8)).replace(b"(1, 1, 1)", b"(2048, 1024, 1024)"[:9].ljust(9))
        file.writestr("arr_0.npy", head)
    return buffer.getvalue()


def nrrd(header, data=b""):
    return b"NRRD0004\n" + "\n".join(header).encode() + b"\n\n" + data


def png(size=(8, 9), cut=None):
    buffer = io.BytesIO()
    Image.fromarray(noise(size).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()[:cut]


def tiff(data, cut=None, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, data, **options)
    return buffer.getvalue()[:cut]


def png_bomb():
    """A header that claims 60,000 x 60,000 pixels."""
    raw = bytearray(png())
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(bytes(raw[12:29])).to_bytes(4, "big")
    return bytes(raw)


VOLUME = ["type: short", "dimension: 3", "sizes: 6 7 8", "encoding: raw", "endian: little"]
BAD = {
    "nan.nii.gz": (nifti(data=with_value(np.nan)), "1 voxels are NaN"),
    "inf.nii.gz": (nifti(data=with_value(np.inf)), "1 voxels are NaN or infinite"),
    "huge.nii.gz": (nifti(data=with_value(1e300, np.float64)), "beyond float32"),
    "complex.nii.gz": (nifti(data=noise(SHAPE).astype(np.complex64)), "complex64"),
    "rgb.nii.gz": (nifti(put(70, "<i2", 128, 24)), "records"),
    "empty.nii.gz": (nifti(put(40, "<i2", 3, 0, 7, 8)), "is empty"),
    "negative.nii.gz": (nifti(put(40, "<i2", 3, -6, 7, 8)), "negative"),
    "bomb.nii.gz": (nifti(put(40, "<i2", 3, 32767, 32767, 32767)), "claims"),
    "five.nii.gz": (nifti(data=np.zeros((3, 3, 3, 2, 2), np.int16)), "5D"),
    "singular.nii.gz": (nifti(no_directions), "singular"),
    "cut.nii.gz": (nifti()[:-40], "44 too early"),
    "flipped.nii.gz": (nifti()[:200] + b"\xff\x00\xff" + nifti()[203:], "broken data"),
    "text.nii.gz": (b"hello", "not NIfTI"),
    "nothing.nii": (b"", r"the file is empty \(0 bytes\)"),
    "short.nii": (nifti(packed=False)[:-9], "cut off or forged"),
    "magic.nii": (nifti(put(344, "S4", b"abcd"), packed=False), "its magic is"),
    "object.npy": (npy(np.array([{"a": 1}], object), allow_pickle=True), "object"),
    "cut.npy": (npy(noise(SHAPE))[:-7], "7 bytes too early"),
    "one.npy": (npy(np.zeros(5, np.int16)), "1 axes"),
    "text.npy": (npy(np.array([["a", "b"]])), "voxels are str32"),
    "zero.npy": (npy(np.zeros((6, 0, 8), np.int16)), "is empty"),
    "two.npz": (npz(a=noise(SHAPE), b=noise(SHAPE)), "holds a, b"),
    "noziph.npz": (b"PK\x03\x04 and no more", "not a zip file"),
    "cut.nrrd": (nrrd(VOLUME, noise(SHAPE).tobytes()[:-5]), "cut off or forged"),
    "outside.nhdr": (nrrd([*VOLUME, "data file: ../../../../etc/passwd"]), "outside its folder"),
    "type.nrrd": (nrrd(["type: block", *VOLUME[1:]]), "'block'"),
    "cut.png": (png(cut=90), "truncated"),
    "bomb.png": (png_bomb(), "too many pixels"),
    "text.jpg": (b"\xff\xd8\xff\xe0 no picture", "broken data"),
    "cut.tif": (tiff(noise(SHAPE[::-1]), cut=900), "broken|cut|TIFF"),
    "time.tif": (tiff(np.zeros((2, 3, 8, 9), np.uint16), imagej=True, metadata={"axes": "TZYX"}), "pick one time"),
}


PICTURES = ("png", "jpg")
"""suffixes of the images, which are packed apart from the volumes"""


def make(folder, pictures):
    folder.mkdir()
    told = {}
    for name, (content, words) in BAD.items():
        stem, _, suffix = name.partition(".")
        if (suffix in PICTURES) == pictures:
            id = f"{stem}{len(told):02d}"
            (folder / f"{id}.{suffix}").write_bytes(content)
            told[id] = words
    (folder / "good.png").write_bytes(png()) if pictures else save(folder / "good.nii.gz", noise(SHAPE))
    return told, table(folder.parent / "l.csv", [f"{id},a" for id in [*told, "good"]])


def limited():
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))


@pytest.mark.parametrize(("pictures", "skip"), [(False, False), (False, True), (True, False)])
def test_thirty_bad_files_are_thirty_lines(tmp_path, pictures, skip):
    bad, labels = make(tmp_path / "d", pictures)
    command = [sys.executable, "-m", "jobs.pack", tmp_path / "d", "-o", tmp_path / "o.h5", "--labels", labels]
    options = ["--split", "100/0/0", *(["--skip-bad"] if skip else []), "--workers", "1"]
    found = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=120, preexec_fn=limited
    )
    assert found.returncode == (0 if skip else 1), found.stderr
    assert "Traceback" not in found.stderr
    lines = found.stderr.splitlines()
    told = [line for line in lines if "pack: bad: " in line]
    assert len(BAD) >= 30 and len(told) == len(bad)
    for id, words in bad.items():
        (line,) = [line for line in told if f"/{id}." in line]
        assert re.search(words, line.partition(f"/{id}.")[2]), f"{id}: {line}"
    if skip:
        volumes = open_volumes(tmp_path / "o.h5")
        assert tuple(volumes.ids) == ("good",) and np.array_equal(volumes.read(0)[0][0], noise(SHAPE))
    else:
        assert not (tmp_path / "o.h5").exists() and f"{len(bad)} of {len(bad) + 1} cannot be packed" in lines[-1]
