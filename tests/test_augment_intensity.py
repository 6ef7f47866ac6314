"""Changes of intensity against plain NumPy and SciPy: one fixed value of each option, images and volumes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from datasets.augment import Augment
from datasets.order import Stream, random_bits, uniforms

SHAPES = {"image": (3, 15, 22), "volume": (2, 9, 12, 13), "thin": (1, 1, 2, 7)}


def made(shape, seed=0):
    return (3 + 2 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def changed(options, sample, number=0, epoch=0):
    """One sample (C, *shape) through Augment."""
    return Augment(**options)(torch.from_numpy(sample.copy())[None], np.array([number]), 5, epoch)[0][0].numpy()


def figures(sample):
    """Least, greatest and mean intensity: of each channel of a volume, of all channels of an image."""
    axes = tuple(range(sample.ndim)) if sample.ndim == 3 else tuple(range(1, sample.ndim))
    return tuple(getattr(sample.astype(np.float64), name)(axis=axes, keepdims=True) for name in ("min", "max", "mean"))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.7])
def test_blur_is_a_gaussian(shape, sigma):
    sample = made(shape)
    spatial = tuple(range(1, len(shape)))
    expected = ndimage.gaussian_filter(sample, sigma, mode="nearest", truncate=4.0, axes=spatial)
    np.testing.assert_allclose(changed({"blur": [sigma, sigma]}, sample), expected, atol=1e-5)


def coarse(line, factor):
    size = len(line)
    count = max(1, round(size / factor))
    voxels = line[[int((step + 0.5) * size / count) for step in range(count)]]
    return np.interp((np.arange(size) + 0.5) * count / size - 0.5, np.arange(count), voxels)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("factor", [1.6, 2.0, 3.0, 30.0])
def test_low_resolution_is_nearest_down_and_linear_up(shape, factor):
    expected = sample = made(shape)
    for axis in range(1, len(shape)):
        expected = np.apply_along_axis(coarse, axis, expected, factor)
    np.testing.assert_allclose(changed({"low_resolution": [factor, factor]}, sample), expected, atol=1e-5)


def test_blur_comes_before_low_resolution():
    sample = made((1, 12, 14))
    expected = ndimage.gaussian_filter(sample, 1.0, mode="nearest", axes=(1, 2))
    for axis in (1, 2):
        expected = np.apply_along_axis(coarse, axis, expected, 2.0)
    np.testing.assert_allclose(changed({"blur": [1, 1], "low_resolution": [2, 2]}, sample), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("power", [0.7, 1.5])
def test_gamma_keeps_the_ends(shape, power):
    sample = made(shape)
    least, most, _ = figures(sample)
    expected = least + (most - least) * ((sample - least) / (most - least)) ** power
    np.testing.assert_allclose(changed({"gamma": [power, power]}, sample), expected, atol=1e-5)
    flat = np.full(shape, 4.0, np.float32)
    assert (changed({"gamma": [power, power]}, flat) == 4).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_brightness_then_contrast_then_scale_and_shift(shape):
    sample = made(shape)
    bright = figures(sample)[0] + 1.3 * (sample - figures(sample)[0])
    mean = figures(bright)[2]
    contrasted = mean + 0.6 * (bright - mean)
    np.testing.assert_allclose(changed({"brightness": [1.3, 1.3]}, sample), bright, atol=1e-5)
    options = {"brightness": [1.3, 1.3], "contrast": [0.6, 0.6]}
    np.testing.assert_allclose(changed(options, sample), contrasted, atol=1e-5)
    gain, bias = 2 * uniforms(5, 0, Stream.AUGMENT, 5)[3:] - 1
    expected = contrasted * (1 + 0.2 * gain) + 0.4 * bias
    np.testing.assert_allclose(changed({**options, "scale": 0.2, "shift": 0.4}, sample), expected, atol=1e-5)


def hue_rotation(degrees):
    """hueRotate as W3C, Filter Effects Module Level 1, spells it."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array(
        [
            [0.213 + c * 0.787 - s * 0.213, 0.715 - c * 0.715 - s * 0.715, 0.072 - c * 0.072 + s * 0.928],
            [0.213 - c * 0.213 + s * 0.143, 0.715 + c * 0.285 + s * 0.140, 0.072 - c * 0.072 - s * 0.283],
            [0.213 - c * 0.213 - s * 0.787, 0.715 - c * 0.715 + s * 0.715, 0.072 + c * 0.928 + s * 0.072],
        ]
    )


def saturation(s):
    return np.array(
        [
            [0.213 + 0.787 * s, 0.715 - 0.715 * s, 0.072 - 0.072 * s],
            [0.213 - 0.213 * s, 0.715 + 0.285 * s, 0.072 - 0.072 * s],
            [0.213 - 0.213 * s, 0.715 - 0.715 * s, 0.072 + 0.928 * s],
        ]
    )


