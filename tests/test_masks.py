"""Masks: paired with their images, refused where they do not fit, turned into class numbers, and drawn from."""

import json

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datasets.masks import (
    Classes,
    foreground,
    found_classes,
    mask_values,
    pair_masks,
    read_classes,
    read_mask,
    table_masks,
)
from datasets.sources import Header, UnusableSource, find, header

SHAPE = (5, 4, 3)
RNG = np.random.default_rng(0)


def nifti(path, data, affine=None):
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([2.0, 2, 2, 1]) if affine is None else affine), path)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a.nii.gz", "a.nii"),
        ("a.png", "a_seg.png"),
        ("a.jpg", "a_MASK.png"),
        ("a.tif", "a-label.tif"),
        ("a.nii", "a_segmentation.nrrd"),
        ("case_0000.nii.gz", "case.nii.gz"),
        ("a.1.nii", "a.1.label.nii"),
    ],
)
def test_a_mask_is_known_by_its_name(tmp_path, image, mask):
    images = find([touch(tmp_path / "images", image, "other.nii")])
    found = pair_masks(touch(tmp_path / "masks", mask, "more.nii"), images)
    assert [(id, source.path.name) for id, source in found.items()] == [(next(iter(images)), mask)]


def test_images_and_masks_may_share_a_folder_and_folders_may_be_alike(tmp_path):
    folder = touch(tmp_path / "brats", "p1_t1.nii", "p1_t2.nii", "p1_seg.nii", "p2_t1.nii", "p2_t2.nii")
    found = pair_masks(folder, find([folder], ["t1", "t2"]))
    assert {id: source.path.name for id, source in found.items()} == {"p1": "p1_seg.nii"}
    images, masks = (touch(tmp_path / name, "x/1.png", "y/1.png") for name in ("images", "masks"))
    assert {id: str(mask.path) for id, mask in pair_masks(masks, find([images])).items()} == {
        id: str(masks / f"{id}.png") for id in ("x/1", "y/1")
    }


def test_no_mask_at_all_and_two_of_one_image_are_told(tmp_path):
    images = find([touch(tmp_path / "images", "a.nii")])
    with pytest.raises(ValueError, match=r"holds no mask of an image: 'a' wants a or a_seg, not b, c$"):
        pair_masks(touch(tmp_path / "wrong", "b.nii", "c.nii"), images)
    with pytest.raises(ValueError, match=r"'a' has two masks: .*a_mask.nii and .*a_seg.nii"):
        pair_masks(touch(tmp_path / "two", "a_seg.nii", "a_mask.nii"), images)


def test_a_mask_is_of_one_image(tmp_path):
    images = find([touch(tmp_path / "images", "x/1.png", "y/1.png")])
    with pytest.raises(ValueError, match=r"1.png would be the mask of 'x/1' and 'y/1'; name one for each"):
        pair_masks(touch(tmp_path / "masks", "1.png"), images)


def test_masks_of_a_table(tmp_path):
    touch(tmp_path, "m.png")
    assert table_masks({"a": tmp_path / "m.png", "b": None})["a"].path == tmp_path / "m.png"
    with pytest.raises(ValueError, match="does not exist"):
        table_masks({"a": tmp_path / "n.png"})


def mask_of(tmp_path, data, affine=None, name="m.nii.gz"):
    nifti(tmp_path / "i.nii", np.zeros(SHAPE, np.int16))
    nifti(tmp_path / name, data, affine)
    image, mask = find([tmp_path / "i.nii"])["i"], next(iter(find([tmp_path / name]).values()))
    return read_mask(mask, image, header(image))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_a_volumes_mask_is_read_as_the_image_lies(tmp_path, dtype):
    labels = RNG.integers(0, 300 if np.dtype(dtype).itemsize > 1 else 3, SHAPE)
    affine = np.diag([-2.0, 2, 2, 1])  # to the left
    affine[0, 3] = 2 * (SHAPE[0] - 1)
    found = mask_of(tmp_path, labels[::-1].astype(dtype), affine)
    assert np.array_equal(found, labels) and found.flags.c_contiguous
    assert found.dtype == (np.uint16 if labels.max() > 255 else np.uint8)


