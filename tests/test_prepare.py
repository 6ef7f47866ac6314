"""What packing does to one volume: windows, stored numbers, normalisation, resampling, crop and pad, each by hand."""

import nibabel
import numpy as np
import pytest
from nibabel.processing import resample_to_output
from scipy import ndimage

from datasets.packing.geometry import centre_fit, cut, final_shape, move_origin, resample, resampled_shape, spacing_of
from datasets.packing.prepare import IMAGENET, choose_storage, clip, measure, normalisation, resolve_dtype, store
from datasets.packing.recipe import Recipe

SPACING = np.diag([1.0, 1.5, 2.0, 1.0])


def smooth(shape, seed=0, dtype=np.float32):
    noise = np.random.default_rng(seed).normal(size=shape)
    return (ndimage.gaussian_filter(noise, 2) * 1000).astype(dtype)


def normalised(data, dtype, kind, window=None, number=0):
    """As a reader gets it: through the stored numbers, scale and offset."""
    data = data if window is None else clip(data, window)
    facts = measure(data, window)
    storage = choose_storage(facts, dtype, window)
    scale, offset = normalisation(facts, storage, kind, number, window)
    stored = store(data, storage)
    assert stored.dtype == dtype
    return stored * scale + offset


@pytest.mark.parametrize(
    ("kinds", "wanted", "expected"),
    [
        (["uint8", "uint8"], "keep", "uint8"),
        (["uint8", "int16"], "keep", "int16"),
        (["uint16"], "keep", "int16"),
        (["int8", "uint16"], "keep", "int16"),
        (["int32"], "keep", "int16"),
        (["float32", "int16"], "keep", "float32"),
        (["float64"], "keep", "float32"),
        (["float32"], "int16", "int16"),
    ],
)
def test_dtype_rules(kinds, wanted, expected):
    assert resolve_dtype(wanted, map(np.dtype, kinds)) == expected
    assert resolve_dtype("keep", [np.dtype("int32")], wide=True) == "float32"


@pytest.mark.parametrize("low", [-40_000, -1024, 0, 1, 65_535 - 400])
def test_integers_of_any_16_bits_stay_exact_in_int16(low):
    data = np.random.default_rng(1).integers(low, low + 400, (7, 8, 9)).astype(np.int32)
    assert np.allclose(normalised(data, "int16", "none"), data, atol=1e-3)


@pytest.mark.parametrize("kind", ["uint8", "int16"])
def test_quantised_floats_keep_their_value_through_scale_and_offset(kind):
    data = np.random.default_rng(0).normal(0.3, 0.1, (20, 20, 20)).astype(np.float32)
    wanted = (data - data.mean()) / data.std()
    error = np.abs(normalised(data, kind, "zscore") - wanted).max()
    assert error < 0.51 * (wanted.max() - wanted.min()) / (2 ** (8 * np.dtype(kind).itemsize) - 1)


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_the_foreground_gives_the_statistics(shift):
    data = np.array([0, 0, 0, 2, 4], np.float32)
    assert (measure(data).mean, measure(data).std) == (3.0, 1.0)
    signed = np.array([-1, 0, 0, 2, 4], np.float32)
    assert (measure(signed).mean, measure(signed).std) == (3.0, 1.0)
    assert measure(data - 1).mean == pytest.approx((data - 1).mean())  # no voxel is 0: all of them
    far = np.random.default_rng(0).normal(shift + 50, 1, 300_000)
    assert measure(far).mean == pytest.approx(far.mean(), rel=1e-12)
    assert measure(far).std == pytest.approx(far.std(), rel=1e-6)
    assert measure(np.zeros(4, np.int16)).std == 0


def test_a_window_clips_and_its_lower_end_is_no_foreground():
    ct = np.random.default_rng(0).normal(0, 500, (20, 20, 20)).astype(np.int16)
    low, high = -160, 240
    wanted = np.clip(ct, low, high)
    inside = wanted[wanted > low]
    assert np.allclose(
        normalised(ct, "int16", "zscore", (low, high)), (wanted - inside.mean()) / inside.std(), atol=1e-4
    )
    unit = normalised(ct, "int16", "unit", (low, high))
    assert np.allclose(unit, (wanted - low) / (high - low), atol=1e-5)
    # 400 units on 256 steps, the same steps in each volume
    coarse = [normalised(part, "uint8", "unit", (low, high)) for part in (ct, ct[:2])]
    assert np.abs(coarse[0] - unit).max() <= 0.5 / 255 + 1e-6 and np.array_equal(coarse[0][:2], coarse[1])


@pytest.mark.parametrize(("dtype", "window"), [(np.int16, (-160.5, 240.3)), (np.float32, (0.1, 0.9))])
def test_the_ends_of_a_window_are_those_of_the_dtype(dtype, window):
    data = (np.random.default_rng(0).normal(0, 1, (20, 20, 20)) * (500 if dtype == np.int16 else 1)).astype(dtype)
    clipped = clip(data, window)
    inside = clipped[clipped > clipped.min()].astype(np.float64)
    assert measure(clipped, window).mean == pytest.approx(inside.mean())
    assert measure(clipped, window).std == pytest.approx(inside.std())
    with pytest.raises(ValueError, match="holds no value of int16"):
        clip(np.zeros(3, np.int16), (0.2, 0.7))


def test_a_window_beyond_the_dtype_clips_nothing():
    data = np.array([0, 255], np.uint8)
    assert np.array_equal(clip(data, (-160, 240)), [0, 240]) and np.array_equal(clip(data, (-1e9, 1e9)), data)


