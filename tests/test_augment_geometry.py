"""Geometric augmentation against SciPy: where each voxel comes from is read off an image of its own coordinates."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.interpolate import make_lsq_spline
from scipy.spatial.transform import Rotation

from datasets.augment import Augment, resampling

SHAPES = [(33, 40), (17, 20, 23)]
GEOMETRY = {
    "rotate": {"rotate": 25},
    "zoom": {"zoom": [0.6, 1.6]},
    "shear": {"shear": 20},
    "translate": {"translate": 0.3},
    "elastic": {"elastic": {"spacing": 8, "magnitude": 2.5}},
    "all": {
        "rotate": 25,
        "zoom": 0.3,
        "shear": 10,
        "translate": 0.1,
        "elastic": {"spacing": 6, "magnitude": 2},
        "flip": [0, 1],
        "p": {"flip": 1},
    },
}


def sources(options, shape, sample=0):
    """(axes, *shape) voxel coordinates that each voxel of the result is read from, clipped to the sample."""
    coordinates = torch.from_numpy(np.indices(shape, dtype=np.float32))[None]
    return Augment(**options)(coordinates, np.array([sample]), 11, 3)[0][0].double().numpy()


def fitted(options, shape, sample=0):
    """matrix and offset of source = matrix @ (place - centre) + centre + offset, from voxels inside; exact to 1e-3."""
    edges = np.array(shape)[:, None] - 1
    places, found = np.indices(shape).reshape(len(shape), -1), sources(options, shape, sample).reshape(len(shape), -1)
    inside = ((found > 1e-3) & (found < edges - 1e-3)).all(0)
    known = np.vstack([places - edges / 2, np.ones(places.shape[1])])[:, inside].T
    wanted = (found - edges / 2)[:, inside].T
    solution = np.linalg.lstsq(known, wanted, rcond=None)[0]
    assert np.abs(known @ solution - wanted).max() < 1e-3
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("shape", SHAPES, ids=["image", "volume"])
@pytest.mark.parametrize("options", GEOMETRY.values(), ids=GEOMETRY.keys())
def test_voxels_and_labels_are_read_where_the_coordinates_say(shape, options):
    draw = np.random.default_rng(1)
    for sample in range(3):
        before, labels = draw.normal(size=(2, *shape)).astype(np.float32), draw.integers(0, 7, shape).astype(np.uint8)
        where = sources(options, shape, sample)
        assert sample != 1 or np.abs(where - np.indices(shape)).max() > 0.5
        batch, maps = torch.from_numpy(before.copy())[None], torch.from_numpy(labels.copy())[None]
        out, moved = Augment(**options)(batch, np.array([sample]), 11, 3, maps)
        for channel in range(2):
            expected = ndimage.map_coordinates(before[channel], where, order=1, mode="nearest")
            np.testing.assert_allclose(out[0, channel], expected, atol=2e-4)
        clear = (np.abs(where - np.floor(where) - 0.5) > 1e-4).all(0)
        assert clear.mean() > 0.95
        nearest = ndimage.map_coordinates(labels, where, order=0, mode="nearest")
        assert (moved[0].numpy() == nearest)[clear].all()


@pytest.mark.parametrize("shape", SHAPES, ids=["image", "volume"])
def test_zoom_is_about_the_centre(shape):
    volume = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    for factor in (0.5, 1.25):
        out, _ = Augment(zoom=[factor, factor])(torch.from_numpy(volume.copy())[None, None], np.array([1]), 0, 0)
        centre = (np.array(shape) - 1) / 2
        matrix = np.eye(len(shape)) / factor
        expected = ndimage.affine_transform(volume, matrix, centre - matrix @ centre, order=1, mode="nearest")
        np.testing.assert_allclose(out[0, 0], expected, atol=1e-4)


def test_rotations_turn_and_nothing_else():
    for sample in range(10):
        matrix, offset = fitted({"rotate": [5, 10, 40]}, (17, 20, 23), sample)
        angles = Rotation.from_matrix(np.linalg.inv(matrix)).as_euler("XYZ", degrees=True)
        assert (abs(angles) <= [5, 10, 40]).all() and abs(offset).max() < 1e-3
        flat, _ = fitted({"rotate": 40}, (33, 40), sample)
        np.testing.assert_allclose(flat @ flat.T, np.eye(2), atol=1e-4)
        assert np.linalg.det(flat) > 0 and flat[0, 0] >= np.cos(np.radians(40)) - 1e-4


def test_one_axis_alone_is_turned():
    matrix, _ = fitted({"rotate": [0, 0, 30]}, (17, 20, 23))
    np.testing.assert_allclose(matrix[2], [0, 0, 1], atol=1e-4)
    assert abs(matrix[0, 1]) > 0.01


def test_voxels_that_are_no_cubes_turn_in_millimetres():
    spacing = np.array([1.0, 1.0, 4.0])
    matrix, _ = fitted({"rotate": 30, "spacing": spacing.tolist()}, (21, 22, 11))
    rigid = spacing[:, None] * matrix / spacing
    np.testing.assert_allclose(rigid @ rigid.T, np.eye(3), atol=1e-3)
    assert abs(matrix @ matrix.T - np.eye(3)).max() > 0.05


def test_shear_is_triangular():
    for shape, many in ((33, 40), 1), ((17, 20, 23), 3):
        matrix, _ = fitted({"shear": 20}, shape)
        forward = np.linalg.inv(matrix)
        above = forward[np.triu_indices(len(shape), 1)]
        assert len(above) == many and (abs(above) <= np.tan(np.radians(20))).all() and (abs(above) > 1e-3).all()
        np.testing.assert_allclose(np.tril(forward), np.eye(len(shape)), atol=1e-4)


def test_translation_is_a_share_of_each_axis():
    for sample in range(5):
        matrix, offset = fitted({"translate": [0.1, 0, 0.3]}, (17, 20, 23), sample)
        np.testing.assert_allclose(matrix, np.eye(3), atol=1e-4)
        assert abs(offset[0]) <= 1.7 and abs(offset[1]) < 1e-4 and abs(offset[2]) <= 6.9
        volume = np.random.default_rng(3).normal(size=(17, 20, 23)).astype(np.float32)
        out, _ = Augment(translate=[0.1, 0, 0.3])(
            torch.from_numpy(volume)[None, None].clone(), np.array([sample]), 11, 3
        )
        np.testing.assert_allclose(out[0, 0], ndimage.shift(volume, -offset, order=1, mode="nearest"), atol=1e-3)


def test_order_is_zoom_shear_turn_move_flip():
    options = {"rotate": 30, "zoom": [1.5, 1.5], "translate": 0.1}
    matrix, offset = fitted(options, (33, 40))
    turn = matrix * 1.5
    np.testing.assert_allclose(turn @ turn.T, np.eye(2), atol=1e-4)
    mirrored, beyond = fitted({**options, "flip": [0], "p": {"flip": 1}}, (33, 40))
    np.testing.assert_allclose(mirrored, np.diag([-1, 1]) @ matrix, atol=1e-4)
    np.testing.assert_allclose(beyond, [-offset[0], offset[1]], atol=1e-3)


def test_a_crop_fills_the_image_and_stays_inside():
    areas = []
    for sample in range(40):
        shape = (33, 40)
        matrix, offset = fitted({"crop": [0.3, 0.9]}, shape, sample)
        assert abs(matrix - np.diag(np.diag(matrix))).max() < 1e-4
        sides = np.diag(matrix)
        assert 3 / 4 - 1e-3 <= sides[0] / sides[1] <= 4 / 3 + 1e-3 or sides.max() > 1 - 1e-3
        reach = np.array(shape) / 2 * sides + abs(offset)
        assert (reach <= np.array(shape) / 2 + 1e-3).all()
        areas.append(sides.prod())
    assert 0.25 < min(areas) < 0.4 and 0.8 < max(areas) <= 0.9 + 1e-3


@pytest.mark.parametrize("shape", [(40, 50), (25, 28, 31)], ids=["image", "volume"])
def test_an_elastic_deformation_is_a_cubic_spline_that_does_not_fold(shape):
    spacing, magnitude = 8, 3.1
    where = sources({"elastic": {"spacing": spacing, "magnitude": magnitude}}, shape)
    shift = where - np.indices(shape)
    assert 0.3 * magnitude < abs(shift).max() <= magnitude
    inner = shift[(slice(None), *[slice(4, -4)] * len(shape))]  # clipped at the edges
    for axis in range(len(shape)):
        lines = np.moveaxis(inner, axis + 1, 0).reshape(inner.shape[axis + 1], -1)
        places = np.arange(4, 4 + len(lines))
        knots = spacing * np.arange(-3, places[-1] // spacing + 5)
        inside = (places >= knots[3]) & (places <= knots[-4])
        assert inside.all()
        wide = make_lsq_spline(
            places, lines, np.r_[[4.0] * 4, [k for k in knots if 4 < k < places[-1]], [places[-1]] * 4]
        )
        assert abs(wide(places) - lines).max() < 1e-3
    slopes = np.stack([np.stack(np.gradient(axis)) for axis in where])
    crop = (slice(None), slice(None), *[slice(5, -5)] * len(shape))
    assert np.linalg.det(np.moveaxis(slopes[crop].reshape(len(shape), len(shape), -1), -1, 0)).min() > 0


def test_flips_move_voxels_and_follow_when_resampled():
    volume = torch.randn(1, 1, 5, 6, 7)
    flips = {"flip": [0, 2], "p": {"flip": 1}}
    alone, _ = Augment(**flips)(volume.clone(), np.array([0]), 0, 0)
    assert torch.equal(alone, volume.flip(2, 4))
    resampled, _ = Augment(**flips, zoom=[1, 1 + 1e-9])(volume.clone(), np.array([0]), 0, 0)
    torch.testing.assert_close(resampled, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 9), (1, 1, 6), (2, 1, 5), (31, 3, 2)])
def test_axes_of_one_voxel_stay(shape):
    options = {"rotate": 20, "zoom": 0.3, "elastic": {"spacing": 4, "magnitude": 1}, "translate": 0.2}
    where = sources(options, shape)
    assert all((where[axis] == 0).all() for axis, size in enumerate(shape) if size == 1)
    assert np.isfinite(where).all() and (where >= 0).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 64])
def test_slabs_for_threads_join_without_a_seam(threads):
    before = torch.get_num_threads()
    volume, maps = torch.randn(1, 2, 7, 8, 9), torch.randint(0, 9, (1, 7, 8, 9), dtype=torch.uint8)
    options = GEOMETRY["all"]
    try:
        torch.set_num_threads(1)
        one = Augment(**options)(volume.clone(), np.array([3]), 1, 1, maps.clone())
        torch.set_num_threads(threads)
        many = Augment(**options)(volume.clone(), np.array([3]), 1, 1, maps.clone())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], many[0]) and torch.equal(one[1], many[1])


@pytest.mark.parametrize("shape", SHAPES, ids=["image", "volume"])
def test_a_sample_too_large_for_one_grid_is_resampled_in_blocks(shape, monkeypatch):
    def once():
        inputs = torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(0))
        maps = (inputs[:, 0] > 0).to(torch.uint8)
        return Augment(**GEOMETRY["all"])(inputs, np.array([3]), 1, 1, maps)

    whole = once()
    monkeypatch.setitem(resampling.BLOCK_BYTES, "cpu", 16 * 1024)
    blocks = once()
    assert torch.equal(whole[0], blocks[0]) and torch.equal(whole[1], blocks[1])
