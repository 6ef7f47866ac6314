"""Every kind of label and layout through `hpc pack`, read back by the loader's own reader and, without us, by h5py."""

import json

import h5py
import hdf5plugin  # noqa: F401  h5py finds its filters
import nibabel
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from datasets import open_volumes
from tests.dicomseries import oblique, slices, store
from tests.scans import noise, run, save, table, twelve


def draw(path, seed, size=(20, 24), colour=True):
    """A PNG of noise; rows x columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, 3) if colour else size
    pixels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def cases(folder, count=8, shape=(12, 11, 10)):
    """nnU-Net's folders: images case_k_0000.nii.gz and maps case_k.nii.gz of classes 0, 1 and 3."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir()
    maps = {}
    for number in range(count):
        size = tuple(axis + number % 3 for axis in shape)
        data = noise(size, number)
        maps[f"case_{number}_0000"] = np.where(data > 700, 3, np.where(data > 500, 1, 0)).astype(np.uint8)
        save(folder / "imagesTr" / f"case_{number}_0000.nii.gz", data, "LPS")
        save(folder / "labelsTr" / f"case_{number}.nii.gz", maps[f"case_{number}_0000"], "LPS")
    return maps


def test_image_folders(tmp_path, capsys):
    pixels = {
        f"{kind}/{number}": draw(tmp_path / "photos" / kind / f"{number}.png", 10 * number + len(kind))
        for kind in ("cat", "horse")
        for number in range(6)
    }
    out = tmp_path / "o.h5"
    assert run(tmp_path / "photos", "-o", out, "--labels", "folders", "--normalise", "imagenet") == 0
    volumes = open_volumes(out)
    assert volumes.shape == (3, 20, 24) and volumes.dtype == np.uint8 and volumes.class_names == ("cat", "horse")
    assert sorted(volumes.ids) == sorted(pixels) and volumes.verify() == []
    for number, id in enumerate(volumes.ids):
        stored = volumes.read(number)[0]
        assert np.array_equal(stored, pixels[id].transpose(2, 0, 1))
        assert volumes.class_names[volumes.targets[number]] == id.partition("/")[0]
    green = volumes.read(0)[0][1] * volumes.scale[0][1] + volumes.offset[0][1]
    assert np.allclose(green, (volumes.read(0)[0][1] / 255 - 0.456) / 0.224, atol=1e-5)
    assert "12 samples of 3x20x24 uint8, classification" in capsys.readouterr().out


def test_folders_of_splits_and_sizes(tmp_path):
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for number in range(count):
            for kind in ("a", "b"):
                seed = 100 * len(split) + 10 * number + ord(kind)
                draw(tmp_path / "d" / split / kind / f"{split}{kind}{number}.png", seed, (30 + number, 40), False)
    arguments = [tmp_path / "d", "-o", tmp_path / "o.h5", "--labels", "folders", "--resize", 16, "--size", 14]
    assert run(*arguments) == 0
    volumes = open_volumes(tmp_path / "o.h5")
    assert volumes.shape == (1, 14, 14)
    assert [len(volumes.indices(split)) for split in ("train", "validation", "test")] == [8, 4, 4]


@pytest.mark.parametrize("form", ["csv", "parquet", "cell"])
def test_several_labels(tmp_path, form):
    scans, _ = twelve(tmp_path)
    has = {f"s{number:02d}": (number % 2, number % 3 == 0) for number in range(12)}
    options = ["--label", "edema,mass"]
    if form == "csv":
        rows = [f"{id},{int(a)},{int(b)}" for id, (a, b) in has.items()]
        labels = table(tmp_path / "l.csv", rows, "id,edema,mass")
    elif form == "parquet":
        labels = tmp_path / "l.parquet"
        columns = {"id": list(has), "edema": [a for a, _ in has.values()], "mass": [bool(b) for _, b in has.values()]}
        parquet.write_table(pyarrow.table(columns), labels)
    else:
        names = [
            "|".join(name for name, there in zip(("edema", "mass"), pair, strict=True) if there)
            for pair in has.values()
        ]
        labels = table(
            tmp_path / "l.csv", [f"{id},{name or 'No Finding'}" for id, name in zip(has, names, strict=True)]
        )
        options = ["--separator", "|", "--no-label", "No Finding"]
    assert run(scans, "-o", tmp_path / "o.h5", "--labels", labels, *options, "--split", "50/25/25") == 0
    volumes = open_volumes(tmp_path / "o.h5")
    assert volumes.task == "multilabel" and volumes.class_names == ("edema", "mass")
    assert volumes.targets.tolist() == [[int(a), int(b)] for a, b in has.values()] and volumes.verify() == []
    assert all(volumes.targets[volumes.indices(split)].any(axis=0).all() for split in ("train", "validation", "test"))


