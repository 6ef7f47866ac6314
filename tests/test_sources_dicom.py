"""DICOM sources: series written from a NIfTI volume come back equal; real files of every make; what is refused."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from nibabel.nicom.dicomwrappers import wrapper_from_file
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from datasets.sources import UnusableSource, find, header, read
from tests.dicomseries import LPS, RNG, VOXELS, dataset, oblique, put, slices, store

DATA = Path(pydicom.__file__).parent / "data" / "test_files"


def load(path):
    (source,) = find([path]).values()
    volume, head = read(source), header(source)
    assert (head.shape, head.dtype) == (volume.data.shape, volume.data.dtype)
    assert np.array_equal(head.affine, volume.affine) and volume.data.flags.c_contiguous
    return volume


def equals(found, image):
    wanted = nibabel.as_closest_canonical(image)
    assert np.array_equal(found.data[0], np.asarray(wanted.dataobj))
    assert np.allclose(found.affine, wanted.affine, atol=1e-6)


@pytest.mark.parametrize("turn", ["LPS", "RAS", "ASL", "IPR"])
def test_a_ct_series_written_from_a_volume_comes_back_equal(tmp_path, turn):
    image = oblique()
    image = image.as_reoriented(nibabel.orientations.ornt_transform(
        nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(turn)
    ))  # fmt: skip
    found = load(store(tmp_path / "ct", slices(image)))
    assert found.data.dtype == np.int16
    equals(found, image)


def test_a_tilted_gantry_keeps_its_shear(tmp_path):
    image = oblique()
    affine = image.affine.copy()
    affine[:3, 2] += 0.4 * affine[:3, 1]
    image = nibabel.Nifti1Image(np.asarray(image.dataobj), affine)
    equals(load(store(tmp_path / "ct", slices(image))), image)


def test_positions_that_are_rounded_are_even(tmp_path):
    written = list(slices(oblique()))
    for data in written:
        data.ImagePositionPatient = [round(float(number), 2) for number in data.ImagePositionPatient]
    assert load(store(tmp_path / "ct", written)).data.shape == (1, 12, 10, 7)


def test_each_slice_has_its_own_slope(tmp_path):
    written = list(slices(oblique()))
    for number, data in enumerate(written):
        data.RescaleSlope, data.RescaleIntercept = 0.5 + number, 3
    found = load(store(tmp_path / "pet", written))
    wanted = ((VOXELS + 1024) * (0.5 + np.arange(7)) + 3).astype(np.float32)
    equals(found, nibabel.Nifti1Image(wanted, oblique().affine))


@pytest.mark.parametrize(
    ("stored", "bits", "intercept", "dtype"),
    [
        ("u2", 12, 0, "u2"),
        ("u2", 12, -1024, "i2"),
        ("u2", 16, -1024, "i4"),
        ("i2", 16, -1024, "i4"),
        ("u1", 8, -9, "i2"),
    ],
)
def test_integers_stay_integers_wide_enough(tmp_path, stored, bits, intercept, dtype):
    ends = np.iinfo(stored) if bits in (8, 16) else np.iinfo("u1")
    pixels = np.array([[ends.min, ends.max]], stored)
    put(dataset(RescaleSlope=1, RescaleIntercept=intercept), pixels, bits).save_as(tmp_path / "a.dcm")
    found = load(tmp_path / "a.dcm")
    assert found.data.dtype == dtype and found.data.ravel().tolist() == [ends.min + intercept, ends.max + intercept]


def test_without_positions_the_instance_number_gives_the_order(tmp_path):
    written = list(slices(oblique()))
    for data in written:
        del data.ImagePositionPatient, data.ImageOrientationPatient
    found = load(store(tmp_path / "us", written))
    assert np.array_equal(found.data[0], VOXELS)
    assert np.allclose(np.diag(found.affine), (0.7, 0.8, 99, 1))


def many_frames(image, order):
    """An enhanced file: each frame with its place in the functional groups."""
    written = list(slices(image))
    data = dataset(InstanceNumber=1)
    shared, measures, rescale, plane = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, plane.ImageOrientationPatient = written[0].PixelSpacing, written[0].ImageOrientationPatient
    rescale.RescaleSlope, rescale.RescaleIntercept = 1, -1024
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    shared.PixelValueTransformationSequence = [rescale]
    data.SharedFunctionalGroupsSequence, frames = [shared], []
    for number in order:
        frame, place = Dataset(), Dataset()
        place.ImagePositionPatient = written[number].ImagePositionPatient
        frame.PlanePositionSequence = [place]
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = frames
    return put(data, np.stack([written[number].pixel_array for number in order]), 12)


def test_the_frames_of_one_file_are_sorted_by_place(tmp_path):
    many_frames(oblique(), [3, 1, 6, 0, 5, 2, 4]).save_as(tmp_path / "mf.dcm")
    equals(load(tmp_path / "mf.dcm"), oblique())


def test_a_dose_grid_is_placed_by_its_offsets():
    data = pydicom.dcmread(DATA / "rtdose.dcm")
    found = load(DATA / "rtdose.dcm")
    wanted = (data.pixel_array * np.float64(data.DoseGridScaling)).astype(np.float32).transpose(2, 1, 0)[::-1, ::-1]
    assert np.array_equal(found.data[0], wanted)
    step = float(data.GridFrameOffsetVector[1]) - float(data.GridFrameOffsetVector[0])
    assert np.allclose(nibabel.affines.voxel_sizes(found.affine), (*reversed(data.PixelSpacing), abs(step)))


def test_monochrome1_is_turned_so_that_more_is_brighter(tmp_path):
    pixels = RNG.integers(0, 4096, (5, 6)).astype(np.uint16)
    put(dataset(PhotometricInterpretation="MONOCHROME1"), pixels, 12).save_as(tmp_path / "a.dcm")
    assert np.array_equal(load(tmp_path / "a.dcm").data[0], 4095 - pixels)


REAL = [
    "examples_rgb_color.dcm",
    "SC_ybr_full_422_uncompressed.dcm",
    "SC_rgb_rle_16bit.dcm",
    "SC_rgb_dcmtk_+eb+cy+np.dcm",
    "SC_rgb_gdcm_KY.dcm",
    "examples_jpeg2k.dcm",
    "ExplVR_BigEnd.dcm",
]


@pytest.mark.parametrize("name", REAL)
def test_colours_are_rgb_as_pydicom_decodes_them(name):
    assert np.array_equal(load(DATA / name).data, pydicom.dcmread(DATA / name).pixel_array.transpose(2, 0, 1))


def test_a_palette_becomes_rgb_and_a_clip_a_volume_of_frames():
    data = pydicom.dcmread(DATA / "examples_palette.dcm")
    wanted = pydicom.pixels.apply_color_lut(data.pixel_array, data)
    assert np.array_equal(load(DATA / "examples_palette.dcm").data, wanted.transpose(2, 0, 1))
    clip = pydicom.dcmread(DATA / "examples_ybr_color.dcm").pixel_array
    assert np.array_equal(load(DATA / "examples_ybr_color.dcm").data, clip.transpose(3, 2, 1, 0))


@pytest.mark.parametrize(
    "name", ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_jp2klossless.dcm"]
)
def test_every_transfer_syntax_gives_the_same_slice(name):
    data = pydicom.dcmread(DATA / "MR_small.dcm")
    found = load(DATA / name)
    affine = np.eye(4)
    columns, rows = np.array(data.ImageOrientationPatient, float).reshape(2, 3)
    affine[:3, :3] = np.stack([columns * 0.3125, rows * 0.3125, np.cross(columns, rows) * data.SliceThickness], 1)
    affine[:3, 3] = data.ImagePositionPatient
    equals(found, nibabel.Nifti1Image(data.pixel_array.T[..., None], LPS @ affine))


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "examples_overlay.dcm"])
def test_every_voxel_of_a_real_slice_is_where_nibabels_dicom_reader_has_it(name):
    wrapper = wrapper_from_file(DATA / name)
    rows, columns = np.indices(wrapper.image_shape[:2]).reshape(2, -1)
    world = LPS @ wrapper.affine @ np.stack([rows, columns, 0 * rows, 0 * rows + 1])
    found = load(DATA / name)
    place = np.linalg.inv(found.affine) @ world
    assert np.allclose(place, place.round(), atol=1e-3)
    values = np.squeeze(wrapper.get_data())[rows, columns]
    assert np.array_equal(found.data[0][tuple(place[:3].round().astype(int))], values)


ALL = sorted(path for path in DATA.glob("*") if path.suffix == ".dcm")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_every_file_that_pydicom_ships_is_read_or_refused_with_one_line(path, recwarn):
    (source,) = find([path]).values()
    try:
        head, volume = header(source), read(source)
        assert (head.shape, head.dtype) == (volume.data.shape, volume.data.dtype)
    except UnusableSource as reason:
        assert len(str(reason)) > 20 and "\n" not in str(reason)
    assert not recwarn


def test_a_disk_of_series_is_read_or_refused():
    """Three patients, all headers and few pixels, as DICOMDIR files come."""
    found = find([DATA / "dicomdirtests"])
    kinds = {name: len(source.files) for name, source in found.items()}
    assert max(kinds.values()) > 1
    for source in found.values():
        try:
            assert header(source).shape == read(source).data.shape
        except UnusableSource as reason:
            assert "\n" not in str(reason)


def edit(number, word, value):
    def change(written):
        setattr(written[number], word, value)
        return written

    return change


def moved(number, part):
    """A slice shifted along the normal by a part of the gap."""

    def change(written):
        step = np.subtract(written[1].ImagePositionPatient, written[0].ImagePositionPatient)
        written[number].ImagePositionPatient = list(np.array(written[number].ImagePositionPatient) + part * step)
        return written

    return change


def sideways(written):
    written[3].ImagePositionPatient[0] += 5
    written[3].ImagePositionPatient[1] += 5
    return written


def localiser(written):
    written[2].ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    return written


def other_size(written):
    put(written[4], np.zeros((4, 4), np.uint16), 12)
    return written


def without(*words):
    def change(written):
        for data in written:
            for word in words:
                delattr(data, word)
        return written

    return change


def one_without(written):
    del written[2].ImagePositionPatient
    return written


def colour(written):
    for data in written:
        data.PhotometricInterpretation = "HSV"
    return written


def bomb(written):
    for data in written[:1]:
        data.Rows = data.Columns = 65_535
        data.NumberOfFrames = 100_000
    return written[:1]


SEVERAL = {
    "missing": (
        lambda written: written[:3] + written[4:],
        r"1 slice\(s\) are missing between IM\d+ and IM\d+: 5 mm apart",
    ),
    "two missing": (
        lambda written: written[:2] + written[4:],
        r"2 slice\(s\) are missing between .*7.5 mm .* others 2.5",
    ),
    "double": (lambda written: [*written, *slices(oblique())][:9], "two of its 9 slices lie at one place: IM"),
    "uneven": (moved(3, 0.3), "its slices are unevenly spaced: 1.75 to 3.25 mm"),
    "sideways": (sideways, "its slices do not lie in one line|unevenly|missing"),
    "localiser": (localiser, r"its slices are not parallel: IM\d+ and IM\d+; is a localiser"),
    "other size": (other_size, r"its files differ in Rows: IM\d+ 10, IM\d+ 4|IM\d+ 4, IM\d+ 10"),
    "other pixels": (edit(1, "PixelSpacing", [1, 1]), "its pixels differ in size"),
    "one without a place": (one_without, "some of its slices have no place in space: IM"),
    "no order": (without("ImagePositionPatient", "InstanceNumber"), "their order is unknown"),
    "colour space": (colour, "photometric interpretation HSV is not read"),
    "claims": (bomb, "its header claims .* bytes, but the files? ha"),
    "no spacing": (edit(0, "PixelSpacing", [0, float("nan")]), "differ in size"),
    "lookup table": (edit(0, "ModalityLUTSequence", [Dataset()]), r"lookup table \(Modality LUT\), which is not read"),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_slices_that_make_no_volume_are_refused_with_one_line(tmp_path, case):
    change, reason = SEVERAL[case]
    store(tmp_path / "s", change(list(slices(oblique()))))
    (source,) = find([tmp_path / "s"]).values()
    with pytest.raises(UnusableSource, match=reason) as caught:
        read(source)
    assert "\n" not in str(caught.value)


def cut(path):
    (written,) = list(slices(oblique()))[:1]
    written.save_as(path)
    path.write_bytes(path.read_bytes()[:-40])


def mosaic(path):
    path.write_bytes(
        gzip.decompress((Path(nibabel.__file__).parent / "nicom/tests/data/siemens_dwi_0.dcm.gz").read_bytes())
    )


def deflated(path):
    """64 MiB of zeros in 64 kB: refused before anything inflates it."""
    (written,) = list(slices(oblique()))[:1]
    written.PixelData = bytes(2**26)
    written.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    written.save_as(path)


ONE = {
    "text": (lambda path: path.write_bytes(b"hello"), "it is not DICOM, whatever its name says"),
    "nothing": (lambda path: path.write_bytes(b""), "it is not DICOM"),
    "only magic": (lambda path: path.write_bytes(bytes(128) + b"DICM"), "it has no pixels"),
    "plan": (lambda path: path.write_bytes((DATA / "rtplan.dcm").read_bytes()), r"no pixels \(RT Plan Storage\)"),
    "cut": (cut, "claims 240 bytes|broken data .*pixel data"),
    "mosaic": (mosaic, "its slices are tiled in one picture"),
    "deflated": (deflated, "it is deflated as a whole, which is not read"),
    "no decoder": (
        lambda path: path.write_bytes((DATA / "MR_small_jpeg_ls_lossless.dcm").read_bytes()),
        "its pixels are JPEG-LS Lossless Image Compression and no decoder is installed: pip install 'pylibjpeg",
    ),
    "not in Pillow": (
        lambda path: path.write_bytes((DATA / "JPGExtended.dcm").read_bytes()),
        "its pixels cannot be decoded .*12-bit precision.*pip install 'pylibjpeg",
    ),
}


@pytest.mark.parametrize("case", ONE)
def test_a_file_that_cannot_be_used_is_refused_with_one_line(tmp_path, case):
    make, reason = ONE[case]
    make(tmp_path / "a.dcm")
    (source,) = find([tmp_path / "a.dcm"]).values()
    with pytest.raises(UnusableSource, match=reason) as caught:
        read(source)
    assert "\n" not in str(caught.value)
