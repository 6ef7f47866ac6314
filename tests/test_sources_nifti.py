"""NIfTI sources against nibabel: orientation, scaling, axes, gzip streams of every make, and what is refused."""

import gzip
import subprocess
import sys
import zlib
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest

from datasets import sources
from datasets.sources import UnusableSource, find, header, packed, read
from tests.scans import SPACING, save, world

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(nibabel.__file__).parent / "tests" / "data"


def load(path):
    (source,) = find([path]).values()
    volume, head = read(source), header(source)
    assert (head.shape, head.dtype) == (volume.data.shape, volume.data.dtype)
    assert np.array_equal(head.affine, volume.affine) and volume.data.flags.c_contiguous
    return volume


EVERY_WAY = ["".join(way) for order in permutations(("RL", "AP", "SI")) for way in product(*order)]


@pytest.mark.parametrize("axes", EVERY_WAY)
def test_volumes_are_turned_to_ras_with_their_place_in_the_world(tmp_path, axes):
    found = load(save(tmp_path / "v.nii.gz", world((9, 10, 71)), axes))
    assert np.array_equal(found.data[0], world((9, 10, 71)))
    assert np.allclose(found.affine[:3, 3], (-3, 4, 5)) and np.allclose(np.diag(found.affine)[:3], SPACING)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, ">i2", ">f8", np.int64])
def test_dtypes_are_read_as_stored(tmp_path, dtype):
    nibabel.save(nibabel.Nifti1Image((world() % 200).astype(dtype), np.eye(4), dtype=dtype), tmp_path / "v.nii")
    found = load(tmp_path / "v.nii")
    assert found.data.dtype == np.dtype(dtype).newbyteorder("=") and np.array_equal(found.data[0], world() % 200)


@pytest.mark.parametrize(("slope", "intercept"), [(0.5, -7.0), (1.0, 3.0), (-2.25, 0.0)])
def test_the_headers_slope_and_intercept_are_applied(tmp_path, slope, intercept):
    path = save(tmp_path / "v.nii.gz", world(), "LIP")
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[112:120] = np.array([slope, intercept], "<f4").tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))
    found = load(path)
    assert found.data.dtype == np.float32
    assert np.array_equal(found.data[0], nibabel.as_closest_canonical(nibabel.load(path)).get_fdata(dtype=np.float32))


@pytest.mark.parametrize(
    ("more", "channels"), [((), 1), ((1,), 1), ((5,), 5), ((1, 3), 3), ((1, 1, 1), 1), ((2, 1), 2)]
)
def test_the_axes_after_the_third_are_channels(tmp_path, more, channels):
    data = np.random.default_rng(0).integers(-50, 50, (4, 5, 6, *more)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([-2, 1, 1, 1])), tmp_path / "v.nii.gz")
    found = load(tmp_path / "v.nii.gz")
    assert found.data.shape == (channels, 4, 5, 6)
    assert np.array_equal(found.data, np.moveaxis(data.reshape(4, 5, 6, channels), 3, 0)[:, ::-1])


REAL = sorted(path for path in DATA.iterdir() if path.name.endswith((".nii", ".nii.gz")))


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_files_read_as_nibabel_reads_them(path):
    refused = {"row_major.dconn.nii": "it is 6D", "resampled_anat_moved.nii": "153 voxels are NaN or infinite"}
    if path.name in refused:
        with pytest.raises(UnusableSource, match=refused[path.name]):
            load(path)
        return
    found, reference = load(path), nibabel.as_closest_canonical(nibabel.load(path))
    values = np.asanyarray(reference.dataobj).astype(np.float32)
    values = values[..., None] if values.ndim == 3 else values
    assert np.array_equal(found.data.astype(np.float32), np.moveaxis(values, 3, 0))
    assert np.allclose(found.affine, reference.affine)


@pytest.mark.parametrize("inflate", [packed.fastest, zlib], ids=["isal", "zlib"])
def test_gzip_streams_of_every_make_are_read(tmp_path, monkeypatch, inflate):
    monkeypatch.setattr(packed, "fastest", inflate)
    raw = save(
        tmp_path / "v.nii", np.random.default_rng(0).integers(0, 900, (40, 40, 40)).astype(np.int16)
    ).read_bytes()
    makes = {
        "one": gzip.compress(raw),
        "stored": gzip.compress(raw, 0),
        "members": gzip.compress(raw[:100]) + gzip.compress(raw[100:5000]) + gzip.compress(raw[5000:]),
        "padded": gzip.compress(raw) + bytes(512),
    }
    for name, stream in makes.items():
        (tmp_path / f"{name}.nii.gz").write_bytes(stream)
        assert np.array_equal(load(tmp_path / f"{name}.nii.gz").data, load(tmp_path / "v.nii").data)
    for cut in (*range(1, 12), 500, len(makes["one"]) - 30):
        (tmp_path / "cut.nii.gz").write_bytes(makes["one"][:-cut])
        with pytest.raises(UnusableSource, match="broken data"):
            load(tmp_path / "cut.nii.gz")
    flipped = bytearray(makes["one"])
    flipped[-6] ^= 1
    for name, stream in {"crc": bytes(flipped), "late": gzip.compress(raw + b"x"), "tail": makes["one"] + b"x"}.items():
        (tmp_path / f"{name}.nii.gz").write_bytes(stream)
        with pytest.raises(UnusableSource, match="broken data"):
            load(tmp_path / f"{name}.nii.gz")


