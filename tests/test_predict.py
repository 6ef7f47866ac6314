"""hpc predict: what a network with a known answer says of new files, where it lies, and what is refused."""

import json
import shutil

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from datasets import open_volumes
from hpc.preempt import ExitCode
from jobs import predict
from tests.inferred import make_run, rows_of
from tests.scans import noise, run, save, table
from tests.test_replay import oblique


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pack_maps(folder, *options, shape=(9, 10, 11), names="abcd", affine=None):
    """Volumes with masks of two classes, half train, half validation."""
    (folder / "scans").mkdir(exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    for seed, name in enumerate(names):
        save(folder / "scans" / f"{name}.nii.gz", noise(shape, seed), affine=affine)
        save(folder / "masks" / f"{name}.nii.gz", (noise(shape, seed) > 450).astype(np.uint8), affine=affine)
    out = folder / "maps.h5"
    common = ("--masks", folder / "masks", "--classes", "air,lesion", "--split", "50/50/0", "--duplicates", "keep")
    assert run(folder / "scans", "-o", out, *common, *options) == 0
    return out


def pack_classes(folder, *options, rows=("a,x", "b,y", "c,z", "d,x"), shape=(6, 7, 8)):
    (folder / "scans").mkdir(exist_ok=True)
    for seed, row in enumerate(rows):
        save(folder / "scans" / f"{row.partition(',')[0]}.nii.gz", noise(shape, seed))
    out, labels = folder / "classes.h5", table(folder / "labels.csv", rows, "id,label")
    common = ("--labels", labels, "--split", "50/50/0", "--duplicates", "keep")
    assert run(folder / "scans", "-o", out, *common, *options) == 0
    return out


def ask(*arguments):
    return predict.main([str(argument) for argument in arguments])


def bright(data):
    """What the network of class Bright calls class 1."""
    return data > data[data > 0].mean()


@pytest.fixture
def maps(tmp_path):
    data = pack_maps(tmp_path, "--ragged")
    return make_run(tmp_path / "run", data, "Bright", "data.patch=[4,4,4]")


@pytest.fixture
def classes(tmp_path):
    return make_run(tmp_path / "run", pack_classes(tmp_path, "--normalise", "unit"), "Mean")


@pytest.mark.parametrize("axes", ["RAS", "LIP", "PSR"])
def test_label_maps_lie_on_their_sources_without_the_training_data(maps, tmp_path, axes, capsys):
    """Voxel by voxel what the source says, in windows of the training's size, in the source's own orientation."""
    (tmp_path / "maps.h5").unlink()
    new = save(tmp_path / "new.nii.gz", noise((13, 9, 7), 9), axes, oblique((1, 1.5, 2)))
    assert ask(new, "--run", maps.path, "-o", tmp_path / "out") == ExitCode.DONE
    image, mask = nibabel.load(new), nibabel.load(tmp_path / "out" / "new.nii.gz")
    assert mask.shape == image.shape and np.array_equal(mask.affine, image.affine)
    assert mask.get_data_dtype() == np.uint8
    wanted = bright(np.asarray(image.dataobj))
    assert np.array_equal(np.asarray(mask.dataobj), wanted)
    rows = rows_of(tmp_path / "out" / "volumes.csv")
    assert [(row["id"], row["class"], row["file"]) for row in rows] == [
        ("new", "air", "new.nii.gz"),
        ("new", "lesion", "new.nii.gz"),
    ]
    assert int(rows[1]["voxels"]) == wanted.sum() and float(rows[1]["ml"]) == pytest.approx(wanted.sum() * 3 / 1000)
    told = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert told["labels"] == {"air": 0, "lesion": 1} and told["runs"][0]["checkpoint"] == "g001-s00000004"
    assert "run: 1 of 1 files predicted" in capsys.readouterr().out


def test_predicted_masks_can_be_packed_again(maps, tmp_path):
    """predict.json names their values, and their place is the source's."""
    assert ask(tmp_path / "scans", "--run", maps.path, "-o", tmp_path / "out") == ExitCode.DONE
    options = ("--masks", tmp_path / "out", "--classes", tmp_path / "out" / "predict.json", "--split", "100/0/0")
    assert run(tmp_path / "scans", "-o", tmp_path / "again.h5", *options, "--ragged", "--duplicates", "keep") == 0
    volumes = open_volumes(tmp_path / "again.h5")
    assert volumes.class_names == ("air", "lesion")
    data, labels = volumes.read(0)
    assert np.array_equal(labels, bright(data[0]))


def test_resampled_and_cropped_files_come_back(tmp_path, capsys):
    """1 mm from 2 mm: a big bright box is found where it is, and what the crop leaves out is class 0, and told."""
    data = pack_maps(tmp_path, "--spacing", "1", "--size", "20", affine=np.diag([2, 2, 2, 1.0]))
    known = make_run(tmp_path / "run", data, "Bright")
    scan = np.full((16, 12, 10), 10, np.int16)
    scan[5:10, 3:8, 2:7] = 900
    scan[0] = 900
    new = save(tmp_path / "new.nii.gz", scan, "LIP", np.diag([2, 2, 2, 1.0]))
    assert ask(new, "--run", known.path, "-o", tmp_path / "out", "--probabilities") == ExitCode.DONE
    mask = nibabel.load(tmp_path / "out" / "new.nii.gz")
    found = nibabel.as_closest_canonical(mask).get_fdata()
    wanted = (scan > 100).astype(float)
    wanted[0] = 0  # outside of the crop: 20 of 32 mm are kept, and 20 of 24
    assert np.array_equal(found, wanted)
    assert "48% lies outside of what --size keeps: air there" in capsys.readouterr().out
    parts = nibabel.load(tmp_path / "out" / "new_probabilities.nii.gz")
    assert parts.shape == (*mask.shape, 2) and np.array_equal(parts.affine, mask.affine)
    assert np.allclose(parts.get_fdata().sum(-1), 1, atol=1e-5)
    assert np.array_equal(parts.get_fdata().argmax(-1), mask.get_fdata())


def test_classes_and_their_probabilities_go_to_a_table(classes, tmp_path):
    """One column per class, in digits enough to come back; batches do not matter."""
    files = [save(tmp_path / f"n{seed}.nii.gz", noise((6, 7, 8), 20 + seed)) for seed in range(5)]
    assert ask(*files, "--run", classes.path, "-o", tmp_path / "out") == ExitCode.DONE
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert list(rows[0]) == ["id", "predicted", "p_x", "p_y", "p_z"] and len(rows) == 5
    for seed, row in enumerate(rows):
        scan = noise((6, 7, 8), 20 + seed).astype(np.float64)
        mean = ((scan - scan.min()) / (scan.max() - scan.min())).mean()
        logits = -np.abs(mean - np.arange(3))
        wanted = np.exp(logits) / np.exp(logits).sum()
        told = [float(row[f"p_{name}"]) for name in "xyz"]
        assert told == pytest.approx(wanted, abs=1e-6) and sum(told) == pytest.approx(1, abs=1e-6)
        assert row["predicted"] == "xyz"[int(np.argmax(told))] and len(row["p_x"]) > 8
    assert ask(*files, "--run", classes.path, "-o", tmp_path / "one", "--batch", 1) == ExitCode.DONE
    assert rows_of(tmp_path / "one" / "predictions.csv") == rows


def test_an_ensemble_is_the_mean_of_probabilities(classes, tmp_path):
    other = make_run(tmp_path / "other", tmp_path / "classes.h5", "Mean", "model.sign=-3")
    new = save(tmp_path / "new.nii.gz", noise((6, 7, 8), 20))
    for name, runs in {"a": [classes], "b": [other], "both": [classes, other]}.items():
        words = [word for one in runs for word in ("--run", one.path)]
        assert ask(new, *words, "-o", tmp_path / name) == ExitCode.DONE
    told = {
        name: np.array([float(rows_of(tmp_path / name / "predictions.csv")[0][f"p_{key}"]) for key in "xyz"])
        for name in ("a", "b", "both")
    }
    assert told["both"] == pytest.approx((told["a"] + told["b"]) / 2, abs=1e-7)
    assert not np.allclose(told["a"], told["b"], atol=1e-3)


def test_an_ensemble_of_segmentations(maps, tmp_path):
    """One says the opposite, but less surely: the other wins everywhere."""
    other = make_run(tmp_path / "other", tmp_path / "maps.h5", "Bright", "data.patch=[6,5,4]", "model.sign=-0.1")
    new = save(tmp_path / "new.nii.gz", noise((13, 9, 7), 9))
    words = ("--run", maps.path, "--run", other.path, "-o", tmp_path / "out", "--flips", "0,2")
    assert ask(new, *words) == ExitCode.DONE
    mask = np.asarray(nibabel.load(tmp_path / "out" / "new.nii.gz").dataobj)
    assert np.array_equal(mask, bright(noise((13, 9, 7), 9)))


def test_bad_files_are_a_line_each_and_the_others_go_on(classes, tmp_path, capsys):
    good = save(tmp_path / "good.nii.gz", noise((6, 7, 8), 1))
    (tmp_path / "cut.nii.gz").write_bytes(good.read_bytes()[:200])
    np.save(tmp_path / "wide.npy", noise((6, 7, 9), 2))
    np.save(tmp_path / "four.npy", np.zeros((4, 6, 7, 8), np.int16))
    files = [tmp_path / name for name in ("cut.nii.gz", "wide.npy", "four.npy")]
    assert ask(*files, good, "--run", classes.path, "-o", tmp_path / "out") == ExitCode.CRASH == 1
    told = capsys.readouterr()
    lines = told.err.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith("hpc predict: bad: ") for line in lines)
    assert "it is 6x7x9 when prepared as the training data, which are 6x7x8: add --windows" in lines[1]
    assert "4 channel(s) and 3 axes, and the training data 1 channel(s)" in lines[2]
    assert "1 of 4 files predicted" in told.out
    assert [row["id"] for row in rows_of(tmp_path / "out" / "predictions.csv")] == ["good"]
    words = ("--run", classes.path, "-o", tmp_path / "windows", "--windows", "--overlap", "0")
    assert ask(tmp_path / "wide.npy", good, *words) == ExitCode.DONE


