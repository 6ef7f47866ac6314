"""hpc evaluate of the other tasks, of several runs, of folds, of other files: against doing it by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import open_volumes
from hpc.experiment import load
from hpc.preempt import ExitCode
from jobs import evaluate as command
from jobs.inference.members import Manner, load_members
from jobs.inference.scoring import as_logits, score
from tests import tiny_tasks
from tests.inferred import answer, evaluate, make_run, rows_of
from tests.scans import noise, run, save, table
from tests.test_predict import bright, pack_maps

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pack_grouped(folder, *options, samples=12):
    """Two scans of each patient, in folds or splits; the class is nearly what the network of class Mean says."""
    (folder / "scans").mkdir(exist_ok=True)
    rows = []
    for seed in range(samples):
        scan = noise((4, 5, 6), seed, 100) + np.int16(300 * (seed % 3))
        scan[0, 0, 0], scan[0, 0, 1] = 0, 1000
        save(folder / "scans" / f"s{seed:02d}.nii.gz", scan)
        rows.append(f"s{seed:02d},{'xyz'[seed % 3]},p{seed // 2}")
    labels = table(folder / "labels.csv", rows, "id,label,group")
    common = ("--labels", labels, "--normalise", "unit", "--duplicates", "keep")
    assert run(folder / "scans", "-o", folder / "data.h5", *common, *options) == 0
    return folder / "data.h5"


@pytest.mark.parametrize("flips", [(), (0, 1)])
def test_whole_volumes_are_segmented_in_windows_of_the_trainings_size(tmp_path, flips):
    """The training's validation looked at the centres alone; here every voxel of every volume counts."""
    known = make_run(tmp_path / "run", pack_maps(tmp_path, "--ragged"), "Bright", "data.patch=[4,4,4]")
    _, found = evaluate(known, "validation", manner=Manner(flips=flips))
    assert found.notes == ("whole volumes in windows of 4x4x4, overlap 0.5",)
    volumes, matrix = found.volumes, np.zeros((2, 2), np.int64)
    dices = []
    for sample in volumes.indices("validation"):
        data, labels = volumes.read(int(sample))
        called = bright(data[0]).astype(int)
        np.add.at(matrix, (labels, called), 1)
        dices.append(2 * (called & labels).sum() / (called.sum() + labels.sum()))
    assert found.scores.matrix.tolist() == matrix.tolist() and matrix.sum() == 2 * 990
    assert found.scores.metrics()["dice"] == pytest.approx(2 * matrix[1, 1] / (matrix[1].sum() + matrix[:, 1].sum()))
    name = "validation+flips-0-1" if flips else "validation"
    path = known.prediction(name, ".csv")
    assert command.main([str(known.path), *(["--flips", "0,1"] if flips else [])]) == ExitCode.DONE
    rows = rows_of(path)
    assert list(rows[0]) == ["id", "group", "loss", "dice", "dice_air", "dice_lesion"]
    assert [float(row["dice_lesion"]) for row in rows] == pytest.approx(dices, rel=1e-6)
    told = json.loads(known.prediction(name, ".json").read_text())
    assert told["metrics"]["dice_per_sample"] == pytest.approx(np.mean(dices))
    low, high = told["intervals"]["dice_per_sample"]
    assert low <= np.mean(dices) <= high


