"""hpc predict and files as they come: of one name in several folders, all bad, folders that cannot be written to."""

import json

import nibabel
import numpy as np
import pytest
import torch

from hpc.preempt import ExitCode
from jobs.inference.journal import PredictJournal
from tests.inferred import make_run, rows_of
from tests.scans import noise, save
from tests.test_predict import ask, bright, classes, maps, refusal  # noqa: F401  fixtures


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("named", ["folders", "files"])
def test_files_of_one_name_keep_their_folders(maps, tmp_path, named):  # noqa: F811
    """And the table tells them apart; a name that is there once stays as it is."""
    wanted = {}
    for seed, id in enumerate(("A/scan", "B/deep/scan", "B/alone")):
        (tmp_path / "new" / id).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / "new" / f"{id}.nii.gz", noise((7, 8, 9), seed))
        wanted["alone" if id.endswith("alone") else id] = bright(noise((7, 8, 9), seed))
    new = tmp_path / "new"
    files = [new / "A", new / "B"] if named == "folders" else sorted(new.rglob("*.nii.gz"))
    for _ in range(2):  # the second time nothing is left to do
        assert ask(*files, "--run", maps.path, "-o", tmp_path / "out") == ExitCode.DONE
    rows = rows_of(tmp_path / "out" / "volumes.csv")
    assert [row["id"] for row in rows[::2]] == sorted(wanted)
    assert [row["file"] for row in rows[::2]] == [f"{id}.nii.gz" for id in sorted(wanted)]
    for id, mask in wanted.items():
        assert np.array_equal(np.asarray(nibabel.load(tmp_path / "out" / f"{id}.nii.gz").dataobj), mask)


def test_two_files_that_would_give_one_are_refused(maps, tmp_path, capsys):  # noqa: F811
    scan = save(tmp_path / "a.nii.gz", noise((7, 8, 9), 1))
    np.save(tmp_path / "a.npy", noise((7, 8, 9), 1))
    told = refusal(capsys, scan, tmp_path / "a.npy", "--run", maps.path, "-o", tmp_path / "out")
    assert "two files have the id 'a'" in told
    other = save(tmp_path / "a_probabilities.nii.gz", noise((7, 8, 9), 1))
    told = refusal(capsys, scan, other, "--run", maps.path, "-o", tmp_path / "out", "--probabilities")
    assert "would both give" in told and not (tmp_path / "out").exists()


def test_where_all_files_are_bad_nothing_stays_behind(classes, tmp_path, capsys):  # noqa: F811
    """No folder of theirs; of one that was there, what was there: another request finds it free."""
    np.save(tmp_path / "four.npy", np.zeros((4, 6, 7, 8), np.int16))
    words = ("--run", classes.path, "-o", tmp_path / "deep" / "out")
    assert ask(tmp_path / "four.npy", *words) == ExitCode.CRASH
    assert "0 of 1 files predicted" in capsys.readouterr().out
    assert not (tmp_path / "deep").exists()
    good = save(tmp_path / "good.nii.gz", noise((6, 7, 8), 1))
    assert ask(good, *words) == ExitCode.DONE
    before = {path.name: path.read_bytes() for path in (tmp_path / "deep" / "out").iterdir()}
    assert ask(tmp_path / "four.npy", *words, "--flips", "0", "--force") == ExitCode.CRASH
    assert {path.name: path.read_bytes() for path in (tmp_path / "deep" / "out").iterdir()} == before


def test_a_request_of_which_nothing_came_holds_no_folder(classes, tmp_path):  # noqa: F811
    """As an earlier version left it, or a stop right at the start."""
    PredictJournal(tmp_path / "out", {"flips": [0]}, (), force=False).begin()
    good = save(tmp_path / "good.nii.gz", noise((6, 7, 8), 1))
    assert ask(good, "--run", classes.path, "-o", tmp_path / "out") == ExitCode.DONE
    assert json.loads((tmp_path / "out" / "predict.json").read_text())["flips"] == []


def test_a_kill_between_a_map_and_its_line_is_no_stranger(maps, tmp_path, monkeypatch):  # noqa: F811
    words = (tmp_path / "scans", "--run", maps.path, "-o", tmp_path / "out")
    add = PredictJournal.add
    monkeypatch.setattr(PredictJournal, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert ask(*words) == 130 and (tmp_path / "out" / "a.nii.gz").exists()
    monkeypatch.setattr(PredictJournal, "add", add)
    assert ask(*words) == ExitCode.DONE
    assert len(rows_of(tmp_path / "out" / "volumes.csv")) == 8


def test_a_folder_that_cannot_be_is_a_line_before_the_work(maps, tmp_path, capsys):  # noqa: F811
    words = (tmp_path / "scans", "--run", maps.path, "-o")
    told = refusal(capsys, *words, "/proc/nope")
    assert "/proc/nope cannot be made (No such file or directory); name a folder of yours by -o DIR" in told
    told = refusal(capsys, *words, "/sys/kernel")
    assert "nothing can be written in /sys/kernel" in told or "cannot be" in told


def test_an_existing_file_of_probabilities_is_not_replaced(maps, tmp_path, capsys):  # noqa: F811
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a_probabilities.nii.gz").write_text("mine")
    words = (tmp_path / "scans", "--run", maps.path, "-o", tmp_path / "out")
    assert "a_probabilities.nii.gz is there already" in refusal(capsys, *words, "--probabilities")


def test_a_device_that_is_not_here_is_told_with_the_option_of_this_command(classes, tmp_path, capsys):  # noqa: F811
    from jobs import evaluate

    words = (tmp_path / "scans", "--run", classes.path, "-o", tmp_path / "out")
    told = refusal(capsys, *words, "--device", "cuda")
    assert "--device cuda, but" in told and "add --device cpu" in told and "train.device" not in told
    trained = make_run(tmp_path / "cuda", tmp_path / "classes.h5", "Mean", "train.device=cuda")
    assert evaluate.main([str(trained.path)]) == ExitCode.BAD_INPUT
    told = capsys.readouterr().err
    assert "cuda has train.device cuda, but" in told and "add --device cpu" in told
    assert evaluate.main([str(trained.path), "--device", "cpu", "--bootstrap", "0"]) == ExitCode.DONE


@pytest.mark.parametrize("name", ["plain.nii.gz", "packed.nii"])
def test_a_suffix_that_lies_about_compression(maps, tmp_path, name):  # noqa: F811
    """As downloads come that a browser has unpacked; what is written is what its name says."""
    real = save(tmp_path / ("a.nii" if name.startswith("plain") else "a.nii.gz"), noise((7, 8, 9), 3), "LIP")
    (tmp_path / name).write_bytes(real.read_bytes())
    assert ask(tmp_path / name, "--run", maps.path, "-o", tmp_path / "out") == ExitCode.DONE
    mask, image = nibabel.load(tmp_path / "out" / name), nibabel.load(real)
    assert np.array_equal(mask.affine, image.affine)
    assert np.array_equal(np.asarray(mask.dataobj), bright(np.asarray(image.dataobj)))
