"""From the start of the process to the first new step of a resumed run: `make bench-restart`. Prints, asserts nothing.

The demo's ResNet with its optimizer state. Beside it, in the same rounds: `import torch` in a process of its own, and
reading and comparing the checkpoint once. The goal for what is left is 2 s; a part of it is torch's as well, whose
optimizers import its compiler: a process that makes one and steps tells how much.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from datasets.writer import VolumeWriter
from hpc import stepledger
from hpc.experiment import load
from hpc.rundir import RunDir
from hpc.yamlfile import dump
from jobs import checkpoint
from jobs.precision import emulates_bf16

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = ROOT / "jobs" / "recipes" / "t1-resnet3d.yaml"


def make_run(folder: Path) -> RunDir:
    """The demo's run, on noise of its size."""
    draw, data = np.random.default_rng(0), folder / "patches.h5"
    shape = (1, 24, 24, 24)
    names = [f"class{number}" for number in range(6)]
    with VolumeWriter(data, shape=shape, dtype="int16", num_samples=600, class_names=names) as writer:
        for number in range(600):
            volume = draw.integers(0, 2000, shape, dtype=np.int16)
            split = "train" if number < 500 else "validation"
            writer.add(volume, number % 6, id=f"s{number}", group=f"s{number}", split=split)
    run = RunDir(folder / "run")
    run.path.mkdir()
    precision = ["train.precision=fp32"] if emulates_bf16(torch.device("cpu")) else []
    experiment, _ = load(RECIPE, [f"data.file={data}", "train.ledger=true", "train.checkpoint_every=1", *precision])
    run.experiment.write_text(dump(experiment.as_dict()))
    return run


def first_step(run: RunDir, generation: int) -> float:
    """Seconds from the process's start to the first line of its step ledger; then it is stopped."""
    environ = {**os.environ, "HPC_GENERATION": str(generation), "PYTHONPATH": str(ROOT)}
    ledger = stepledger.path(run, generation, 0)
    start = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "jobs.run", str(run.path)], env=environ, stdout=subprocess.DEVNULL
    ) as process:
        while not (ledger.exists() and ledger.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"the run left with {process.returncode}")
            time.sleep(0.002)
        took = time.monotonic() - start
        process.terminate()
    return took


def import_torch() -> float:
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.monotonic() - start


def first_optimizer() -> float:
    """Of any process that trains by torch: what its first optimizer and step take."""
    text = (
        "import time, torch; p = torch.zeros(1, requires_grad=True); p.sum().backward(); t = time.monotonic(); "
        "torch.optim.SGD([p], lr=0.1).step(); print(time.monotonic() - t)"
    )
    return float(subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True).stdout)


def read_checkpoint(run: RunDir) -> float:
    start = time.monotonic()
    found = checkpoint.verify(next(checkpoint.newest_first(run.checkpoints)))
    found.model(), found.optimizer()
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        # As at a user's: what Python has compiled at the first start of the run is there at the next.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(name) / "compiled")
        run = make_run(Path(name))
        first_step(run, 1)
        table = [
            (first_step(run, 2 + n), import_torch(), read_checkpoint(run), first_optimizer()) for n in range(rounds)
        ]
    start, torch_only, reading, optimizer = (statistics.median(column) for column in zip(*table, strict=True))
    rest = statistics.median(total - imported - read for total, imported, read, _ in table)
    print(f"start to first new step   {start:6.2f} s")
    print(f"import torch              {torch_only:6.2f} s")
    print(f"read the checkpoint once  {reading:6.3f} s")
    print(f"the rest                  {rest:6.2f} s   (goal: 2 s)")
    print(f"  of it torch's optimizer {optimizer:6.2f} s")


if __name__ == "__main__":
    main()
