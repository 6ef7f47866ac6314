"""What every reader promises (datasets/sources/contract.py), over real files and one of each format made here."""

import sys
import tracemalloc
import warnings
from pathlib import Path

import matplotlib
import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
import sklearn
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.sources import NotASource, UnusableSource, describe, find, header, read

RNG = np.random.default_rng(0)
CUBE = RNG.integers(0, 900, (40, 48, 56)).astype(np.int16)


def shipped():
    """Files of our formats in packages that are installed anyway."""
    for package, place in (
        (nibabel, "tests/data"),
        (nibabel, "nicom/tests/data"),
        (pydicom, "data/test_files"),
        (sklearn, "datasets/images"),
        (matplotlib, "mpl-data"),
        (np, "lib/tests/data"),
    ):
        for path in sorted((Path(package.__file__).parent / place).rglob("*")):
            if path.is_file() and path.suffix not in (".svg", ".pdf"):
                yield path


def sources_of(paths):
    """Of those files that are of a format."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            try:
                yield from find([path]).values()
            except NotASource:
                continue


REAL = list(sources_of(shipped()))


@pytest.mark.parametrize("source", REAL, ids=lambda source: "/".join(source.path.parts[-3:]))
def test_real_files_are_read_as_their_header_says_or_refused_in_one_line(source):
    keep_the_promises(source)


def keep_the_promises(source):
    """True if the source was read. Refusing is allowed, in one line and with no word on the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            head = header(source)
        except UnusableSource as reason:
            one_line(reason)
            with pytest.raises(UnusableSource):
                read(source)
            return False
        try:
            volume = read(source)
        except UnusableSource as reason:
            one_line(reason)
            return False
    assert volume.data.shape == head.shape and volume.data.dtype == head.dtype
    assert len(head.shape) in (3, 4) and head.dtype.kind in "iuf" and head.dtype.isnative
    assert head.affine.shape == (4, 4) and np.array_equal(head.affine, volume.affine)
    assert np.isfinite(head.affine).all() and abs(np.linalg.det(head.affine[:3, :3])) > 0
    assert volume.data.flags.carray and np.isfinite(volume.data).all()
    assert describe(source)["size"] >= source.path.stat().st_size or len(source.files) > 1
    return True


def one_line(reason):
    assert str(reason).isprintable() and 10 < len(str(reason)) < 330


def test_most_real_files_are_read():
    little = [source for source in REAL if source.path.stat().st_size < 40_000]
    kinds = {source.kind for source in little if keep_the_promises(source)}
    assert kinds == {"nifti", "dicom", "numpy", "image"}  # no package here ships NRRD or TIFF


def series(folder, cube):
    folder.mkdir()
    for number, plane in enumerate(np.moveaxis(cube, 2, 0)):
        data = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
        data.Rows, data.Columns, data.PixelData = *plane.T.shape, np.ascontiguousarray(plane.T).tobytes()
        data.ImagePositionPatient = [0, 0, number]
        data.save_as(folder / f"{number:03d}")
    return folder


def made(folder, cube=CUBE):
    """One source of each format and compression."""
    image = nibabel.Nifti1Image(cube, np.diag([-1, 1, 2, 1]))
    nibabel.save(image, folder / "plain.nii"), nibabel.save(image, folder / "packed.nii.gz")
    nrrd.write(str(folder / "raw.nrrd"), cube, {"encoding": "raw"})
    nrrd.write(str(folder / "gzip.nrrd"), cube), nrrd.write(str(folder / "bzip2.nrrd"), cube, {"encoding": "bzip2"})
    np.save(folder / "plain.npy", cube), np.savez(folder / "stored.npz", cube)
    np.savez_compressed(folder / "packed.npz", cube)
    tifffile.imwrite(folder / "plain.tif", cube, photometric="minisblack")
    tifffile.imwrite(folder / "packed.tif", cube, photometric="minisblack", compression="zlib")
    few = np.tile(cube, (4, 4, 1))[:, :, :8]  # large slices: what else a DICOM file holds is 100 kB
    return [*sorted(folder.iterdir()), series(folder / "series", few)]


def test_reading_takes_at_most_three_times_the_volume(tmp_path):
    cube = np.tile(CUBE, (2, 2, 2))
    for path in made(tmp_path, cube):
        (source,) = find([path]).values()
        read(source)  # what a library keeps once it is loaded is not counted
        tracemalloc.start()
        volume = read(source)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3.2 * volume.data.nbytes, path.name


@pytest.mark.parametrize(
    ("suffix", "module", "name"),
    [
        (".dcm", "pydicom", "DICOM needs pydicom"),
        (".nrrd", "nrrd", "NRRD needs pynrrd"),
        (".tif", "tifffile", "TIFF needs tifffile"),
        (".png", "PIL.Image", "images needs Pillow"),
    ],
)
def test_a_reader_that_is_not_installed_is_named_with_its_command(tmp_path, monkeypatch, suffix, module, name):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"NRRD0004\n")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NotASource, match=rf"reading {name}: pip install -e '\.\[formats\]'"):
        read(find([path])["a"])


def test_headers_are_cheap(tmp_path):
    for path in made(tmp_path)[:-1]:  # the headers of so many DICOM files outweigh their little slices
        (source,) = find([path]).values()
        header(source)
        tracemalloc.start()
        header(source)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < CUBE.nbytes, path.name


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small file of each kind."""
    folder = tmp_path_factory.mktemp("small")
    paths = made(folder, CUBE[:6, :7, :5])[:-1]
    Image.fromarray(CUBE[0].astype(np.uint8)).save(folder / "a.png")
    Image.fromarray(CUBE[:, :, :3].astype(np.uint8)).save(folder / "a.jpg")
    paths += [folder / "a.png", folder / "a.jpg", *(folder / "series").glob("000")]
    return [(path.name, path.read_bytes()) for path in paths]


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_read_or_refused_and_never_break(tmp_path, capfd, small, data):
    name, content = small[data.draw(st.integers(0, len(small) - 1))]
    raw = bytearray(content)
    near = min(len(raw), 600)  # where headers are
    for place in data.draw(st.lists(st.integers(0, near - 1) | st.integers(0, len(raw) - 1), max_size=6)):
        raw[place] = data.draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)) | st.integers(0, 255))
    path = tmp_path / name
    path.write_bytes(bytes(raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))]))
    for source in sources_of([path]):
        keep_the_promises(source)
    assert capfd.readouterr().err == ""
