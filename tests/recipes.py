"""Recipes end to end as a table: the tiny form of each as a user types it, and how much it must have learnt.

    $ hpc train NAME --tiny
    $ hpc evaluate NAME-tiny --json
    $ hpc predict NAME-tiny FILES -o predicted

A margin is under what was measured (docs/LOG.md), over naming the commonest class (or the prevalence) on samples that
no training has seen. tests/test_recipes.py plays the rows.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.rundir import RunDir

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / ".cache" / "recipes-data"
"""Fetched and packed once for all tests."""


@dataclass(frozen=True)
class Row:
    recipe: str
    metric: str
    margin: float
    new: str
    """Files to predict, below the folder of the data; none for patches about places of an atlas."""
    sooner: tuple[str, ...] = ()
    """Played by `make test`, one of each task, with these overrides: so far training beats the margin for any seed."""

    @property
    def has_test(self) -> bool:
        return not self.recipe.startswith("t1-")  # their patches are those of the demo


_TILES = "landcover/test/*/tile-1*.png"
ROWS = [
    Row("cedia-resnet3d", "accuracy", 0.25, "structures/15697-p*.nii.gz"),
    Row("cedia-transformer3d", "accuracy", 0.4, "structures/15697-p*.nii.gz", ("train.epochs=6",)),
    Row("t1-resnet3d", "accuracy", 0.25, ""),
    Row("t1-transformer3d", "accuracy", 0.4, ""),
    Row("efficientnet-b4-finetune", "balanced_accuracy", 0.15, _TILES),
    Row("efficientnet-b4-finetune-cuda", "balanced_accuracy", 0.15, _TILES),
    Row("image-template", "accuracy", 0.08, _TILES),
    Row("image-template-cpu", "accuracy", 0.08, _TILES),
    Row("vit-scratch", "accuracy", 0.08, _TILES),
    Row("vit-finetune", "accuracy", 0.05, _TILES),
    Row("convnext-duplicates-kept", "accuracy", 0.6, "digits-kept/*/digit-00*.png"),
    Row("convnext-duplicates-dropped", "accuracy", 0.6, "digits-kept/*/digit-00*.png"),
    Row("multilabel-resnet50", "map", 0.25, "landcover-labels/tiles/tile-1*.png", ("train.epochs=1",)),
    Row("multilabel-baseline", "map", 0.25, "landcover-labels/tiles/tile-1*.png"),
    Row("multilabel-resnet152", "map", 0.25, "landcover-labels/tiles/tile-1*.png"),
    Row("multilabel-focal-bce", "map", 0.25, "landcover-labels/tiles/tile-1*.png"),
    Row("multilabel-weighted-bce", "map", 0.25, "landcover-labels/tiles/tile-1*.png"),
    Row("landcover-unet", "iou", 0.1, "landcover-masks/tiles/tile-1*.png"),
    Row("landcover-unet-balanced", "iou", 0.1, "landcover-masks/tiles/tile-1*.png"),
    Row("landcover-unet-oversampling", "iou", 0.1, "landcover-masks/tiles/tile-1*.png"),
    Row("segmentation3d", "dice", 0.3, "tissues/scans/block-*-3-*.nii.gz", ("train.epochs=2",)),
]


@dataclass(frozen=True)
class Played:
    """What a row came to: `score` and `baseline` are of the metric on the validation split."""

    run: RunDir
    score: float
    baseline: float
    held_out: tuple[float, float]
    """Both of the test split, which chose nothing; of the validation split where a file has no other."""
    found: dict[str, Any]
    """Of evaluate."""
    sources: list[Path]
    predicted: Path
    log: str
    seconds: float

    def line(self, row: Row) -> str:
        score, baseline = self.held_out
        got = f"{row.metric} {self.score:.3f}, held out {score:.3f}, baseline {baseline:.3f}"
        return f"recipe {row.recipe}: {got}, margin {row.margin:g}, {self.seconds:.0f} s"


def play(row: Row, folder: Path, *overrides: str) -> Played:
    """Type the row's commands in a folder of its own; AssertionError with all that was printed for one that fails."""
    DATA.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True)
    (folder / DATA.name).symlink_to(DATA)
    log: list[str] = []
    began = time.monotonic()
    hpc(folder, log, "train", row.recipe, "--tiny", *overrides)
    seconds = time.monotonic() - began
    run = RunDir(next((folder / "runs").iterdir()))
    found = json.loads(hpc(folder, log, "evaluate", run.name, "--json"))
    split = "test" if row.has_test else "validation"
    held_out = json.loads(hpc(folder, log, "evaluate", run.name, "--split", split, "--json")) if row.has_test else found
    sources = sorted(DATA.glob(row.new)) if row.new else []
    predicted = folder / "predicted"
    if sources:
        hpc(folder, log, "predict", run.name, *map(str, sources), "-o", str(predicted))
    score, baseline = found["metrics"][row.metric], found["baseline"][row.metric]
    proof = held_out["metrics"][row.metric], held_out["baseline"][row.metric]
    return Played(run, score, baseline, proof, found, sources, predicted, "\n".join(log), seconds)


def hpc(folder: Path, log: list[str], *words: str) -> str:
    """One command; its output."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("HPC_", "SLURM_"))}
    environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("hpc")), *words]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    log.append(f"$ hpc {' '.join(words[:4])}\n{done.stdout}{done.stderr}")
    assert done.returncode == 0, "\n".join([*log, f"left with {done.returncode}"])
    return done.stdout