def test_what_is_not_finite_is_bad(tmp_path, capsys):
    known = make_run(tmp_path / "run", pack_classes(tmp_path, "--normalise", "none"), "Broken")
    dark, light = np.full((6, 7, 8), -5, np.int16), np.full((6, 7, 8), 5, np.int16)
    files = [save(tmp_path / f"{name}.nii.gz", data) for name, data in (("dark", dark), ("light", light))]
    assert ask(*files, "--run", known.path, "-o", tmp_path / "out") == ExitCode.CRASH
    assert "light.nii.gz: the network's answer is not finite" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "out" / "predictions.csv")) == 1


def test_a_network_that_fails_says_on_what(tmp_path, capsys):
    known = make_run(tmp_path / "run", pack_classes(tmp_path), "Fails")
    capsys.readouterr()
    assert ask(tmp_path / "scans", "--run", known.path, "-o", tmp_path / "out") == ExitCode.CRASH
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4 and all("Fails gives (112, 3) for an input (1, 1, 6, 7, 8)" in line for line in lines)


def test_a_second_call_does_what_is_left(maps, tmp_path, monkeypatch):
    """After a stop; a file that has changed, or whose map is gone, is predicted again; nothing else is read."""
    from datasets.packing.replay import Replay

    asked, read = [], Replay.read
    monkeypatch.setattr(Replay, "read", lambda self, source: asked.append(source.id) or read(self, source))
    words = ("--run", maps.path, "-o", tmp_path / "out")
    assert ask(tmp_path / "scans" / "a.nii.gz", *words) == ExitCode.DONE
    assert ask(tmp_path / "scans", *words) == ExitCode.DONE
    assert asked == ["a", "b", "c", "d"]
    before = (tmp_path / "out" / "volumes.csv").read_bytes()
    asked.clear()
    (tmp_path / "out" / "b.nii.gz").unlink()
    save(tmp_path / "scans" / "c.nii.gz", noise((9, 10, 11), 77))
    assert ask(tmp_path / "scans", *words) == ExitCode.DONE
    assert asked == ["b", "c"]
    rows = rows_of(tmp_path / "out" / "volumes.csv")
    assert [row["id"] for row in rows] == ["a", "a", "b", "b", "c", "c", "d", "d"]
    assert (tmp_path / "out" / "volumes.csv").read_bytes() != before
    assert not [
        path for path in (tmp_path / "out").iterdir() if path.name.startswith(".") and "predict" not in path.name
    ]


