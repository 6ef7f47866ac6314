"""Cross-validation: folds at pack time, from a table or a list, and the fold that a run chooses."""

import json

import h5py
import nibabel
import numpy as np
import pytest

from datasets import layout, open_volumes
from datasets.layout import VolumeFileError
from datasets.partition import HELD_OUT, fold_samples
from datasets.writer import VolumeWriter
from hpc.errors import UserError
from hpc.experiment import validate
from jobs import inspect, pack
from jobs.check import open_data


def names(numbers):
    return [f"g{number}" for number in numbers]


@pytest.fixture
def scans(tmp_path):
    """Twenty volumes of two classes, two of each patient, and their table."""
    folder, rng = tmp_path / "scans", np.random.default_rng(0)
    folder.mkdir()
    for number in range(20):
        data = rng.integers(0, 900, (4, 4, 4)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), folder / f"s{number:02d}.nii.gz")
    table(tmp_path, "id,label,group", *(f"s{n:02d},{'sick' if n // 2 % 2 else 'well'},p{n // 2}" for n in range(20)))
    return tmp_path


def table(folder, *lines):
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


def run(folder, *arguments):
    given = (folder / "scans", "-o", folder / "o.h5", "--labels", folder / "labels.csv", *arguments)
    return pack.main([str(argument) for argument in given])


def experiment(folder, **data):
    values = {"name": "a", "model": {"name": "resnet3d_tiny"}, "data": {"file": str(folder / "o.h5"), **data}}
    return validate(values, "test")


@pytest.mark.parametrize("num_folds", [2, 3, 5, 10])
def test_folds_are_equal_in_size_and_in_each_class(num_folds):
    labels = np.array([0] * 200 + [1] * 100 + [2] * 20)
    folds = fold_samples(labels, names(range(320)), num_folds, seed=4)
    for label, count in enumerate((200, 100, 20)):
        shares = np.bincount(folds[labels == label], minlength=num_folds)
        assert len(shares) == num_folds and np.abs(shares - count / num_folds).max() < 1.01


