"""docs/predict.md names the columns and the keys that evaluate and predict really write."""

import re
from pathlib import Path

import pytest
import torch

from hpc.preempt import ExitCode
from jobs import evaluate
from tests.inferred import answer, rows_of
from tests.test_predict import ask, classes, maps  # noqa: F401  fixtures

PAGE = (Path(__file__).parent.parent / "docs" / "predict.md").read_text()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def documented(begin, names):
    """The words in code of the last cell of the table's row that begins so, `X_CLASS` spelt out."""
    (row,) = [line for line in PAGE.splitlines() if line.startswith(begin)]
    cell = re.sub(r"\(.*?\)", "", row.rsplit(" | ", 1)[1])
    found = []
    for word in re.findall(r"`(.*?)`", cell):
        found += [word.replace("CLASS", name) for name in names] if word.endswith("_CLASS") else [word]
    return found


def test_of_a_classification(classes, tmp_path, capsys):  # noqa: F811
    assert ask(tmp_path / "scans", "--run", classes.path, "-o", tmp_path / "out") == ExitCode.DONE
    row, *_ = rows_of(tmp_path / "out" / "predictions.csv")
    assert list(row) == documented("| classification, multilabel | `predictions.csv`", "xyz")
    told = answer(capsys, classes.path)
    row, *_ = rows_of(classes.prediction("validation", ".csv"))
    assert list(row) == documented("| classification, multilabel | `id`", "xyz")
    sentence = PAGE.partition("The JSON has ")[2].partition("\n\n")[0]
    keys = re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", sentence, flags=re.DOTALL))
    assert list(told) == keys
    assert list(told["bootstrap"]) == re.findall(r"`(\w+)`", sentence.partition("`bootstrap` (")[2])


def test_of_a_segmentation(maps, tmp_path):  # noqa: F811
    assert ask(tmp_path / "scans", "--run", maps.path, "-o", tmp_path / "out") == ExitCode.DONE
    row, *_ = rows_of(tmp_path / "out" / "volumes.csv")
    assert list(row) == documented("| segmentation | a label map", ())
    assert evaluate.main([str(maps.path), "--bootstrap", "0"]) == ExitCode.DONE
    row, *_ = rows_of(maps.prediction("validation", ".csv"))
    assert list(row) == documented("| segmentation | `id`", ("air", "lesion"))
