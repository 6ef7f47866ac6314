"""hpc evaluate says what the training said of the same checkpoint, and leaves predictions that bear it out."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc.errors import UserError
from hpc.experiment import load
from hpc.preempt import ExitCode
from hpc.rundir import RunDir, read_json
from jobs import checkpoint
from jobs.evaluate import main
from jobs.inference.facts import DataFacts, recall
from jobs.inference.members import find_checkpoint
from jobs.setup import prepare
from tests import tiny_run
from tests.inferred import answer, evaluate, rows_of
from tests.tiny_run import CLASSES, SPLITS, in_child


def finish(folder: Path) -> None:
    assert tiny_run.train(RunDir(folder)) == "done"
    os._exit(0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run whose best epoch is not its last."""
    folder = tmp_path_factory.mktemp("evaluate")
    run = tiny_run.make_run(folder / "run", tiny_run.make_data(folder), "train.optimizer.lr=0.01")
    assert in_child(finish, run.path) == 0
    result = read_json(run.result)
    assert result["best"]["step"] != result["last"]["step"], "best and last are one: the tests prove less"
    return run


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("wanted", ["best", "last"])
def test_the_metrics_are_those_of_the_training(run: RunDir, wanted: str) -> None:
    result = read_json(run.result)
    name, found = evaluate(run, "validation", wanted)
    scores = found.scores
    assert scores.metrics() == pytest.approx(result[wanted]["metrics"], rel=1e-5)
    assert int(name.split("-s")[1]) == result[wanted]["step"]
    assert list(found.volumes.class_names) == list(CLASSES) == result["class_names"]
    if wanted == "best":
        assert name == result["best"]["checkpoint"]
        assert scores.matrix.tolist() == result["confusion_matrix"]
        assert scores.per_class() == result["per_class"]


def test_the_training_notes_what_predictions_need_of_the_data(run: RunDir) -> None:
    told, volumes = read_json(run.data), prepare(load(run.experiment)[0]).volumes
    assert told["class_names"] == list(CLASSES) and told["shape"] == [1, 8, 8, 8]
    assert told["fingerprint"] == volumes.fingerprint and told["packing"] == volumes.packing
    assert recall(run, load(run.experiment)[0]) == DataFacts.of(volumes)


@pytest.mark.parametrize("split", SPLITS)
def test_every_sample_is_scored_once_and_the_predictions_bear_the_metrics_out(run: RunDir, split: str) -> None:
    assert main([str(run.path), "--split", split]) == ExitCode.DONE
    scores = evaluate(run, split, "best")[1].scores
    assert scores.samples == SPLITS[split], "the last, short batch counts"
    with np.load(run.prediction(split), allow_pickle=False) as file:
        ids, targets, given = file["ids"], file["targets"], file["scores"]
        assert file["class_names"].tolist() == list(CLASSES)
    assert ids.tolist() == [f"{split}{number}" for number in range(SPLITS[split])]
    assert targets.tolist() == [number % len(CLASSES) for number in range(SPLITS[split])]
    np.testing.assert_allclose(given.sum(1), 1, rtol=1e-5)
    matrix = np.zeros((3, 3), int)
    np.add.at(matrix, (targets, given.argmax(1)), 1)
    assert matrix.tolist() == scores.matrix.tolist()
    loss = -np.log(given[np.arange(len(targets)), targets]).mean()
    assert scores.loss == pytest.approx(loss, rel=1e-4)
    assert run.figure(f"confusion_matrix_{split}").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(run.prediction(split, ".csv"))
    assert [row["id"] for row in rows] == ids.tolist()
    assert [row["predicted"] for row in rows] == [CLASSES[number] for number in given.argmax(1)]
    assert [row["target"] for row in rows] == [CLASSES[number] for number in targets]
    told = np.array([[float(row[f"p_{name}"]) for name in CLASSES] for row in rows], np.float32)
    assert np.array_equal(told, given), "the table loses no digit"
    assert np.mean([float(row["loss"]) for row in rows]) == pytest.approx(scores.loss, rel=1e-6)


def test_the_scores_are_those_of_the_network_on_the_samples_alone(run: RunDir) -> None:
    """By hand, one sample at a time, without loader or task."""
    assert main([str(run.path), "--split", "test"]) == ExitCode.DONE
    parts = prepare(load(run.experiment)[0])
    model = parts.build_model("resnet3d_tiny").eval()
    model.load_state_dict(find_checkpoint(run, "best").model())
    volumes = parts.volumes
    with torch.inference_mode(), np.load(run.prediction("test")) as file:
        for row, sample in enumerate(volumes.indices("test")):
            stored, _ = volumes.read(int(sample))
            inputs = torch.from_numpy(stored * volumes.scale[sample].reshape(-1, 1, 1, 1)).float()
            scores = model(inputs[None]).softmax(1)[0]
            np.testing.assert_allclose(scores.numpy(), file["scores"][row], rtol=1e-4, atol=1e-6)