def test_a_group_is_in_one_fold_and_given_folds_win():
    groups = names(np.arange(60) // 3)
    given = [-1] * 60
    given[0], given[7] = 4, 2
    folds = fold_samples([n % 2 for n in range(60)], groups, 5, given=given)
    assert {len(set(folds[first : first + 3].tolist())) for first in range(0, 60, 3)} == {1}
    assert (folds[0], folds[7]) == (4, 2) and set(folds.tolist()) == set(range(5))


@pytest.mark.parametrize(
    ("number", "given", "words"),
    [
        (1, None, "1 folds cannot be made; ask for 2 to 100"),
        (101, None, "2 to 100"),
        (5, None, "3 free group"),
        (2, [0, 1, -1], "group 'g0' is in fold 0 and fold 1"),
    ],
)
def test_folds_that_cannot_be_are_refused(number, given, words):
    groups = ["g0", "g0", "g1"] if given else names(range(3))
    with pytest.raises(ValueError, match=words):
        fold_samples([0, 1, 0], groups, number, given=given)


def test_a_run_trains_on_all_folds_but_its_own(scans):
    assert run(scans, "--folds", 5, "--split", "80/0/20") == 0
    volumes = open_volumes(scans / "o.h5")
    assert volumes.num_folds == 5 and not len(volumes.indices("validation"))
    assert np.array_equal(volumes.folds == HELD_OUT, volumes.split == 2) and len(volumes.indices("test")) == 4
    seen, prints = [], {volumes.fingerprint}
    for number in range(5):
        chosen = open_data(experiment(scans, fold=number, batch_size=2))
        validation = chosen.indices("validation").tolist()
        assert validation == np.flatnonzero(volumes.folds == number).tolist()
        assert sorted([*chosen.indices("train").tolist(), *validation, *chosen.indices("test").tolist()]) == list(
            range(20)
        )
        assert not {chosen.groups[n] for n in validation} & {chosen.groups[n] for n in chosen.indices("train").tolist()}
        seen += validation
        prints.add(chosen.fingerprint)
    assert sorted(seen) == np.flatnonzero(volumes.folds != HELD_OUT).tolist() and len(prints) == 6


def test_a_run_must_choose_a_fold_that_is_there(scans):
    run(scans, "--folds", 5)
    with pytest.raises(UserError, match=r"has folds: choose one by data.fold, 0 to 4 .*data.fold=0:5"):
        open_data(experiment(scans, batch_size=2))
    with pytest.raises(VolumeFileError, match="has folds 0 to 4; there is no fold 5"):
        open_data(experiment(scans, fold=5, batch_size=2))
    run(scans)
    with pytest.raises(VolumeFileError, match="has no folds: pack it with --folds 5"):
        open_data(experiment(scans, fold=0, batch_size=2))


def test_folds_and_splits_from_the_table_win(scans):
    lines = [
        f"s{n:02d},{'sick' if n // 2 % 2 else 'well'},{'test' if n < 2 else ''},{n % 3 if n > 5 else ''}"
        for n in range(20)
    ]
    table(scans, "id,label,split,fold", *lines)
    assert run(scans, "--folds", 3) == 0
    volumes = open_volumes(scans / "o.h5")
    assert volumes.folds[:2].tolist() == [HELD_OUT] * 2 and volumes.folds[6:].tolist() == [n % 3 for n in range(6, 20)]


def test_a_list_of_splits(scans):
    parts = {
        "train": names_of(range(10)),
        "val": names_of(range(10, 14)),
        "test": [f"s{n:02d}.nii.gz" for n in range(14, 20)],
    }
    (scans / "list.json").write_text(json.dumps(parts))
    assert run(scans, "--split-list", scans / "list.json") == 0
    assert open_volumes(scans / "o.h5").split.tolist() == [0] * 10 + [1] * 4 + [2] * 6


def names_of(numbers):
    return [f"s{number:02d}" for number in numbers]


def test_folds_as_in_nnunets_splits_final(scans):
    folds = [names_of(range(first, first + 4)) for first in range(0, 20, 4)]
    entries = [{"train": [id for other in folds if other is not own for id in other], "val": own} for own in folds]
    (scans / "splits_final.json").write_text(json.dumps(entries))
    assert run(scans, "--split-list", scans / "splits_final.json", "--folds", 5) == 0
    assert open_volumes(scans / "o.h5").folds.tolist() == [n // 4 for n in range(20)]


def test_a_test_set_stays_one_beside_nnunets_folds(scans):
    """From the list itself, or from the table, of ids that the list does not name; --split changes nothing then."""
    folds = [names_of(range(first, first + 4)) for first in (0, 4, 8)]
    entries = [{"train": [id for other in folds if other is not own for id in other], "val": own} for own in folds]
    lines = [f"s{n:02d},{'sick' if n // 2 % 2 else 'well'},p{n // 2},{'test' if n > 11 else ''}" for n in range(20)]
    for rest in (names_of(range(12, 20)), None):
        tests = {} if rest is None else {"test": rest}
        (scans / "list.json").write_text(json.dumps([entry | tests for entry in entries]))
        if rest is None:
            table(scans, "id,label,group,split", *lines)
        assert run(scans, "--split-list", scans / "list.json", "--folds", 3, "--split", "75/0/25") == 0
        assert open_volumes(scans / "o.h5").folds.tolist() == [n // 4 for n in range(12)] + [HELD_OUT] * 8
    (scans / "list.json").write_text(json.dumps([{"val": ALL[:8]}, {"val": ALL[8:]}]))
    assert run(scans, "--split-list", scans / "list.json", "--folds", 2) == 2


def test_nnunets_names_are_those_of_the_first_channel(scans):
    for path in list((scans / "scans").iterdir()):
        path.rename(path.with_name(path.name.replace(".nii", "_0000.nii")))
    table(scans, "id,label", *(f"s{n:02d}_0000,{'sick' if n % 2 else 'well'}" for n in range(20)))
    (scans / "list.json").write_text(json.dumps([{"val": ALL[:8]}, {"val": ALL[8:]}]))
    assert run(scans, "--split-list", scans / "list.json", "--folds", 2) == 0


def test_folds_are_told_and_a_class_of_one_fold_is(scans, capsys):
    table(scans, "id,label", *(f"s{n:02d},{'rare' if n == 3 else 'well'}" for n in range(20)))
    assert run(scans, "--folds", 4) == 0
    assert "class 'rare' is in fold" in capsys.readouterr().err
    assert inspect.main([str(scans / "o.h5")]) == 0
    assert "4 folds of 5, 5, 5, 5 samples, for data.fold" in capsys.readouterr().out


def test_a_fold_of_a_fold_is_one_fold(scans):
    run(scans, "--folds", 4)
    volumes = open_volumes(scans / "o.h5")
    again = volumes.fold(0).fold(1)
    assert np.array_equal(again.split, volumes.fold(1).split) and again.fingerprint == volumes.fold(1).fingerprint


ALL = names_of(range(20))


@pytest.mark.parametrize(
    ("parts", "more", "words"),
    [
        ({"train": ALL, "val": ["s03"]}, [], "puts 's03' into two parts"),
        ({"train": ALL[1:]}, [], "no line names 's00'"),
        ({"train": [*ALL, "s99"]}, [], "no file is given for 's99'"),
        ({"trainig": ALL}, [], "is not {"),
        ({"train": "s00"}, [], "is not {"),
        ({}, [], "names no sample"),
        ([{"train": ALL[1:], "val": ALL[:1]}, {"train": ALL[:1], "val": ALL[1:]}], [], "has folds: add --folds 2"),
        ([{"train": ALL[10:], "val": ALL[:10]}, {"train": ALL[:10], "val": ALL[9:]}], ["--folds", 2], "'s09' into two"),
        (
            [{"train": ALL[:6], "val": ALL[:6]}, {"train": [], "val": ALL[6:]}],
            ["--folds", 2],
            "fold 0 does not train on just",
        ),
        (
            [{"val": ALL[:4], "test": ALL[16:]}, {"val": ALL[4:16], "test": ALL[15:]}],
            ["--folds", 2],
            "'s15' into two parts",
        ),
        ([{"val": ALL[:4]}, {"val": ALL[4:]}], ["--folds", 3], "fold 2 of 3 is empty: folds are counted from 0"),
        ({"0": ALL}, [], "is not {"),
        ([{"val": ALL[:3]}, {"val": ALL[3:]}], ["--folds", 2], "'p1' is in fold 0 and fold 1"),
        ({"train": ALL[:10], "val": ALL[10:]}, ["--folds", 2], "is given validation, but with --folds each fold is"),
    ],
)
def test_lists_that_cannot_be_are_told_in_a_line(scans, capsys, parts, more, words):
    (scans / "list.json").write_text(json.dumps(parts))
    assert run(scans, "--split-list", scans / "list.json", *more) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (scans / "o.h5").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--folds", 5, "--split", "70/15/15"],
            "each fold is the validation once; write --split 85/0/15, not 70/15/15",
        ),
        (["--folds", 1], "1 folds cannot be made"),
        (["--folds", 11], "10 free group"),
        (["--folds", 3, "--split", "0/0/100"], "all samples are in the test split"),
        (["--split-list", "none.json"], "cannot be read as JSON"),
    ],
)
def test_folds_that_cannot_be_made_are_told_in_a_line(scans, capsys, more, words):
    try:
        assert run(scans, *more) == 2
    except SystemExit as left:  # argparse
        assert left.code == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (scans / "o.h5").exists()


def test_shards_with_and_without_folds_do_not_mix_and_a_changed_fold_is_seen(tmp_path):
    for number, folds in enumerate((True, False)):
        facts = {"shape": (1, 2, 2, 2), "dtype": "int16", "num_samples": 4, "class_names": ["a", "b"], "folds": folds}
        with VolumeWriter(tmp_path / f"{number}.h5", **facts) as writer:
            for sample in range(4):
                volume = np.full((1, 2, 2, 2), sample, np.int16)
                writer.add(volume, sample % 2, id=f"{number}-{sample}", fold=sample % 2 if folds else None)
    with pytest.raises(VolumeFileError, match="has folds, the other not"):
        open_volumes([tmp_path / "0.h5", tmp_path / "1.h5"])
    with h5py.File(tmp_path / "0.h5", "r+") as file:
        file[layout.FOLDS][0] = 1
    with pytest.raises(VolumeFileError, match="offset or folds are not those it was packed with"):
        open_volumes(tmp_path / "0.h5")