@pytest.mark.parametrize("task", ["multilabel", "segmentation"])
def test_windows_and_batches_agree(tmp_path, task):
    """One window of the whole sample, and an ensemble of a run with itself, are the run in batches."""
    data = tiny_tasks.make_data(tmp_path, task)
    known = make_run(tmp_path / "run", data, "Bright" if task == "segmentation" else "Mean")
    _, alone = evaluate(known, "validation")
    members = load_members([known, known], "best", CPU)
    twice = score(members, "validation", Manner())
    parts = score(members[:1], "validation", Manner(window=(6, 8), windows=task == "multilabel"))
    for other in (twice, parts):
        assert other.scores.metrics() == pytest.approx(alone.scores.metrics(), rel=1e-4, abs=1e-5)
        np.testing.assert_allclose(other.stored.losses, alone.stored.losses, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(other.stored.rows, alone.stored.rows, rtol=1e-4, atol=1e-5)
        assert other.ids == alone.ids == [f"validation{number}" for number in range(5)]


def test_a_table_of_labels(tmp_path, capsys):
    data = tiny_tasks.make_data(tmp_path, "multilabel")
    known = make_run(tmp_path / "run", data, "Mean")
    told = answer(capsys, known.path, "--bootstrap", 50)
    rows, volumes = rows_of(known.prediction("validation", ".csv")), open_volumes(data)
    for row, sample in zip(rows, volumes.indices("validation"), strict=True):
        names = [name for name, there in zip(volumes.class_names, volumes.targets[sample], strict=True) if there]
        assert row["target"] == "|".join(names)
        called = [name for name in volumes.class_names if float(row[f"p_{name}"]) > 0.5]
        assert row["predicted"] == "|".join(called)
    assert told["bootstrap"]["of"] == "samples" and set(told["intervals"]) <= set(told["metrics"])


def test_probabilities_become_logits_and_come_back():
    values = torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.5, 0.3]])
    torch.testing.assert_close(as_logits("classification", values).softmax(1), values)
    many = torch.tensor([[0.0, 1.0, 0.5, 0.9999]])
    torch.testing.assert_close(as_logits("multilabel", many).sigmoid(), many, rtol=0, atol=2e-7)
    assert torch.isfinite(as_logits("multilabel", many)).all()


def test_patients_are_drawn_as_wholes(tmp_path, capsys):
    known = make_run(tmp_path / "run", pack_grouped(tmp_path, "--split", "50/50/0"), "Mean")
    told = answer(capsys, known.path)
    assert told["bootstrap"] == {
        "resamples": 1000,
        "units": 3,
        "of": "groups",
        "confidence": 0.95,
        "seed": 0,
        "left_out": [],
    }
    assert command.main([str(known.path), "--confidence", "0.8", "--seed", "3"]) == ExitCode.DONE
    table = capsys.readouterr().out
    assert "in brackets 0.8 intervals: 1000 resamples of 3 groups" in table and "accuracy" in table
    again = answer(capsys, known.path)
    assert again == told
    assert {row["group"] for row in rows_of(known.prediction("validation", ".csv"))} <= {f"p{n}" for n in range(6)}
    assert "intervals" not in answer(capsys, known.path, "--bootstrap", 0)


def test_one_patient_gives_no_interval(tmp_path, capsys):
    """It would have no width, as if the metric were known exactly."""
    known = make_run(tmp_path / "run", pack_grouped(tmp_path, "--split", "50/50/0", samples=4), "Mean")
    told = answer(capsys, known.path)
    assert "intervals" not in told and "no intervals: there is one group of samples" in told["notes"][0]


@pytest.fixture
def folds(tmp_path):
    """Three runs, one for each fold."""
    data = pack_grouped(tmp_path, "--folds", "3", "--split", "50/0/50")
    return [make_run(tmp_path / f"fold{k}", data, "Mean", f"data.fold={k}", f"model.sign={k + 1}") for k in range(3)]


def test_folds_score_each_sample_by_the_run_that_has_not_seen_it(folds, tmp_path, capsys):
    paths = [one.path for one in folds]
    told = answer(capsys, *paths, "-o", tmp_path / "out")
    assert told["notes"] == ["each sample by the runs of its fold, which have not seen it (3 folds)"]
    rows = {row["id"]: row for row in rows_of(tmp_path / "out" / "validation.csv")}
    assert len(rows) == told["samples"] == 6
    for number, one in enumerate(folds):
        _, alone = evaluate(one, "validation")
        assert len(alone.ids) == 2
        for id, values in zip(alone.ids, alone.stored.rows, strict=True):
            assert [float(rows[id][f"p_{name}"]) for name in "xyz"] == pytest.approx(values.tolist(), abs=1e-7), number
    moved = Path(load(folds[0].experiment)[0].data.file).rename(tmp_path / "moved.h5")
    assert answer(capsys, *paths, "--data", moved)["metrics"] == told["metrics"]
    moved.rename(load(folds[0].experiment)[0].data.file)
    two = answer(capsys, *paths[:2])
    assert two["samples"] == 4 and "1 of 3 folds have no run here: their samples are left out" in two["notes"]


