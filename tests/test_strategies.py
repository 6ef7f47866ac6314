"""Strategies on two processes: each is the single one within rounding, and its own when stopped and resumed.

Every run has two stages (the first with a frozen backbone), clipped gradients, an average, a step that is dropped, and
a rank without samples in its last batch of validation; ZeRO 3 has no average, and one stage. Two pairs of processes
do all rows.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpc.allocation import Allocation
from hpc.errors import UserError
from hpc.experiment import load
from hpc.rundir import RunDir, read_json
from hpc.training import Train
from jobs import strategies
from jobs.engine import Engine
from jobs.precision import Fault, Scaler
from jobs.train import Stopped, Trainer
from tests import tiny_run
from tests.tiny_run import Outcome, SignalAtBoundary, assert_same, free_port, outcome, run_ranks

ZERO = "train.strategy=deepspeed"
EMA = "train.ema={decay: 0.5}"
FREE = "train.stages=[{epochs: 2}]"
KINDS: dict[str, tuple[str, ...]] = {
    "ddp": ("train.strategy=ddp", EMA),
    "fsdp": ("train.strategy=fsdp", EMA),
    "zero1": (ZERO, "train.zero={stage: 1}", EMA),
    "zero2": (ZERO, "train.zero={stage: 2}", EMA),
    "zero3": (ZERO, "train.zero={stage: 3}", FREE),
    "offload2": (ZERO, "train.zero={stage: 2, offload: true}", EMA),
    "offload3": (ZERO, "train.zero={stage: 3, offload: true}", FREE),
}
STOPPED = [kind for kind in KINDS if not kind.startswith("offload")]
COMMON = (
    "train.stages=[{epochs: 1, freeze: backbone}, {epochs: 1}]",
    "train.epochs=2",
    "train.optimizer={name: adamw, lr: 0.001, weight_decay: 0.1}",
    "train.scheduler={name: constant}",
    "train.accumulate=2",
    "train.clip_norm=0.05",
    "train.ledger=true",
)
NET = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 8), nn.Conv3d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.norm(x)).relu()

class Net(nn.Module):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.stem = nn.Conv3d(in_channels, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3, 4)))
"""
FP16 = ("train.precision=fp16", FREE)
IN_STAGE_0, IN_STAGE_1 = 3, 9
DROPPED = 6
"""A step of the second stage."""
Row = tuple[Path, int, int, int | None, int, tuple[str, ...]]


def play(rank: int, rows: list[Row]) -> None:
    """Attempts (run, generation, ranks, boundary, port, overrides) one after another; the last rank is signalled."""
    Scaler.__init__.__defaults__ = (2.0**19, 2000)  # type: ignore[misc]  # the first steps in fp16 overflow
    for folder, generation, world, boundary, port, overrides in rows:
        if rank < world:
            place = Allocation(rank, world, rank, cpus_per_task=1, master_port=port, generation=generation)
            attempt(RunDir(folder), place, boundary if rank == world - 1 else None, overrides)
            _forget_deepspeed()
    os._exit(0)


def attempt(run: RunDir, place: Allocation, boundary: int | None, overrides: tuple[str, ...]) -> None:
    flag = SignalAtBoundary(boundary, 15)
    engine = Engine(place, torch.device("cpu"), deterministic=True, token=f"{run.name} {place.generation}")
    trainer = Trainer(run, load(run.experiment, list(overrides))[0], engine, flag.install())
    try:
        trainer.resume()
        train_step = trainer._train_step

        def spoilt(batch: Any) -> Any:
            update = trainer.learner.update
            gradients = type(update).gradients
            bad = trainer.step + 1 == DROPPED

            def found(batch: Any, step: int) -> Any:
                counts, fault = gradients(update, batch, step)
                return counts, Fault.NOT_FINITE if bad else fault

            update.gradients = found  # type: ignore[method-assign]
            return train_step(batch)

        trainer._train_step = spoilt  # type: ignore[method-assign]
        trainer.fit()
        trainer.engine.barrier()
    except Stopped:
        assert boundary is not None or place.world_size > 1
    finally:
        trainer.close()


