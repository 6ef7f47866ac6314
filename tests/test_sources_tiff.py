"""TIFF sources against tifffile and Pillow: axes, channels, sizes of voxels, and what is refused."""

import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from datasets.sources import UnusableSource, find, header, read

RNG = np.random.default_rng(0)


def noise(*shape, dtype=np.uint16):
    return RNG.integers(0, 200, shape).astype(dtype)


def load(path):
    (source,) = find([path]).values()
    volume, head = read(source), header(source)
    assert (head.shape, head.dtype) == (volume.data.shape, volume.data.dtype)
    assert np.array_equal(head.affine, volume.affine) and volume.data.flags.c_contiguous
    return volume


AXES = [
    ("YX", {"photometric": "minisblack"}),
    ("ZYX", {"photometric": "minisblack"}),
    ("ZYX", {"photometric": "minisblack", "compression": "zlib"}),
    ("ZYX", {"photometric": "minisblack", "tile": (16, 16)}),
    ("ZYX", {"imagej": True}),
    ("ZCYX", {"imagej": True}),
    ("ZYXS", {"imagej": True}),
    ("CYX", {"imagej": True}),
    ("CZYX", {"ome": True}),
    ("ZCYX", {"ome": True}),
    ("YXS", {"photometric": "rgb"}),
    ("SYX", {"photometric": "rgb", "planarconfig": "separate"}),
]


DTYPES = ["u1", ">u2", "<f4"]
CASES = [(*case, dtype) for case in AXES for dtype in DTYPES if case != ("ZYXS", {"imagej": True}) or dtype == "u1"]


@pytest.mark.parametrize(("axes", "options", "dtype"), CASES)
def test_axes_become_channels_columns_rows_pages(tmp_path, axes, options, dtype):
    sizes = {"Z": 5, "C": 2, "S": 3, "Y": 33, "X": 70}
    data = noise(*(sizes[axis] for axis in axes), dtype=dtype)
    metadata = {"axes": axes} if options.get("imagej") or options.get("ome") else None
    tifffile.imwrite(tmp_path / "v.tif", data, metadata=metadata, byteorder=">" if dtype == ">u2" else "<", **options)
    channel = next((axis for axis in axes if axis in "CS"), "")
    wanted = np.einsum(f"{axes}->{channel}XYZ" if "Z" in axes else f"{axes}->{channel}YX", data)
    found = load(tmp_path / "v.tif")
    assert np.array_equal(found.data, wanted if channel else wanted[None])
    assert found.data.dtype == np.dtype(dtype).newbyteorder("=") and np.array_equal(found.affine, np.eye(4))