def test_folds_are_an_ensemble_on_the_test_split(folds, capsys):
    told = answer(capsys, *(one.path for one in folds), "--split", "test")
    alone = [evaluate(one, "test")[1].stored.rows for one in folds]
    members = load_members(folds, "best", CPU)
    found = score(members, "test", Manner())
    np.testing.assert_allclose(found.stored.rows, np.mean(alone, axis=0), atol=1e-6)
    assert told["samples"] == 6 and told["notes"] == [] and len(told["runs"]) == 3


def mistake(capsys, *arguments):
    capsys.readouterr()
    assert command.main([str(argument) for argument in arguments]) == ExitCode.BAD_INPUT
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.strip().splitlines()) == 1
    return told.err


def test_what_folds_have_trained_on_is_no_test(folds, capsys):
    told = mistake(capsys, *(one.path for one in folds), "--split", "train")
    assert "each of the folds was trained on some of it; use validation or test" in told


def test_runs_on_other_files_are_not_scored_on_each_others_training(tmp_path, capsys):
    data = pack_grouped(tmp_path, "--split", "50/50/0")
    other = tmp_path / "other.h5"
    other.write_bytes(data.read_bytes())
    first = make_run(tmp_path / "first", data, "Mean")
    second = make_run(tmp_path / "second", other, "Mean", "model.sign=2")
    told = mistake(capsys, first.path, second.path)
    assert "name a file that none of them has seen: --data FILE.h5" in told
    assert answer(capsys, first.path, second.path, "--data", other, "--split", "validation")["samples"] == 6


def test_another_file_is_scored_whole(tmp_path, capsys):
    """Without --split, of all its samples, by whatever split they were packed."""
    known = make_run(tmp_path / "run", pack_grouped(tmp_path, "--split", "50/50/0"), "Mean")
    (tmp_path / "new").mkdir()
    new = pack_grouped(tmp_path / "new", "--split", "100/0/0", samples=9)
    told = answer(capsys, known.path, "--data", new)
    assert told["split"] == "all" and told["samples"] == 9 and told["data"] == str(new)
    assert len(rows_of(known.prediction("data-all", ".csv"))) == 9
    (tmp_path / "odd").mkdir()
    odd = pack_grouped(tmp_path / "odd", "--split", "100/0/0", "--size", "3")
    assert "has --size 3, not None as the data that run was trained on" in mistake(capsys, known.path, "--data", odd)
    assert "it has train" in mistake(capsys, known.path, "--data", new, "--split", "test")
    (tmp_path / "data.h5").unlink()
    told = answer(capsys, known.path, "--data", new, "--bootstrap", 0)
    assert "the training data cannot be read" in told["notes"][0] and told["samples"] == 9
    assert "data.h5" in mistake(capsys, known.path)


def test_several_runs_leave_nothing_without_a_folder(folds, tmp_path, capsys):
    assert command.main([*(str(one.path) for one in folds), "--split", "test"]) == ExitCode.DONE
    told = capsys.readouterr().out
    assert "nothing is written of several runs without -o DIR" in told and "3 runs, fold0 ... on test" in told
    assert not any(one.predictions.exists() for one in folds)


def test_a_mean_over_windows_of_a_classifier(tmp_path, capsys):
    """Trained on boxes about the centre; with --windows all of the volume counts."""
    known = make_run(tmp_path / "run", pack_grouped(tmp_path, "--split", "50/50/0"), "Mean", "data.patch=[2,2,2]")
    centre = answer(capsys, known.path)
    assert centre["notes"] == []
    whole = answer(capsys, known.path, "--windows", "--overlap", "0")
    assert whole["notes"] == ["mean over windows of 2x2x2, overlap 0"]
    assert whole["metrics"]["loss"] != centre["metrics"]["loss"]


