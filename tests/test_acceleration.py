"""Layout and compilation: the same numbers, the same names, nothing left by a warm-up, and no run ended by it."""

import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpc.allocation import Allocation
from hpc.errors import UserError
from hpc.rundir import RunDir
from hpc.training import Train
from jobs import acceleration
from models3d import create_model
from tests import tiny_run

CPU = torch.device("cpu")


def tiny(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    small = {"width": 4, "layers": 2, "downsample": [3], "stem_stride": 2}
    return create_model("resnet3d_tiny", 1, 3, **(small | options)).train()


def inputs(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 1, 8, 8, 8, generator=torch.Generator().manual_seed(2))


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs, gradients and buffers of a pass."""
    model.zero_grad()
    outputs = model(x)
    outputs.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"outputs": outputs.detach(), **grads, **{name: b.clone() for name, b in model.named_buffers()}}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Dynamo and autograd as under Inductor, and no C++ compiler."""
    monkeypatch.setattr(acceleration, "BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()


def flat() -> nn.Module:
    torch.manual_seed(1)
    return create_model("unet2d", 1, 3, width=4, depth=2).train()


@pytest.mark.parametrize("build", [tiny, flat])
def test_channels_last_is_the_same_step(build: Any) -> None:
    x, settings = inputs() if build is tiny else torch.randn(2, 1, 16, 16), Train(channels_last=True)
    wanted, model = step(build(), x), build()
    acceleration.accelerate(model, settings, CPU)
    wide = [p for p in model.parameters() if p.ndim in (4, 5) and p.shape[1] > 1]
    assert wide and all(p.stride(1) == 1 for p in wide)
    found = step(model, acceleration.layout(settings)(x))
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=2e-3, atol=2e-4, msg=key)


def test_blocks_are_the_outermost_repeated_ones() -> None:
    kinds = {type(block).__name__ for block in acceleration.blocks(tiny())}
    assert kinds == {"ResBlock"} and len(acceleration.blocks(tiny())) == 4
    transformer = create_model("transformer3d", 1, 3, input_size=(8, 8, 4), patch_size=4, depth=3)
    assert len({type(block) for block in acceleration.blocks(transformer)}) == 1
    assert len(acceleration.blocks(transformer)) == 3
    flat = nn.Sequential(nn.Conv3d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    assert acceleration.blocks(flat) == []
    assert acceleration.blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == [], "layers are none"
    with pytest.raises(UserError, match=r"no repeated blocks .* use train.compile=model, or off"):
        acceleration.targets(flat, "blocks")


@pytest.mark.parametrize(("kind", "checkpoint"), [("blocks", False), ("model", False), ("blocks", True)])
def test_compiled_is_the_same_step_under_the_same_names(quick: None, kind: str, checkpoint: bool) -> None:
    model, settings = tiny(checkpoint=checkpoint), Train(compile=kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = step(tiny(), inputs())
    acceleration.accelerate(model, settings, CPU)
    assert list(model.state_dict()) == list(before)
    assert acceleration.warm_up(model, inputs(), nullcontext(), int)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    found = step(model, inputs())
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
    eager = tiny()
    eager.load_state_dict(model.state_dict())
    model.load_state_dict(eager.state_dict())


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_a_short_last_batch_of_an_evaluation_compiles_nothing(quick: None) -> None:
    model, settings = tiny(), Train(compile="blocks")
    acceleration.accelerate(model, settings, CPU)
    step(model, inputs())
    before = graphs()
    model.eval()
    for rows in (2, 1, 3):
        with torch.inference_mode(), acceleration.uncompiled(settings):
            model(inputs(rows))
    model.train()
    step(model, inputs())
    assert graphs() == before


def test_a_compiler_that_fails_costs_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def broken(graph: Any, example: Any) -> Any:
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(acceleration, "BACKEND", broken)
    model = tiny()
    acceleration.accelerate(model, Train(compile="blocks"), CPU)
    assert not acceleration.warm_up(model, inputs(), nullcontext(), int)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1 and "the run goes on without" in told[0] and "no such compiler" in told[0]
    wanted, found = step(tiny(), inputs()), step(model, inputs())
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    torch._dynamo.reset()


def test_a_stop_breaks_compilation_off(tmp_path: Path, data: Path) -> None:
    assert tiny_run.in_child(stop, tmp_path, data) == 0


def stop(folder: Path, data: Path) -> None:
    """The run stops before its first step, and is afterwards the undisturbed one."""

    def endless(graph: Any, example: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR2)
        while True:
            time.sleep(0.01)

    own, acceleration.BACKEND = ("train.compile=blocks", "train.epochs=1"), endless  # type: ignore[assignment]
    run = tiny_run.make_run(folder / "parts", data, *own)
    assert tiny_run.train(run, 1) == "stopped" and tiny_run.newest(run).step == 0
    acceleration.BACKEND = "aot_eager"
    torch._dynamo.reset()
    assert tiny_run.train(run, 2) == "done"
    tiny_run.assert_same(tiny_run.outcome(run), tiny_run.play(folder / "whole", data, (), *own))


def test_compilation_broken_off_on_one_of_two_ranks_begins_anew(tmp_path: Path, data: Path) -> None:
    """By a stop, and by a kill."""
    own, names = ("train.compile=blocks", "train.epochs=1"), ("whole", "stopped", "killed")
    whole, stopped, killed = (tiny_run.make_run(tmp_path / name, data, *own) for name in names)
    rows = [(whole, 1, 0, [0, 0]), (stopped, 1, signal.SIGUSR2, [0, 0]), (stopped, 2, 0, [0, 0])]
    rows += [(killed, 1, signal.SIGKILL, [1, -signal.SIGKILL]), (killed, 2, 0, [0, 0])]
    for run, generation, number, ends in rows:
        port = tiny_run.free_port()
        assert tiny_run.run_ranks(one_rank, [(rank, run, generation, port, number) for rank in range(2)]) == ends
    for run in (stopped, killed):
        tiny_run.assert_same(tiny_run.outcome(run), tiny_run.outcome(whole))


def one_rank(rank: int, run: RunDir, generation: int, port: int, broken: int) -> None:
    """The last rank gets the signal, if any, as it compiles."""

    def signalled(graph: Any, example: Any) -> Any:
        if broken and rank == 1:
            os.kill(os.getpid(), broken)
        return aot_eager(graph, example)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    acceleration.BACKEND = signalled  # type: ignore[assignment]
    place = Allocation(rank, 2, rank, cpus_per_task=1, master_port=port)
    assert tiny_run.train(run, generation, allocation=place) == ("stopped" if broken else "done")
    os._exit(0)


def test_compilation_that_fails_on_another_rank_is_taken_back_here(quick: None) -> None:
    model = tiny()
    acceleration.accelerate(model, Train(compile="model"), CPU)
    assert not acceleration.warm_up(model, inputs(), nullcontext(), lambda bad: 1)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_the_cache_is_in_the_scratch_else_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, compiled = RunDir(tmp_path / "run"), Train(compile="model")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    monkeypatch.delenv("HPC_SCRATCH", raising=False)
    assert acceleration.use_cache(run, Train()) is None
    monkeypatch.setattr(acceleration, "instance_scratch", lambda: None)
    assert acceleration.use_cache(run, compiled) == run.compiled
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    scratch = tmp_path / "scratch"
    monkeypatch.setattr(acceleration, "instance_scratch", lambda: str(scratch))
    found = acceleration.use_cache(run, compiled)
    assert found and found.parent == scratch and found.stat().st_mode & 0o777 == 0o700
    assert acceleration.use_cache(run, compiled) == found  # as if the user had set it
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    found.chmod(0o777)  # anybody may have put code there
    assert acceleration.use_cache(run, compiled) == run.compiled


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_data(tmp_path_factory.mktemp("data"))


def test_a_compiled_run_resumes_bit_by_bit_and_goes_on_eagerly(tmp_path: Path, data: Path) -> None:
    assert tiny_run.in_child(compare, tmp_path, data) == 0


def compare(folder: Path, data: Path) -> None:
    """Two stages: what is frozen in one is not in the other."""
    acceleration.BACKEND = "aot_eager"
    stages = "train.stages=[{epochs: 1, freeze: backbone}, {epochs: 1}]"
    own = ("train.compile=blocks", "train.channels_last=true", stages, "train.epochs=2")
    whole = tiny_run.play(folder / "whole", data, (), *own)
    tiny_run.assert_same(tiny_run.play(folder / "parts", data, (5,), *own), whole)
    run = tiny_run.make_run(folder / "eager", data, *own)
    assert tiny_run.train(run, 1, 5) == "stopped"
    text = run.experiment.read_text()
    run.experiment.write_text(text.replace("compile: blocks", "compile: 'off'"))
    assert tiny_run.train(run, 2) == "done"
    names = tiny_run.outcome(run)["weights"].keys()
    assert names == whole["weights"].keys()


def test_inductor_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(config, "compile_threads", 1)  # no pool of workers is started
    monkeypatch.setattr(config, "cpp_cache_precompile_headers", False)
    torch.manual_seed(1)
    block = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)]

    class Block(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.inner(x)

    model = nn.Sequential(*[Block(inner) for inner in block])
    x = torch.randn(4, 8)
    wanted = step(model, x)
    acceleration.accelerate(model, Train(compile="blocks"), CPU)
    found = step(model, x)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert any(tmp_path.rglob("*.so"))
    torch._dynamo.reset()
