"""The data options of an experiment, through the training job: patches, samplers, staging, bad samples."""

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from datasets import open_volumes
from hpc.errors import UserError
from hpc.experiment import load, validate
from jobs.setup import check, prepare
from tests import tiny_run
from tests.inferred import evaluate
from tests.tiny_run import CONTEXT, outcome

OPTIONS = ("data.sampler=balanced", "data.patch=[6, 5, 6]", "data.views=2", "data.stage=node", "train.epochs=1")
STEPS_PER_EPOCH = 8  # 17 samples twice, in batches of 4


def play(folder: Path, data: Path, scratch: Path, stops: tuple[int, ...]) -> dict[str, Any]:
    os.environ["HPC_SCRATCH"] = str(scratch)
    run = tiny_run.make_run(folder, data, *OPTIONS)
    for generation, boundary in enumerate(stops, start=1):
        assert tiny_run.train(run, generation, boundary) == "stopped"
        assert not any(scratch.glob("hpc-data-*/*"))
    assert tiny_run.train(run, len(stops) + 1) == "done"
    assert not any(scratch.glob("hpc-data-*/*")) and any(scratch.glob("hpc-data-*"))
    return outcome(run)


def test_patches_balanced_and_staged_end_the_same_wherever_they_were_stopped(tmp_path: Path) -> None:
    data = tiny_run.make_data(tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        golden, stopped = (
            pool.submit(play, tmp_path / name, data, scratch, stops).result()
            for name, stops in (("whole", ()), ("stopped", (4,)))
        )
    assert golden["step"] == STEPS_PER_EPOCH
    assert golden == stopped


def skip(folder: Path, data: Path) -> None:
    run = tiny_run.make_run(folder, data, "data.verify=1", "data.on_bad_sample=skip", "train.epochs=1")
    assert tiny_run.train(run) == "done"


def stop(folder: Path, data: Path) -> str:
    try:
        tiny_run.train(tiny_run.make_run(folder, data, "data.verify=1"))
    except OSError as error:
        return str(error)
    return ""


def test_a_bad_sample_stops_the_run_or_is_replaced_and_told(tmp_path: Path) -> None:
    data = tiny_run.make_data(tmp_path)
    shard = open_volumes(data).shards[0]
    assert shard.inputs.offset is not None
    with data.open("r+b") as file:
        file.seek(shard.inputs.offset + 3 * 1024 + 5)
        file.write(b"\x55\xaa\x55")
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        assert "scans.h5: sample 'train3' (number 3) is damaged" in pool.submit(stop, tmp_path / "stop", data).result()
        pool.submit(skip, tmp_path / "skip", data).result()
    events = tiny_run.RunDir(tmp_path / "skip").read_events()
    told = [event for event in events if event["event"] == "bad-sample"]
    assert [event["sample"] for event in told] == ["train3"] and "is damaged" in told[0]["reason"]


def test_the_model_gets_patches(tmp_path: Path) -> None:
    data = tiny_run.make_data(tmp_path)
    run = tiny_run.make_run(tmp_path / "run", data, "data.patch=[4, 6, 8]", "train.epochs=1", "train.limit_steps=1")
    experiment = load(run.experiment)[0]
    assert prepare(experiment).shape == (1, 4, 6, 8)
    assert "1 x 8 x 8 x 8 int16, in patches of 4 x 6 x 8, 17 train" in check(experiment)[0]
    assert tiny_run.in_child(tiny_run.train, run) == 0
    assert evaluate(run, "test", "last")[1].scores.samples == 4


FAULTS = {
    ("data.patch=[4, 4]",): "data.patch [4, 4] must have 3 sizes",
    ("data.weights={latte: 2}", "data.sampler=weighted"): "no class 'latte'; classes are early, late, none",
    ("data.patch=[4, 40, 4]",): "data.patch [4, 40, 4] is over 2 times the largest training volume (8 x 8 x 8)",
    (
        "data.views=9000000",
        "data.batch_size=2",
    ): "data.views 9000000 makes an epoch of 153,000,000 samples: use 5,88",
    ("data.patch=[4, 4, 4]", "data.foreground=0.5"): "needs stored voxels of each class",
}


@pytest.mark.parametrize("overrides", FAULTS)
def test_the_check_tells_what_does_not_fit_the_file(overrides: tuple[str, ...], tmp_path: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", tiny_run.make_data(tmp_path), *overrides)
    with pytest.raises((UserError, ValueError)) as caught:
        check(load(run.experiment)[0])
    assert FAULTS[overrides] in str(caught.value) and len(str(caught.value).splitlines()) == 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sampler": "even"}, "data.sampler: Input should be 'uniform', 'balanced' or 'weighted'"),
    ({"sampler": "weighted"}, "weights belong to sampler: weighted, which needs them"),
    ({"weights": {"a": 2}}, "weights belong to sampler: weighted"),
    ({"weights": {"a": -2}, "sampler": "weighted"}, "data.weights.a: "),
    ({"foreground": 0.5}, "foreground has no effect without patch"),
    ({"patch": [8]}, "data.patch: "),
    ({"patch": [8, 0, 8]}, "data.patch.1: "),
    ({"stage": "nodes"}, "data.stage: Input should be 'none' or 'node'"),
    ({"on_bad_sample": "ignore"}, "data.on_bad_sample: Input should be 'stop' or 'skip'"),
    ({"views": 0}, "data.views: "),
    ({"threads": -1}, "data.threads: "),
]


@pytest.mark.parametrize(("data", "message"), REFUSED)
def test_options_that_cannot_take_effect_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate({"name": "x", "model": {"name": "m"}, "data": {"file": "v.h5", **data}}, "x.yaml")
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1
