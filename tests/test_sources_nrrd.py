"""NRRD sources against pynrrd: encodings, spaces, channels, detached data, and what is refused."""

import bz2
import gzip

import nibabel
import nrrd
import numpy as np
import pytest

from datasets.exporting import label_file, probability_file, suffixes_of
from datasets.sources import UnusableSource, describe, find, header, read

RNG = np.random.default_rng(0)
CUBE = RNG.integers(-900, 900, (5, 6, 70)).astype(np.int16)
TURNED = [[0, 0, 2.0], [-1.0, 0, 0], [0, 1.5, 0]]
PLACED = {"space": "left-posterior-superior", "space directions": TURNED, "space origin": [3.0, -4, 5]}


HEAD = "NRRD0004\ntype: {type}\ndimension: 3\nsizes: {sizes}\nendian: {endian}\nencoding: {encoding}\n{more}\n"


def load(path):
    (source,) = find([path]).values()
    volume, head = read(source), header(source)
    assert (head.shape, head.dtype) == (volume.data.shape, volume.data.dtype)
    assert np.array_equal(head.affine, volume.affine) and volume.data.flags.c_contiguous
    return volume


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2"])
@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">u2", "<i4", "<f4", ">f8", "<u8"])
def test_every_encoding_and_type_comes_back(tmp_path, encoding, dtype):
    data = np.abs(CUBE % 100).astype(dtype)
    nrrd.write(str(tmp_path / "v.nrrd"), data, {"encoding": encoding})
    found = load(tmp_path / "v.nrrd")
    assert found.data.dtype == np.dtype(dtype).newbyteorder("=") and np.array_equal(found.data[0], data)
    assert np.array_equal(found.affine, np.eye(4))


@pytest.mark.parametrize(
    ("space", "signs"),
    [("left-posterior-superior", (-1, -1, 1)), ("right-anterior-superior", (1, 1, 1)), ("LAS", (-1, 1, 1))],
)
def test_voxels_and_places_are_those_of_the_same_nifti(tmp_path, space, signs):
    nrrd.write(str(tmp_path / "v.nrrd"), CUBE, {**PLACED, "space": space})
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.array(TURNED).T, PLACED["space origin"]
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(CUBE, np.diag([*signs, 1]) @ affine))
    found = load(tmp_path / "v.nrrd")
    assert np.array_equal(found.data[0], np.asarray(image.dataobj)) and np.allclose(found.affine, image.affine)


def test_an_axis_that_is_not_of_space_is_channels(tmp_path):
    vectors = RNG.integers(0, 9, (3, 4, 5, 6)).astype(np.uint8)
    none = {"space directions": [[np.nan] * 3, [1, 0, 0], [0, 1, 0], [0, 0, 1]], "space": "RAS"}
    nrrd.write(str(tmp_path / "first.nrrd"), vectors, {"kinds": ["vector", "space", "space", "space"], **none})
    nrrd.write(str(tmp_path / "last.nrrd"), np.moveaxis(vectors, 0, 3), {"kinds": [*["domain"] * 3, "list"]})
    assert np.array_equal(load(tmp_path / "first.nrrd").data, vectors)
    assert np.array_equal(load(tmp_path / "last.nrrd").data, vectors)


def test_two_axes_of_space_are_an_image(tmp_path):
    picture = RNG.integers(0, 9, (7, 5)).astype(np.uint8)  # columns, rows
    nrrd.write(str(tmp_path / "grey.nrrd"), picture, {"spacings": [0.5, 0.25]})
    found = load(tmp_path / "grey.nrrd")
    assert np.array_equal(found.data, picture.T[None]) and np.diag(found.affine).tolist() == [0.25, 0.5, 1, 1]
    colours = RNG.integers(0, 9, (3, 7, 5)).astype(np.uint8)
    nrrd.write(str(tmp_path / "rgb.nrrd"), colours, {"kinds": ["RGB-color", "domain", "domain"]})
    assert np.array_equal(load(tmp_path / "rgb.nrrd").data, colours.swapaxes(1, 2))


def detach(folder, name="v.raw", more="", content=None):
    """A detached header whose data file is `name`."""
    text = (
        f"NRRD0004\ntype: short\ndimension: 3\nsizes: 5 6 70\nendian: little\nencoding: raw\n{more}data file: {name}\n"
    )
    (folder / "v.nhdr").write_text(text)
    if content is None:
        content = CUBE.tobytes(order="F")
    (folder / "v.raw").write_bytes(content)
    return folder / "v.nhdr"


def test_a_detached_data_file_beside_its_header_is_read(tmp_path):
    whole = CUBE.tobytes(order="F")
    for more, content in (
        ("", whole),
        ("line skip: 2\n", b"one\ntwo\n" + whole),
        ("byte skip: 3\n", b"abc" + whole),
        ("byte skip: -1\n", b"abcdef" + whole),
    ):
        path = detach(tmp_path, more=more, content=content)
        assert np.array_equal(load(path).data[0], CUBE)
    (source,) = find([path]).values()
    assert describe(source)["size"] == path.stat().st_size + (tmp_path / "v.raw").stat().st_size


@pytest.mark.parametrize("name", ["../v.raw", "/etc/passwd", "link.raw", "deep/../../v.raw"])
def test_a_data_file_outside_the_headers_folder_is_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    path = detach(tmp_path / "in", name)
    (tmp_path / "v.raw").write_bytes(CUBE.tobytes())
    (tmp_path / "in" / "link.raw").symlink_to(tmp_path / "v.raw")
    (source,) = find([path]).values()
    for use in (read, header, describe):
        with pytest.raises(UnusableSource, match=f"its data file '{name}' lies outside its folder"):
            use(source)


