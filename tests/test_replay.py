"""New files become exactly what packing stores, and what is predicted for one lies where the file lies."""

import gzip
import itertools
import json

import nibabel
import nrrd
import numpy as np
import pytest
import tifffile
from PIL import Image

from datasets import exporting, open_volumes
from datasets.layout import PACKING_ATTR
from datasets.packing.replay import Replay
from datasets.sources import UnusableSource, find, header, read
from datasets.writer import VolumeWriter
from tests import dicomseries
from tests.scans import noise, run, save, table, world


def oblique(zooms=(1.0, 1.0, 1.0), angle=0.4):
    """An affine turned about two axes, with an origin."""
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(zooms)
    affine[:3, 3] = (11.5, -7.25, 3)
    return affine


def packed(folder, files, *options, rows=None):
    """The volume file of these sources, all in one split."""
    ids = [file.name.partition(".")[0] for file in files]
    labels = table(folder / "labels.csv", rows or [f"{id},{'ab'[n % 2]}" for n, id in enumerate(ids)])
    out = folder / "out.h5"
    assert run(*files, "-o", out, "--labels", labels, "--split", "100/0/0", "--duplicates", "keep", *options) == 0
    return open_volumes(out)


def replayed(volumes, files):
    replay = Replay.of(volumes.packing, volumes.channels, volumes.spatial_axes)
    return {id: replay.read(source) for id, source in replay.find(files).items()}


def assert_the_same(volumes, samples):
    """Bit by bit: stored numbers, dtype, normalisation, place in space."""
    assert sorted(samples) == sorted(volumes.ids)
    for number, id in enumerate(volumes.ids):
        stored, sample = volumes.read(number)[0], samples[id]
        assert sample.data.dtype == stored.dtype and sample.data.tobytes() == stored.tobytes()
        assert sample.scale.tobytes() == volumes.scale[number].tobytes()
        assert sample.offset.tobytes() == volumes.offset[number].tobytes()
        assert np.array_equal(sample.affine, volumes.affine[number])
        assert sample.place.source_shape == tuple(volumes.source_shape[number])


RECIPES = {
    "as it is": (),
    "1 mm": ("--spacing", "1", "--ragged"),
    "coarser": ("--spacing", "2.5,3,2", "--size", "5"),
    "resized": ("--resize", "7,12,5"),
    "window": ("--window", "100,700", "--normalise", "unit", "--dtype", "uint8"),
    "cropped and padded": ("--size", "13,5,12", "--normalise", "none"),
    "float32": (
        "--dtype",
        "float32",
    ),
    "all": ("--window", "50,800", "--spacing", "1.3", "--size", "9,14,11", "--dtype", "int16"),
}


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_a_file_is_replayed_bit_by_bit(tmp_path, options):
    files = [
        save(tmp_path / "ras.nii.gz", world()),
        save(tmp_path / "lip.nii.gz", noise((9, 10, 11), 1), "LIP"),
        save(tmp_path / "oblique.nii", noise((9, 10, 11), 2), affine=oblique((1.0, 1.5, 2.0))),
    ]
    volumes = packed(tmp_path, files, *options)
    assert_the_same(volumes, replayed(volumes, files))


def test_nan_becomes_a_given_value(tmp_path, capsys):
    """As SPM writes what lies around a head; of numbers that the header scales, too. Predicting does the same."""
    data = noise((9, 10, 11)).astype(np.float32)
    data[:3] = np.nan
    scaled = nibabel.Nifti1Image(data[::-1], np.eye(4))
    scaled.header.set_slope_inter(2, 1)
    nibabel.save(scaled, tmp_path / "b.nii")
    files = [save(tmp_path / "a.nii.gz", data), tmp_path / "b.nii", tmp_path / "c.npy"]
    np.save(files[2], data * 3)
    volumes = packed(tmp_path, files, "--nan", "-5")
    assert "990 voxels in 3 of 3 sources were NaN and are -5 now; 33.3% of a, at most" in capsys.readouterr().err
    assert_the_same(volumes, replayed(volumes, files))
    stored = volumes.read(0)[0]
    assert np.array_equal(stored[0], np.where(np.isnan(data), -5, data))
    assert [np.count_nonzero(volumes.read(n)[0] == -5) for n in range(3)] == [330, 330, 330]
    older = {name: value for name, value in volumes.packing.items() if name != "nan"}
    with pytest.raises(UnusableSource, match="330 voxels are NaN"):
        Replay.of(older, 1, 3).read(find([files[0]])["a"])
    save(tmp_path / "d.nii.gz", np.full((9, 10, 11), np.nan, np.float32))
    again = ("-o", tmp_path / "n.h5", "--labels", table(tmp_path / "n.csv", ["a,x", "d,y"]), "--split", "100/0/0")
    assert run(files[0], tmp_path / "d.nii.gz", *again) == 1
    assert "330 voxels are NaN or infinite; repair or mask them, or fill NaN by --nan 0" in capsys.readouterr().err
    assert run(files[0], tmp_path / "d.nii.gz", *again, "--nan", 0) == 1
    assert "all its voxels are NaN" in capsys.readouterr().err
    assert run(files[0], *again, "--nan", "inf") == 2


