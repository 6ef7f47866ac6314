"""`deterministic: layout` against DDP as `run` has it, on 2 ranks: `make bench-layout`. Prints ratios, asserts nothing.

One thread a rank, a batch of noise, forward, backward, reduction and SGD; each way in turn, several rounds; medians.
With 8 virtual ranks a part is one row, for which torch's convolutions of small volumes take a slower kernel on the CPU.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jobs.virtual import THREADS, BatchNorms, Gradients, VirtualRanks
from models3d import create_model

RANKS, BATCH, CLASSES = 2, 8, 3
MODELS = {"resnet3d_tiny": 16, "resnet3d": 12}
"""Model, and the side of its volumes in voxels."""
COUNTS = (2, 4, 8)


def ddp(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """As jobs/engine.py wraps it under `run`."""
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        nn.functional.cross_entropy(parallel(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def layout(count: int, rank: int, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    ranks = VirtualRanks(count, rank, RANKS)
    gradients, norms = Gradients(ranks, model), BatchNorms(ranks, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        losses = {}
        for v, (inputs, targets) in ranks.parts(x, y):
            torch.manual_seed(v)
            with norms.capture(v):
                loss = nn.functional.cross_entropy(model(inputs), targets)
            (loss / count).backward()
            gradients.add()
            losses[v] = loss.detach().double()
        gradients.reduce()
        ranks.sum(losses)
        optimizer.step()
        optimizer.zero_grad()
        norms.commit()

    return step


def measure(rank: int, store: str, rounds: int) -> None:
    torch.set_num_threads(THREADS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for name, side in MODELS.items():
        x, y = torch.randn(BATCH // RANKS, 1, side, side, side), torch.randint(0, CLASSES, (BATCH // RANKS,))
        ways = {"DDP, run": ddp(create_model(name, 1, CLASSES).train(), x, y)}
        for count in COUNTS:
            model = create_model(name, 1, CLASSES).train()
            ways[f"layout, {count} virtual ranks"] = layout(count, rank, model, x, y)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(1 + rounds):
            for way, step in ways.items():
                dist.barrier()
                started = time.perf_counter()
                step()
                dist.barrier()
                if turn:  # the first one warms up
                    seconds[way].append(time.perf_counter() - started)
        if rank == 0:
            show(f"{name}, {side}^3", seconds)
    dist.destroy_process_group()


def show(model: str, seconds: dict[str, list[float]]) -> None:
    base = statistics.median(seconds["DDP, run"])
    for way, taken in seconds.items():
        middle = statistics.median(taken)
        figures = f"{middle * 1e3:>10.0f}{middle / base:>8.2f}{min(taken) * 1e3:>9.0f}{max(taken) * 1e3:>9.0f}"
        print(f"{model:<22}{way:<28}{figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"{'model':<22}{'way':<28}{'ms a step':>10}{'x DDP':>8}{'min':>9}{'max':>9}", flush=True)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # DDP warns that no parameter is unused
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        given = [(rank, f"{folder}/store", options.rounds) for rank in range(RANKS)]
        ranks = [context.Process(target=measure, args=one) for one in given]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()


if __name__ == "__main__":
    main()
