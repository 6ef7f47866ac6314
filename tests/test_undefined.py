"""A metric that is undefined is never a number: in files and tables, for the best epoch and what follows it."""

import io
import json
import math
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets import masks
from datasets.writer import VolumeWriter
from hpc.errors import UserError
from hpc.experiment import load
from hpc.metrics import decimals, defined
from hpc.preempt import ExitCode
from hpc.rundir import RunDir, append_line, dumps, read_json, write_json
from jobs import evaluate
from jobs.check import open_data
from tests import tiny_run, tiny_tasks

NET = """
import torch
from torch import nn

class Maps(nn.Module):
    '''Never calls another class than the background.'''
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.head = nn.Conv2d(in_channels, num_classes, 1)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        scores = 0.01 * self.head(x)
        background = torch.zeros(scores.shape[1], device=x.device)
        background[0] = 50
        return scores + background[:, None, None]
"""


def strict(text: str) -> Any:
    """As JSON parsers that know no NaN have it."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def make_data(folder: Path, foreground: int = 0) -> Path:
    """Maps of which the training has all classes and the validation the background alone."""
    path, draw = folder / "flat.h5", np.random.default_rng(0)
    maps = np.zeros((14, 6, 8), np.uint8)
    maps[:9, :2], maps[:9, 2:3] = 1, 2
    options: dict[str, Any] = {"shape": (1, 6, 8), "dtype": "int16", "num_samples": 14}
    if foreground:
        options["foreground"] = np.stack([masks.foreground(one, 3, foreground, (0, 0)) for one in maps])
    with VolumeWriter(path, task="segmentation", class_names=("background", "disc", "edge"), **options) as writer:
        for number in range(14):
            split = "train" if number < 9 else "validation"
            writer.add(draw.integers(-9, 9, (1, 6, 8)).astype("int16"), maps[number], id=str(number), split=split)
    return path


def make_run(folder: Path, data: Path, *overrides: str) -> RunDir:
    (folder.parent / "flat.py").write_text(NET)
    net = f"model.name=file:{folder.parent / 'flat.py'}:Maps"
    return tiny_tasks.make_run(folder, data, "segmentation", net, *overrides)


def test_a_number_that_is_none_is_null_in_every_file(tmp_path: Path) -> None:
    value = {"a": [math.nan, 1.5, (math.inf, 2)], "b": {"c": -math.inf, "d": "NaN", "e": True}}
    wanted = {"a": [None, 1.5, [None, 2]], "b": {"c": None, "d": "NaN", "e": True}}
    assert strict(dumps(value)) == wanted
    write_json(tmp_path / "a.json", value)
    append_line(tmp_path / "a.jsonl", value)
    assert strict((tmp_path / "a.json").read_text()) == strict((tmp_path / "a.jsonl").read_text()) == wanted
    assert (decimals(math.nan), decimals(None), decimals(0.25, 3)) == ("–", "–", "0.250")
    assert list(defined({"dice": math.nan, "iou": 0.0, "loss": math.nan})) == ["iou", "loss"]


def fail(folder: Path) -> None:
    trainer = tiny_run.make_trainer(RunDir(folder))
    trainer.resume()
    with pytest.raises(UserError) as caught:
        trainer.fit()
    (folder / "told").write_text(str(caught.value))
    trainer.close()
    os._exit(0)


def test_a_run_whose_monitor_is_never_defined_ends_with_one_sentence(tmp_path: Path) -> None:
    """Neither early stopping nor the plateau takes the epochs for bad ones."""
    follow = ("train.early_stopping={patience: 1}", "train.scheduler={name: plateau, patience: 0}")
    run = make_run(tmp_path / "run", make_data(tmp_path), *follow)
    assert open_data(load(run.experiment)[0]), "without a table of foreground nobody knows before"
    assert tiny_run.in_child(fail, run.path) == 0
    told = (run.path / "told").read_text()
    assert told.startswith(
        "train.monitor dice was undefined in each of 2 evaluations, so no epoch is the best: no voxel"
    )
    assert "disc, edge" in told and "use loss" in told and "\n" not in told
    assert tiny_run.shown_values(run, "step/learning_rate") == pytest.approx([0.02] * 4)
    lines = [strict(line) for line in run.metrics.read_text().splitlines()]
    assert [line["metrics"]["dice"] for line in lines] == [None, None]
    state = strict(run.state.read_text())
    assert not state["best"] and not run.result.exists()


def train(folder: Path) -> None:
    assert tiny_run.train(RunDir(folder)) == "done"
    os._exit(0)


def test_beside_a_defined_monitor_it_is_left_out_everywhere(tmp_path: Path, monkeypatch: Any) -> None:
    run = make_run(tmp_path / "tiny-0a1b2c3d", make_data(tmp_path), "train.monitor=loss")
    assert tiny_run.in_child(train, run.path) == 0
    result = strict(run.result.read_text())
    assert result["best"]["metrics"]["dice"] is None and result["baseline"]["dice"] is None
    with pytest.raises(KeyError):
        tiny_run.shown_values(run, "validation/dice")
    assert len(tiny_run.shown_values(run, "validation/loss")) == 2

    shown = io.StringIO()
    with redirect_stdout(shown):
        assert evaluate.main([str(run.path), "--bootstrap", "20"]) == ExitCode.DONE
    assert "  dice                –   (commonest class alone –)" in shown.getvalue() and "nan" not in shown.getvalue()
    with redirect_stdout(told := io.StringIO()):
        assert evaluate.main([str(run.path), "--json", "--bootstrap", "0"]) == ExitCode.DONE
    assert strict(told.getvalue())["metrics"]["dice"] is None
    hpc_says(run, monkeypatch)


def hpc_says(run: RunDir, monkeypatch: Any) -> None:
    from typer.testing import CliRunner

    from hpc.cli import app

    monkeypatch.chdir(run.path.parent)
    write_json(run.state, read_json(run.state) | {"pid": 1, "host": "elsewhere"})  # as the batch script leaves it
    for words, part in (
        (["show", str(run.path)], "–"),
        (["report", str(run.path), "-o", "journal"], ""),
        (["ls", str(run.path)], "loss"),
    ):
        answer = CliRunner().invoke(app, words)
        assert answer.exit_code == 0 and part in answer.output and "nan" not in answer.output, answer.output
    page = (run.path.parent / "journal" / "EXPERIMENTS.md").read_text()
    assert "| nan" not in page and "| dice | higher is better | – | – |" in page, page


def test_the_plan_refuses_dice_where_the_table_of_foreground_shows_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_data(tmp_path, foreground=4))
    for override in ("train.monitor=dice", "train.early_stopping={patience: 1}"):
        with pytest.raises(
            UserError, match=r"train\.monitor dice is undefined: no voxel of disc, edge in the validation"
        ):
            open_data(load(run.experiment, [override])[0])
    assert open_data(load(run.experiment, ["train.monitor=iou"])[0])
    assert open_data(load(run.experiment, ["train.loss.include_background=true"])[0])


def test_early_stopping_and_plateau_do_not_count_undefined_epochs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_data(tmp_path), "train.early_stopping={patience: 2}", "train.epochs=9")
    assert tiny_run.in_child(follow, run.path) == 0


def follow(folder: Path) -> None:
    trainer = tiny_run.make_trainer(RunDir(folder))
    learner = trainer.learner
    learner.started()
    for epoch, dice in enumerate([0.5, math.nan, 0.4, math.nan, math.nan], start=1):
        learner.judged(epoch, {"dice": dice, "loss": 1.0})
        assert learner.ended_early is None
    learner.judged(6, {"dice": 0.3, "loss": 1.0})
    assert learner.ended_early == {"metric": "dice", "epochs_without_gain": 2, "planned_epochs": 9}
    os._exit(0)