PIXELS = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 2, "PhysicalSizeZ": 3}
SPACINGS = [
    ({"imagej": True, "resolution": (4, 2), "metadata": {"axes": "ZYX", "spacing": 3, "unit": "mm"}}, (0.25, 0.5, 3)),
    (
        {"imagej": True, "resolution": (4, 2), "metadata": {"axes": "ZYX", "spacing": 3, "unit": "nm"}},
        (25e-8, 5e-7, 3e-6),
    ),
    ({"imagej": True, "resolution": (4, 2), "metadata": {"axes": "ZYX", "unit": "pixel"}}, (1, 1, 1)),
    ({"ome": True, "metadata": {"axes": "ZYX", **PIXELS}}, (5e-4, 2e-3, 3e-3)),
    ({"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "mm"}}, (0.5, 1, 1)),
    ({"resolution": (20, 40), "resolutionunit": "centimeter"}, (0.5, 0.25, 1)),
    ({"resolution": (72, 72), "resolutionunit": "inch"}, (1, 1, 1)),
]


@pytest.mark.parametrize(("options", "sizes"), SPACINGS)
def test_sizes_of_a_voxel_in_mm(tmp_path, options, sizes):
    tifffile.imwrite(tmp_path / "v.tif", noise(3, 4, 5), photometric="minisblack", **options)
    assert np.allclose(np.diag(load(tmp_path / "v.tif").affine), (*sizes, 1))


@pytest.mark.parametrize("compression", [None, "tiff_deflate", "packbits"])
def test_pages_that_pillow_wrote_are_a_stack(tmp_path, compression):
    pages = noise(4, 9, 7, dtype=np.uint8)
    first, *others = (Image.fromarray(page) for page in pages)
    first.save(tmp_path / "v.tiff", save_all=True, append_images=others, compression=compression)
    assert np.array_equal(load(tmp_path / "v.tiff").data[0], pages.transpose(2, 1, 0))


def test_alpha_is_dropped_and_white_zero_turned(tmp_path):
    rgba = noise(6, 7, 4, dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    assert np.array_equal(load(tmp_path / "a.tif").data, rgba[..., :3].transpose(2, 0, 1))
    tifffile.imwrite(tmp_path / "w.tif", rgba[..., 0], photometric="miniswhite")
    assert np.array_equal(load(tmp_path / "w.tif").data[0], 255 - rgba[..., 0])
    Image.fromarray(rgba[..., 0] > 99).save(tmp_path / "b.tif")
    assert np.array_equal(load(tmp_path / "b.tif").data[0], rgba[..., 0] > 99)


def written(data, **options):
    return lambda path: tifffile.imwrite(path, data, **options)


def changed(change, data=None, **options):
    def make(path):
        written(noise(3, 40, 50) if data is None else data, photometric="minisblack", **options)(path)
        path.write_bytes(change(path.read_bytes()))

    return make


def pillow(image, **options):
    return lambda path: image.save(path, **options)


def two(path):
    with tifffile.TiffWriter(path) as file:
        file.write(noise(4, 5)), file.write(noise(6, 7, dtype=np.uint8))


def elsewhere(path):
    """OME metadata that place the second half of the pages in another file."""
    tifffile.imwrite(path, noise(4, 5, 6), metadata={"axes": "ZYX"}, ome=True)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'SizeZ="4"', b'SizeZ="9"'))


def bomb(path):
    tifffile.imwrite(path, noise(4, 5), photometric="minisblack", compression="zlib", metadata=None)
    with tifffile.TiffFile(path, mode="r+") as file:
        for tag in ("ImageWidth", "ImageLength"):
            file.pages[0].tags[tag].overwrite(60_000)


def hidden(path):
    """A strip that inflates to 32 MiB, of a page of 40 bytes."""
    packed = zlib.compress(bytes(2**25) + RNG.bytes(600_000), 1)
    tifffile.imwrite(path, noise(4, 5), photometric="minisblack", compression="zlib", metadata=None)
    with tifffile.TiffFile(path, mode="r+") as file:
        tags = file.pages[0].tags
        tags["StripByteCounts"].overwrite(len(packed)), tags["StripOffsets"].overwrite(path.stat().st_size)
    with path.open("ab") as end:
        end.write(packed)


def claims(path):
    tifffile.imwrite(path, noise(4, 5), photometric="minisblack", metadata=None)
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags["ImageLength"].overwrite(60_000)


GREY = Image.fromarray(noise(20, 30, dtype=np.uint8))
NAN = np.full((3, 4, 5), np.nan, np.float32)
WRONG = {
    "text": (lambda path: path.write_bytes(b"hello"), "it is not TIFF"),
    "nothing": (lambda path: path.write_bytes(b""), "it is not TIFF|broken data"),
    "magic": (changed(lambda raw: b"MMxx" + raw[4:]), "it is not TIFF"),
    "half": (changed(lambda raw: raw[: len(raw) // 2]), "claims 12,000 bytes, but the file has"),
    "cut": (changed(lambda raw: raw[:-5], compression="zlib"), "broken data"),
    "flipped": (changed(lambda raw: raw[:-40] + bytes(40), compression="zlib"), "broken data"),
    "lzw": (pillow(GREY, compression="tiff_lzw"), "its codec LZW needs imagecodecs: pip install imagecodecs"),
    "jpeg": (pillow(GREY, compression="jpeg"), "its codec JPEG needs imagecodecs"),
    "palette": (pillow(GREY.convert("P")), "its colours are a palette; convert it to RGB"),
    "time": (written(noise(3, 4, 5), imagej=True, metadata={"axes": "TYX"}), "axes are T 3, Y 4, X 5; pick one time"),
    "two images": (two, "it holds 2 images of their own"),
    "channels twice": (
        written(noise(2, 4, 5, 3, dtype=np.uint8), imagej=True, metadata={"axes": "CYXS"}),
        "its axes are C 2, .*one axis of channels",
    ),
    "elsewhere": (elsewhere, "some of its pages are not in the file|claims"),
    "bomb": (bomb, "above 512 MiB at most 200 times are read"),
    "hidden": (hidden, "its compressed parts hold more than the 40 bytes of a page"),
    "claims": (claims, "claims 600,000 bytes, but the file has"),
    "complex": (written(noise(3, 4, dtype=np.complex64)), "its voxels are complex64"),
    "NaN": (written(NAN, photometric="minisblack"), "60 voxels are NaN or infinite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_cannot_be_used_is_refused_with_one_line(tmp_path, case, capfd):
    make, reason = WRONG[case]
    make(tmp_path / "v.tif")
    (source,) = find([tmp_path]).values()
    with pytest.raises(UnusableSource, match=reason) as caught:
        read(source)
    assert "\n" not in str(caught.value) and "v.tif" not in str(caught.value)
    assert capfd.readouterr().err == ""
