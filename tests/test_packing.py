"""NIfTI and labels to a volume file, through the command line as `hpc pack` and `hpc inspect` call it."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from datasets import open_volumes
from jobs import inspect, pack
from tests.scans import noise, run, save, table, twelve, world

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def scans(tmp_path):
    return twelve(tmp_path)


def test_whole_volumes_from_a_table(scans, tmp_path, capsys):
    folder, labels = scans
    out = tmp_path / "scans.h5"
    assert run(folder, "-o", out, "--labels", labels, "--group", "patient", "--split", "50/25/25") == 0
    volumes = open_volumes(out)
    assert volumes.shape == (1, 6, 7, 8) and volumes.dtype == np.int16 and volumes.class_names == ("sick", "well")
    assert volumes.ids == tuple(f"s{number:02d}" for number in range(12))
    assert [volumes.class_names[target] for target in volumes.targets[:2]] == ["well", "sick"]
    assert sum(len(volumes.indices(split)) for split in ("train", "validation", "test")) == 12
    assert len(volumes.indices("train")) == 6
    assert len(set(zip(volumes.groups, volumes.split, strict=True))) == 6  # six patients, none in two splits
    for number, name in enumerate(volumes.ids):
        original = nibabel.load(folder / f"{name}.nii.gz").get_fdata()
        stored = volumes.read(number)[0][0]
        assert np.array_equal(stored, original)
        foreground = original[original > 0]
        wanted = (original - foreground.mean()) / foreground.std()
        assert np.allclose(stored * volumes.scale[number] + volumes.offset[number], wanted, atol=1e-4)
    assert volumes.source[0] == {
        "name": "s00.nii.gz",
        "size": (folder / "s00.nii.gz").stat().st_size,
        "sha256": hashlib.sha256((folder / "s00.nii.gz").read_bytes()).hexdigest(),
    }
    assert volumes.packing["normalise"] == "zscore" and volumes.packing["dtype"] == "int16"
    printed = capsys.readouterr().out
    assert volumes.fingerprint in printed and "12 samples of 1x6x7x8 int16" in printed
    assert not set(tmp_path.iterdir()) - {folder, labels, out}


def test_packing_twice_gives_the_same_samples(scans, tmp_path):
    folder, labels = scans
    for name in ("a.h5", "b.h5"):
        assert run(folder, "-o", tmp_path / name, "--labels", labels, "--seed", 5) == 0
    assert open_volumes(tmp_path / "a.h5").fingerprint == open_volumes(tmp_path / "b.h5").fingerprint


def test_the_tables_own_split_wins(scans, tmp_path):
    folder, _ = scans
    rows = [f"s{number:02d}.nii.gz\t{number % 2}\t{'test' if number < 5 else 'train'}" for number in range(12)]
    labels = table(tmp_path / "l.tsv", rows, "id\tlabel\tsplit")
    assert run(folder, "-o", tmp_path / "o.h5", "--labels", labels) == 0
    assert open_volumes(tmp_path / "o.h5").indices("test").tolist() == [0, 1, 2, 3, 4]


@pytest.fixture
def atlas(tmp_path):
    """Two brains on different grids and an atlas at half their resolution: left half of the world 7, right half 9."""
    folder = tmp_path / "brains"
    folder.mkdir()
    fine = np.diag([1.0, 1.0, 1.0, 1.0])
    for name, axes, shape, origin in (
        ("one", "LAS", (20, 22, 24), (-10, 0, 0)),
        ("two", "LIP", (24, 20, 20), (-12, 1, 2)),
    ):
        affine = fine.copy()
        affine[:3, 3] = origin
        x = np.indices(shape)[0] + origin[0]
        save(folder / f"{name}.nii.gz", (x + 100).astype(np.int16), axes, affine)
    coarse = np.diag([2.0, 2.0, 2.0, 1.0])
    coarse[:3, 3] = (-13, 0, 0)
    halves = np.where(np.indices((14, 12, 12))[0] * 2 - 13 < 0, 7, 9).astype(np.int32)
    save(tmp_path / "atlas.nii.gz", halves, "LAS", coarse)
    table(tmp_path / "regions.csv", ["7,left", "9,right", "11,left"], "value,label")
    return folder, ["--atlas", tmp_path / "atlas.nii.gz", "--regions", tmp_path / "regions.csv"]


def test_patches_carry_the_atlas_class_of_their_centre_in_world_space(atlas, tmp_path):
    folder, options = atlas
    out = tmp_path / "p.h5"
    assert run(folder, "-o", out, *options, "--patch", "6,4,5", "--per-class", 30, "--split", "50/50/0") == 0
    volumes = open_volumes(out)
    assert volumes.shape == (1, 6, 4, 5) and len(volumes) == 120
    assert np.bincount(volumes.targets).tolist() == [60, 60] and volumes.class_names == ("left", "right")
    for sample in range(len(volumes)):
        patch = volumes.read(sample)[0][0]
        centre = volumes.affine[sample] @ (3, 2, 2, 1)
        assert patch[3, 2, 2] - 100 == centre[0]  # voxels hold their x in mm, so the affine moved with the patch
        assert volumes.class_names[volumes.targets[sample]] == ("left" if centre[0] < 0 else "right")
    assert len(set(volumes.ids)) == 120 and set(volumes.groups) == {"one", "two"}
    for split in ("train", "validation"):
        assert len({volumes.groups[sample] for sample in volumes.indices(split)}) == 1
    places = {(group, *affine[:3, 3]) for group, affine in zip(volumes.groups, volumes.affine, strict=True)}
    assert len(places) == 120  # drawn without repeats


def test_patches_of_a_table_take_the_volumes_label(scans, tmp_path):
    folder, labels = scans
    assert run(folder, "-o", tmp_path / "p.h5", "--labels", labels, "--patch", 4, "--per-class", 3) == 0
    volumes = open_volumes(tmp_path / "p.h5")
    assert volumes.shape == (1, 4, 4, 4) and len(volumes) == 36 and volumes.source_shape[0].tolist() == [6, 7, 8]


def spoil_nan(folder):
    data = world((6, 7, 8)).astype(np.float32)
    data[1, 2, 3] = np.nan
    save(folder / "s03.nii.gz", data)


def spoil_text(folder):
    (folder / "s03.nii.gz").write_text("hello")


def spoil_5d(folder):
    nibabel.save(nibabel.Nifti1Image(np.zeros((6, 7, 8, 2, 3), np.int16), np.eye(4)), folder / "s03.nii.gz")


def spoil_cut(folder):
    raw = (folder / "s03.nii.gz").read_bytes()
    (folder / "s03.nii.gz").write_bytes(raw[: 3 * len(raw) // 4])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(spoil_nan, "1 voxels are NaN"), (spoil_5d, "it is 5D"), (spoil_cut, "broken data"), (spoil_text, "not NIfTI")],
)
def test_a_volume_that_cannot_be_used_is_told_with_its_reason(scans, tmp_path, capsys, spoil, reason):
    folder, labels = scans
    spoil(folder)
    assert run(folder, "-o", tmp_path / "o.h5", "--labels", labels) == 1
    error = capsys.readouterr().err.splitlines()
    assert not (tmp_path / "o.h5").exists() and "1 of 12 cannot be packed" in error[-1] and "--skip-bad" in error[-1]
    lines = [line for line in error if "s03.nii.gz" in line]
    assert len(lines) == 1 and reason in lines[0]
    assert run(folder, "-o", tmp_path / "o.h5", "--labels", labels, "--skip-bad") == 0
    assert "1 source(s) left out" in capsys.readouterr().err
    volumes = open_volumes(tmp_path / "o.h5")
    assert len(volumes) == 11 and "s03" not in volumes.ids and volumes.verify() == []


@pytest.mark.parametrize("value", [1e39, -1e300])
def test_a_value_beyond_float32_makes_a_volume_unusable(scans, tmp_path, capsys, value):
    folder, labels = scans
    data = world((6, 7, 8)).astype(np.float64)
    data[1, 2, 3] = value
    save(folder / "s03.nii.gz", data)
    assert run(folder, "-o", tmp_path / "o.h5", "--labels", labels, "--skip-bad") == 0
    assert f"s03.nii.gz: its value {value:g} is beyond float32's range" in capsys.readouterr().err
    assert "s03" not in open_volumes(tmp_path / "o.h5").ids


@pytest.mark.parametrize(("high", "dtype"), [(60_000, "int16"), (70_000, "float32")])
def test_wide_integers_are_kept_as_the_values_allow(scans, tmp_path, high, dtype):
    folder, labels = scans
    data = world((6, 7, 8)).astype(np.int32)
    data[1, 2, 3] = high
    save(folder / "s03.nii.gz", data)
    save(folder / "s04.nii.gz", noise(seed=4).astype(np.int32) - 1024)
    assert run(folder, "-o", tmp_path / "o.h5", "--labels", labels, "--normalise", "none") == 0
    volumes = open_volumes(tmp_path / "o.h5")
    assert volumes.dtype == dtype
    for number, wanted in ((3, data), (4, noise(seed=4) - 1024)):
        found = volumes.read(number)[0][0] * volumes.scale[number][0] + volumes.offset[number][0]
        assert np.array_equal(found, wanted)


def test_a_class_that_cannot_be_learned_is_told(scans, tmp_path, capsys):
    folder, _ = scans
    rows = [f"s{n:02d},{'rare' if n == 3 else 'common'},{'test' if n < 5 else ''}" for n in range(12)]
    labels = table(tmp_path / "l.csv", rows, "id,label,split")
    assert run(folder, "-o", tmp_path / "o.h5", "--labels", labels) == 0
    assert "class 'rare' has no sample in train" in capsys.readouterr().err


def missing_source(folder, labels):
    return [folder, folder / "absent.nii.gz", "--labels", labels]


def unknown_id(folder, labels):
    labels.write_text(labels.read_text() + "s1O,well,p9\n")
    return [folder, "--labels", labels]


def no_row(folder, labels):
    save(folder / "zz.nii.gz", world())
    return [folder, "--labels", labels]


def twice_in_table(folder, labels):
    labels.write_text(labels.read_text() + "s01,well,p9\n")
    return [folder, "--labels", labels]


def twice_a_file(folder, labels):
    save(folder / "s01.nii", world())
    return [folder, "--labels", labels]


def other_shape(folder, labels):
    save(folder / "s01.nii.gz", world())
    return [folder, "--labels", labels]


def all_bad(folder, labels):
    for path in folder.iterdir():
        path.write_text("hello")
    return [folder, "--labels", labels]


def class_lost(folder, labels):
    spoil_cut(folder)
    save(folder / "s05.nii.gz", np.full((6, 7, 8), np.nan, np.float32))
    labels.write_text(labels.read_text().replace("s03,sick", "s03,rare").replace("s05,sick", "s05,rare"))
    return [folder, "--labels", labels, "--skip-bad"]


def edit_table(old, new):
    def build(folder, labels):
        labels.write_text(labels.read_text().replace(old, new, 1))
        return [folder, "--labels", labels]

    return build


def with_options(*options):
    return lambda folder, labels: [folder, *(labels if option == "T" else option for option in options)]


WRONG = {
    "missing file": (missing_source, "absent.nii.gz does not exist"),
    "unknown id": (unknown_id, r"no file is given for 's1O' \(did you mean 's1[01]'\?\)"),
    "file without a row": (no_row, "no line names 'zz'"),
    "id twice in the table": (twice_in_table, "line 14 gives the id 's01' a second time"),
    "id twice in the files": (twice_a_file, "two files have the id 's01'"),
    "no class": (edit_table("well", ""), "line 2 has no label"),
    "no column": (edit_table("label", "lable"), r"no column 'label' \(is it 'lable'\?\)"),
    "column twice": (edit_table("id,label,patient", "id,label,label"), "has the column 'label' 2 times"),
    "class lost": (
        class_lost,
        r"class 'rare' has no .*s03.nii.gz was skipped: broken data \(.*s05.nii.gz was skipped: 336 .* NaN.*kept",
    ),
    "no labels": (with_options(), "give --labels TABLE"),
    "no table": (with_options("--labels", "absent.csv"), "absent.csv cannot be read"),
    "bad group": (with_options("--labels", "T", "--group", "patent"), r"\(is it 'patient'\?\)"),
    "bad split": (with_options("--labels", "T", "--split", "70/20/20"), "does not add up to 100"),
    "bad patch": (
        with_options("--labels", "T", "--patch", "4,4", "--per-class", "1"),
        "2 numbers, but the data have 3 axes",
    ),
    "patch too large": (with_options("--labels", "T", "--patch", "7", "--per-class", "1"), "smaller than the patch"),
    "how many": (with_options("--labels", "T", "--patch", "4"), "add --per-class"),
    "size and patch": (
        with_options("--labels", "T", "--patch", "4", "--per-class", "1", "--size", "4"),
        "one of the two",
    ),
    "atlas alone": (with_options("--atlas", "a.nii"), "give both --atlas"),
    "differ in shape": (other_shape, r"differ in shape: 6x7x8 \(11\), 9x10x11 \(1\), such as 's01'; add --size"),
    "nothing usable": (all_bad, "nothing can be packed; the first, .*s00.nii.gz: it is not NIfTI"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_users_mistake_is_one_line_and_exit_code_2_and_nothing_is_left(scans, tmp_path, capsys, case):
    folder, labels = scans
    build, message = WRONG[case]
    arguments = build(folder, labels)
    before = set(tmp_path.iterdir())
    code = run(*arguments, "-o", tmp_path / "out.h5")
    printed = capsys.readouterr().err.splitlines()
    assert code == 2 and len(printed) == 1 and re.search(message, printed[0])
    left = set(tmp_path.iterdir()) - before
    if case == "class lost":  # after all were read
        assert [path.name for path in left] == [".out.h5.packing"] and "is kept" in printed[0]
    else:
        assert not left


def test_an_output_in_a_missing_folder_is_refused(scans, tmp_path, capsys):
    folder, labels = scans
    assert run(folder, "-o", tmp_path / "no" / "out.h5", "--labels", labels) == 2
    assert "its folder does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("victim", ["source", "link", "labels", "atlas", "regions", "other", "empty"])
def test_what_is_no_hdf5_file_is_never_overwritten(atlas, tmp_path, capsys, victim):
    folder, options = atlas
    labels = table(tmp_path / "l.csv", ["one,p1", "two,p2"], "id,group")
    target = {"source": folder / "two.nii.gz", "labels": labels, "atlas": options[1], "regions": options[3]}.get(victim)
    if target is None:
        target = tmp_path / "target.h5"
        target.symlink_to(folder / "one.nii.gz") if victim == "link" else target.write_text(
            "" if victim == "empty" else "notes"
        )
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments = [folder, "--labels", labels, *options, "--patch", 4, "--per-class", 5, "--split", "50/50/0"]
    assert run(*arguments, "-o", folder / ".." / target.relative_to(tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ("exists and is not an HDF5 file" if victim in ("other", "empty") else "would overwrite the input") in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for _ in range(2):  # an older volume file is replaced
        assert run(*arguments, "-o", tmp_path / "new.h5") == 0


def test_one_group_cannot_fill_three_splits(atlas, tmp_path, capsys):
    folder, options = atlas
    assert run(folder / "one.nii.gz", "-o", tmp_path / "o.h5", *options, "--patch", 4, "--per-class", 5) == 2
    assert "1 free group(s) cannot fill train and validation and test" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["jobs.pack", "jobs.inspect", "datasets.layout", "datasets.packing.packer"])
def test_no_torch_is_imported(module):
    code = f"import sys, {module}; bad = {{'torch', 'matplotlib'}} & set(sys.modules); sys.exit(', '.join(bad) or 0)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_help_names_the_command_that_people_type(capsys):
    for command in (pack, inspect):
        with pytest.raises(SystemExit) as left:
            command.main(["--help"])
        assert left.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: {command.PROG}")


def test_progress_counts_bytes_and_sources(scans, tmp_path):
    folder, labels = scans
    seen = []
    options = pack.parse([str(folder), "-o", str(tmp_path / "o.h5"), "--labels", str(labels)])
    pack.pack(options, lambda *step: seen.append(step))
    size = sum(path.stat().st_size for path in folder.iterdir())
    *seen, last = seen
    assert last[2:] == (12, 12, "samples written") and last[0] == last[1]
    assert [step[2:] for step in seen] == [(number, 12, "sources") for number in range(1, 13)]
    assert seen[-1][:2] == (size, size) and all(step[1] == size for step in seen)
    assert [step[0] for step in seen] == sorted({step[0] for step in seen})