def moved(by):
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = by
    return affine


@pytest.mark.parametrize(
    ("data", "affine", "words"),
    [
        (np.zeros((5, 4, 2), np.uint8), None, r"its mask m.nii.gz is 5x4x2 and the image 5x4x3; resample"),
        (np.zeros(SHAPE, np.uint8), moved(0.5), r"lies elsewhere, 0.866 mm apart"),
        (np.zeros(SHAPE, np.uint8), np.diag([2.0, 2, 2.2, 1]), r"lies elsewhere, 0.4 mm apart"),
        (np.full(SHAPE, 1.5, np.float32), None, "the value 1.5, which is no whole number"),
        (np.full(SHAPE, -1, np.int16), None, "the value -1; labels are 0 to 65535"),
        (np.full(SHAPE, 70000, np.int32), None, "the value 70000; labels"),
        (np.zeros((*SHAPE, 2), np.uint8), None, "has 2 channels; a mask has one"),
    ],
)
def test_masks_that_do_not_fit_are_unusable(tmp_path, data, affine, words):
    with pytest.raises(UnusableSource, match=words):
        mask_of(tmp_path, data, affine)


def test_a_hair_of_rounding_is_no_other_place(tmp_path):
    assert not mask_of(tmp_path, np.zeros(SHAPE, np.uint8), moved(0.05)).any()


def picture(tmp_path, image, name="m.png"):
    image.save(tmp_path / name)
    mask = next(iter(find([tmp_path / name]).values()))
    return read_mask(mask, mask, Header((3, 4, 6), np.dtype(np.uint8), np.eye(4)))


def test_masks_of_images_are_palette_indices_or_grey_values(tmp_path):
    labels = RNG.integers(0, 3, (4, 6)).astype(np.uint8)
    palette = Image.fromarray(labels, "P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 7, 7, 7])
    colours = [Image.fromarray(labels).convert(mode) for mode in ("RGB", "RGBA", "LA")]
    for image in (palette, Image.fromarray(labels), *colours, Image.fromarray(labels.astype(np.uint16))):
        assert np.array_equal(picture(tmp_path, image), labels)
    assert set(picture(tmp_path, Image.fromarray(labels > 0)).ravel().tolist()) == {0, 1}


def test_images_that_are_no_masks_are_unusable(tmp_path):
    noise = Image.fromarray(RNG.integers(0, 255, (4, 6, 3)).astype(np.uint8))
    for image, name, words in (
        (noise, "m.png", "is in colour; save palette indices or grey values"),
        (noise, "m.jpg", "is a JPEG, which blurs labels"),
        (noise.resize((8, 8)), "m.png", "is 8x8 and the image 4x6"),
    ):
        with pytest.raises(UnusableSource, match=words):
            picture(tmp_path, image, name)
    path = tmp_path / "m.png"
    noise.save(path)
    path.write_bytes(path.read_bytes()[:60])
    mask = find([path])["m"]
    with pytest.raises(UnusableSource, match=r"its mask m.png is broken \("):
        read_mask(mask, mask, Header((3, 4, 6), np.dtype(np.uint8), np.eye(4)))


def write(folder, text, name):
    (folder / name).write_text(text)
    return str(folder / name)


def test_classes_are_named_by_a_list_a_table_or_nnunets_json(tmp_path):
    table = write(tmp_path, "value,label\n255,lesion\n0,skin\n7,lesion\n", "c.csv")
    assert read_classes("bg, liver,tumour") == Classes(["bg", "liver", "tumour"], {0: 0, 1: 1, 2: 2})
    assert read_classes(table) == Classes(["skin", "lesion"], {0: 0, 7: 1, 255: 1})
    for labels in ({"background": 0, "liver": 1, "9": 2}, {"0": "background", "2": "9", "1": "liver"}):
        named = read_classes(write(tmp_path, json.dumps({"labels": labels}), "dataset.json"))
        assert named == Classes(["background", "liver", "9"], {0: 0, 1: 1, 2: 2})


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("{}", "d.json", 'has no "labels" such as'),
        ('{"labels": {"whole": [1, 2], "core": 2}}', "d.json", "regions of several values are not read"),
        ('{"labels": {"a": 1, "b": 1}}', "d.json", "gives no value, or one value twice"),
        ('{"labels": {"bg": 0, "ignore": 2}}', "d.json", "has the label 'ignore'"),
        ("value,label\n-1,x\n", "c.csv", "class 'x' has the value -1; use 0 to 65535"),
        ("value,label\n" + "".join(f"{n},n{n}\n" for n in range(256)), "c.csv", "256 classes are too many"),
    ],
)
def test_bad_files_of_classes_are_refused(tmp_path, text, name, words):
    with pytest.raises(ValueError, match=words):
        read_classes(write(tmp_path, text, name))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("liver", "two names or more"),
        ("a,a", "two names"),
        ("none.csv", "cannot be read"),
        ("n.json", "cannot be read"),
    ],
)
def test_bad_names_of_classes_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        read_classes(text)


