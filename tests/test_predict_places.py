"""Networks of patches asked for the class at places, and windows that cannot be."""

import nibabel
import numpy as np
import pytest
import torch

from datasets import open_volumes
from hpc.preempt import ExitCode
from jobs import evaluate
from jobs.inference.fitting import device_memory, window_memory
from jobs.inference.members import Manner, load_members
from tests.inferred import make_run, rows_of
from tests.scans import save, table
from tests.test_predict import ask, maps, noise, pack_classes, refusal  # noqa: F401  a fixture
from tests.test_replay import oblique


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def patches(tmp_path):
    """A run on patches of four volumes, and the table of their middles in mm."""
    (tmp_path / "scans").mkdir()
    options = ("--patch", "4,5,3", "--per-class", "3", "--normalise", "unit")
    data = pack_classes(tmp_path, *options, shape=(9, 9, 9))
    volumes = open_volumes(data)
    middles = volumes.affine @ np.array([2, 2, 1, 1.0])
    rows = [
        f"{id.partition('/')[0]},{x!r},{y!r},{z!r}"
        for id, (x, y, z, _) in zip(volumes.ids, middles.tolist(), strict=True)
    ]
    return make_run(tmp_path / "parts", data, "Mean"), table(tmp_path / "places.csv", rows, "id,x,y,z")


def test_the_class_at_places_is_that_of_the_packed_patches(patches, tmp_path):
    """To the bit what evaluation says of the same patches, in the order of the table file by file."""
    run, places = patches
    assert evaluate.main([str(run.path), "--split", "all", "--bootstrap", "0"]) == ExitCode.DONE
    wanted = rows_of(run.prediction("all", ".csv"))
    words = ("--run", run.path, "-o", tmp_path / "out", "--centres", places)
    for _ in range(2):  # the second time from what is noted
        assert ask(tmp_path / "scans", *words) == ExitCode.DONE
    found = rows_of(tmp_path / "out" / "predictions.csv")
    assert list(found[0]) == ["id", "x", "y", "z", "predicted", "p_x", "p_y", "p_z"]
    assert len(found) == len(wanted) == 12
    for row, other in zip(found, wanted, strict=True):
        assert row["id"] == other["id"].partition("/")[0] and row["predicted"] == other["predicted"]
        told, known = ([float(line[f"p_{name}"]) for name in "xyz"] for line in (row, other))
        assert told == pytest.approx(known, abs=1e-6)


def test_places_are_in_the_world_of_each_file(patches, tmp_path, capsys):
    """However it is stored; a place at the edge has a line without a class."""
    run, _ = patches
    new = save(tmp_path / "new.nii.gz", noise((9, 9, 9), 5), "LIP", oblique((1, 1.5, 2)))
    again = tmp_path / "as.nii.gz"
    nibabel.save(nibabel.as_closest_canonical(nibabel.load(new)), again)
    affine = nibabel.load(again).affine
    rows = [",".join(map(str, (affine @ [*voxel, 1])[:3])) for voxel in ((4, 4, 4), (0, 4, 4))]
    places = table(tmp_path / "own.csv", rows, "x,y,z")
    for number, file in enumerate((new, again)):
        words = ("--run", run.path, "-o", tmp_path / f"out{number}", "--centres", places, "--flips", "0")
        assert ask(file, *words) == ExitCode.DONE
        assert "1 of 2 places have no whole patch in it" in capsys.readouterr().out
    one, other = (rows_of(tmp_path / f"out{n}" / "predictions.csv") for n in (0, 1))
    assert one[1]["predicted"] == one[1]["p_x"] == "" and one[0]["predicted"] in "xyz"
    assert [row["p_x"] for row in one] == [row["p_x"] for row in other]


def test_places_that_make_no_sense_are_refused(patches, maps, tmp_path, capsys):  # noqa: F811
    run, places = patches
    words = (tmp_path / "scans", "--run", run.path, "-o", tmp_path / "out")
    assert "--centres TABLE.csv (columns id, x, y, z in mm), or add --windows" in refusal(capsys, *words)
    for rows, header, reason in (
        (["1,2,3"], "x,y,z", "has no column id, and there are 4 files"),
        (["a,1,2"], "id,x,y", "has no column 'z'"),
        (["a,1,2,q"], "id,x,y,z", "is no place in mm"),
        (["q,1,2,3"], "id,x,y,z", "has places of 'q', which is none of the files"),
        ([], "id,x,y,z", "names no place"),
    ):
        assert reason in refusal(capsys, *words, "--centres", table(tmp_path / "odd.csv", rows, header))
    assert "leave out --windows" in refusal(capsys, *words, "--centres", places, "--windows")
    other = ("--run", maps.path, "-o", tmp_path / "out", "--centres", places)
    assert "for the class at places, and run is none" in refusal(capsys, tmp_path / "scans", *other)


def test_a_window_that_cannot_fit_is_refused_and_a_larger_one_is_told(maps, tmp_path, capsys):  # noqa: F811
    words = (tmp_path / "scans", "--run", maps.path, "-o", tmp_path / "out")
    told = refusal(capsys, *words, "--window", "100000,100000,100")
    assert "--window 100000,100000,100 takes" in told and "cpu has" in told and "it was trained on 4,4,4" in told
    assert evaluate.main([str(maps.path), "--window", "100000,100000,100"]) == ExitCode.BAD_INPUT
    assert "takes" in capsys.readouterr().err
    assert "takes" in refusal(capsys, *words, "--window", ",".join(["1000000000"] * 3))
    assert ask(*words, "--window", "12,4,4") == ExitCode.DONE
    assert "--window is larger than 4 files: their edges are repeated" in capsys.readouterr().err
    assert evaluate.main([str(maps.path), "--window", "12,4,4", "--bootstrap", "0"]) == ExitCode.DONE
    assert "--window is larger than 2 of 2 samples" in capsys.readouterr().out


def test_the_memory_of_a_window_is_that_of_its_forward_pass(tmp_path):
    """Weights, the window and the activations that live at once, none kept for a backward pass."""
    from tests import tiny_tasks

    run = make_run(tmp_path / "run", tiny_tasks.make_data(tmp_path, "segmentation"), "Bright")
    (member,) = load_members([run], "best", torch.device("cpu"))
    before = member.model.training
    small, large = (window_memory(member, (64 * n, 64)) for n in (1, 2))
    assert small and large and 64 * 64 * 4 * 2 < small < 64 * 64 * 4 * 12 and 1.8 < large / small < 2.05
    assert member.model.training is before is False
    assert device_memory(torch.device("cpu")) > 2**28 and Manner().words() == []
