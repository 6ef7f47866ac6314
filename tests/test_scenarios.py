"""Runs the table of tests/scenarios.py, a few rows at a time; each row is a test of its own."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.playing import Playing, Row, play
from tests.scenarios import ROWS
from tests.slurm.cluster import obstacle, reap

AT_A_TIME = 3
# The row that mostly waits for the clock starts first.
SOAK = os.environ.get("HPC_SOAK") == "1"
ORDER = sorted(
    [row for row in ROWS if SOAK or not row.soak], key=lambda row: (row.weights is not None, row.name != "time-limit")
)
EXPERIMENT = """
name: tiny
model: {name: resnet3d_tiny, stem_stride: 2, dropout: 0.3}
data: {file: scans.h5, batch_size: 12, augment: {flip: [0], noise: 0.2}, threads: 1}
train:
  epochs: 4
  precision: bf16
  checkpoint_every: 2s
  device: cpu
  optimizer: {name: adamw, lr: 2e-3}
  scheduler: {name: cosine, warmup_epochs: 1}
launch: {instance: cedia-a100-40gb, gpus: 1, cpus: 1, mem: 2GB, time: 30min}
"""


def make_scans(folder: Path) -> None:
    """600 small volumes of three kinds: a ball, a cube, a rod, at random places in noise."""
    draw = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(16)] * 3, indexing="ij"))
    folder.mkdir()
    table = ["id,label"]
    for number in range(600):
        kind = number % 3
        offset = np.abs(grid - draw.uniform(5, 11, size=(3, 1, 1, 1)))
        shape = [(offset**2).sum(0) < 25, offset.max(0) < 4, np.maximum(offset[0], offset[1]) < 2][kind]
        volume = (100 * shape + draw.normal(100, 40, grid.shape[1:])).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 1, 2, 1])), folder / f"scan{number:03d}.nii")
        table.append(f"scan{number:03d},{['ball', 'cube', 'rod'][kind]}")
    (folder / "labels.csv").write_text("\n".join(table) + "\n")


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, "Future[Playing]"]]:
    """Every row, started; a row's test waits for its own."""
    base = tmp_path_factory.mktemp("scenarios")
    make_scans(base / "scans")
    packing = Playing(Row("pack", "scans into HDF5", ""), base, {})
    packing.command("hpc pack scans/*.nii -o scans.h5 --labels scans/labels.csv --split 80/20/0")
    reap()
    started: dict[str, Future[Playing]] = {}
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for row in ORDER:
            if row.cluster is not None and obstacle():
                continue
            folder = base / row.name
            folder.mkdir()
            for name in ("scans.h5", "scans"):
                (folder / name).symlink_to(base / name)
            text = EXPERIMENT if row.cluster is not None else EXPERIMENT.replace("cedia-a100-40gb, gpus: 1", "laptop")
            (folder / "tiny.yaml").write_text(text)
            started[row.name] = pool.submit(play, row, folder, started)
        yield started
        pool.shutdown(cancel_futures=True)


def mark(row: Row) -> object:
    return pytest.param(row, id=row.name, marks=[pytest.mark.slurm] if row.cluster is not None else [])


@pytest.mark.parametrize("row", [mark(row) for row in ORDER])
def test_scenario(row: Row, stage: dict[str, "Future[Playing]"]) -> None:
    print(stage[row.name].result().block())