def file(content=None, type="short", sizes="5 6 70", endian="little", encoding="raw", more=""):
    text = HEAD.format(type=type, sizes=sizes, endian=endian, encoding=encoding, more=more)
    return text.encode() + (CUBE.tobytes(order="F") if content is None else content)


NAN = np.full((5, 6, 70), np.nan, "<f4").tobytes()
LONG = CUBE.tobytes() + b"x"
WRONG = {
    "text": (b"hello", "it is not NRRD"),
    "version": (b"NRRD0099\n\n", "broken data .*Unsupported NRRD file version"),
    "no sizes": (b"NRRD0004\ntype: short\nendian: little\ndimension: 3\nencoding: raw\n\n", "broken data .*sizes"),
    "cut": (file()[:-1], r"claims 4,2.. bytes, but the file has 4,2.."),
    "long": (file(LONG), "but its header announces"),
    "claims": (file(sizes="1048576 1048576 1048576"), r"claims 2,305,843,009,2..,...,... bytes, but the file"),
    "negative": (file(sizes="-5 6 70"), "an axis is negative"),
    "empty": (file(sizes="5 0 70"), r"it is empty: \(5, 0, 70\)"),
    "dimension": (file(sizes="5 6"), "its dimension is 3, its sizes are"),
    "block": (file(type="block"), "its voxels are of type 'block'"),
    "endian": (file(endian="middle"), "its endian is 'middle', not little or big"),
    "encoding": (file(encoding="ascii"), "its encoding 'ascii' is not read; use raw, gzip or bzip2"),
    "gzip as raw": (file(gzip.compress(CUBE.tobytes())), "claims|announces"),
    "raw as gzip": (file(encoding="gzip"), "broken data"),
    "gzip cut": (file(gzip.compress(CUBE.tobytes())[:-5], encoding="gz"), "broken data .*cut off"),
    "gzip long": (file(gzip.compress(LONG), encoding="gzip"), "more than the 4,200 bytes"),
    "gzip bomb": (file(gzip.compress(bytes(999)), sizes="999 999 999", encoding="gzip"), "at most 200 times are read"),
    "bzip2 cut": (file(bz2.compress(CUBE.tobytes())[:-20], encoding="bzip2"), "broken data"),
    "bzip2 long": (file(bz2.compress(LONG), encoding="bz2"), "the stream has others"),
    "many files": (file(more="data file: v%03d.raw 1 9 1\n"), "its voxels lie in many files"),
    "skip": (file(more="byte skip: -2\n"), "byte skip -2"),
    "kinds": (file(more="kinds: time list domain\n"), "1 of its 3 axes are of space"),
    "flat": (file(more="space: RAS\nspace directions: (1,0,0) (1,0,0) (0,0,0)\n"), "its affine is singular"),
    "NaN": (file(NAN, type="float"), "2100 voxels are NaN"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_cannot_be_used_is_refused_with_one_line(tmp_path, case):
    content, reason = WRONG[case]
    (tmp_path / "v.nrrd").write_bytes(content)
    (source,) = find([tmp_path]).values()
    with pytest.raises(UnusableSource, match=reason) as caught:
        read(source)
    assert "\n" not in str(caught.value) and "v.nrrd" not in str(caught.value)


LAYERS = {"kinds": ["list", "domain", "domain", "domain"], "space directions": [[np.nan] * 3, *TURNED]}
SOURCES = {
    "turned, in micrometres": (CUBE, {**PLACED, "space units": ["µm", "µm", "µm"]}),
    "spacings alone": (CUBE, {"spacings": [1.0, 2.0, 3.0], "units": ["mm", "mm", "mm"]}),
    "nothing": (CUBE, {}),
    "channels": (np.stack([CUBE, CUBE]), {**PLACED, **LAYERS}),
    "an image": (CUBE[0], {"spacings": [0.5, 0.25]}),
    "kept private": (CUBE, {**PLACED, "Patient name": "Jane Doe", "content": "Jane Doe"}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_was_predicted_of_one_lies_where_it_lies(tmp_path, name):
    """Voxel by voxel in the source's own order, header field by field, and read back in its place."""
    data, about = SOURCES[name]
    path = tmp_path / "v.nrrd"
    nrrd.write(str(path), data, {**about, "space units": ["mm"] * 3} if "space units" in about else dict(about))
    if "space units" in about:
        path.write_bytes(
            path.read_bytes().replace(b'space units: "mm" "mm" "mm"', 'space units: "µm" "µm" "µm"'.encode())
        )
    (source,) = find([path]).values()
    volume = read(source)
    labels = (volume.data[0] % 5).astype(np.uint8)
    assert suffixes_of(source, labels.ndim == 2) == (".nrrd", ".nrrd")
    content = label_file(source, labels, volume.affine)
    assert content == label_file(source, labels, volume.affine) and b"Jane" not in content
    (tmp_path / "out.nrrd").write_bytes(content)
    back = load(tmp_path / "out.nrrd")
    assert np.array_equal(back.data[0], labels) and back.data.dtype == np.uint8
    assert np.array_equal(back.affine, volume.affine)
    mask, head = nrrd.read(str(tmp_path / "out.nrrd"))
    stored, theirs = nrrd.read(str(path))
    wanted = stored[0] if name == "channels" else stored
    assert np.array_equal(mask, (wanted % 5).astype(np.uint8))
    for field in ("space", "space origin"):
        assert np.array_equal(head.get(field), theirs.get(field))
    values = np.random.default_rng(0).random((3, *labels.shape), np.float32)
    (tmp_path / "p.nrrd").write_bytes(probability_file(source, values, volume.affine))
    parts = load(tmp_path / "p.nrrd")
    assert np.array_equal(parts.data, values) and np.array_equal(parts.affine, volume.affine)