def _forget_deepspeed() -> None:
    """DeepSpeed keeps groups of processes for the life of its own."""
    if "deepspeed" in sys.modules:
        sys.modules["deepspeed.comm.comm"].cdb = None  # type: ignore[attr-defined]
        importlib.reload(sys.modules["deepspeed.utils.groups"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RunDir]]:
    folder = tmp_path_factory.mktemp("strategies")
    data = tiny_run.make_data(folder, {"train": 17, "validation": 5, "test": 1})
    (folder / "net.py").write_text(NET)
    names = [
        "single",
        "single-free",
        "changing",
        "ddp-fp16",
        "changing-fp16",
        *KINDS,
        *(f"{kind}-stopped" for kind in STOPPED),
    ]
    given = (f"model={{name: 'file:{folder}/net.py:Net'}}", *COMMON)
    made = {name: tiny_run.make_run(folder / name, data, *given) for name in names}
    rows: list[tuple[RunDir, int, int, int | None, tuple[str, ...]]] = [(made["single"], 1, 1, None, (EMA,))]
    rows += [(made["single-free"], 1, 1, None, (FREE,)), (made["ddp-fp16"], 1, 2, None, ("train.strategy=ddp", *FP16))]
    for number, (kind, overrides) in enumerate(KINDS.items()):
        stop = (IN_STAGE_1, IN_STAGE_0)[number % 2]
        rows += [(made[kind], 1, 2, None, overrides)]
        if kind in STOPPED:
            again = made[f"{kind}-stopped"]
            rows += [(again, 1, 2, stop, overrides), (again, 2, 2, None, overrides)]
    changes = [("ddp", 2, 3), ("zero2", 2, 6), ("fsdp", 2, 3), ("ddp", 1, None)]
    rows += [(made["changing"], n, *where, KINDS[kind]) for n, (kind, *where) in enumerate(changes, 1)]
    # a step each, then one rank to the end; fsdp begins with the epoch's validation
    ways = [("ddp", 2, 2), ("zero1", 2, 2), ("zero2", 2, 2), ("zero3", 2, 2), ("fsdp", 2, 5), ("ddp", 1, None)]
    for n, (kind, *where) in enumerate(ways, 1):
        rows += [(made["changing-fp16"], n, *where, (*(text for text in KINDS[kind] if text != EMA), *FP16))]
    plan = [(run.path, *row, free_port(), overrides) for run, *row, overrides in rows]
    for half in (plan[: len(plan) // 2], plan[len(plan) // 2 :]):
        assert run_ranks(play, [(rank, half) for rank in range(2)]) == [0, 0]
    yield made


def weights(found: Outcome, which: str = "trained") -> np.ndarray[Any, Any]:
    """`weights`: their average, which is evaluated."""
    return np.concatenate([np.frombuffer(value, np.float32) for value in found[which].values()])


def moments(found: Outcome) -> np.ndarray[Any, Any]:
    values = [np.frombuffer(v, np.float32) for (_, key), v in found["optimizer"].items() if key == "exp_avg"]
    return np.concatenate(values)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_single_one_within_rounding(kind: str, runs: dict[str, RunDir]) -> None:
    found, single = outcome(runs[kind]), outcome(runs["single-free" if FREE in KINDS[kind] else "single"])
    assert found["step"] == single["step"] == 8
    assert found["optimizer"].keys() == single["optimizer"].keys() and found["groups"] == single["groups"]
    np.testing.assert_allclose(moments(found), moments(single), atol=2e-5)
    np.testing.assert_allclose(weights(found), weights(single), atol=2e-4)
    assert found["last"]["metrics"]["loss"] == pytest.approx(single["last"]["metrics"]["loss"], rel=0.01)
    counts = [read_json(runs[name].result)["parameters"] for name in (kind, "single")]
    assert counts[0] == counts[1] > 0
    skipped = [event["step"] for event in runs[kind].read_events() if event["event"] == "skipped"]
    assert skipped == [DROPPED]


@pytest.mark.parametrize("kind", STOPPED)
def test_stopped_and_resumed_it_is_bit_identical(kind: str, runs: dict[str, RunDir]) -> None:
    assert_same(outcome(runs[f"{kind}-stopped"]), outcome(runs[kind]))


def test_a_run_changes_strategy_and_ranks(runs: dict[str, RunDir]) -> None:
    """Two ranks of ddp, ZeRO 2 and fsdp, then one alone."""
    found, single = outcome(runs["changing"]), outcome(runs["single"])
    assert len({event["generation"] for event in runs["changing"].read_events()}) == 4
    assert found["learner"] == single["learner"]
    np.testing.assert_allclose(weights(found, "weights"), weights(single, "weights"), atol=2e-4)
    assert found["weights"] != found["trained"], "an average"
    np.testing.assert_allclose(moments(found), moments(single), atol=2e-5)
    np.testing.assert_allclose(weights(found), weights(single), atol=2e-4)


def test_the_loss_scale_goes_through_all_strategies(runs: dict[str, RunDir]) -> None:
    """A step each of ddp, ZeRO 1 to 3 and fsdp on two ranks, then one alone."""
    found, whole = outcome(runs["changing-fp16"]), outcome(runs["ddp-fp16"])
    events = runs["changing-fp16"].read_events()
    assert len({event["step"] for event in events if event["event"] == "signal"}) == 5
    assert {event["generation"] for event in events if event["event"] == "overflow"} == {1, 2}
    assert found["learner"] == whole["learner"] and found["learner"]["precision"]["good"] == 5
    np.testing.assert_allclose(moments(found), moments(whole), atol=2e-5)
    np.testing.assert_allclose(weights(found), weights(whole), atol=2e-4)


REFUSED = {
    ("train.strategy=fsdp", "train.optimizer.name=timm:lamb"): "timm:lamb",
    (*KINDS["zero3"], EMA): "ema needs whole weights",
    (*KINDS["zero3"], "train.stages=[{epochs: 1}, {epochs: 1}]"): "in one stage",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_work_is_refused_as_the_file_is_read(overrides: tuple[str, ...], tmp_path: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", tmp_path / "none.h5")
    with pytest.raises(UserError, match=REFUSED[overrides]):
        load(run.experiment, list(overrides))


def test_what_the_model_or_the_machine_excludes_is_refused_by_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    strategies.check(Train(strategy="deepspeed"), model)
    model.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError, match="fsdp cannot cut the scalar scale; give it one dimension, or use ddp"):
        strategies.check(Train(strategy="fsdp"), model)
    strategies.check(Train(strategy="ddp"), model)
    monkeypatch.setattr(strategies, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="deepspeed is not installed here: pip install deepspeed, or use fsdp"):
        strategies.check(Train(strategy="deepspeed"), model)