def test_channels_other_formats_and_images_are_replayed(tmp_path):
    for name, seed in itertools.product("ab", (0, 1)):
        np.save(tmp_path / f"{name}_{seed:04d}.npy", noise((6, 7, 8), seed + 10 * (name == "b")))
    files = sorted(tmp_path.glob("*.npy"))
    labels = table(tmp_path / "labels.csv", ["a,x", "b,y"])
    options = ("--channels", "0000,0001", "--split", "100/0/0", "--labels", labels)
    assert run(*files, "-o", tmp_path / "two.h5", *options) == 0
    volumes = open_volumes(tmp_path / "two.h5")
    assert volumes.channels == 2
    assert_the_same(volumes, replayed(volumes, files))


def test_images_are_replayed(tmp_path):
    files = []
    for name in ("a.png", "b.jpg"):
        pixels = noise((30, 41), ord(name[0]), 255).astype(np.uint8)
        Image.fromarray(np.stack([pixels, pixels // 2, 255 - pixels], -1)).save(tmp_path / name)
        files.append(tmp_path / name)
    volumes = packed(tmp_path, files, "--resize", "20", "--size", "16", "--normalise", "imagenet")
    assert_the_same(volumes, replayed(volumes, files))


def test_grey_images_among_colour_are_replayed(tmp_path):
    """red = green = blue, as they are packed; grey of 16 bits is refused by both."""

    colours = np.random.default_rng(0).integers(0, 255, (3, 8, 9, 3), np.uint8)
    files = [tmp_path / f"{name}.png" for name in "abc"]
    for file, pixels in zip(files, colours, strict=True):
        Image.fromarray(pixels).convert("L" if file.stem == "c" else "RGB").save(file)
    volumes = packed(tmp_path, files, "--normalise", "imagenet")
    assert_the_same(volumes, replayed(volumes, files))
    Image.fromarray(colours[0, ..., 0].astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UnusableSource, match="1 channel"):
        replayed(volumes, [tmp_path / "deep.png"])


def test_a_dicom_series_is_replayed(tmp_path):
    dicomseries.store(tmp_path / "ct", dicomseries.slices(dicomseries.oblique()))
    volumes = packed(tmp_path, [tmp_path / "ct"], "--spacing", "2", rows=["ct,a"])
    assert_the_same(volumes, replayed(volumes, [tmp_path / "ct"]))


def test_packed_patches_are_parts_of_what_is_replayed(tmp_path):
    files = [save(tmp_path / f"{name}.nii.gz", noise((20, 21, 22), seed)) for seed, name in enumerate("ab")]
    volumes = packed(tmp_path, files, "--patch", "6", "--per-class", "3")
    samples = replayed(volumes, files)
    for number, id in enumerate(volumes.ids):
        sample = samples[id[0]]
        start = np.linalg.inv(sample.affine) @ volumes.affine[number][:, 3]
        box = tuple(slice(round(first), round(first) + 6) for first in start[:3])
        assert np.array_equal(sample.data[(slice(None), *box)], volumes.read(number)[0])
        assert np.array_equal(sample.scale, volumes.scale[number])


def test_normalised_numbers_are_the_loaders(tmp_path):
    import torch

    from datasets import Loader

    files = [save(tmp_path / "a.nii.gz", noise((9, 10, 11)))]
    volumes = packed(tmp_path, files)
    batch = next(iter(Loader(volumes, batch_size=1, dtype=torch.float32, threads=0)))
    assert np.array_equal(replayed(volumes, files)["a"].normalised(), batch.inputs[0].numpy())


def test_wide_integers_of_a_new_file_are_spread_over_the_files_dtype(tmp_path):
    """The pack held int16; a new file with a wider range is rounded to fit, and its normalised values hold."""
    files = [save(tmp_path / "a.nii.gz", noise((9, 10, 11)))]
    volumes = packed(tmp_path, files)
    wide = np.linspace(0, 1e6, 990).astype(np.int32).reshape(9, 10, 11)
    sample = replayed(volumes, [save(tmp_path / "wide.nii.gz", wide)])["wide"]
    wanted = (wide - wide[wide > 0].mean()) / wide[wide > 0].std()
    assert sample.data.dtype == np.int16 and np.allclose(sample.normalised()[0], wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (np.zeros((2, 9, 10, 11), np.int16), r"2 channel\(s\) and 3 axes, and the training data 1 channel\(s\)"),
        (np.full((9, 10, 11), np.nan, np.float32), "NaN"),
        (np.zeros((9, 10), np.int16), r"1 channel\(s\) and 2 axes"),
    ],
)
def test_a_file_that_does_not_fit_is_told(tmp_path, data, reason):
    volumes = packed(tmp_path, [save(tmp_path / "a.nii.gz", noise((9, 10, 11)))])
    np.save(tmp_path / "new.npy", data)
    with pytest.raises(UnusableSource, match=reason):
        replayed(volumes, [tmp_path / "new.npy"])


def test_a_window_that_holds_no_value_of_a_files_dtype_is_told(tmp_path):
    options = ("--window", "-500,-100")
    volumes = packed(tmp_path, [save(tmp_path / "a.nii.gz", noise((9, 10, 11)) - np.int16(600))], *options)
    np.save(tmp_path / "new.npy", np.zeros((9, 10, 11), np.uint8))
    with pytest.raises(UnusableSource, match="holds no value of uint8"):
        replayed(volumes, [tmp_path / "new.npy"])


def test_a_file_that_was_not_packed_says_so(tmp_path):
    with VolumeWriter(tmp_path / "own.h5", shape=(1, 4, 4, 4), dtype="int16", num_samples=1, class_names="a") as writer:
        writer.add(np.zeros((1, 4, 4, 4), np.int16), 0, id="x")
    with pytest.raises(ValueError, match="not made by 'hpc pack'"):
        Replay.of(open_volumes(tmp_path / "own.h5").packing, 1, 3)


# The way back.

ORIENTATIONS = ["RAS", "LIP", "PSL", "AIR"]


def one_hot(labels, classes):
    return (labels == np.arange(classes).reshape(-1, *[1] * labels.ndim)).astype(np.float32)


def read_back(folder, source, labels, affine):
    path = folder / f"mask{exporting.suffixes_of(source, labels.ndim == 2)[0]}"
    path.write_bytes(exporting.label_file(source, labels, affine))
    return path


@pytest.mark.parametrize("axes", ORIENTATIONS)
@pytest.mark.parametrize("affine", [None, oblique(), oblique((0.8, 0.8, 3.0))], ids=["straight", "oblique", "thick"])
def test_a_map_has_the_sources_shape_affine_and_codes(tmp_path, axes, affine):
    """And its voxels lie where the source's do: the map is made of the source's own voxels."""
    path = save(tmp_path / "a.nii.gz", world() % 5, axes, affine)
    image = nibabel.load(path)
    image.set_qform(image.affine, 2)
    image.set_sform(image.affine, 4)
    nibabel.save(image, path)
    volumes = packed(tmp_path, [path])
    sample = replayed(volumes, [path])["a"]
    source = find([path])["a"]
    labels, outside = sample.place.labels(one_hot(sample.data[0], 5))
    assert outside == 0
    mask = nibabel.load(read_back(tmp_path, source, labels, sample.source_affine))
    assert mask.shape == image.shape and np.array_equal(mask.affine, image.affine)
    assert mask.get_data_dtype() == np.uint8
    assert int(mask.header["qform_code"]) == 2 and int(mask.header["sform_code"]) == 4
    assert np.array_equal(mask.header.get_zooms(), image.header.get_zooms())
    assert np.array_equal(mask.header.get_qform(), image.header.get_qform())
    assert np.array_equal(np.asarray(mask.dataobj), np.asarray(image.dataobj)), "voxel by voxel"


@pytest.mark.parametrize("axes", ["RAS", "LIP"])
@pytest.mark.parametrize("spacing", ["1", "3", "0.7,2,1.1"])
def test_resampling_is_undone_where_the_thing_is(tmp_path, axes, spacing):
    """A ball on the sample's grid comes back as the ball that the source's own grid would have, but for its rim."""
    shape = (24, 18, 15)
    path = save(tmp_path / "a.nii.gz", noise(shape), axes, oblique((1.0, 1.5, 2.0)))
    volumes = packed(tmp_path, [path], "--spacing", spacing)
    sample = replayed(volumes, [path])["a"]
    centre = sample.source_affine @ [11.5, 8.5, 7, 1]

    def distance(affine, shape):
        places = np.stack([*np.indices(shape), np.ones(shape)], -1) @ affine.T
        return np.linalg.norm((places - centre)[..., :3], axis=-1)

    inside = distance(sample.affine, sample.data.shape[1:]) < 8
    labels, _ = sample.place.labels(np.stack([~inside, inside]).astype(np.float32))
    away = distance(sample.source_affine, shape)
    rim = max(max(map(float, spacing.split(","))), 2.0)
    assert labels[away < 8 - rim].all() and not labels[away > 8 + rim].any()
    dice = 2 * labels[away < 8].sum() / (labels.sum() + (away < 8).sum())
    assert dice > 0.85
    mask = nibabel.load(read_back(tmp_path, find([path])["a"], labels, sample.source_affine))
    places = mask.affine @ [*np.mean(np.nonzero(np.asarray(mask.dataobj)), axis=1), 1]
    assert np.linalg.norm((places - centre)[:3]) < 1, "in mm, of the file as others read it"


@pytest.mark.parametrize("size", ["5", "13,20,4", "9,10,11", "10,9,12"])
def test_cropping_and_padding_are_undone(tmp_path, size):
    data = world() % 3
    path = save(tmp_path / "a.nii.gz", data, "LIP")
    volumes = packed(tmp_path, [path], "--size", size, "--normalise", "none")
    sample = replayed(volumes, [path])["a"]
    labels, outside = sample.place.labels(one_hot(sample.data[0], 3))
    same = labels == data
    inside = [min(have, want) for have, want in zip(data.shape, sample.data.shape[1:], strict=True)]
    starts = [
        (have - want) // 2 if want < have else 0 for have, want in zip(data.shape, sample.data.shape[1:], strict=True)
    ]
    box = tuple(slice(start, start + length) for start, length in zip(starts, inside, strict=True))
    assert same[box].all() and outside == data.size - np.prod(inside)
    labels[box] = 0
    assert not labels.any(), "class 0 where the sample does not reach"


def test_a_crop_after_resampling_is_undone(tmp_path):
    path = save(tmp_path / "a.nii.gz", noise((20, 20, 20)), affine=np.eye(4))
    volumes = packed(tmp_path, [path], "--spacing", "2", "--size", "6")
    sample = replayed(volumes, [path])["a"]
    labels, outside = sample.place.labels(one_hot(np.ones((6, 6, 6), int), 2))
    assert labels.size - outside == 12**3 and labels[5:15, 5:15, 5:15].all(), "at its corners the outside weighs more"
    labels[4:16, 4:16, 4:16] = 0
    assert not labels.any()


def test_probabilities_go_back_as_well(tmp_path):
    path = save(tmp_path / "a.nii.gz", noise((8, 9, 10)), "LIP")
    volumes = packed(tmp_path, [path])
    sample, source = replayed(volumes, [path])["a"], find([path])["a"]
    values = np.random.default_rng(0).dirichlet([1, 1, 1], (8, 9, 10)).astype(np.float32).transpose(3, 0, 1, 2)
    back = np.stack([sample.place.undo(value, 0) for value in values])
    suffix = exporting.suffixes_of(source, images=False)[1]
    (tmp_path / f"p{suffix}").write_bytes(exporting.probability_file(source, back, sample.source_affine))
    image = nibabel.load(tmp_path / f"p{suffix}")
    assert image.shape == (*nibabel.load(path).shape, 3) and image.get_data_dtype() == np.float32
    assert np.array_equal(read(find([tmp_path / f"p{suffix}"])["p"]).data, values)


@pytest.mark.parametrize("version", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_headers_of_sources_are_not_trusted_with_our_values(tmp_path, version):
    """Scaling, display range, text and extensions of the source are not the map's."""
    image = version(np.ones((5, 6, 7, 1), np.float32), np.diag([2, 2, 2, 1.0]))
    image.header["cal_max"], image.header["descrip"] = 900, b"Jane Doe"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    image.header.set_slope_inter(3, 7)
    nibabel.save(image, tmp_path / "a.nii")
    source = find([tmp_path / "a.nii"])["a"]
    path = read_back(tmp_path, source, np.full((5, 6, 7), 3, np.uint8), np.eye(4))
    mask = nibabel.load(path)
    assert path.suffix == ".nii" and isinstance(mask, version) and mask.shape == (5, 6, 7)
    assert np.array_equal(mask.get_fdata(), np.full((5, 6, 7), 3)) and b"Jane" not in path.read_bytes()


def test_the_real_scan_of_nibabel(tmp_path):
    """Its example4d has an oblique affine and is stored L, A, S: voxel (i, j, k) of the map is that of the scan."""
    from nibabel.testing import data_path

    whole = nibabel.load(f"{data_path}/example4d.nii.gz")
    image = whole.slicer[..., 0]
    nibabel.save(image, tmp_path / "a.nii.gz")
    volumes = packed(tmp_path, [tmp_path / "a.nii.gz"])
    sample = replayed(volumes, [tmp_path / "a.nii.gz"])["a"]
    bright = sample.data[0] > 100
    labels, _ = sample.place.labels(np.stack([~bright, bright]).astype(np.float32))
    mask = nibabel.load(read_back(tmp_path, find([tmp_path / "a.nii.gz"])["a"], labels, sample.source_affine))
    assert np.array_equal(mask.affine, image.affine) and mask.shape == image.shape
    assert nibabel.aff2axcodes(mask.affine) == nibabel.aff2axcodes(whole.affine) != ("R", "A", "S")
    assert np.array_equal(np.asarray(mask.dataobj), np.asarray(image.dataobj) > 100)


def test_maps_of_other_formats_lie_as_their_sources(tmp_path):
    volume = noise((6, 7, 8))
    np.save(tmp_path / "n.npy", volume)
    Image.fromarray(noise((30, 41), 1, 255).astype(np.uint8)).save(tmp_path / "i.png")
    about = {"axes": "ZYX", "spacing": 3.0, "unit": "mm"}
    tifffile.imwrite(tmp_path / "t.tif", volume.transpose(2, 1, 0), imagej=True, resolution=(2, 4), metadata=about)
    tifffile.imwrite(tmp_path / "u.tif", noise((12, 9)))
    space = {"space": "left-posterior-superior", "space directions": np.diag([-2, 1, 3]), "space origin": [5, 6, 7]}
    nrrd.write(str(tmp_path / "r.nrrd"), volume, space)
    dicomseries.store(tmp_path / "d", dicomseries.slices(dicomseries.oblique()))
    for path in sorted(tmp_path.iterdir()):
        source = next(iter(find([path]).values()))
        head = header(source)
        labels = (read(source).data[0] > 300).astype(np.uint8)
        there = read_back(tmp_path, source, labels, head.affine)
        mask = next(iter(find([there]).values()))
        assert header(mask).shape == (1, *head.shape[1:])
        assert np.allclose(header(mask).affine, head.affine, atol=1e-5)
        assert np.array_equal(read(mask).data[0], labels)


def test_packing_options_survive_json(tmp_path):
    """They are read from an attribute, or from a run's folder."""
    import h5py

    volumes = packed(tmp_path, [save(tmp_path / "a.nii.gz", noise((9, 10, 11)))], "--spacing", "2", "--window", "0,500")
    with h5py.File(tmp_path / "out.h5") as file:
        told = json.loads(file.attrs[PACKING_ATTR])
    assert Replay.of(told, 1, 3) == Replay.of(volumes.packing, 1, 3)
    assert Replay.of(told, 1, 3).recipe.window == (0.0, 500.0)


def test_gzip_is_the_same_each_time(tmp_path):
    path = save(tmp_path / "a.nii.gz", noise((9, 10, 11)))
    source = find([path])["a"]
    contents = {exporting.label_file(source, np.ones((9, 10, 11), np.uint8), np.eye(4)) for _ in range(2)}
    assert len(contents) == 1 and gzip.decompress(contents.pop())
