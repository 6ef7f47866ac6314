"""Image and NumPy sources against Pillow and NumPy: modes, orientation, axes, pickles, bombs, and what is refused."""

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from datasets.sources import UnusableSource, find, header, read

PICTURES = [Path(name) for name in load_sample_images().filenames]
RNG = np.random.default_rng(0)
GREY, COLOUR = RNG.integers(0, 256, (9, 14), np.uint8), RNG.integers(0, 256, (9, 14, 3), np.uint8)


def load(path):
    (source,) = find([path]).values()
    volume, head = read(source), header(source)
    assert (head.shape, head.dtype) == (volume.data.shape, volume.data.dtype)
    assert np.array_equal(head.affine, volume.affine) and volume.data.flags.c_contiguous
    return volume.data


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_real_photographs_read_as_pillow_reads_them(path):
    assert np.array_equal(load(path), np.asarray(Image.open(path)).transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
def test_grey_and_colour_come_back_from_lossless_formats(tmp_path, suffix):
    Image.fromarray(COLOUR).save(tmp_path / f"c.{suffix}", lossless=True)
    assert np.array_equal(load(tmp_path / f"c.{suffix}"), COLOUR.transpose(2, 0, 1))
    if suffix != "webp":  # which has no grey
        Image.fromarray(GREY).save(tmp_path / f"g.{suffix}")
        assert np.array_equal(load(tmp_path / f"g.{suffix}"), GREY[None])


def test_16_bit_grey_stays_as_it_is(tmp_path):
    deep = RNG.integers(0, 65536, (9, 14)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "d.png")
    found = load(tmp_path / "d.png")
    assert found.dtype == np.uint16 and np.array_equal(found[0], deep)


@pytest.mark.parametrize("mode", ["1", "LA", "RGBA", "P", "CMYK"])
def test_other_modes_become_grey_or_rgb(tmp_path, mode):
    image = Image.fromarray(COLOUR).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(GREY))
    path = tmp_path / ("i.jpg" if mode == "CMYK" else "i.png")
    image.save(path)
    grey = mode in ("1", "LA")
    wanted = np.asarray(Image.open(path).convert("L" if grey else "RGB"))
    assert np.array_equal(load(path), wanted[None] if grey else wanted.transpose(2, 0, 1))
    if mode == "RGBA":
        assert np.array_equal(load(path), COLOUR.transpose(2, 0, 1))  # the colours below transparent pixels, too


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_the_cameras_orientation_is_applied(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(COLOUR).save(tmp_path / f"i.{suffix}", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / f"i.{suffix}"))
    assert np.array_equal(load(tmp_path / f"i.{suffix}"), np.asarray(upright).transpose(2, 0, 1))


@pytest.mark.parametrize("shape", [(6, 7), (5, 6, 7), (2, 5, 6, 7)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("stored", "wanted"), [("<i2", "<i2"), (">f4", "<f4"), ("?", "u1"), ("<f2", "<f4")])
def test_arrays_of_two_to_four_axes(tmp_path, shape, order, stored, wanted):
    data = np.asarray(RNG.integers(0, 2, shape), stored, order=order)
    np.save(tmp_path / "a.npy", data)
    np.savez(tmp_path / "b.npz", whatever=data)
    np.savez_compressed(tmp_path / "c.npz", other=np.zeros(3), image=data)
    for name in ("a.npy", "b.npz", "c.npz"):
        found = load(tmp_path / name)
        assert found.dtype == wanted and np.array_equal(found, data if len(shape) == 4 else data[None])


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth=8, colour=0, data=b""):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def npy(data, shape=None, claim="<i2", version=2):
    """The bytes of an .npy file whose header may lie."""
    file = io.BytesIO()
    np.lib.format.write_array_header_2_0(file, {"descr": claim, "fortran_order": False, "shape": shape or data.shape})
    start = file.getvalue()
    return start[:6] + bytes([version]) + start[7:] + data.tobytes()


