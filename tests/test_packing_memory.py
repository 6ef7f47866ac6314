"""Packing holds one volume at a time, however many there are, and patches are drawn without a table of all voxels."""

import tracemalloc

import numpy as np
import pytest
from scipy import ndimage

from datasets.order import philox_bits
from datasets.packing import geometry, samples
from tests.scans import noise, run, save, table

SHAPE = (32, 30, 28)
FORMS = {"whole": [], "resampled": ["--spacing", "1.3"], "patches": ["--patch", "8", "--per-class", "5"]}


def peak(folder, count, form):
    folder.mkdir()
    for number in range(count):
        save(folder / f"s{number:02}.nii", noise(SHAPE, seed=number))
    labels = table(folder.with_suffix(".csv"), [f"s{n:02},{'ab'[n % 2]}" for n in range(count)])
    arguments = [folder, "--labels", labels, "-o", folder.with_suffix(".h5"), "--split", "100/0/0", "--workers", "1"]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    assert run(*arguments, *form) == 0
    return tracemalloc.get_traced_memory()[1] - before


@pytest.mark.parametrize("name", FORMS)
def test_memory_is_that_of_one_volume(tmp_path, name):
    tracemalloc.start()
    try:
        peak(tmp_path / "warm", 2, FORMS[name])  # what is imported, and kept
        few, many = peak(tmp_path / "few", 2, FORMS[name]), peak(tmp_path / "many", 6, FORMS[name])
    finally:
        tracemalloc.stop()
    assert many < few + 2 * np.prod(SHAPE)  # not a volume more


def test_places_are_drawn_without_a_table_of_all_voxels():
    among = np.ones(128**3, bool)
    tracemalloc.start()
    try:
        samples._draw(among, (128, 128, 128), 50, (0, 0), 0)
        used = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert used < 2 * among.size


@pytest.mark.parametrize("shape", [(20, 17, 13), (31, 24)])
def test_resampling_in_place_is_scipys(shape):
    data = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    steps, start, new = [0.8, 1.0, 1.9][: len(shape)], [-0.3, 0.0, 0.45][: len(shape)], tuple(n // 2 for n in shape)
    smooth = ndimage.gaussian_filter(data, [max(0.0, (step - 1) / 2) for step in steps], mode="nearest")
    wanted = ndimage.affine_transform(
        smooth, np.array(steps), start, output_shape=new, output=np.float32, order=3, mode="nearest"
    ).clip(data.min(), data.max())
    before = data.copy()
    found = geometry._interpolate(data, steps, start, new, labels=False)
    assert np.abs(found - wanted).max() < 1e-6 and np.array_equal(data, before)


def test_places_are_those_of_the_least_bits_of_all(monkeypatch):
    monkeypatch.setattr(samples, "_BLOCK", 50)
    rooms = (7, 11, 9)
    among = np.random.default_rng(0).random(7 * 11 * 9) < 0.4
    places = np.flatnonzero(among)
    order = np.argsort(philox_bits((3, 5), (0, 0, 2, 0), places.size), kind="stable")[:20]
    expected = np.stack(np.unravel_index(places[order], rooms), axis=1)
    assert samples._draw(among, rooms, 20, (3, 5), 2) == list(map(tuple, expected.tolist()))
    assert len(samples._draw(among, rooms, 10**6, (3, 5), 2)) == places.size
    assert samples._draw(np.zeros_like(among), rooms, 20, (3, 5), 2) == []
