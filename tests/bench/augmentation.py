"""Augmentation of a batch against MONAI's and TorchIO's per-sample transforms, in one run: `make bench-augmentation`.

Affine (rotation +-15 degrees, zoom 0.9 to 1.1, translation +-5 voxels), a flip of each axis with 1/2 and Gaussian noise
on 8 volumes of 96^3 float32, all of them every time. Each way in turn, several rounds; medians, and ratios of the
medians. The peers get one sample after the other with all threads, and as many samples at once as there are threads.
Needs `pip install -e .[bench]`. Prints, asserts nothing.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from datasets.augment import Augment
from tests.bench.compare import MISSING

SIZE, BATCH, SHIFT = 96, 8, 5
Way = Callable[[int], Any]


def ours(batch: Tensor) -> Way:
    augment = Augment(rotate=15, zoom=[0.9, 1.1], translate=SHIFT / SIZE, flip=[0, 1, 2], noise=0.1)
    samples = np.arange(len(batch))
    return lambda turn: augment(batch, samples, 0, turn)


def monai(lazy: bool) -> Callable[[Tensor], Any]:
    """The fastest way of its own: no metadata where it can do without; lazy joins affine and flips into one pass."""
    from monai.data import set_track_meta
    from monai.transforms import Compose, RandAffine, RandFlip, RandGaussianNoise

    set_track_meta(lazy)
    angle, shift, scale = (math.radians(15),) * 3, (SHIFT,) * 3, (0.1,) * 3
    size = (SIZE,) * 3
    affine = RandAffine(1.0, angle, None, shift, scale, size, "bilinear", "border", cache_grid=not lazy)
    flips = [RandFlip(0.5, axis) for axis in range(3)]
    chain = Compose([affine, *flips, RandGaussianNoise(1.0, std=0.1)], lazy=lazy)

    def change(sample: Tensor) -> Any:
        set_track_meta(lazy)
        return chain(sample)

    return change


def torchio() -> Callable[[Tensor], Any]:
    import torchio as tio

    affine = tio.RandomAffine(scales=0.1, degrees=15, translation=SHIFT, isotropic=True)
    chain = tio.Compose([affine, tio.RandomFlip(axes=(0, 1, 2), flip_probability=0.5), tio.RandomNoise(std=(0, 0.1))])
    return lambda sample: chain(sample)


def one_by_one(batch: Tensor, change: Callable[[Tensor], Any]) -> Way:
    return lambda turn: torch.stack([torch.as_tensor(change(sample)) for sample in batch])


def side_by_side(batch: Tensor, change: Callable[[Tensor], Any], threads: int) -> Way:
    pool = ThreadPoolExecutor(threads)
    return lambda turn: torch.stack([torch.as_tensor(one) for one in pool.map(change, batch)])


def bare(batch: Tensor) -> Way:
    """torch's own warp of the whole batch, without noise and flips: what a simple batched version starts from."""
    theta = torch.eye(3, 4).repeat(len(batch), 1, 1) + 0.05

    def warp(turn: int) -> Tensor:
        grid = affine_grid(theta, list(batch.shape), align_corners=False)
        return grid_sample(batch, grid, padding_mode="border", align_corners=False)

    return warp


def measure(ways: dict[str, Way], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """For each way, of each round: seconds on the clock and seconds of all cores."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for way in ways.values():
        way(0)
    for turn in range(rounds):
        for name, way in ways.items():
            started, worked = time.perf_counter(), time.process_time()
            way(turn)
            seconds[name].append((time.perf_counter() - started, time.process_time() - worked))
    return seconds


GOAL = 1.4
"""times our time, of the peers one sample after the other"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch = torch.randn(BATCH, 1, SIZE, SIZE, SIZE)
    peers: dict[str, Any] = {}
    if find_spec("monai"):
        peers |= {"MONAI": monai(lazy=False), "MONAI, lazy": monai(lazy=True)}
    if find_spec("torchio"):
        peers |= {"TorchIO": torchio()}
    ways = {"ours, batched": ours(batch), "torch: affine_grid + grid_sample alone": bare(batch)}
    for name, change in peers.items():
        ways[f"{name}, one by one"] = one_by_one(batch, change)
        ways[f"{name}, {options.threads} at once"] = side_by_side(batch, change, options.threads)
    for name in ("monai", "torchio"):
        if not find_spec(name):
            print(f"{name}: {MISSING}")
    seconds = measure(ways, options.rounds)
    base, base_cpu = medians(seconds["ours, batched"])
    print(f"affine + flip + noise on {BATCH} x {SIZE}^3 float32, {options.threads} threads")
    print(f"{'way':<42}{'ms':>8}{'x ours':>8}{'min':>8}{'max':>8}{'CPU ms':>8}{'x ours':>8}")
    for name, taken in seconds.items():
        middle, cpu = medians(taken)
        clock = [one for one, _ in taken]
        print(
            f"{name:<42}{middle * 1e3:>8.0f}{middle / base:>8.2f}{min(clock) * 1e3:>8.0f}{max(clock) * 1e3:>8.0f}"
            f"{cpu * 1e3:>8.0f}{cpu / base_cpu:>8.2f}"
        )

    for name in peers:
        beside = medians(seconds[f"{name}, one by one"])[0] / base
        print(f"  {'ok' if beside >= GOAL else 'BELOW':<6}{name}, one by one / ours: {beside:.2f}, goal {GOAL}")


def medians(taken: list[tuple[float, float]]) -> tuple[float, float]:
    clock, cpu = zip(*taken, strict=True)
    return statistics.median(clock), statistics.median(cpu)


if __name__ == "__main__":
    main()
