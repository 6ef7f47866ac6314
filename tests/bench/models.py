"""`make bench-models`: the tiny `resnet3d` and MONAI's ResNet of as many parameters, trained alike on the demo's scans.

    python -m tests.bench.models [--seeds 3] [--epochs 6]

Both are trained by `hpc train`: the same patches of T1 brains (two brains train, the third validates), steps, optimizer
and schedule. Printed: accuracy after the last epoch, not of the best one, with a t-interval over the seeds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy import stats

from hpc.rundir import RunDir, read_json
from models3d import create_model

DATA = Path("demo/t1-patches.h5")
NETS: dict[str, dict[str, Any]] = {
    "resnet3d": {"name": "resnet3d", "width": 16, "layers": 4, "stem_stride": 2, "pool_size": 3, "hidden": [64]},
    "monai:ResNet": {
        "name": "monai:ResNet",
        "block": "basic",
        "layers": [1, 1, 1, 1],
        "block_inplanes": [12, 20, 28, 40],
        "conv1_t_size": 3,
        "conv1_t_stride": 2,
        "no_max_pool": True,
    },
}


def experiment(net: str, seed: int, epochs: int) -> dict[str, Any]:
    return {
        "name": f"bench-{net.replace(':', '-').lower()}-{seed}",
        "task": "classification",
        "model": NETS[net],
        "data": {"file": str(DATA.resolve()), "batch_size": 32, "augment": {"flip": [0], "scale": 0.1, "shift": 0.1}},
        "train": {
            "epochs": epochs,
            "seed": seed,
            "precision": "bf16",
            "device": "cpu",
            "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.05},
            "scheduler": {"name": "one_cycle"},
        },
        "launch": {"instance": "laptop", "cluster": "local", "cpus": 1, "mem": "4GB", "time": "1h"},
    }


def train(net: str, seed: int, epochs: int, folder: Path) -> dict[str, float]:
    """One run in the foreground; its last validation metrics, the majority's share, and seconds."""
    values = experiment(net, seed, epochs)
    path = folder / f"{values['name']}.yaml"
    path.write_text(yaml.safe_dump(values))
    started = time.monotonic()
    command = [str(Path(sys.executable).with_name("hpc")), "train", str(path), "--runs", str(folder / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{path.name} left with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    (run,) = (folder / "runs").glob(f"{values['name']}-*")
    result = read_json(RunDir(run).result)
    print(f"  {net}, seed {seed}: {json.dumps(result['last']['metrics'])}", flush=True)
    return {**result["last"]["metrics"], "majority": result["baseline"]["accuracy"], "s": time.monotonic() - started}


def interval(values: list[float]) -> str:
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{np.mean(values):.3f} +- {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    if not DATA.exists():
        from jobs.realdata.making import make

        make("t1-patches", DATA.parent)
    rows: dict[str, list[dict[str, float]]] = {net: [] for net in NETS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for net in NETS:
                rows[net].append(train(net, seed, arguments.epochs, Path(folder)))
    print(f"\n{arguments.seeds} seeds, {arguments.epochs} epochs; mean and 95 % t-interval")
    print(f"  {'net':<16}{'parameters':>12}  {'accuracy':<18}{'f1_macro':<18}{'loss':<18}{'s a run':>8}")
    for net, runs in rows.items():
        with torch.device("meta"):
            options = {key: value for key, value in NETS[net].items() if key != "name"}
            count = sum(p.numel() for p in create_model(net, 1, 6, **options).parameters())
        cells = "".join(f"{interval([run[key] for run in runs]):<18}" for key in ("accuracy", "f1_macro", "loss"))
        print(f"  {net:<16}{count:>12,}  {cells}{np.mean([run['s'] for run in runs]):>8.0f}")
    ours, theirs = ([run["accuracy"] for run in runs] for runs in rows.values())
    found = stats.ttest_ind(ours, theirs, equal_var=False)
    low, high = found.confidence_interval()
    difference = np.mean(ours) - np.mean(theirs)
    print(f"  accuracy, ours - theirs: {difference:+.3f} ({low:+.3f} to {high:+.3f}, Welch); ", end="")
    print(f"majority class {rows['resnet3d'][0]['majority']:.3f}")


if __name__ == "__main__":
    main()