def test_classes_that_nobody_named_are_the_values(tmp_path):
    assert found_classes({0: tmp_path, 5: tmp_path}) == Classes(["0", "5"], {0: 0, 5: 1})
    assert found_classes({255: tmp_path, 0: tmp_path}) == Classes(["0", "255"], {0: 0, 255: 1})
    with pytest.raises(ValueError, match=r"b has the value 255, and 254 is the largest of a class without a name"):
        found_classes({0: tmp_path, 1: tmp_path, 255: tmp_path / "b"})


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_values_become_class_numbers(dtype):
    classes = Classes(["a", "b", "c"], {0: 0, 7: 1, 9: 1, 200: 2})
    values = np.array([0, 7, 9, 200], dtype)
    mask = values[RNG.integers(0, 4, (130, 100, 100))]
    assert mask_values(mask) == [0, 7, 9, 200]
    assert np.array_equal(classes.number(mask), np.array([0, 1, 1, 2])[np.searchsorted(values, mask)])
    mask[3, 4, 5] = 8
    with pytest.raises(UnusableSource, match="has the value 8, which is no class; the classes have 0, 7, 9, 200"):
        classes.number(mask)
    mask[3, 4, 5] = 255
    with pytest.raises(UnusableSource, match=r"value 255, .*name it in a table of --classes \(255,void\)"):
        classes.number(mask)


def test_an_image_is_no_mask():
    with pytest.raises(UnusableSource, match="has 900 different values"):
        mask_values(np.arange(900, dtype=np.uint16).reshape(30, 30))


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 5))
def test_foreground_is_of_its_class_without_repeats_and_all_where_there_are_few(seed, count, classes):
    labels = (np.random.default_rng(seed).random((17, 19, 23)) ** 9 * classes).astype(np.uint8)
    places = foreground(labels, classes + 1, count, (seed, 3))
    assert places.shape == (classes + 1, count) and places.dtype == np.int32
    for number, row in enumerate(places):
        held = row[row >= 0]
        assert len(held) == min(count, np.count_nonzero(labels == number)) == len(set(held.tolist()))
        assert (labels.ravel()[held] == number).all() and (row[len(held) :] == -1).all()
    assert np.array_equal(places, foreground(labels, classes + 1, count, (seed, 3)))


def test_foreground_is_drawn_evenly_and_its_beginning_is_a_draw_too():
    labels = np.ones((64, 64, 32), np.uint8)
    first = np.concatenate([foreground(labels, 2, 300, (seed, 0))[1, :50] for seed in range(60)])
    shares = np.histogram(first, 8, (0, labels.size))[0] / len(first)
    assert np.abs(shares - 1 / 8).max() < 0.03
    few = foreground(labels, 2, labels.size, (0, 0))[1]
    assert np.array_equal(np.sort(few), np.arange(labels.size)) and not np.array_equal(few, np.sort(few))
