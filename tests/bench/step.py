"""`make bench-step`: the step of the seed's ResNet, ratios and their goals, by interleaved medians.

    python -m tests.bench.step [--only tuned,monai,loop,compile,ddp] [--size 48] [--batch 2] [--rounds 5] [--compiled]

One table: what, ratio, goal, reached or missed. `--compiled` lets compiled settings take part among the fixed ones;
the row `compile` compiles both seed models in both ways, which takes minutes on a CPU.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from datasets.writer import VolumeWriter
from hpc.allocation import Allocation
from hpc.experiment import Experiment, validate
from hpc.preempt import StopFlag
from hpc.rundir import RunDir
from jobs import acceleration, autotune
from jobs.choice import Choice
from jobs.engine import Engine
from jobs.flops import counter
from jobs.precision import emulates_bf16
from jobs.probe import Probe
from jobs.setup import prepare
from jobs.tasks import make_task
from jobs.train import Trainer
from models3d import create_model

CLASSES, CPU = 3, torch.device("cpu")
# Without instructions for it, a bf16 convolution on a CPU takes minutes: nothing to compare.
LOW = "fp32" if emulates_bf16(CPU) else "bf16"
SEEDS: dict[str, list[int]] = {"resnet3d": [], "transformer3d": [190, 190, 10]}
"""What is compiled, and the size of its volumes; [] takes --size."""
PLAIN = Choice(threads=1)
TRAINING = 48
"""Samples."""
MONAI: dict[str, Any] = {
    "block": "basic",
    "layers": [6, 6, 6, 2],
    "block_inplanes": [32, 32, 32, 32],
    "conv1_t_size": 3,
    "conv1_t_stride": 1,
    "no_max_pool": True,
}
"""As the seed's network: 20 blocks of two convolutions, 32 filters, halved three times."""
Row = tuple[str, float, str, float]
"""What, ratio, '>=' or '<=', goal."""


# What is measured.


def write_data(folder: Path, size: int) -> Path:
    """scans.h5: noise."""
    path, generator = folder / "scans.h5", np.random.default_rng(7)
    shape = (1, size, size, size)
    names = ("a", "b", "c")
    with VolumeWriter(path, shape=shape, dtype="int16", num_samples=TRAINING + 2, class_names=names) as writer:
        for number in range(TRAINING + 2):
            split = "train" if number < TRAINING else "validation"
            volume = generator.integers(-99, 99, shape).astype("int16")
            writer.add(volume, number % CLASSES, id=str(number), split=split, scale=0.01)
    return path


def experiment(data: Path, batch: int, **train: Any) -> Experiment:
    values = {
        "name": "step",
        "model": {"name": "resnet3d"},
        "data": {"file": str(data), "batch_size": batch, "threads": 1, "verify": 0},
        "train": {"device": "cpu", "deterministic": "off", "clip_norm": 1.0, "figures": "few", "epochs": 1, **train},
    }
    return validate(values, "bench")