def test_a_stop_in_the_middle_keeps_what_is_done(maps, tmp_path, monkeypatch, capsys):
    from jobs.inference.predicting import Predictor

    save_map, done = Predictor.save_map, []

    def stops(self, folder, answer, probabilities):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(answer.source.id)
        return save_map(self, folder, answer, probabilities)

    words = (tmp_path / "scans", "--run", maps.path, "-o", tmp_path / "out")
    monkeypatch.setattr(Predictor, "save_map", stops)
    assert ask(*words) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    monkeypatch.setattr(Predictor, "save_map", save_map)
    seen = {name: (tmp_path / "out" / f"{name}.nii.gz").stat().st_mtime_ns for name in done}
    assert ask(*words) == ExitCode.DONE
    assert seen == {name: (tmp_path / "out" / f"{name}.nii.gz").stat().st_mtime_ns for name in done}
    assert len(rows_of(tmp_path / "out" / "volumes.csv")) == 8


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert ask(*arguments) == ExitCode.BAD_INPUT
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.strip().splitlines()) == 1
    return told.err


def test_the_output_is_a_folder_and_a_file_named_twice_is_one(maps, tmp_path, capsys):
    new = tmp_path / "scans" / "a.nii.gz"
    (tmp_path / "file").write_text("")
    assert "is a file; name a folder" in refusal(capsys, new, "--run", maps.path, "-o", tmp_path / "file")
    assert "is a file; name a folder" in refusal(capsys, new, "--run", maps.path, "-o", tmp_path / "file" / "below")
    assert ask(new, new, new.parent, "--run", maps.path, "-o", tmp_path / "out") == ExitCode.DONE
    assert "4 of 4 files predicted" in capsys.readouterr().out