def test_other_ways_to_ask_have_names_of_their_own(tmp_path, capsys):
    """What the default evaluation left stays as it is, figures too; the journal knows both."""
    from hpc.journal import captions

    known = make_run(tmp_path / "run", pack_maps(tmp_path, "--ragged"), "Bright", "data.patch=[4,4,4]")
    assert command.main([str(known.path), "--bootstrap", "0"]) == ExitCode.DONE
    left = {path: path.read_bytes() for path in known.path.rglob("*") if path.is_file()}
    for words, name in (
        (("--flips", "0,2"), "validation+flips-0-2"),
        (("--window", "5,4,3", "--overlap", "0.25"), "validation+window-5x4x3+overlap-0.25"),
        (("--checkpoint", "last", "--flips", "1"), "validation+last+flips-1"),
    ):
        assert command.main([str(known.path), "--bootstrap", "0", *words]) == ExitCode.DONE
        assert known.prediction(name, ".csv").exists() and name in capsys.readouterr().out
        told = json.loads(known.prediction(name, ".json").read_text())
        assert told["flips"] == [int(axis) for axis in name.partition("flips-")[2].split("-") if axis]
        assert known.figure(f"confusion_matrix_{name}").exists()
    assert {path: path.read_bytes() for path in left} == left
    names = [f"roc_validation{end}" for end in ("+flips-0", "", "+last+flips-1")]
    assert sorted([*names, "curves", "mine"], key=captions.place) == ["curves", names[1], names[0], names[2], "mine"]
    assert captions.caption(names[0]).endswith("(validation+flips-0)")


def test_the_console_table_of_labels_has_ap_and_auc(tmp_path, capsys):
    known = make_run(tmp_path / "run", tiny_tasks.make_data(tmp_path, "multilabel"), "Mean")
    assert command.main([str(known.path), "--bootstrap", "0"]) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.split()[:1] == ["class"])
    assert head.split() == ["class", "support", "precision", "recall", "f1", "ap", "auc"]
    told = json.loads(known.prediction("validation", ".json").read_text())["per_class"]
    rows = {line.split()[0]: line.split() for line in lines[lines.index(head) + 1 :][: len(told)]}
    for row in told:
        assert rows[row["name"]][5] == ("nan" if row["ap"] is None else f"{row['ap']:.3f}")


def test_where_the_data_file_is_gone_data_is_named(tmp_path, capsys):
    known = make_run(tmp_path / "run", tiny_tasks.make_data(tmp_path, "multilabel"), "Mean")
    (tmp_path / "multilabel.h5").rename(tmp_path / "elsewhere.h5")
    told = mistake(capsys, known.path)
    assert "multilabel.h5" in told and "--data FILE.h5" in told
    assert not known.predictions.exists(), "a refusal leaves nothing behind"
    told = answer(capsys, known.path, "--data", tmp_path / "elsewhere.h5")
    assert (told["split"], told["samples"]) == ("validation", 5), "the training's own file is no other"
    assert "/proc/nope cannot be made" in mistake(capsys, known.path, "-o", "/proc/nope")


def test_an_unfinished_fold_is_named_refused_or_left_out(folds, tmp_path, capsys):
    """One that has saved answers, and is told; one that has not is refused, with the option that goes on without."""
    from jobs import predict

    paths = [one.path for one in folds]
    new = save(tmp_path / "new.nii.gz", noise((4, 5, 6), 1))
    files = [str(new), "-o", str(tmp_path / "out"), *(word for path in paths for word in ("--run", str(path)))]
    folds[1].result.unlink()
    told = answer(capsys, *paths)
    assert told["notes"][0] == (
        "not finished, and asked as saved so far: fold1 (--skip-unfinished leaves such runs out)"
    )
    assert predict.main(files) == ExitCode.DONE and "asked as saved so far: fold1" in capsys.readouterr().err
    told = answer(capsys, *paths, "--skip-unfinished")
    assert told["samples"] == 4 and [one["run"] for one in told["runs"]] == ["fold0", "fold2"]
    assert "1 of 3 folds have no run here: their samples are left out" in told["notes"]
    folds[1].checkpoints.rename(tmp_path / "moved")
    assert "fold1 of these 3 runs: no checkpoint yet; --skip-unfinished" in mistake(capsys, *paths)
    assert answer(capsys, *paths, "--skip-unfinished")["samples"] == 4
    assert "has no effect on one run" in mistake(capsys, paths[0], "--skip-unfinished")
    assert "fold1 has no checkpoint yet" in mistake(capsys, paths[1])
