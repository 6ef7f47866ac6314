"""Labels from folders: classes, splits above them, and samples in neither."""

import pytest

from datasets.folders import read_folders
from datasets.tables import Row


def test_the_first_folder_is_the_class():
    table = read_folders({"1": "cat", "2": "dog/white/small", "dog/1": "dog", "3": "Test"})
    assert table.class_names == ["Test", "cat", "dog"] and not table.several
    assert table.rows["2"] == table.rows["dog/1"] == Row(("dog",)) and table.rows["3"] == Row(("Test",))


def test_numbers_are_sorted_as_numbers():
    assert read_folders({"a": "10", "b": "9", "c": "2"}).class_names == ["2", "9", "10"]


def test_folders_of_splits_give_the_split():
    table = read_folders({"1": "Training/cat", "2": "val/dog/x", "3": "TEST/cat"})
    assert table.rows == {"1": Row(("cat",), split=0), "2": Row(("dog",), split=1), "3": Row(("cat",), split=2)}
    assert table.class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ({"1": "train/a", "2": "test/a", "3": "more/a"}, "some folders are splits and some are not: more/, "),
        ({"1": "cat", "2": ""}, r"'2' lies in no folder of a class; give the folder above"),
        ({"1": "train/cat", "2": "val"}, r"'2' lies in val/, the folder of a split \(validation\), but in no folder"),
    ],
)
def test_samples_of_no_class_are_refused(folders, words):
    with pytest.raises(ValueError, match=words):
        read_folders(folders)
