"""Volumes that are packed twice: found whatever their dtype, told, dropped or refused, and never in two splits."""

from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from datasets import open_volumes
from datasets.duplicates import Print, find_twins, fingerprint, refuse_leaks
from jobs import pack

SHAPE = (60, 56, 52)


@dataclass
class Volume:
    print: Print
    id: str = ""
    path: Path = Path("scan.nii")
    labels: tuple[str, ...] = ()
    split: int = -1
    fold: int = -1


def twins_of(volumes):
    """(first, second, alike) by number."""
    items = [Volume(fingerprint(np.asarray(data)[None]), id=str(number)) for number, data in enumerate(volumes)]
    return [(int(pair.first.id), int(pair.second.id), pair.alike) for pair in find_twins(items)]


def head(seed):
    """A smooth body with structures at the same places in all, and others of its own."""
    common, own = (ndimage.gaussian_filter(np.random.default_rng(s).normal(size=SHAPE), 6) for s in (99, seed))
    body = ndimage.gaussian_filter(np.pad(np.ones([n - 16 for n in SHAPE]), 8), 4)
    return (body * (300 + 6000 * common + 6000 * own)).clip(0).astype(np.int16)


def changed():
    one, noise = head(1), np.random.default_rng(0)
    yield "float", one.astype(np.float32), False
    yield "noise", one + noise.normal(0, 0.05 * one.max(), SHAPE), True
    yield "scale", one * 3.0 + 100, True
    yield "gamma", (one / one.max()) ** 0.85, True
    yield "bytes", np.rint(one / one.max() * 255).astype(np.uint8), True
    yield "shift", np.roll(one, 1, axis=0), True
    yield "double", one.repeat(2, axis=0).repeat(2, axis=1), True


@pytest.mark.parametrize(("data", "alike"), [row[1:] for row in changed()], ids=[row[0] for row in changed()])
def test_the_same_volume_is_found_again(data, alike):
    others = [head(seed) for seed in range(2, 8)]
    assert twins_of([*others, head(1), data]) == [(6, 7, alike)]


def test_others_of_the_same_kind_are_no_twins():
    assert not twins_of(head(seed) for seed in range(20))


def test_each_is_told_with_the_first_that_it_equals():
    assert [pair[:2] for pair in twins_of([head(1), head(2), head(1), head(2), head(1)])] == [(0, 2), (1, 3), (0, 4)]


def structure(seed):
    """A few hundred voxels, about the same place in all: what is cut out of label maps."""
    draw, places = np.random.default_rng(seed), np.indices(SHAPE).reshape(3, -1)
    radii, centre = draw.uniform(4, 7, 3), np.array(SHAPE) // 2 + draw.normal(0, 1, 3)
    distance = (((places.T - centre) / radii) ** 2).sum(axis=1)
    return (distance < 1).astype(np.uint8).reshape(SHAPE)


def test_sparse_masks_at_one_place_are_alike_only_where_they_are_equal():
    masks = [structure(seed) for seed in range(24)]
    assert max(mask.mean() for mask in masks) < 0.05
    assert twins_of([*masks, masks[3].astype(np.int16)]) == [(3, 24, False)]


def test_shape_counts_and_volumes_too_small_are_compared_by_their_voxels_alone():
    flat = np.arange(64, dtype=np.int16)
    assert twins_of(flat.reshape(shape) for shape in ((4, 4, 4), (8, 8, 1), (4, 4, 4))) == [(0, 2, False)]


def test_minus_zero_is_zero_and_large_integers_are_themselves():
    small = np.arange(-32, 32).reshape(4, 4, 4)
    assert twins_of([small.astype(np.int16), np.where(small == 0, -0.0, small)]) == [(0, 1, False)]
    assert not twins_of([np.full((4, 4, 4), 2**53), np.full((4, 4, 4), 2**53 + 1)])


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", ">i4", "u8", "f2", ">f4", "f8"])
def test_equal_values_are_equal_in_every_dtype_that_holds_them(dtype):
    rng = np.random.default_rng(0)
    for values in (rng.integers(0, 100, (2, 70, 60, 50)), rng.integers(-9, 9, (1, 9, 9)), np.full((1, 3, 3), 2**15)):
        other = values.astype(dtype)
        if (other.astype(np.float64) == values).all():
            assert fingerprint(other).digest == fingerprint(values).digest
        else:
            assert fingerprint(other).digest != fingerprint(values).digest