def test_a_bad_value_is_one_line(maps, tmp_path, capsys):
    text = refusal(capsys, tmp_path / "scans", "--run", maps.path, "-o", tmp_path / "out", "--batch=x")
    assert "--batch" in text and "'x'" in text and "usage:" not in text


def test_files_of_others_are_not_replaced(maps, tmp_path, capsys):
    scans, out = tmp_path / "scans", tmp_path / "out"
    words = (scans, "--run", maps.path)
    assert "would replace an input" in refusal(capsys, scans / "a.nii.gz", "--run", maps.path, "-o", scans)
    assert "would replace an input" in refusal(capsys, scans / "a.nii.gz", "--run", maps.path, "-o", scans, "--force")
    assert "whose files are predicted" in refusal(capsys, *words, "-o", scans / "out")
    out.mkdir()
    (out / "b.nii.gz").write_text("mine")
    assert "b.nii.gz is there already" in refusal(capsys, *words, "-o", out)
    assert [path.name for path in out.iterdir()] == ["b.nii.gz"], "a refusal leaves nothing behind"
    (out / "b.nii.gz").unlink()
    (out / "volumes.csv").write_text("mine")
    assert "volumes.csv is there already" in refusal(capsys, *words, "-o", out)
    assert (out / "volumes.csv").read_text() == "mine"
    assert ask(*words, "-o", out, "--force") == ExitCode.DONE
    told = refusal(capsys, *words, "-o", out, "--flips", "0")
    assert "another request" in told and "--force" in told
    assert ask(*words, "-o", out, "--flips", "0", "--force") == ExitCode.DONE
    assert json.loads((out / "predict.json").read_text())["flips"] == [0]


@pytest.fixture
def two(tmp_path):
    """Runs on data that were packed differently."""
    first = make_run(tmp_path / "first", pack_classes(tmp_path), "Mean")
    shutil.copy(tmp_path / "classes.h5", tmp_path / "kept.h5")
    second = make_run(tmp_path / "second", pack_classes(tmp_path, "--size", "5"), "Mean")
    third = make_run(tmp_path / "third", pack_classes(tmp_path, rows=("a,x", "b,y", "c,x", "d,y")), "Mean")
    return first, second, third