@pytest.mark.parametrize("form", ["ragged", "size", "compressed", "chunks"])
def test_masks_follow_their_images(tmp_path, form):
    maps = cases(tmp_path)
    options = {
        "ragged": ["--ragged"],
        "size": ["--size", "12,11,10"],
        "compressed": ["--size", "12,11,10", "--compress", "bitshuffle-lz4"],
        "chunks": ["--size", "12,11,10", "--chunk", "8", "--compress", "zstd"],
    }[form]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "tumour": 3}}))
    arguments = [tmp_path / "imagesTr", "-o", tmp_path / "o.h5", "--masks", tmp_path / "labelsTr"]
    assert run(*arguments, "--classes", tmp_path / "dataset.json", "--split", "50/25/25", *options) == 0
    volumes = open_volumes(tmp_path / "o.h5")
    assert volumes.task == "segmentation" and volumes.class_names == ("background", "liver", "tumour")
    assert volumes.ragged == (form == "ragged") and volumes.verify() == []
    for number, id in enumerate(volumes.ids):
        inputs, target = volumes.read(number)
        original = noise(maps[id].shape, int(id.split("_")[1]))
        wanted = np.where(maps[id] == 3, 2, maps[id])
        if form != "ragged":
            begin = [(have - want) // 2 for have, want in zip(original.shape, (12, 11, 10), strict=True)]
            box = tuple(slice(first, first + want) for first, want in zip(begin, (12, 11, 10), strict=True))
            original, wanted = original[box], wanted[box]
        assert np.array_equal(inputs[0], original) and np.array_equal(target, wanted)


def test_voxels_of_each_class_are_noted(tmp_path):
    maps = cases(tmp_path)
    arguments = [tmp_path / "imagesTr", "-o", tmp_path / "o.h5", "--masks", tmp_path / "labelsTr", "--ragged"]
    assert run(*arguments, "--split", "50/25/25") == 0  # the values found: 0, 1, 3
    volumes = open_volumes(tmp_path / "o.h5")
    assert volumes.class_names == ("0", "1", "3")
    with h5py.File(tmp_path / "o.h5") as file:
        drawn = file["foreground"][()]
    for row, id in zip(drawn, volumes.ids, strict=True):
        for places, value in zip(row, (0, 1, 3), strict=True):
            there = places[places >= 0]
            assert (maps[id].reshape(-1)[there] == value).all() and len(set(there.tolist())) == len(there)
            assert len(there) == min(256, np.count_nonzero(maps[id] == value))


def test_masks_that_do_not_fit_are_told(tmp_path, capsys):
    cases(tmp_path)
    save(tmp_path / "labelsTr" / "case_1.nii.gz", np.zeros((5, 5, 5), np.uint8))
    (tmp_path / "labelsTr" / "case_2.nii.gz").unlink()
    save(tmp_path / "labelsTr" / "case_4.nii.gz", np.full((13, 12, 11), 9, np.uint8), "LPS")
    arguments = [tmp_path / "imagesTr", "-o", tmp_path / "o.h5", "--masks", tmp_path / "labelsTr", "--ragged"]
    assert run(*arguments, "--classes", "nothing,liver,unused,tumour", "--split", "50/25/25") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for line, words in zip(
        lines, ("5x5x5 and the image", "no mask", "value 9, which is no class", "3 of 8"), strict=True
    ):
        assert words in line


def test_a_map_without_a_class_of_value_0_is_not_padded(tmp_path, capsys):
    for name in ("i", "m"):
        (tmp_path / name).mkdir()
    for number in range(3):
        save(tmp_path / "i" / f"s{number}.nii.gz", noise(seed=number))
        save(tmp_path / "m" / f"s{number}.nii.gz", np.where(noise(seed=number) > 500, 2, 1).astype(np.uint8))
    arguments = [tmp_path / "i", "-o", tmp_path / "o.h5", "--masks", tmp_path / "m"]
    assert run(*arguments, "--size", "6") == 0
    assert run(*arguments, "--size", "9") == 1
    assert "no class has the value 0" in capsys.readouterr().err


def test_equal_images_with_different_masks_are_not_dropped(tmp_path, capsys):
    for name in ("i", "m"):
        (tmp_path / name).mkdir()
    for number in range(4):
        save(tmp_path / "i" / f"s{number}.nii.gz", noise(seed=min(number, 2)))
        save(tmp_path / "m" / f"s{number}.nii.gz", (noise(seed=number) > 500).astype(np.uint8))
    arguments = [tmp_path / "i", "-o", tmp_path / "o.h5", "--masks", tmp_path / "m", "--duplicates", "drop"]
    assert run(*arguments) == 2
    assert "neither is dropped" in capsys.readouterr().err


def test_a_header_in_metres_or_microns_is_read_in_mm(tmp_path):
    (tmp_path / "d").mkdir()
    for name, unit, size in (("metre", "meter", 0.001), ("micron", "micron", 1000.0), ("mm", "mm", 1.0)):
        image = nibabel.Nifti1Image(noise(seed=len(name)), np.diag([size, size, size, 1]))
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / "d" / f"{name}.nii")
    labels = table(tmp_path / "l.csv", ["metre,a", "micron,b", "mm,b"])
    assert run(tmp_path / "d", "-o", tmp_path / "o.h5", "--labels", labels, "--spacing", 1) == 0
    volumes = open_volumes(tmp_path / "o.h5")
    assert volumes.shape == (1, 6, 7, 8) and np.allclose(volumes.affine, np.eye(4))