def test_one_voxel_anywhere_and_the_order_count():
    data = np.random.default_rng(0).integers(0, 900, (1, 64, 64, 64)).astype(np.int16)
    seen = {
        fingerprint(data).digest,
        fingerprint(data[:, ::-1]).digest,
        fingerprint(data.reshape(1, 64, 128, 32)).digest,
    }
    for place in (0, 99_999, data.size - 1):
        other = data.copy()
        other.flat[place] += 1
        seen.add(fingerprint(other).digest)
    swapped = data.reshape(-1, 4).copy()  # words of 8 bytes
    swapped[[0, 1]] = swapped[[1, 0]]
    assert len(seen | {fingerprint(swapped.reshape(data.shape)).digest}) == 7


def test_real_numbers_are_equal_in_single_and_double_precision():
    single = np.random.default_rng(0).normal(size=(1, 40, 40, 40)).astype(np.float32)
    double = single.astype(np.float64)
    assert fingerprint(single).digest == fingerprint(double).digest
    double[0, 3, 3, 3] += 1e-12
    assert fingerprint(single).digest != fingerprint(double).digest


def test_a_symmetric_body_with_noise_is_the_same():
    body = np.pad(head(1), [(2, 2), (4, 4), (6, 6)]).astype(float)  # means of two voxels
    body += body[::-1]
    noisy = body + np.random.default_rng(0).normal(0, 0.02 * body.max(), body.shape)
    assert twins_of([body, noisy]) == [(0, 1, True)]


def test_pictures_by_their_brightness_and_volumes_of_several_channels():
    rng = np.random.default_rng(0)
    colour = ndimage.gaussian_filter(rng.normal(size=(3, 300, 400)), (0, 12, 12))
    colour = (255 * (colour - colour.min()) / np.ptp(colour)).astype(np.uint8)
    grey = np.tensordot([0.299, 0.587, 0.114], colour, 1)[None]
    other = fingerprint(colour[::-1])
    first, second = fingerprint(colour), fingerprint(grey)
    apart = [np.bitwise_count(first.bits ^ one.bits).sum() / first.num_bits for one in (second, other)]
    assert apart[0] < 0.02 and apart[1] > 0.1 and first.digest != second.digest
    series = np.stack([head(1) + number for number in range(20)])
    assert twins_of([head(1)]) == [] and fingerprint(series).num_bits == 511


def test_all_that_are_alike_are_joined_as_by_comparing_each_pair():
    rng = np.random.default_rng(0)
    bits = rng.random((2500, 512)) < 0.5
    bits[:, 511] = False
    for number in range(1500, 2500):  # chains and crowds, over the bounds of blocks
        bits[number] = bits[rng.integers(0, 900) if number % 3 else number - 1] ^ (rng.random(512) < 0.03)
    bits[:, 511] = False
    words = np.packbits(bits, axis=1).view(np.uint64)
    twins = find_twins([Volume(Print(str(n), row, 511), id=str(n)) for n, row in enumerate(words)])
    pairs = np.array([(int(pair.first.id), int(pair.second.id)) for pair in twins])
    near = np.concatenate([np.bitwise_count(words ^ row).sum(axis=1, dtype=int)[None] for row in words]) <= 0.07 * 511
    groups = connected_components(near)
    assert near[tuple(pairs.T)].all() and (pairs[:, 0] < pairs[:, 1]).all()
    found = connected_components(coo_array((np.ones(len(pairs)), tuple(pairs.T)), near.shape))
    assert 0 < len(pairs) == len(words) - groups[0] and np.array_equal(found[1], groups[1])


