"""Shards beside the settings of speed (fp16 that overflows, channels last, compiled blocks), and the way back.

Every row is what `ddp` makes of the same settings: that is one process within rounding (tests/test_strategies.py).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc.allocation import Allocation
from hpc.rundir import RunDir
from jobs import acceleration
from jobs.guards import IN_A_ROW
from jobs.precision import Fault, Scaler
from jobs.update import Updater
from tests import tiny_run
from tests.test_strategies import KINDS, NET, _forget_deepspeed, moments, weights
from tests.tiny_run import free_port, outcome, run_ranks

PLAIN = ("train.optimizer={name: adamw, lr: 0.001}", "train.scheduler={name: constant}", "train.clip_norm=0.05")
FAST = ("train.precision=fp16", "train.channels_last=true", "train.compile=blocks", "train.epochs=2")
BACK = ("train.epochs=4", "train.keep=20")
BAD = range(9, 9 + IN_A_ROW)
"""Steps whose gradients are no number in the runs that go back."""
SHARDS = ("fsdp", "zero1", "zero3", "offload2")
"""In fp16, each stopped and resumed."""
Row = tuple[Path, int, int | None, int]


def play(rank: int, rows: list[Row]) -> None:
    """Attempts (run, generation, boundary, port) one after another; the last rank is signalled."""
    Scaler.__init__.__defaults__ = (2.0**19, 2000)  # type: ignore[misc]  # the first two steps overflow
    acceleration.BACKEND = "aot_eager"
    gradients = Updater.gradients

    def spoilt(update: Updater, batch: Any, step: int) -> Any:
        counts, fault = gradients(update, batch, step)
        return counts, Fault.NOT_FINITE if step + 1 in BAD else fault

    Updater.gradients = spoilt  # type: ignore[method-assign]
    for folder, generation, boundary, port in rows:
        place = Allocation(rank, 2, rank, cpus_per_task=1, master_port=port)
        always = folder.name.startswith("back")
        answer = tiny_run.train(
            RunDir(folder), generation, boundary if rank else None, allocation=place, save_always=always
        )
        assert answer == ("stopped" if boundary else "done")
        _forget_deepspeed()
    os._exit(0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RunDir]]:
    folder = tmp_path_factory.mktemp("speed")
    data = tiny_run.make_data(folder, {"train": 17, "validation": 5, "test": 1})
    (folder / "net.py").write_text(NET)
    made, rows = {}, []
    for name in ("fast-ddp", *(f"fast-{kind}" for kind in SHARDS), "back-ddp", "back-fsdp", "back-zero2"):
        own = [text for text in KINDS[name.partition("-")[2]] if not text.startswith("train.stages")]
        own += FAST if name.startswith("fast") else BACK
        if name.startswith("fast"):
            own = [text for text in own if not text.startswith("train.ema")]
        run = made[name] = tiny_run.make_run(
            folder / name, data, f"model={{name: 'file:{folder}/net.py:Net'}}", *PLAIN, *own
        )
        if name.partition("-")[2] in SHARDS and name.startswith("fast"):
            rows += [(run.path, 1, 6, free_port()), (run.path, 2, None, free_port())]
        else:
            rows += [(run.path, 1, None, free_port())]
    assert run_ranks(play, [(rank, rows) for rank in range(2)]) == [0, 0]
    yield made


@pytest.mark.parametrize("kind", SHARDS)
def test_shards_are_as_fast_settings_of_whole_weights(kind: str, runs: dict[str, RunDir]) -> None:
    """Stopped and resumed: the loss scale goes on."""
    found, whole = outcome(runs[f"fast-{kind}"]), outcome(runs["fast-ddp"])
    assert found["learner"]["precision"] == whole["learner"]["precision"]
    assert 0 < found["learner"]["precision"]["overflows"] < 8 == found["step"]
    np.testing.assert_allclose(moments(found), moments(whole), atol=2e-5)
    np.testing.assert_allclose(weights(found), weights(whole), atol=2e-4)


@pytest.mark.parametrize("kind", ["fsdp", "zero2"])
def test_shards_go_back_as_whole_weights_do(kind: str, runs: dict[str, RunDir]) -> None:
    """Weights, moments and their average."""
    found, whole = outcome(runs[f"back-{kind}"]), outcome(runs["back-ddp"])
    told = [event for event in runs[f"back-{kind}"].read_events() if event["event"] == "rollback"]
    assert [event["left"] for event in told] == [BAD[-1]]
    assert found["step"] == whole["step"] == 16 and found["learner"] == whole["learner"]
    np.testing.assert_allclose(moments(found), moments(whole), atol=2e-5)
    np.testing.assert_allclose(weights(found), weights(whole), atol=2e-4)
    assert found["last"]["metrics"]["loss"] == pytest.approx(whole["last"]["metrics"]["loss"], rel=0.01)


@pytest.mark.skipif(os.environ.get("HPC_SOAK") != "1", reason="the real compiler takes its time; make soak")
def test_the_real_compiler_works_beside_shards(tmp_path: Path) -> None:
    """fully_shard and ZeRO 3 with Inductor are ddp without."""
    data = tiny_run.make_data(tmp_path, {"train": 8, "validation": 2, "test": 1})
    (tmp_path / "net.py").write_text(NET)
    made = {}
    for kind in ("ddp", "fsdp", "zero3"):
        own = [text for text in KINDS[kind] if not text.startswith(("train.stages", "train.ema"))]
        own += ["train.epochs=1", f"train.compile={'off' if kind == 'ddp' else 'blocks'}"]
        net = f"model={{name: 'file:{tmp_path}/net.py:Net'}}"
        run = made[kind] = tiny_run.make_run(tmp_path / kind, data, net, *PLAIN, *own)
        port = free_port()
        assert run_ranks(compiled, [(rank, run, port) for rank in range(2)]) == [0, 0]
        assert any(run.compiled.rglob("*.so")) == (kind != "ddp")
    for kind in ("fsdp", "zero3"):
        np.testing.assert_allclose(weights(outcome(made[kind])), weights(outcome(made["ddp"])), atol=2e-4)


def compiled(rank: int, run: RunDir, port: int) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(run.compiled)
    assert tiny_run.train(run, allocation=Allocation(rank, 2, rank, cpus_per_task=1, master_port=port)) == "done"
    os._exit(0)