def test_grey_images_among_coloured_ones_become_coloured_and_alpha_is_dropped(tmp_path):
    for number in range(6):
        draw(tmp_path / "d" / "ab"[number % 2] / f"{number}.png", number, colour=True)
    size = Image.open(tmp_path / "d" / "a" / "0.png").size
    grey = np.random.default_rng(0).integers(0, 256, size[::-1]).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "d" / "a" / "0.png")
    Image.fromarray(np.stack([grey, grey // 2], axis=-1), "LA").save(tmp_path / "d" / "b" / "1.png")
    Image.open(tmp_path / "d" / "a" / "2.png").convert("RGBA").save(tmp_path / "d" / "a" / "2.png")
    assert run(tmp_path / "d", "-o", tmp_path / "o.h5", "--labels", "folders", "--split", "50/50/0") == 0
    volumes = open_volumes(tmp_path / "o.h5")
    assert len(volumes) == 6 and volumes.shape == (3, *size[::-1])
    for name in ("0", "1"):
        (sample,) = [number for number, id in enumerate(volumes.ids) if id.endswith(name)]
        assert np.array_equal(volumes.read(sample)[0], np.stack([grey] * 3))


def test_an_odd_one_out_is_told_and_can_be_left_out(tmp_path, capsys):
    for number in range(6):
        draw(tmp_path / "d" / "ab"[number % 2] / f"{number}.png", number, colour=True)
    Image.fromarray(np.full((12, 12), 900, np.uint16)).save(tmp_path / "d" / "b" / "3.png")
    (tmp_path / "d" / "a" / "notes.txt").write_text("hello")
    arguments = [tmp_path / "d", "-o", tmp_path / "o.h5", "--labels", "folders"]
    assert run(*arguments) == 1
    assert "3.png: it has 1 channel(s) and 2 axes, most others 3 channel(s)" in capsys.readouterr().err
    assert run(*arguments, "--skip-bad", "--split", "50/50/0") == 0
    assert "1 other file(s) were passed over, such as" in capsys.readouterr().err
    assert len(open_volumes(tmp_path / "o.h5")) == 5


def test_a_class_that_no_map_has_is_a_note(tmp_path, capsys):
    cases(tmp_path)
    arguments = [tmp_path / "imagesTr", "-o", tmp_path / "o.h5", "--masks", tmp_path / "labelsTr", "--ragged"]
    assert run(*arguments, "--classes", "background,liver,cyst,tumour,vein") == 0
    assert "class 'vein' has no sample in train" in capsys.readouterr().err


def test_images_with_masks_of_black_and_white(tmp_path):
    for number in range(4):
        pixels = draw(tmp_path / "i" / f"{number}.png", number, colour=False)
        (tmp_path / "m").mkdir(exist_ok=True)
        Image.fromarray(np.where(pixels > 127, 255, 0).astype(np.uint8)).save(tmp_path / "m" / f"{number}_mask.png")
    assert run(tmp_path / "i", "-o", tmp_path / "o.h5", "--masks", tmp_path / "m", "--split", "50/25/25") == 0
    volumes = open_volumes(tmp_path / "o.h5")
    inputs, target = volumes.read(0)
    assert np.array_equal(target, (inputs[0] > 127).astype(np.uint8)) and volumes.class_names == ("0", "255")


def test_the_tables_masks(tmp_path):
    cases(tmp_path)
    rows = [f"case_{number}_0000,labelsTr/case_{number}.nii.gz,p{number // 2}" for number in range(8)]
    labels = table(tmp_path / "l.csv", rows, "id,mask,group")
    arguments = [tmp_path / "imagesTr", "-o", tmp_path / "o.h5", "--labels", labels, "--by-mask", "--ragged"]
    assert run(*arguments, "--split", "50/25/25") == 0
    volumes = open_volumes(tmp_path / "o.h5")
    assert volumes.task == "segmentation" and len(set(volumes.groups)) == 4


@pytest.mark.parametrize("compress", ["blosc2-lz4", "blosc2-zstd", "zstd", "bitshuffle-lz4"])
@pytest.mark.parametrize("chunk", [None, "4,3,5"])
def test_compressed_files_are_read_by_h5py(tmp_path, compress, chunk):
    scans, labels = twelve(tmp_path)
    options = ["--compress", compress, *(["--chunk", chunk] if chunk else [])]
    assert run(scans, "-o", tmp_path / "o.h5", "--labels", labels, *options) == 0
    volumes = open_volumes(tmp_path / "o.h5")
    with h5py.File(tmp_path / "o.h5") as file:
        assert file["inputs"].chunks == (1, 1, *((4, 3, 5) if chunk else (6, 7, 8)))
        for number in range(12):
            assert np.array_equal(file["inputs"][number][0], noise(seed=number))
            assert np.array_equal(volumes.read(number)[0][0], noise(seed=number))


def test_shards_are_one_data_set(tmp_path):
    scans, labels = twelve(tmp_path)
    assert run(scans, "-o", tmp_path / "whole.h5", "--labels", labels, "--group", "patient") == 0
    options = ["--labels", labels, "--group", "patient", "--shard-size", "3K"]
    assert run(scans, "-o", tmp_path / "o.h5", *options) == 0
    shards = sorted(tmp_path.glob("o-*.h5"))
    assert [path.name for path in shards] == [f"o-{number:05d}-of-00003.h5" for number in (1, 2, 3)]
    assert [open_volumes(path).num_samples for path in shards] == [4, 4, 4]
    whole, parts = open_volumes(tmp_path / "whole.h5"), open_volumes(shards)
    assert parts.fingerprint == whole.fingerprint and parts.source == whole.source
    assert open_volumes(tmp_path / "o-*.h5").paths == tuple(shards)
    shards[1].unlink()
    with pytest.raises(ValueError, match="names 2 files, but there should be 3"):
        open_volumes(tmp_path / "o-*.h5")


def test_channels_from_several_files(tmp_path):
    (tmp_path / "d").mkdir()
    for number in range(6):
        for channel, name in enumerate(("t1", "t2")):
            save(tmp_path / "d" / f"p{number}_{name}.nii.gz", noise(seed=10 * number + channel))
    labels = table(tmp_path / "l.csv", [f"p{number},{number % 2}" for number in range(6)])
    assert run(tmp_path / "d", "-o", tmp_path / "o.h5", "--labels", labels, "--channels", "t2,t1") == 0
    volumes = open_volumes(tmp_path / "o.h5")
    assert volumes.shape == (2, 6, 7, 8) and volumes.scale.shape == (6, 2)
    for number in range(6):
        stored = volumes.read(number)[0]
        assert np.array_equal(stored[0], noise(seed=10 * number + 1)) and np.array_equal(
            stored[1], noise(seed=10 * number)
        )
        for channel in (0, 1):
            normal = stored[channel] * volumes.scale[number][channel] + volumes.offset[number][channel]
            inside = normal[stored[channel] > 0]
            assert abs(inside.mean()) < 1e-3 and abs(inside.std() - 1) < 1e-3


def test_dicom_series_of_patients_in_folders_of_classes(tmp_path):
    wanted = {}
    for number in range(4):
        image = oblique()
        image = nibabel.Nifti1Image(np.asarray(image.dataobj) // (number + 1), image.affine)
        wanted[f"p{number}"] = np.asarray(nibabel.as_closest_canonical(image).dataobj)
        folder = tmp_path / "d" / ("sick" if number % 2 else "well") / f"p{number}"
        folder.mkdir(parents=True)
        store(folder, slices(image, SeriesInstanceUID=f"1.2.{number}"))
    arguments = [tmp_path / "d", "-o", tmp_path / "o.h5", "--labels", "folders", "--normalise", "none"]
    assert run(*arguments, "--split", "50/50/0", "--duplicates", "keep") == 0  # the same noise, darker
    volumes = open_volumes(tmp_path / "o.h5")
    assert volumes.dtype == np.int16 and list(volumes.ids) == ["p1", "p3", "p0", "p2"]
    for number, id in enumerate(volumes.ids):
        assert volumes.class_names[volumes.targets[number]] == ("sick" if int(id[1]) % 2 else "well")
        assert np.array_equal(volumes.read(number)[0][0], wanted[id])
        assert np.allclose(volumes.affine[number], nibabel.as_closest_canonical(oblique()).affine, atol=1e-6)


def test_resampled_windowed_and_cropped_at_once(tmp_path):
    """A ball of 30 HU in air, of anisotropic voxels: after packing it is a ball of the same size at the same place."""
    (tmp_path / "ct").mkdir()
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    affine[:3, 3] = (-20, -20, -21)
    for number in range(3):
        place = np.einsum("ij,jxyz->ixyz", affine[:3, :3], np.indices((40, 40, 14))) + affine[:3, 3, None, None, None]
        ball = np.where(np.linalg.norm(place, axis=0) < 12, 30, -1000).astype(np.int16)
        ball[number, 0, 0] = 3000
        nibabel.save(nibabel.Nifti1Image(ball, affine), tmp_path / "ct" / f"c{number}.nii.gz")
    labels = table(tmp_path / "l.csv", [f"c{number},{number % 2}" for number in range(3)])
    options = ["--spacing", 1, "--window", "-160,240", "--size", "36", "--dtype", "uint8", "--normalise", "unit"]
    assert run(tmp_path / "ct", "-o", tmp_path / "o.h5", "--labels", labels, *options, "--duplicates", "keep") == 0
    volumes = open_volumes(tmp_path / "o.h5")
    assert volumes.shape == (1, 36, 36, 36) and volumes.dtype == np.uint8
    unit = volumes.read(0)[0][0] * volumes.scale[0][0] + volumes.offset[0][0]
    assert unit.min() >= 0 and unit.max() <= 1.001
    inside = unit > 190 / 400 / 2
    place = np.einsum("ij,jxyz->ixyz", volumes.affine[0][:3, :3], np.indices((36, 36, 36)))
    place += volumes.affine[0][:3, 3, None, None, None]
    assert abs(inside.sum() / (4 / 3 * np.pi * 12**3) - 1) < 0.12
    assert np.abs(place[:, inside].mean(axis=1)).max() < 0.6
    assert abs(unit[18, 18, 18] - 190 / 400) < 0.02
    assert volumes.packing["window"] == [-160.0, 240.0] and volumes.packing["spacing"] == [1.0]