def test_a_gzip_bomb_is_refused_from_its_header_and_a_hidden_one_at_its_first_byte(tmp_path):
    claimed = bytearray(save(tmp_path / "v.nii", world()).read_bytes())
    claimed[42:48] = np.array([1024, 1024, 1024], "<i2").tobytes()
    (tmp_path / "claims.nii.gz").write_bytes(gzip.compress(bytes(claimed)))
    honest = (tmp_path / "v.nii").read_bytes()
    (tmp_path / "hides.nii.gz").write_bytes(gzip.compress(honest + bytes(2**28)))
    code = (
        "import resource, sys; from pathlib import Path; from datasets.sources import find, read\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (2**28, 2**28))\n"
        "for source in find([Path(sys.argv[1])]).values():\n"
        "    try: read(source)\n"
        "    except ValueError as error: print(source.id, error)\n"
    )
    (tmp_path / "v.nii").unlink()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    claims, hides = done.stdout.splitlines()
    assert "claims 2,147,484,000 bytes" in claims
    assert "above 512 MiB at most 200 times are read" in claims
    assert "more than the 2,332 bytes" in hides


def patched(at, dtype, *values):
    def spoil(path):
        raw = bytearray(path.read_bytes())
        new = np.array(values, dtype).tobytes()
        raw[at : at + len(new)] = new
        path.write_bytes(bytes(raw))

    return spoil


def voxels(dtype, value):
    def spoil(path):
        data = world().astype(dtype)
        data[1, 2, 3] = value
        nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), path)

    return spoil


def four(*shape):
    return lambda path: nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), path)


def pair(path):
    patched(344, "S4", b"ni1\0")(path)


def rgb(path):
    colours = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colours, np.eye(4)), path)


WRONG = {
    "text": (lambda path: path.write_text("hello"), "it is not NIfTI, whatever its name says: it starts with b'hell'"),
    "nothing": (lambda path: path.write_bytes(b""), r"the file is empty \(0 bytes\)"),
    "half a header": (lambda path: path.write_bytes(path.read_bytes()[:200]), "it is not NIfTI.*its magic is b''"),
    "magic": (patched(344, "S3", b"xyz"), r"its magic is b'xyz"),
    "pair": (pair, "half of an .hdr/.img pair"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:1000]), "claims 2,332 bytes, but the file has 1,000"),
    "long": (lambda path: path.write_bytes(path.read_bytes() + b"more"), "2,336 bytes, but its header announces 2,332"),
    "huge": (patched(40, "<i2", 3, 32767, 32767, 32767), "claims 70,36.,...,...,... bytes, but the file has 2,332"),
    "negative axis": (patched(42, "<i2", -3), "an axis is negative"),
    "empty": (patched(42, "<i2", 0), r"it is empty: \(0, 10, 11\)"),
    "2D": (patched(40, "<i2", 2), "it is 2D .*a volume has three axes"),
    "5D": (four(2, 2, 2, 3, 4), "it is 5D .*pick one of its volumes"),
    "complex": (voxels(np.complex64, 1j), "its voxels are complex64; only integers and real numbers"),
    "colours": (rgb, r"its voxels are records \(R, G, B\)"),
    "unknown type": (patched(70, "<i2", 9999), "broken data .*data code 9999"),
    "offset": (patched(108, "<f4", 12.0), "broken data"),
    "no offset": (patched(108, "<f4", np.nan), "broken data"),
    "NaN": (voxels(np.float32, np.nan), "1 voxels are NaN or infinite"),
    "infinity": (voxels(np.float64, -np.inf), "1 voxels are NaN or infinite"),
    "beyond float32": (voxels(np.float64, -1e300), r"its value -1e\+300 is beyond float32's range"),
    "scaled beyond": (patched(112, "<f4", 3e38, 0), "is beyond float32's range"),
    "singular": (patched(280, "<f4", *[0] * 12), "its affine is singular"),
    "NaN affine": (patched(280, "<f4", np.nan), "its affine holds NaN"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_cannot_be_used_is_refused_with_one_line(tmp_path, case):
    spoil, reason = WRONG[case]
    path = save(tmp_path / "v.nii", world())
    spoil(path)
    (source,) = find([path]).values()
    with pytest.raises(UnusableSource, match=reason) as caught:
        sources.read(source)
    assert "\n" not in str(caught.value) and "v.nii" not in str(caught.value)
