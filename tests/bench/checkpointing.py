"""What activation checkpointing costs and buys: the seed's ResNet, activations of its blocks kept or made anew."""

import argparse
from functools import partial

import torch
from torch.nn import functional as F

from hpc.optimisation import Optimizer
from jobs.memory import Step, estimate
from jobs.optimize import build_optimizer
from models3d import create_model
from tests.bench.compare import Comparison

FULL = (1, 1, 190, 190, 190)


def section(size: int, batch: int, rounds: int) -> None:
    kept = {}
    for on in (False, True):
        with torch.device("meta"):
            model = create_model("resnet3d", 1, 3, checkpoint=on)
        kept[on] = estimate(model, FULL, Step()).activations
    ratio = kept[False] / kept[True]
    print("\nactivations of resnet3d at 190^3, predicted from shapes")
    print(f"  {kept[False] / 1e9:.1f} GB kept, {kept[True] / 1e9:.1f} GB computed anew")
    print(f"  {'ok' if ratio >= 3 else 'BELOW':<6}kept / anew: {ratio:.2f}, goal 3")
    ways = {name: partial(_step, *_made(on), size, batch) for name, on in (("activations kept", False), ("anew", True))}
    table = Comparison(f"training step of resnet3d, fp32, {batch} x {size}^3", batch, "samples/s")
    table.run(ways, rounds)
    table.print()
    table.ratio("anew", "activations kept", 1 / 1.4)


def _made(checkpoint: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = create_model("resnet3d", 1, 3, checkpoint=checkpoint).train()
    return model, build_optimizer(Optimizer(), model)


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, size: int, batch: int) -> None:
    F.cross_entropy(model(torch.ones(batch, 1, size, size, size)), torch.zeros(batch, dtype=torch.long)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    section(arguments.size, arguments.batch, arguments.rounds)


if __name__ == "__main__":
    main()
