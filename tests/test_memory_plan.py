"""The memory plan of an experiment: what a step takes, what is refused, what does fit, and what cannot be told."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc import cli, instances, preflight
from hpc.errors import UserError
from hpc.experiment import Experiment, load, validate
from hpc.instances import Instance
from hpc.training import LOSSES
from jobs import memory_plan
from jobs.memory_plan import MemoryPlan, NotPlanned, plan_memory
from jobs.setup import check, look
from tests import tiny_run

CEDIA = instances.find("cedia-a100-40gb")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_data(tmp_path_factory.mktemp("data"))


def experiment(file: Path, model: dict[str, Any] | None = None, **sections: Any) -> Experiment:
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": "resnet3d_tiny", "pool_size": 1, **(model or {})},
        "data": {"file": str(file), "batch_size": 8, **sections.get("data", {})},
        "train": sections.get("train", {}),
        "launch": {"instance": CEDIA.name, **sections.get("launch", {})},
    }
    return validate(values, "test")


def planned(one: Experiment, details: bool = False) -> MemoryPlan:
    found = look(one)
    return plan_memory(one, found.parts, found.model, details)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An instance of so many GB."""

    def of(gb: float, **changed: Any) -> Instance:
        instance = CEDIA.model_copy(update={"gpu_mem_gb": gb, **changed})
        monkeypatch.setattr(memory_plan.instances, "find", lambda _: instance)
        return instance

    return of


def test_the_parts_of_a_step_and_where_it_runs(data: Path) -> None:
    found = planned(experiment(data))
    assert found.place == "one GPU of cedia-a100-40gb" and found.capacity == 40 * 10**9
    assert found.ahead == 2 * 8 * 8**3 * 2, "two batches of int16"
    assert found.refusal is found.caution is None
    on_cpu = planned(experiment(data, train={"device": "cpu"}, launch={"mem": "8GB"}))
    assert on_cpu.place == "one process on cedia-a100-40gb" and on_cpu.capacity == on_cpu.surely == 8 * 10**9


TWO = {"instance": "cedia-a100-40gb-x2"}
WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"train": {"precision": "bf16"}}, {"activations": -1}),
    ({"train": {"precision": "fp16"}}, {"activations": -1}),
    ({"model": {"checkpoint": True}}, {"activations": -1}),
    ({"train": {"accumulate": 2}}, {"activations": -1, "inputs": 0}),
    ({"train": {"ema": {}}}, {"ema": 1}),
    ({"train": {"optimizer": {"name": "sgd"}}}, {"optimizer": -1}),
    ({"train": {"stages": [{"epochs": 10, "freeze": "backbone"}]}}, {"gradients": -1, "optimizer": -1}),
    ({"train": {"deterministic": "layout", "virtual_ranks": 4}}, {"activations": -1, "copies": 1}),
    ({"launch": TWO}, {"activations": -1, "copies": 1}),
    (
        {"launch": TWO, "train": {"strategy": "fsdp"}},
        {"parameters": -1, "optimizer": -1},
    ),
    (
        {"launch": TWO, "train": {"strategy": "deepspeed", "zero": {"stage": 1}}},
        {"parameters": 0, "optimizer": -1, "gradients": 0},
    ),
]


@pytest.mark.parametrize(("changed", "signs"), WAYS, ids=[str(number) for number in range(len(WAYS))])
def test_what_an_experiment_says_is_in_its_estimate(data: Path, changed: dict[str, Any], signs: dict[str, int]) -> None:
    plain, other = (planned(experiment(data, **sections)).estimate for sections in ({}, changed))
    for key, sign in signs.items():
        difference = getattr(other, key) - getattr(plain, key)
        assert (difference > 0) - (difference < 0) == sign, f"{key}: {difference:+}"


def test_what_does_not_fit_is_refused_with_keys_that_do(data: Path, small: Any) -> None:
    one = experiment(data, {"width": 16})
    peak = planned(one).peak
    small(0.8 * peak / 1e9)
    found = planned(one)
    assert found.refusal and "\n" not in found.refusal
    words = found.refusal.split("what fits: ")[1]
    keys = [option.split(" (")[0] for option in words.split(", or ")]
    assert "model.checkpoint=true" in keys and "train.precision=bf16" in keys
    for key in keys:
        values = {"model": {"width": 16}, "data": {}, "train": {}}
        for word in key.split():
            section, name = word.split("=")[0].split(".")
            values[section][name] = {"true": True}.get(word.split("=")[1], word.split("=")[1])
        again = planned(experiment(data, values.pop("model"), **values))
        assert again.refusal is None and again.peak <= again.capacity, key


def test_the_largest_batch_is_the_last_that_fits(data: Path, small: Any) -> None:
    small(planned(experiment(data, data={"batch_size": 11})).peak / 1e9 + 1e-6)
    found = planned(experiment(data, data={"batch_size": 4}), details=True)
    assert found.largest_batch == 11 and not found.enough
    small(40)
    found = planned(experiment(data, data={"batch_size": 4}), details=True)
    assert found.largest_batch == 17 and found.enough, "the training split"
    assert found.lines()[-1].endswith("as many as the training split has")