def test_a_chain_of_alike_ones_leaks_nowhere():
    """A and C are alike, B and C are, A and B are not: B and C are compared, too."""

    def volume(name, bits):
        words = np.packbits(np.arange(512) < bits).view(np.uint64)
        return Volume(Print(name, words, 511), id=name)

    twins = find_twins([volume("a", 0), volume("b", 60), volume("c", 30)])
    assert [(pair.first.id, pair.second.id) for pair in twins] == [("a", "c"), ("b", "c")]
    with pytest.raises(ValueError, match=r"in validation and train: give both one group, or use --duplicates keep$"):
        refuse_leaks({"a": ("train", None), "b": ("validation", None), "c": ("train", None)}, twins)


@pytest.fixture
def scans(tmp_path):
    """Twelve volumes of two classes; s04 is s00 as float, s07 is s01 with noise, and s09 is s05 under another label."""
    folder = tmp_path / "scans"
    folder.mkdir()
    volumes = [head(seed) for seed in range(12)]
    volumes[4] = volumes[0].astype(np.float32)
    volumes[7] = (volumes[1] + np.random.default_rng(0).normal(0, 9, SHAPE)).astype(np.int16)
    volumes[8] = volumes[5]
    for number, volume in enumerate(volumes):
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / f"s{number:02d}.nii.gz")
    return tmp_path


def run(folder, *arguments, groups=lambda number: number):
    rows = [f"s{number:02d},{'sick' if number % 2 else 'well'},g{groups(number)}" for number in range(12)]
    (folder / "labels.csv").write_text("\n".join(["id,label,group", *rows]) + "\n")
    given = (folder / "scans", "-o", folder / "o.h5", "--labels", folder / "labels.csv", *arguments)
    return pack.main([str(argument) for argument in given])


def test_they_are_told(scans, capsys):
    assert run(scans, "--split", "100/0/0") == 0
    notes = [line.rpartition("/")[2] for line in capsys.readouterr().err.splitlines()]
    assert notes == ["s00.nii.gz", "s01.nii.gz", "s05.nii.gz, labelled sick and well"]
    assert len(open_volumes(scans / "o.h5")) == 12


def test_they_are_dropped_and_nearly_equal_ones_stay(scans, capsys):
    (scans / "scans/s08.nii.gz").write_bytes((scans / "scans/s02.nii.gz").read_bytes())  # of the same class
    assert run(scans, "--split", "100/0/0", "--duplicates", "drop") == 0
    assert set(open_volumes(scans / "o.h5").ids) == {f"s{n:02d}" for n in range(12)} - {"s04", "s08"}
    assert capsys.readouterr().err.count(", and left out") == 2


def test_neither_is_dropped_where_their_labels_differ(scans, capsys):
    assert run(scans, "--split", "100/0/0", "--duplicates", "drop") == 2
    assert "labelled sick and well: their labels differ, so neither is dropped" in capsys.readouterr().err


def test_they_may_be_an_error(scans, capsys):
    assert run(scans, "--split", "100/0/0", "--duplicates", "error") == 2
    said = capsys.readouterr().err
    assert "s04.nii.gz is the same volume as" in said and "(2 more such)" in said and said.count("twins: ") == 2
    assert not (scans / "o.h5").exists()


@pytest.mark.parametrize("how", [("--split", "60/20/20"), ("--folds", 6)], ids=["splits", "folds"])
def test_two_of_a_kind_in_two_splits_are_refused_until_they_share_a_group(scans, capsys, how):
    codes = [run(scans, *how, "--seed", seed) for seed in range(4)]
    said = capsys.readouterr().err
    assert 2 in codes and "give both one group, or use --duplicates" in said
    assert run(scans, *how, "--duplicates", "keep") == 0
    twins = {4: 0, 7: 1, 8: 5}
    assert [run(scans, *how, "--seed", seed, groups=lambda n: twins.get(n, n)) for seed in range(4)] == [0] * 4
