"""What a user gets wrong with data is told in one line: arguments, weights, affines, locks, full disks."""

import h5py
import numpy as np
import pytest
import torch

from datasets import Loader, open_volumes, sampling
from datasets.drafts import Plan, require_room
from datasets.layout import FOREGROUND, VolumeFileError
from datasets.staging import StagingError, _lock_path, stage
from datasets.writer import VolumeWriter
from jobs.montage import _caption
from tests.inspected import facts_of, run, volumes_of, write

WRITER = {"shape": (1, 4, 4, 4), "dtype": "int16", "num_samples": 2, "class_names": ["a", "b"]}
WRONG_WRITERS = [
    ({"shape": 4}, "shape 4 is no list of whole numbers"),
    ({"shape": (1, "4", 4, 4)}, "no list of whole numbers"),
    ({"dtype": "int17"}, "dtype 'int17' is unknown; use uint8, int16"),
    ({"num_samples": "2"}, "num_samples '2' must be a whole number"),
    ({"class_names": 2}, "class_names 2 is no list of names"),
]
WRONG_LOADERS = [
    ({"patch": [5, 5, 99]}, r"patch \[5, 5, 99\] is over 4 times as long as the largest volume .*; give \["),
    ({"patch": [2, 2, 2], "batch_size": 4_000_000_000, "views": 4_000_000_000}, "3 batches of .* GB, and this machine"),
    ({"batch_size": "2"}, "batch_size '2' is no whole number"),
    ({"threads": 1.5}, "threads 1.5 is no whole number"),
    ({"rank": None}, "rank None is no whole number"),
    ({"seed": "x"}, "seed 'x' is no whole number"),
    ({"verify": "all"}, "verify 'all' is a share"),
    ({"patch": 4}, "patch 4 is no list of sizes"),
    ({"patch": [2, 2, "2"]}, "must be 3 sizes of 1 or more"),
    ({"dtype": "float32"}, "dtype 'float32' is no float"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_WRITERS)
def test_arguments_of_the_writer(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        VolumeWriter(tmp_path / "v.h5", **{**WRITER, **options})


def test_an_unknown_split_names_the_sample_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="sample 's1': split 'val' is unknown; use train, validation, test"):
        write(tmp_path / "v.h5", volumes_of(2), [0, 1], split=["train", "val"], id=["s0", "s1"])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def volumes(tmp_path):
    return open_volumes(write(tmp_path / "v.h5", volumes_of(6), [0, 1, 0, 1, 0, 2], split=["train"] * 5 + ["test"]))


@pytest.mark.parametrize(("options", "message"), WRONG_LOADERS)
def test_arguments_of_the_loader(options, message, volumes):
    with pytest.raises(ValueError, match=message):
        Loader(volumes, **{"batch_size": 2, **options})


def test_weights_of_a_class_that_training_lacks_are_refused(volumes):
    with pytest.raises(ValueError, match="no training sample is of neither; classes with samples are left, right"):
        sampling.class_weights(volumes, {"neither": 2.0, "left": 3.0})
    assert sampling.class_weights(volumes, {"left": 3.0}).tolist() == [3, 1, 3, 1, 3, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_affines_that_are_no_numbers_are_shown_as_unknown(value, tmp_path, capsys):
    affines = [np.eye(4), np.diag([value, 1, 1, 1])]
    path = write(tmp_path / "v.h5", volumes_of(2), [0, 1], affine=affines)
    assert run(path, "--png", tmp_path / "v.png") == 0
    assert "?x1x1 mm" in capsys.readouterr().out
    facts_of(capsys, path)


def test_the_caption_says_which_way_the_axes_run(volumes, monkeypatch):
    assert "patient's left is on the left" in _caption(volumes)[1]
    monkeypatch.setattr(volumes, "orientation", "LPS")
    assert "axes are LPS" in _caption(volumes)[1] and "patient" not in _caption(volumes)[1]


def test_a_changed_foreground_table_is_found_on_opening(tmp_path):
    path = tmp_path / "v.h5"
    options = WRITER | {"task": "segmentation", "foreground": np.zeros((2, 2, 5), np.int32)}
    with VolumeWriter(path, **options) as writer:
        for number in range(2):
            writer.add(np.full((1, 4, 4, 4), number, np.int16), np.zeros((4, 4, 4), np.uint8), id=f"s{number}")
    open_volumes(path)
    with h5py.File(path, "r+") as file:
        file[FOREGROUND][1, 1, 3] = 7
    with pytest.raises(VolumeFileError, match="its tables are not those it was packed with"):
        open_volumes(path)


def test_a_folder_in_place_of_a_lock_is_named_or_passed_over(volumes, tmp_path):
    with stage(volumes, [tmp_path]) as staged:
        folder = staged.paths[0].parent
    (folder.parent / "other.lock").mkdir()
    stage(volumes, [tmp_path]).close()
    _lock_path(folder).mkdir()
    with pytest.raises(StagingError, match=r"data\.stage: .*\.lock is no lock .*: remove it"):
        stage(volumes, [tmp_path])


def test_a_damaged_copy_is_not_used_again(volumes, tmp_path):
    with stage(volumes, [tmp_path]) as staged:
        copy = staged.paths[0]
        offset = open_volumes(copy).shards[0].inputs.offset
        with copy.open("r+b") as file:
            file.seek(offset)
            file.write(b"\x55" * 64)
        with pytest.raises(StagingError, match=r"the copy of sample 's00' .* differs"):
            stage(volumes, [tmp_path])


def test_room_is_asked_for_all_files_at_once(tmp_path, monkeypatch):
    plan = Plan(shape=(1, 100, 100, 100), dtype="int16", task="classification", num_samples=5)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 25_000_000})())
    require_room(tmp_path, {tmp_path / str(number): plan for number in range(2)})
    with pytest.raises(ValueError, match="25 MB free, 3 files need 30 more"):
        require_room(tmp_path, {tmp_path / str(number): plan for number in range(3)})


def test_numbers_of_torch_dtypes_stay_good(volumes):
    assert len(Loader(volumes, batch_size=np.int64(2), dtype=torch.float32, patch=(np.int64(4), 4, 4)))
