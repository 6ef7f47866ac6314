"""Saver against torch.save + fsync, in one run: `make bench-save`. Prints ratios, asserts nothing.

A model with Adam's state, page cache warm, both ways in turn, several rounds; the medians count. `stall` is what the
training waits for, `durable` the time until the checkpoint is on the disk, its sums included; `load` verifies and
loads against `torch.load(weights_only=True)`.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs import checkpoint
from jobs.saving import Saver

PARAMETERS = {"10 MB": 0.83e6, "184 MB": 15.3e6, "345 MB": 28.7e6}
LIMITS = {"stall": 0.15, "durable": 1.6}


def make(parameters: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As many tensors as a 3D ResNet-18 has, all trained once."""
    width = round((parameters / 20 / 27) ** 0.5)
    model = nn.Sequential(*[layer for _ in range(20) for layer in (nn.Conv3d(width, width, 3), nn.BatchNorm3d(width))])
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def torch_save(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def seconds(way: Callable[[], Any]) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def measure(folder: Path, parameters: float, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Bytes of a checkpoint, and the seconds of each way in each round."""
    model, optimizer = make(parameters)
    weights, moments = model.state_dict(), optimizer.state_dict()
    where = folder / "checkpoints"
    device = torch.device("cpu")
    saver = Saver(where, 1, keep=1, device=device, fence=lambda: None, report=lambda kind, **fields: None)
    taken: dict[str, list[float]] = {name: [] for name in ("torch.save", "stall", "durable", "torch.load", "load")}
    for number in range(rounds + 2):  # the first two fill new memory
        path = folder / f"{number}.pt"
        both = {"model": weights, "optimizer": optimizer.state_dict()}
        taken["torch.save"].append(seconds(lambda path=path, both=both: torch_save(path, both)))
        taken["torch.load"].append(seconds(lambda path=path: torch.load(path, weights_only=True)))
        path.unlink()
        os.sync()
        started = time.perf_counter()
        name = saver.save(number, weights, moments, {}, {}, set())
        taken["stall"].append(time.perf_counter() - started)
        saver.wait()
        taken["durable"].append(time.perf_counter() - started)
        while [path.name for path in where.iterdir()] != [name]:  # until it is read back, and the older one is deleted
            time.sleep(0.01)
        taken["load"].append(seconds(lambda name=name: load(where / name)))
        os.sync()
    saver.close()
    size = sum(file.stat().st_size for file in (where / name).iterdir())
    return size, {name: values[2:] for name, values in taken.items()}


def load(path: Path) -> None:
    found = checkpoint.verify(path)
    found.model(), found.optimizer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", help="on the file system to measure; default: that of temporary files")
    options = parser.parse_args()
    for label, parameters in PARAMETERS.items():
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            size, taken = measure(folder, parameters, options.rounds)
        finally:
            shutil.rmtree(folder)
        middle = {name: statistics.median(values) for name, values in taken.items()}
        print(f"{label}: {size / 1e6:.0f} MB, torch.save + fsync {middle['torch.save']:.3f} s")
        for name, against in (("stall", "torch.save"), ("durable", "torch.save"), ("load", "torch.load")):
            limit = f"   (at most {LIMITS[name]})" if name in LIMITS else ""
            ratio = middle[name] / middle[against]
            print(f"  {name:<10}{middle[name]:>9.4f} s {ratio:>7.2f} of {against}{limit}")


if __name__ == "__main__":
    main()