def test_imagenet_is_torchvisions_normalisation():
    from torchvision.transforms.v2.functional import normalize, to_dtype, to_image

    image = np.random.default_rng(0).integers(0, 256, (3, 9, 7)).astype(np.uint8)
    import torch

    theirs = normalize(
        to_dtype(to_image(image.transpose(1, 2, 0)), torch.float32, scale=True),
        [mean for mean, _ in IMAGENET],
        [deviation for _, deviation in IMAGENET],
    )
    ours = np.stack([normalised(image[number], "uint8", "imagenet", number=number) for number in range(3)])
    assert np.allclose(ours, theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (0.7, 1.0, 3.0)])
def test_resampling_to_a_spacing_keeps_the_place_in_the_world(spacing):
    """A function of the place in mm has the same values before and after, away from the edges."""
    shape, affine = (40, 36, 30), SPACING.copy()
    affine[:3, 3] = (-20, 10, 5)
    place = np.einsum("ij,jxyz->ixyz", affine[:3, :3], np.indices(shape)) + affine[:3, 3, None, None, None]
    data = np.sin(place / 9).sum(axis=0, keepdims=True).astype(np.float32)
    out, moved = resample(data, affine, Recipe(spacing=spacing))
    assert out.shape[1:] == resampled_shape(shape, affine, Recipe(spacing=spacing))
    assert np.allclose(spacing_of(moved, 3), spacing)
    place = np.einsum("ij,jxyz->ixyz", moved[:3, :3], np.indices(out.shape[1:])) + moved[:3, 3, None, None, None]
    inner = (slice(3, -3),) * 3
    assert np.abs(out[0][inner] - np.sin(place / 9).sum(axis=0)[inner]).max() < 0.06


def test_a_finer_spacing_agrees_with_nibabels():
    image = nibabel.Nifti1Image(smooth((20, 18, 16)), SPACING)
    theirs = resample_to_output(image, (0.8, 0.8, 0.8), order=3, mode="nearest")
    out, affine = resample(image.get_fdata()[None].astype(np.float32), SPACING, Recipe(spacing=(0.8,)))
    # their grid begins at the first voxel, ours has the same centre: compare in the world
    turn = np.linalg.inv(affine) @ theirs.affine
    ours = ndimage.affine_transform(out[0], turn[:3, :3], turn[:3, 3], output_shape=theirs.shape, order=3)
    inner = (slice(4, -4),) * 3
    scale = theirs.get_fdata()[inner].std()
    assert np.abs(ours - theirs.get_fdata())[inner].max() < 0.1 * scale


def test_label_maps_take_the_nearest_voxel_and_no_new_value():
    maps = (np.random.default_rng(0).integers(0, 2, (9, 9, 9)) * 7).astype(np.uint8)
    out, _ = resample(maps[None], SPACING, Recipe(resize=(18, 27, 9)), labels=True)
    assert np.array_equal(out[0], np.repeat(np.repeat(maps, 2, 0), 3, 1))


def test_integers_are_rounded_and_stay_in_range():
    data = smooth((20, 20, 20), dtype=np.int16)
    out, _ = resample(data[None], np.eye(4), Recipe(resize=(33,)))
    assert out.dtype == np.int16 and out.shape == (1, 33, 33, 33)
    assert data.min() <= out.min() and out.max() <= data.max()


def test_one_number_is_the_shorter_side():
    image = np.zeros((3, 40, 60), np.uint8)
    assert resample(image, np.eye(4), Recipe(resize=(20,)))[0].shape == (3, 20, 30)
    assert final_shape((40, 60), np.eye(4), Recipe(resize=(20,), size=(16,))) == (16, 16)


def test_the_same_grid_is_not_touched():
    data = smooth((1, 5, 6, 7))
    assert resample(data, SPACING, Recipe(spacing=(1.0, 1.5, 2.0)))[0] is data


def test_crop_and_pad_about_the_centre():
    x, y, z = np.indices((5, 8, 3))
    data = np.stack([100 * x + 10 * y + z + 50, x]).astype(np.int16)
    fitted, affine = centre_fit(data, SPACING, (7, 4, 3), (50, -1))
    assert np.array_equal(fitted[:, 1:6], data[:, :, 2:6])
    assert set(np.unique(fitted[0, [0, 6]])) == {50} and set(np.unique(fitted[1, [0, 6]])) == {-1}
    assert np.allclose(affine @ (1, 0, 0, 1), (0, 3, 0, 1))


def test_a_patch_keeps_its_place():
    data = smooth((1, 9, 8, 7))
    assert np.array_equal(cut(data, (2, 1, 3), (4, 5, 2)), data[:, 2:6, 1:6, 3:5])
    assert np.allclose(move_origin(SPACING, (2, 1, 3)) @ (0, 0, 0, 1), SPACING @ (2, 1, 3, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spacing": (1.0,), "resize": (8,)}, "both resample"),
        ({"size": (8, 8, 8, 8)}, "one, two or three numbers"),
        ({"size": (0,)}, "above 0"),
        ({"window": (5.0, 5.0)}, "not LOW,HIGH"),
        ({"dtype": "int8"}, "keep, uint8, int16, float32"),
        ({"normalise": "z"}, "zscore, unit, imagenet, none"),
        ({"per_class": 3}, "it needs --patch"),
    ],
)
def test_recipes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_sizes_must_fit_the_axes():
    with pytest.raises(ValueError, match="has 3 numbers, but the data have 2 axes"):
        final_shape((40, 60), np.eye(4), Recipe(size=(8, 8, 8)))