def test_colours_follow_the_standard():
    sample = made((3, 8, 9))
    expected = np.einsum("ij,jhw->ihw", saturation(1.7), sample)
    np.testing.assert_allclose(changed({"saturation": [1.7, 1.7]}, sample), expected, atol=1e-5)
    grey = np.einsum("j,jhw->hw", [0.213, 0.715, 0.072], sample)
    np.testing.assert_allclose(changed({"saturation": [0, 0]}, sample), np.stack([grey] * 3), atol=1e-5)
    turned = changed({"hue": 0.5}, sample)
    colours, *_ = np.linalg.lstsq(sample.reshape(3, -1).T, turned.reshape(3, -1).T, rcond=None)
    angles = np.arange(-180, 180, 0.01)
    misfit = [np.abs(hue_rotation(angle) - colours.T).max() for angle in angles]
    assert min(misfit) < 2e-3
    drawn = angles[int(np.argmin(misfit))]
    assert 5 < abs(drawn) <= 180
    both = changed({"hue": 0.5, "saturation": [1.7, 1.7]}, sample)
    expected = np.einsum("ij,jhw->ihw", hue_rotation(drawn) @ saturation(1.7), sample)
    np.testing.assert_allclose(both, expected, atol=0.01)


RELATIVE = {
    "gamma": [1.4, 1.4],
    "contrast": [0.5, 0.5],
    "brightness": [1.5, 1.5],
    "saturation": [0.4, 0.4],
    "hue": 0.3,
    "blur": [1.2, 1.2],
    "low_resolution": [2, 2],
}


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(RELATIVE)), st.floats(0.1, 100), st.floats(-100, 100))
def test_what_they_mean_does_not_hang_on_the_normalisation(name, scale, offset):
    sample = made((3, 8, 9)).astype(np.float64)
    options = {name: RELATIVE[name]}
    first = changed(options, sample.astype(np.float32)) * scale + offset
    second = changed(options, (sample * scale + offset).astype(np.float32))
    np.testing.assert_allclose(first, second, atol=1e-4 * (scale + abs(offset)))


def test_flip_scale_shift_and_noise_keep_their_draws():
    sample, number, epoch = made((1, 6, 7, 8)), 41, 2
    draws = uniforms(5, epoch, Stream.AUGMENT, 6, sample=number)
    axes = [axis + 1 for axis in range(3) if draws[axis] < 0.5]
    expected = torch.from_numpy(np.flip(sample, axes).copy())
    expected *= torch.tensor(1 + 0.2 * (2 * draws[3] - 1), dtype=torch.float32)
    expected += torch.tensor(0.3 * (2 * draws[4] - 1), dtype=torch.float32)
    seed = int(random_bits(5, epoch, Stream.NOISE, 1, number)[0] >> np.uint64(1))
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(seed))
    expected += noise * float(0.1 * draws[5])
    out = changed({"flip": [0, 1, 2], "scale": 0.2, "shift": 0.3, "noise": 0.1}, sample, number, epoch)
    assert axes and np.array_equal(out, expected.numpy())


def test_noise_is_normal_and_of_each_sample_alone():
    batch = torch.zeros(5, 1, 20, 20, 20)
    out, _ = Augment(noise=0.5)(batch, np.array([3, 9, 27, 81, 243]), 0, 0)
    for row, sample in enumerate(out):
        values = sample.flatten().numpy()
        deviation = 0.5 * uniforms(0, 0, Stream.AUGMENT, 6, sample=3 ** (row + 1))[5]
        assert stats.kstest(values / deviation, "norm").pvalue > 1e-3
    correlations = np.corrcoef(out.flatten(1).numpy()) - np.eye(5)
    assert abs(correlations).max() < 0.05


@pytest.mark.parametrize("shape", [(3, 40, 50), (2, 20, 22, 24)])
def test_cutout_fills_boxes_and_leaves_the_labels(shape):
    sample = made(shape)
    options = {"cutout": {"holes": 1, "size": [0.2, 0.5], "fill": -50}}
    sizes = []
    for number in range(20):
        maps = torch.ones(1, *shape[1:], dtype=torch.uint8)
        batch = torch.from_numpy(sample.copy())[None]
        out, labels = Augment(**options)(batch, np.array([number]), 0, 0, maps)
        hole = (out[0] == -50).numpy()
        (box,) = ndimage.find_objects(hole[0].astype(int))
        assert (hole == hole[0]).all() and hole[0][box].all() and hole[0].sum() == hole[0][box].size
        assert np.array_equal(out[0].numpy()[~hole], sample[~hole]) and labels.all()
        sizes += [(side.stop - side.start) / size for side, size in zip(box, shape[1:], strict=True)]
    assert 0.18 < min(sizes) < 0.27 and 0.43 < max(sizes) < 0.53


def test_cutout_takes_its_count_of_holes():
    blank = np.ones((1, 200, 200), np.float32)
    most = max(
        ndimage.label(changed({"cutout": {"holes": 3, "size": 0.05}}, blank, number)[0] == 0)[1] for number in range(9)
    )
    assert most == 3


@pytest.mark.parametrize("shape", [(1, 1, 300), (300, 1, 1), (1, 300, 1), (300, 1), (1, 300), (1, 20, 30)])
@pytest.mark.parametrize("options", [{"blur": [1, 2]}, {"low_resolution": [1, 3]}])
def test_filters_of_an_axis_of_one_voxel_do_not_depend_on_threads(shape, options):
    inputs = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 1, *shape)).astype(np.float32))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(Augment(**options)(inputs.clone(), np.arange(2), 0, 0)[0])
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(results[0], inputs) and all(torch.equal(one, results[0]) for one in results)