def medians(ways: dict[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Seconds of each, in turns; the first turn warms up."""
    taken: dict[Any, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def step_of(model: nn.Module, choice: Choice, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    inputs = acceleration.channels_last(x) if choice.channels_last else x

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=choice.precision == "bf16"):
            outputs = model(inputs)
        F.cross_entropy(outputs.float(), y).backward()
        model.zero_grad(set_to_none=True)

    return step


def flops(model: nn.Module, x: torch.Tensor) -> float:
    """Of forward and backward; convolutions and matrix products alone."""
    with counter() as counting:
        model(x).sum().backward()
    model.zero_grad(set_to_none=True)
    return float(counting.get_total_flops())


def matrix_rate(size: int = 2048) -> float:
    """FLOP/s of a bf16 matrix product."""
    a, b = torch.randn(size, size).bfloat16(), torch.randn(size, size).bfloat16()
    return 2 * size**3 / medians({"": lambda: a @ b}, 9)[""]


@contextmanager
def place(options: argparse.Namespace, **train: Any) -> Iterator[tuple[RunDir, Experiment, Engine]]:
    """A run's folder, its experiment and engine; compiled code and choices of this bench alone."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        made = experiment(write_data(Path(folder), options.size), options.batch, **train)
        run = RunDir(Path(folder) / "run")
        run.path.mkdir()
        run.experiment.write_text(json.dumps(made.as_dict()))
        yield run, made, Engine(Allocation(), CPU, False, "bench", torch.get_num_threads())


def tuned(options: argparse.Namespace) -> tuple[Choice, Probe]:
    """What autotune chooses, with its log, and the probe that builds models as it does."""
    with place(options, precision="auto", autotune=True) as (run, made, engine):
        parts = prepare(made)
        found = Choice.of(autotune.settle(run, made, engine, parts, False, StopFlag())[0])
        x, y = torch.randn(options.batch, *parts.shape), torch.arange(options.batch) % CLASSES
        plain = PLAIN.put_into(made)
        return found, Probe(plain, parts, make_task(plain, parts.volumes, CPU), x, y, deterministic=False)


def tuned_rows(options: argparse.Namespace) -> Iterator[Row]:
    found, probe = tuned(options)
    x, y = probe._inputs, probe._targets
    kinds = ("off", "blocks", "model") if options.compiled else ("off",)
    fixed = [
        Choice(precision, last, kind, threads=1)
        for precision in ("fp32", "bf16")
        for last in (False, True)
        for kind in kinds
    ]
    if (own := replace(found, threads=1)) not in fixed:
        fixed.append(own)
    seconds = medians({way: step_of(probe.model(way), way, x, y) for way in fixed}, options.rounds)
    work, rate = flops(probe.model(PLAIN), x), matrix_rate()
    for way, taken in seconds.items():
        print(f"  {way!s:<48}{taken:8.3f} s {work / taken / 1e9:8.1f} GFLOP/s {work / taken / rate:6.2f} of the rate")
    print(f"  a step has {work / 1e9:.1f} GFLOP; bf16 matrix products reach {rate / 1e9:.0f} GFLOP/s")
    yield f"tuned ({found}) against the best fixed setting", min(seconds.values()) / seconds[own], ">=", 0.9
    yield "tuned against fp32 eager", seconds[PLAIN] / seconds[own], ">=", 2.0


def monai_rows(options: argparse.Namespace) -> Iterator[Row]:
    from monai.networks.nets import ResNet

    found, probe = tuned(options)
    x, y, amp = probe._inputs, probe._targets, replace(PLAIN, precision=LOW)
    model, own = ResNet(spatial_dims=3, n_input_channels=1, num_classes=CLASSES, **MONAI).train(), probe.model(found)
    ways = {"own": step_of(own, found, x, y), "monai": step_of(model, amp, x, y)}
    seconds = medians(ways, options.rounds)
    work = {"own": flops(probe.model(PLAIN), x), "monai": flops(model, x)}
    rates = {name: work[name] / seconds[name] for name in ways}
    print(f"  MONAI's ResNet: {work['monai'] / 1e9:.1f} GFLOP, {rates['monai'] / 1e9:.1f} GFLOP/s in {LOW}")
    yield f"FLOP/s of ours ({found}) against MONAI's", rates["own"] / rates["monai"], ">=", 1.1


# The loop.


def loop_rows(options: argparse.Namespace) -> Iterator[Row]:
    with place(options, precision=LOW) as (run, made, engine):
        trainer = Trainer(run, made, engine, StopFlag())
        trainer.resume()
        trainer._begin_epoch()
        batches = list(trainer.loader)
        bare = bare_step(made, trainer)
        turns = iter(range(10**9))

        def ours() -> None:
            trainer._train_step(batches[next(turns) % len(batches)])
            trainer._boundary()

        ways = {"bare": lambda: bare(batches[next(turns) % len(batches)]), "ours": ours}
        # As many steps as the run has: beyond its end the schedule knows no rate.
        seconds = medians(ways, min(options.rounds * 3, trainer.total_steps - 2))
        trainer.close()
    yield "the training loop against a bare one, extra time", seconds["ours"] / seconds["bare"] - 1, "<=", 0.02


def bare_step(made: Experiment, trainer: Trainer) -> Callable[[Any], None]:
    """Forward, loss, backward, clipping, AdamW or what the run has, and reading the loss."""
    model = create_model("resnet3d", 1, CLASSES).train()
    model.load_state_dict(trainer.model.state_dict())
    optimizer = type(trainer.learner.strategy.optimizer)(model.parameters(), lr=1e-3)

    def step(batch: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(batch.inputs)
        loss = F.cross_entropy(outputs.float(), batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


# Compilation: each in a process of its own.


def compile_rows(options: argparse.Namespace) -> Iterator[Row]:
    for model in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            found = {}
            for kind in ("blocks", "model"):
                for state in ("cold", "cached"):
                    found[kind, state] = _compile_apart(model, kind, Path(folder) / kind, options)
                    print(f"  {model:<15}{kind:<8}{state:<8}{found[kind, state]:8.1f} s", flush=True)
        ratio = found["blocks", "cold"] / found["model", "cold"]
        yield f"compile time of {model}, blocks against the whole model, cold", ratio, "<=", 0.7
        for kind in ("blocks", "model"):
            ratio = found[kind, "cached"] / found[kind, "cold"]
            yield f"compile time of {model}, {kind}, from the cache against cold", ratio, "<=", 0.1


def _compile_apart(model: str, kind: str, cache: Path, options: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "tests.bench.step", "--child", model, kind]
    command += ["--size", str(options.size), "--batch", str(options.batch)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def compile_child(name: str, kind: str, options: argparse.Namespace) -> None:
    """Seconds that the first pass takes beyond an eager one; importing the compiler is left out."""
    importlib.import_module("torch._inductor.compile_fx")
    choice = Choice(LOW, compile=kind)
    shape = SEEDS[name] or [options.size] * 3
    x, y = torch.randn(options.batch, 1, *shape), torch.arange(options.batch) % CLASSES
    model = create_model(name, 1, CLASSES).train()
    eager = medians({"": step_of(model, choice, x, y)}, 2)[""]
    settings = choice.put_into(experiment(Path("none.h5"), options.batch)).train
    acceleration.accelerate(model, settings, CPU)
    started = time.perf_counter()
    step_of(model, choice, x, y)()
    print(time.perf_counter() - started - eager)


# Two processes, a core each.


def ddp_rows(options: argparse.Namespace) -> Iterator[Row]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        given = [(rank, f"{folder}/store", options, answers) for rank in range(2)]
        ranks = [context.Process(target=ddp_rank, args=one) for one in given]
        for process in ranks:
            process.start()
        found = [answers.get() for _ in ranks]
        for process in ranks:
            process.join()
    apart, together = (max(one[name] for one in found) for name in ("apart", "ddp"))
    print(f"  a step of {options.batch} samples in each: {apart:.3f} s apart, {together:.3f} s under DDP")
    yield "DDP on 2 processes against 2 separate ones", apart / together, ">=", 0.9


def ddp_rank(rank: int, store: str, options: argparse.Namespace, answers: Any) -> None:
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % len(os.sched_getaffinity(0))]})
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x, y = torch.randn(options.batch, 1, *[options.size] * 3), torch.arange(options.batch) % CLASSES
    half = Choice(LOW)
    models = {"apart": create_model("resnet3d", 1, CLASSES).train(), "ddp": create_model("resnet3d", 1, CLASSES)}
    models["ddp"] = DistributedDataParallel(models["ddp"].train())
    ways = {name: with_barrier(step_of(model, half, x, y)) for name, model in models.items()}
    answers.put(medians(ways, options.rounds))
    dist.barrier()
    dist.destroy_process_group()


def with_barrier(step: Callable[[], None]) -> Callable[[], None]:
    """Both begin together: else one would use what the other leaves of the memory's bandwidth."""

    def both() -> None:
        dist.barrier()
        step()

    return both


ROWS = {"tuned": tuned_rows, "monai": monai_rows, "loop": loop_rows, "compile": compile_rows, "ddp": ddp_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(ROWS), help="rows, with commas between")
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        compile_child(*options.child, options)
        return
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(ROWS):
        parser.error(f"--only {','.join(sorted(unknown))}: use {', '.join(ROWS)}")
    where = f"{autotune.device_name(CPU)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"resnet3d, batch {options.batch} x {options.size}^3, {where}", flush=True)
    rows = []
    for name in wanted:
        print(f"{name}:", flush=True)
        rows += list(ROWS[name](options))
    print(f"\n{'':<88}{'ratio':>8}{'goal':>9}")
    for what, ratio, sign, goal in rows:
        reached = ratio >= goal if sign == ">=" else ratio <= goal
        print(f"{what:<88}{ratio:8.3f}{sign:>4}{goal:5.2f}  {'reached' if reached else 'missed'}")


if __name__ == "__main__":
    main()