def test_a_checkpoint_can_be_named(run: RunDir) -> None:
    for path in checkpoint.newest_first(run.checkpoints):
        assert find_checkpoint(run, path.name).name == path.name


def test_an_unknown_checkpoint_is_told_with_the_nearest_names(run: RunDir) -> None:
    first = next(checkpoint.newest_first(run.checkpoints)).name
    with pytest.raises(UserError, match=f"did you mean '{first}'") as caught:
        find_checkpoint(run, first[:-1] + "9")
    assert "best" in str(caught.value) and "last" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="did you mean 'best'"):
        find_checkpoint(run, "bets")


def test_a_live_run_is_evaluated_by_its_state(run: RunDir, tmp_path: Path) -> None:
    """Before result.json there is only state.json; before the first evaluation, not even a best."""
    live = RunDir(tmp_path / "live")
    live.path.mkdir()
    live.checkpoints.symlink_to(run.checkpoints)
    newest = next(checkpoint.newest_first(run.checkpoints)).name
    assert find_checkpoint(live, "best").name == newest
    live.state.write_text(json.dumps({"generation": 1, "best": {}}))
    assert find_checkpoint(live, "best").name == newest
    best = read_json(run.result)["best"]["checkpoint"]
    live.state.write_text(json.dumps({"generation": 1, "best": {"checkpoint": best}}))
    assert find_checkpoint(live, "best").name == best


def test_a_split_without_samples_names_those_that_have_some(tmp_path: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", tiny_run.make_data(tmp_path, splits={"train": 6, "validation": 3}))
    assert in_child(finish, run.path) == 0
    with pytest.raises(UserError, match=r"--split test: .* it has train, validation"):
        evaluate(run, "test", "best")


def test_no_checkpoint_yet(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint yet"):
        find_checkpoint(RunDir(tmp_path), "best")


def test_a_damaged_checkpoint_is_refused_and_left_where_it_is(run: RunDir, tmp_path: Path) -> None:
    """The reader beside a live job moves nothing."""
    live = RunDir(tmp_path / "live")
    shutil.copytree(run.path, live.path)
    best = live.checkpoints / read_json(run.result)["best"]["checkpoint"]
    (best / "model.safetensors").write_bytes(b"x")
    with pytest.raises(checkpoint.Damaged, match=r"model\.safetensors"):
        evaluate(live, "validation", "best")
    assert best.exists() and not live.quarantine.exists()
    best.rename(tmp_path / "lost")
    with pytest.raises(UserError, match=f"its best checkpoint {best.name} is gone; name another: --checkpoint last"):
        find_checkpoint(live, "best")


def test_the_command_prints_a_table_and_the_same_as_json(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, run.path)
    result = read_json(run.result)
    assert told["metrics"] == pytest.approx(result["best"]["metrics"], rel=1e-5)
    assert told["per_class"] == result["per_class"] and told["confusion_matrix"] == result["confusion_matrix"]
    assert main([str(run.path), "--split", "test", "--checkpoint", "last"]) == ExitCode.DONE
    table = capsys.readouterr().out
    assert f"on test: {SPLITS['test']} samples" in table
    assert all(name in table for name in CLASSES) and str(run.prediction("test+last")) in table


MISTAKES = {
    "no such run": ["nowhere"],
    "no such checkpoint": ["RUN", "--checkpoint", "bets"],
    "no such axis": ["RUN", "--flips", "3"],
    "axes that are none": ["RUN", "--flips", "x"],
    "overlap of one window": ["RUN", "--overlap", "0.5"],
    "overlap of 1": ["RUN", "--windows", "--overlap", "1"],
    "a window of two sizes": ["RUN", "--window", "4,4"],
    "no samples": ["RUN", "--batch", "0"],
    "resamples below 0": ["RUN", "--bootstrap", "-1"],
    "a seed without resamples": ["RUN", "--bootstrap", "0", "--seed", "1"],
    "certainty": ["RUN", "--confidence", "1"],
    "no such data": ["RUN", "--data", "nowhere.h5"],
}


@pytest.mark.parametrize("arguments", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_and_code_2(
    run: RunDir, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run.path) if word == "RUN" else word for word in arguments]) == ExitCode.BAD_INPUT
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.strip().splitlines()) == 1


def test_an_unknown_split_lists_those_there_are(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run.path), "--split", "tset"]) == ExitCode.BAD_INPUT
    assert "validation" in capsys.readouterr().err