def test_between_surely_too_much_and_surely_enough_is_a_caution(data: Path, small: Any) -> None:
    peak = planned(experiment(data)).peak
    small(0.97 * peak / 1e9)
    found = planned(experiment(data))
    assert found.refusal is None and found.caution and "may not fit" in found.caution


def test_what_autotune_will_find_is_no_refusal(data: Path, small: Any) -> None:
    tuned = {"autotune": True, "precision": "auto"}
    plain = planned(experiment(data, {"width": 16}), details=True)
    less = {switch.keys: switch.peak for switch in plain.switches}
    small(0.8 * plain.peak / 1e9)
    found = planned(experiment(data, {"width": 16}, train=tuned))
    assert found.peak == plain.peak and found.refusal is None and "train.precision=bf16" in less
    assert found.caution and "train.autotune will find model.checkpoint=true" in found.caution
    small(0.8 * less["model.checkpoint=true"] / 1e9)
    assert planned(experiment(data, {"width": 16}, train=tuned)).refusal


def test_where_no_single_switch_is_enough_several_are_named(data: Path, small: Any) -> None:
    layout = {"deterministic": "layout", "virtual_ranks": 1}
    wide = {"width": 16, "hidden": []}
    one = experiment(data, wide, data={"batch_size": 16}, train=layout)
    least = min(switch.peak for switch in planned(one, details=True).switches)
    with_both = {**layout, "precision": "bf16"}
    both = planned(experiment(data, {**wide, "checkpoint": True}, data={"batch_size": 16}, train=with_both)).peak
    assert both < least
    small((both + least) / 2 / 1e9)
    refusal = planned(one).refusal or ""
    assert re.search(r"what fits: (\S+ \S+) \(", refusal), refusal
    assert "model.checkpoint=true" in refusal and "train.precision=bf16" in refusal


def test_only_switches_that_may_be_thrown_and_do_something_are_shown(data: Path) -> None:
    def keys(**sections: Any) -> set[str]:
        return {switch.keys for switch in planned(experiment(data, **sections), details=True).switches}

    assert {"model.checkpoint=true", "train.precision=bf16", "train.accumulate=2"} <= keys()
    assert not keys(model={"checkpoint": True}, train={"precision": "bf16"}) & {
        "model.checkpoint=true", "train.precision=bf16"
    }  # fmt: skip
    assert not any("accumulate" in key for key in keys(train={"deterministic": "layout"}))
    several = keys(model={"hidden": [4000]}, launch=TWO)
    assert {"train.strategy=fsdp", "train.strategy=deepspeed"} <= several


NETS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.head = nn.Linear(512, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1))


class Counting(Net):
    def forward(self, x):
        return super().forward(x) * (1 if self.training is False or x.device.type == "meta" else float(x.mean()))


class Still(Net):
    def forward(self, x):
        return super().forward(x).detach()
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


def own(data: Path, nets: Path, name: str) -> Experiment:
    one = experiment(data)
    return one.model_copy(update={"model": type(one.model).model_validate({"name": f"file:{nets}:{name}"})})


def test_a_model_of_ones_own_is_planned_and_one_that_reads_values_is_not_checked(data: Path, nets: Path) -> None:
    assert planned(own(data, nets, "Net")).peak > 0
    with pytest.raises(NotPlanned, match="memory of a training step: ") as caught:
        planned(own(data, nets, "Counting"))
    assert "\n" not in str(caught.value)
    found = preflight.check(own(data, nets, "Counting"), CEDIA, "local", "", Path("runs"))
    assert found.refusals == [] and found.memory is None
    assert [line[:24] for line in found.unchecked] == ["memory of a training ste", "whether the GPU will wai"]


def test_outputs_that_do_not_depend_on_the_parameters_are_refused(data: Path, nets: Path) -> None:
    with pytest.raises(UserError, match="its output does not depend on its parameters"):
        check(own(data, nets, "Still"))


@pytest.mark.parametrize("task", ["segmentation", "multilabel"])
def test_the_loss_of_each_task_runs_on_shapes(data: Path, task: str) -> None:
    found = look(experiment(data))
    for name in LOSSES[task]:
        one = validate({**experiment(data).as_dict(), "task": task, "train": {"loss": {"name": name}}}, "test")
        loss, targets = memory_plan._scored(one, found.parts.volumes, (1, 4, 4, 4))
        shape = (2, 3, 4, 4, 4) if task == "segmentation" else (2, 3)
        assert loss(torch.randn(shape), targets(2)).ndim == 0


def test_plan_tells_it_and_its_json_too(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(
        f"name: tiny\nmodel: {{name: resnet3d_tiny, pool_size: 1}}\ndata: {{file: {data}, batch_size: 8}}\n"
        f"launch: {{instance: {CEDIA.name}, cluster: local}}\n"
    )
    assert load(file)[0].data.batch_size == 8
    monkeypatch.setattr(sys, "argv", ["hpc", "plan", str(file), "--json", "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["peak"] < found["memory"]["capacity"] and found["memory"]["largest_batch"] == 17
    assert {switch["keys"] for switch in found["memory"]["switches"]} >= {"train.precision=bf16"}
    assert any(line.startswith("memory: a training step takes ") for line in found["passed"])