def npz(*members, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def saved(name, *arrays, **options):
    file = io.BytesIO()
    np.save(file, *arrays) if name == "npy" else np.savez(file, *arrays, **options)
    return file.getvalue()


def jpeg():
    file = io.BytesIO()
    Image.fromarray(np.kron(COLOUR, np.ones((8, 8, 1), np.uint8))).save(file, "JPEG")
    return file.getvalue()


def animation(kind):
    file = io.BytesIO()
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def cut(content):
    return content[: int(len(content) * 0.6)]


CUBE = np.arange(120, dtype="<i2").reshape(4, 5, 6)
NAN = np.array([[0.0, np.nan], [np.inf, 1]], "<f4")
WRONG = {
    "text as png": ("a.png", b"hello", "not PNG, JPEG, BMP or WebP, whatever its name"),
    "nothing": ("a.jpg", b"", "not PNG, JPEG"),
    "gif": ("a.png", b"GIF89a" + bytes(100), "not PNG, JPEG"),
    "png start": ("a.png", png(4, 4)[:20], "broken data .*Truncated"),
    "png cut": ("a.png", cut(png(40, 40, 8, 0, bytes(41 * 40))), "broken data"),
    "png flipped": ("a.png", png(9, 9, data=bytes(90)).replace(b"IDAT\x78", b"IDAT\x79"), "broken data"),
    "jpeg cut": ("a.jpg", cut(jpeg()), "broken data .*truncated"),
    "png bomb": ("a.png", png(12_000, 12_000), r"its 144,000,000 pixels are more than the 89,478,485"),
    "png claims": ("a.png", png(2**31 - 1, 2**31 - 1), "too many pixels"),
    "16-bit colour": ("a.png", png(2, 2, 16, 2, bytes(26)), "it is RGB of 16 bits"),
    "animated": ("a.png", animation("PNG"), "it holds 2 frames"),
    "animated webp": ("a.webp", animation("WEBP"), "it holds 2 frames"),
    "text as npy": ("a.npy", b"hello", "it is not a NumPy array"),
    "objects": ("a.npy", saved("npy", np.array([{}], object)), "holds Python objects .* never loaded"),
    "objects in npz": ("a.npz", saved("npz", np.array([[print]], object)), "holds Python objects"),
    "records": ("a.npy", saved("npy", np.zeros((2, 2), "i2,f4")), r"its voxels are records \(f0, f1\)"),
    "record names": ("a.npy", npy(CUBE, version=3), r"its format is 3.0: records"),
    "text array": ("a.npy", saved("npy", np.array([["a"]])), "its voxels are str32"),
    "complex": ("a.npy", saved("npy", np.zeros((2, 2), complex)), "its voxels are complex128"),
    "one axis": ("a.npy", saved("npy", np.zeros(4)), r"it has 1 axes \(4,\)"),
    "empty": ("a.npy", saved("npy", np.zeros((3, 0))), r"it is empty: \(3, 0\)"),
    "negative": ("a.npy", npy(CUBE, (-4, 5, 6)), "an axis is negative"),
    "npy cut": ("a.npy", cut(npy(CUBE)), "claims 240 bytes"),
    "npy long": ("a.npy", npy(CUBE) + b"x", "bytes follow the end"),
    "npy claims": ("a.npy", npy(CUBE, (2**20, 2**20, 2**20)), "claims 2,305,843,009,213,693,952 bytes, but the file"),
    "NaN": ("a.npy", saved("npy", NAN), "2 voxels are NaN or infinite"),
    "huge value": ("a.npy", saved("npy", np.full((2, 2), 1e39)), r"its value 1e\+39 is beyond float32"),
    "no zip": ("a.npz", b"PK\3\4hello", "broken data .*zip"),
    "no array": ("a.npz", npz(("readme.txt", b"hello")), "which of its arrays. It holds none"),
    "two arrays": ("a.npz", saved("npz", x=CUBE, y=CUBE), "which of its arrays. It holds x, y; keep one"),
    "npz claims": ("a.npz", npz(("x.npy", npy(CUBE, (2**10, 2**10, 2**10)))), "above 512 MiB at most 200 times"),
    "npz short": ("a.npz", npz(("x.npy", npy(CUBE, (9, 9, 9)))), "it ends 1,218 bytes too early"),
    "npz hides": ("a.npz", npz(("x.npy", npy(CUBE) + bytes(2**26))), "bytes follow the end"),
    "npz by bzip2": ("a.npz", npz(("x.npy", npy(CUBE)), method=zipfile.ZIP_BZIP2), "its zip method 12 is not NumPy's"),
    "npz flipped": ("a.npz", npz(("x.npy", npy(CUBE))).replace(b"\x78", b"\x79"), "broken data"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_cannot_be_used_is_refused_with_one_line(tmp_path, case):
    name, content, reason = WRONG[case]
    (tmp_path / name).write_bytes(content)
    (source,) = find([tmp_path]).values()
    with pytest.raises(UnusableSource, match=reason) as caught:
        read(source)
    assert "\n" not in str(caught.value) and name not in str(caught.value)


def test_an_archive_that_climbs_out_writes_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.npz").write_bytes(npz(("../../out.npy", npy(CUBE))))
    assert np.array_equal(load(tmp_path / "in" / "a.npz")[0], CUBE)
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "a.npz"]


def test_colours_and_headers_come_without_decoding(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(COLOUR).save(path)

    def decoded(image):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    (source,) = find([path]).values()
    assert header(source).shape == (3, 9, 14)
    with pytest.raises(UnusableSource, match="pixels were decoded"):
        read(source)