def test_runs_that_do_not_belong_together_are_no_ensemble(two, tmp_path, capsys):
    first, second, third = (one.path for one in two)
    words = (tmp_path / "scans", "-o", tmp_path / "out", "--run", first)
    told = refusal(capsys, *words, "--run", second)
    assert "second was trained on data with --size 5, not None as in first" in told
    told = refusal(capsys, *words, "--run", third)
    assert "third was trained on data with classes x, y, not x, y, z as in first" in told


def test_options_that_make_no_sense_are_refused(maps, tmp_path, capsys):
    words = (tmp_path / "scans", "-o", tmp_path / "out", "--run", maps.path)
    for options, reason in (
        (("--windows",), "--windows is for classifiers"),
        (("--window", "4,4"), "has 2 sizes, and the data have 3 axes"),
        (("--window", "4,4,0"), "is none"),
        (("--flips", "3"), "axes are 0 (x), 1 (y), 2 (z)"),
        (("--overlap", "1.5"), "overlap 1.5 must be"),
        (("--batch", "0"), "--batch 0"),
        (("--checkpoint", "bets"), "did you mean 'best'"),
    ):
        assert reason in refusal(capsys, *words, *options)
    assert "does not exist" in refusal(capsys, tmp_path / "gone.nii.gz", *words[1:])
    assert not (tmp_path / "out").exists()


def test_probabilities_of_a_classifier_are_in_the_table_anyway(classes, tmp_path, capsys):
    words = (tmp_path / "scans", "-o", tmp_path / "out", "--run", classes.path, "--probabilities")
    assert "those of a classification are in the table" in refusal(capsys, *words)


def test_nets_of_packed_patches_need_windows(tmp_path, capsys):
    """A whole file has no one place: the mean over all windows is asked for by name."""
    data = pack_classes(tmp_path, "--patch", "4", "--per-class", "3", shape=(9, 9, 9))
    known = make_run(tmp_path / "run", data, "Mean")
    words = (tmp_path / "scans", "-o", tmp_path / "out", "--run", known.path)
    assert "add --windows" in refusal(capsys, *words)
    assert ask(*words, "--windows") == ExitCode.DONE
    assert len(rows_of(tmp_path / "out" / "predictions.csv")) == 4


def test_data_that_were_not_packed_cannot_be_replayed(tmp_path, capsys):
    from tests import tiny_run

    known = make_run(tmp_path / "run", tiny_run.make_data(tmp_path), "Mean")
    new = save(tmp_path / "new.nii.gz", noise((8, 8, 8)))
    assert "not made by 'hpc pack'" in refusal(capsys, new, "--run", known.path, "-o", tmp_path / "out")


def test_a_run_without_data_json_reads_its_data_file(classes, tmp_path, capsys):
    """As those of earlier versions; when both are gone, the sentence says so."""
    classes.data.unlink()
    words = (tmp_path / "scans", "-o", tmp_path / "out", "--run", classes.path)
    assert ask(*words) == ExitCode.DONE
    (tmp_path / "classes.h5").unlink()
    assert "has no data.json, and its data file cannot be read" in refusal(capsys, *words)


def test_images_give_images(tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "masks").mkdir()
    for seed, name in enumerate("abcd"):
        pixels = noise((12, 16), seed, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "scans" / f"{name}.png")
        Image.fromarray((pixels > 120).astype(np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    options = ("--masks", tmp_path / "masks", "--classes", "dark,light", "--split", "50/50/0", "--duplicates", "keep")
    assert run(tmp_path / "scans", "-o", tmp_path / "maps.h5", *options) == 0
    known = make_run(tmp_path / "run", tmp_path / "maps.h5", "Bright")
    assert ask(tmp_path / "scans", "--run", known.path, "-o", tmp_path / "out", "--probabilities") == ExitCode.DONE
    found = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert np.array_equal(found, bright(noise((12, 16), 0, 255).astype(np.uint8)))
    assert np.load(tmp_path / "out" / "a_probabilities.npy").shape == (2, 12, 16)
    assert rows_of(tmp_path / "out" / "volumes.csv")[0]["ml"] == ""
