"""How sources are found: ids, folders, channels, DICOM series, and a user's mistakes in one line."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from datasets.sources import NotASource, UnusableSource, describe, find, header, read

ROOT = Path(__file__).resolve().parent.parent
DICOM = Path(pydicom.__file__).parent / "data" / "test_files"


def touch(folder, *names):
    """Empty files: finding does not open them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def scan(path, value=0, shape=(3, 4, 5), shift=0.0, dtype=np.int16):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([1.0, 1, 2, 1])
    affine[0, 3] = shift
    nibabel.save(nibabel.Nifti1Image(np.full(shape, value, dtype), affine), path)
    return path


def slices(folder, number, count, description=""):
    """A series of `count` headers as a scanner names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(count):
        data = pydicom.dcmread(DICOM / "CT_small.dcm")
        data.SeriesInstanceUID, data.SeriesNumber, data.SeriesDescription = f"1.2.{number}", number, description
        data.save_as(folder / f"{number}-{place}")


def test_files_and_folders_in_the_order_given_without_hidden_and_unknown_ones(tmp_path):
    folder = touch(
        tmp_path / "in", "b.nii.gz", "a/z.png", "a/.hidden.png", ".git/y.png", "notes.txt", "c.ome.tif", "1.csv"
    )
    given = touch(tmp_path, "x.NII", "v1.2.nrrd")
    found = find([given / "x.NII", folder, given / "v1.2.nrrd"])
    assert [(name, source.kind, source.folder) for name, source in found.items()] == [
        ("x", "nifti", ""),
        ("v1.2", "nrrd", ""),
        ("z", "image", "a"),
        ("b", "nifti", ""),
        ("c", "tiff", ""),
    ]
    assert found["b"].path == folder / "b.nii.gz"


def test_ids_that_collide_below_a_folder_become_paths(tmp_path):
    found = find([touch(tmp_path, "cat/1.png", "dog/1.png", "dog/2.png", "deep/er/1.jpg")])
    assert {name: source.folder for name, source in found.items()} == {
        "cat/1": "cat",
        "deep/er/1": "deep/er",
        "dog/1": "dog",
        "2": "dog",
    }


def test_channels_are_joined_in_their_order(tmp_path):
    touch(tmp_path, "p1/p1_t1.nii.gz", "p1/p1_t2.nii.gz", "p1/p1_seg.nii.gz", "p2/p2_t2.nii", "p2/p2_t1.nii")
    found = find([tmp_path], ("t2", "t1"))
    assert {name: [file.name for file in source.files] for name, source in found.items()} == {
        "p1": ["p1_t2.nii.gz", "p1_t1.nii.gz"],
        "p2": ["p2_t2.nii", "p2_t1.nii"],
    }
    assert found["p1"].channels == 2 and found["p1"].folder == "p1"
    named = find([tmp_path / "p1/p1_t1.nii.gz", tmp_path / "p1/p1_t2.nii.gz"], ("t1", "t2"))
    assert list(named) == ["p1"]


def test_channels_of_one_id_in_two_folders_stay_two_samples(tmp_path):
    touch(tmp_path, "a/s_0000.nii.gz", "a/s_0001.nii.gz", "b/s_0000.nii.gz", "b/s_0001.nii.gz")
    assert list(find([tmp_path], ("0000", "0001"))) == ["a/s", "b/s"]


def test_channels_are_read_into_one_volume(tmp_path):
    scan(tmp_path / "s_t1.nii.gz", 3, dtype=np.uint8), scan(tmp_path / "s_t2.nii.gz", -4)
    (source,) = find([tmp_path], ("t1", "t2")).values()
    volume, head = read(source), header(source)
    assert volume.data.shape == head.shape == (2, 3, 4, 5) and volume.data.dtype == head.dtype == np.int16
    assert [int(channel.max()) for channel in volume.data] == [3, -4] and np.array_equal(volume.affine, head.affine)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"shape": (3, 4, 6)}, r"differ in shape: s_t1.nii.gz \(3x4x5\) and s_t2.nii.gz \(3x4x6\)"),
        ({"shift": 0.2}, "lie in different places: s_t1.nii.gz and s_t2.nii.gz"),
        ({"shape": (3, 4, 5, 2)}, "s_t2.nii.gz has 2 channels; a channel is a file with one"),
    ],
)
def test_channels_that_do_not_fit_name_both_files(tmp_path, wrong, reason):
    scan(tmp_path / "s_t1.nii.gz"), scan(tmp_path / "s_t2.nii.gz", **wrong)
    (source,) = find([tmp_path], ("t1", "t2")).values()
    for use in (header, read):
        with pytest.raises(UnusableSource, match=reason):
            use(source)


def test_dicom_series_are_told_apart_by_their_headers(tmp_path):
    slices(tmp_path / "well" / "ann", 1, 3)
    slices(tmp_path / "sick" / "bob", 1, 2)
    slices(tmp_path / "sick" / "bob", 2, 2)
    slices(tmp_path / "sick" / "eve", 4, 2, "T1 mprage")
    slices(tmp_path / "well" / "eve", 4, 2)
    shutil.copy(DICOM / "rtplan.dcm", tmp_path / "well" / "ann")
    shutil.copy(DICOM / "dicomdirtests" / "DICOMDIR", tmp_path)
    found = find([tmp_path])
    assert {name: (source.folder, len(source.files)) for name, source in found.items()} == {
        "bob_1": ("sick", 2),
        "bob_2": ("sick", 2),
        "sick/eve": ("sick", 2),
        "ann": ("well", 3),
        "well/eve": ("well", 2),
    }
    assert found["ann"].kind == "dicom" and found["ann"].path == tmp_path / "well" / "ann"
    assert list(find([tmp_path / "well" / "ann"])) == ["ann"]
    assert list(find(sorted((tmp_path / "well" / "ann").iterdir()))) == ["ann", "rtplan"]


def test_series_of_one_number_are_told_apart_by_description_or_uid(tmp_path):
    for uid, description in (("1.5", "axial"), ("1.6", "sagittal")):
        for place in range(2):
            data = pydicom.dcmread(DICOM / "CT_small.dcm")
            data.SeriesInstanceUID, data.SeriesNumber, data.SeriesDescription = uid, 3, description
            data.save_as(tmp_path / f"{uid}-{place}.dcm")
    name = tmp_path.name
    assert list(find([tmp_path])) == [f"{name}_3_axial", f"{name}_3_sagittal"]


def test_a_file_is_described_by_its_bytes(tmp_path):
    scan(tmp_path / "s_t1.nii.gz", 3), scan(tmp_path / "s_t2.nii.gz", 4)
    one, two = (describe(source) for source in find([tmp_path]).values())
    both = describe(find([tmp_path], ("t1", "t2"))["s"])
    assert both["name"] == one["name"] == "s_t1.nii.gz" and both["size"] == one["size"] + two["size"]
    assert len({entry["sha256"] for entry in (one, two, both)}) == 3


def named(*names):
    return lambda folder: [touch(folder, *(name for name in names if "absent" not in name)) / name for name in names]


def whole(*names):
    return lambda folder: [touch(folder, *names)]


WRONG = {
    "missing": (named("absent.nii.gz"), (), NotASource, "absent.nii.gz does not exist; give files"),
    "unknown": (named("a.xyz"), (), NotASource, r"a.xyz has no suffix that is read; known are \.nii\.gz, .*DICOM"),
    "pair": (named("a.hdr"), (), NotASource, "half of an .hdr/.img pair, convert it to .nii.gz"),
    "only a suffix": (named("x/.nii"), (), NotASource, "no suffix that is read"),
    "unprintable": (whole("a\nb.nii"), (), NotASource, r"the name b'a\\nb.nii' in .* is not printable text; rename it"),
    "not UTF-8": (whole(os.fsdecode(b"\xff.nii")), (), NotASource, r"the name b'\\xff.nii' in .* is not printable"),
    "empty folder": (whole("notes.txt"), (), NotASource, r"holds no file that is read; known are \.nii\.gz"),
    "nothing": (lambda folder: [], (), NotASource, "no source was given"),
    "id twice": (whole("a.nii", "a.nii.gz"), (), ValueError, "two files have the id 'a': .*a.nii and .*a.nii.gz"),
    "id twice by name": (named("a/1.png", "b/1.png"), (), ValueError, "two files have the id '1': .*a/1.png and .*b/1"),
    "no channel": (
        whole("a.nii"),
        ("t1",),
        NotASource,
        "no file is named after the channels: .*a.nii is none",
    ),
    "channel lacks": (whole("a_t1.nii", "a_t2.nii", "b_t1.nii"), ("t1", "t2"), ValueError, "'b' lacks channel 't2': "),
    "channel twice": (whole("a_t1.nii", "a_t1.nii.gz"), ("t1",), ValueError, "channel 't1' of 'a' is there twice"),
    "two formats": (whole("a_t1.nii", "a_t2.png"), ("t1", "t2"), ValueError, "channels of 'a' are of two formats"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_users_mistake_is_one_line(tmp_path, case):
    build, channels, kind, message = WRONG[case]
    with pytest.raises(kind, match=message) as caught:
        find(build(tmp_path), channels)
    assert "\n" not in str(caught.value)


def test_a_series_is_no_channel(tmp_path):
    slices(tmp_path / "a_t1", 1, 2)
    with pytest.raises(ValueError, match=r"a channel is one file, and .*a_t1 is a DICOM series"):
        find([tmp_path], ("t1",))


def test_a_file_that_went_away_is_a_reason(tmp_path):
    (source,) = find([scan(tmp_path / "s.nii")]).values()
    source.path.unlink()
    with pytest.raises(UnusableSource, match="No such file"):
        read(source)


def test_links_are_followed_once_and_circles_are_not(tmp_path):
    scan(tmp_path / "else" / "s.nii"), scan(tmp_path / "patient" / "p.nii")
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "s.nii").symlink_to(tmp_path / "else" / "s.nii")
    (tmp_path / "in" / "deep" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "gone.nii").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "in" / "pipe.nii")
    for name in ("linked", "again"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "patient")
    assert [(name, source.folder) for name, source in find([tmp_path / "in"]).items()] == [("p", "again"), ("s", "")]


def test_no_library_of_another_format_is_loaded(tmp_path):
    heavy = ("nrrd", "tifffile", "torch", "h5py", "pyarrow")
    code = "import sys; from pathlib import Path; from datasets.sources import find, read\n"
    code += f"[read(source) for source in find([Path({str(scan(tmp_path / 's.nii.gz'))!r})]).values()]\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\[\]\s*", done.stdout)
