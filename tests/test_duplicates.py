"""Volumes that are packed twice: found whatever their dtype, told, dropped or refused, and never in two splits."""

from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

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
    items = [Volume(fingerprint(data), id=str(number)) for number, data in enumerate(volumes)]
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


@pytest.mark.parametrize(("data", "alike"), [row[1:] for row in changed()], ids=[row[0] for row in changed()])
def test_the_same_volume_is_found_again(data, alike):
    others = [head(seed) for seed in range(2, 8)]
    assert twins_of([*others, head(1), data]) == [(6, 7, alike)]


def test_others_of_the_same_kind_are_no_twins():
    assert not twins_of(head(seed) for seed in range(20))


def test_each_is_told_with_the_first_that_it_equals():
    assert [pair[:2] for pair in twins_of([head(1), head(2), head(1), head(2), head(1)])] == [(0, 2), (1, 3), (0, 4)]


def test_shape_counts_and_volumes_too_small_are_compared_by_their_voxels_alone():
    flat = np.arange(64, dtype=np.int16)
    assert twins_of(flat.reshape(shape) for shape in ((4, 4, 4), (8, 8, 1), (4, 4, 4))) == [(0, 2, False)]


def test_minus_zero_is_zero_and_large_integers_are_themselves():
    small = np.arange(-32, 32).reshape(4, 4, 4)
    assert twins_of([small.astype(np.int16), np.where(small == 0, -0.0, small)]) == [(0, 1, False)]
    assert not twins_of([np.full((4, 4, 4), 2**53), np.full((4, 4, 4), 2**53 + 1)])


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
    assert "s04.nii.gz is the same volume as" in said and "(2 more such)" in said and said.count("\n") == 1
    assert not (scans / "o.h5").exists()


@pytest.mark.parametrize("how", [("--split", "60/20/20"), ("--folds", 6)], ids=["splits", "folds"])
def test_two_of_a_kind_in_two_splits_are_refused_until_they_share_a_group(scans, capsys, how):
    codes = [run(scans, *how, "--seed", seed) for seed in range(4)]
    said = capsys.readouterr().err
    assert 2 in codes and "give both one group, or use --duplicates" in said
    assert run(scans, *how, "--duplicates", "keep") == 0
    twins = {4: 0, 7: 1, 8: 5}
    assert [run(scans, *how, "--seed", seed, groups=lambda n: twins.get(n, n)) for seed in range(4)] == [0] * 4
