"""What rows of tests/scenarios.py and tests/faults are played with: data, an experiment, and the undisturbed runs."""

import shutil
import tempfile
from functools import cache
from pathlib import Path
from threading import Lock

import nibabel
import numpy as np

from datasets.writer import VolumeWriter
from tests.playing import Playing, Row
from tests.proof import play

NET = Path(__file__).parent / "faults" / "net.py"
EXPERIMENT = """
name: tiny
model: {name: file:net.py:Net, pause: 0.025}
data: {file: scans.h5, batch_size: 12, augment: {flip: [0], noise: 0.2}, threads: 1}
train:
  epochs: 4
  precision: bf16
  checkpoint_every: 1s
  device: cpu
  figures: few
  ledger: true
  optimizer: {name: adamw, lr: 2e-3}
  scheduler: {name: cosine, warmup_epochs: 1}
launch: {instance: cedia-a100-40gb, gpus: 1, cpus: 1, mem: 2GB, time: 30min}
"""
MAPS = """
name: tiny
task: segmentation
model: {name: file:net.py:Maps, pause: 0.05}
data: {file: maps.h5, batch_size: 12, augment: {flip: [0], noise: 0.2}, threads: 1}
train:
  checkpoint_every: 1s
  device: cpu
  figures: few
  ledger: true
  ema: {decay: 0.9}
  clip_norm: 1
  loss: {class_weights: balanced}
  stages: [{epochs: 1, freeze: [body.0], lr: 1e-2}, {epochs: 2, lr: 5e-3, scheduler: {name: cosine}}]
launch: {instance: cedia-a100-40gb, gpus: 1, cpus: 1, mem: 2GB, time: 30min}
"""
TWO_TASKS = "$ hpc train tiny.yaml launch.tasks_per_node=2 launch.cpus=2 model.pause=0"
COMPILED = "tiny.yaml launch.cluster=local train.compile=blocks train.precision=fp32 train.epochs=2"
UNDISTURBED = {
    row.name: row
    for row in (
        Row(
            "one-task",
            "an undisturbed run here, in the foreground",
            "$ hpc train tiny.yaml launch.cluster=local model.pause=0",
        ),
        Row("two-tasks", "an undisturbed run of two ranks here", TWO_TASKS),
        Row("two-tasks-maps", "an undisturbed segmentation of two ranks here", TWO_TASKS.replace("tiny.", "maps.")),
        Row(
            "compiled",
            "an undisturbed run here, its blocks compiled",
            f"$ hpc train {COMPILED} model.pause=0",
            soak=True,
        ),
        Row("fsdp", "the same with weights in shards", f"{TWO_TASKS} train.strategy=fsdp"),
        Row("zero", "the same by ZeRO 3", f"{TWO_TASKS} train.strategy=deepspeed train.zero.stage=3"),
        Row(
            "spoilt",
            "of two ranks, the second of which meets a loss that is no number: at step 65, and at 85 to 89",
            f"spoil steps 65 85 86 87 88 89\n{TWO_TASKS}",
            lost=None,
        ),
    )
}
_BASE = tempfile.TemporaryDirectory(prefix="hpc-stage-")
_LOCKS = {name: Lock() for name in ("scans", *UNDISTURBED)}


def make_scans(folder: Path) -> None:
    """600 small volumes of three kinds: a ball, a cube, a rod, at random places in noise."""
    draw = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"))
    folder.mkdir()
    table = ["id,label"]
    for number in range(600):
        kind = number % 3
        offset = np.abs(grid - draw.uniform(2.5, 5.5, size=(3, 1, 1, 1)))
        shape = [(offset**2).sum(0) < 6, offset.max(0) < 2, np.maximum(offset[0], offset[1]) < 1][kind]
        volume = (100 * shape + draw.normal(100, 40, grid.shape[1:])).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 1, 2, 1])), folder / f"scan{number:03d}.nii")
        table.append(f"scan{number:03d},{['ball', 'cube', 'rod'][kind]}")
    (folder / "labels.csv").write_text("\n".join(table) + "\n")


def make_maps(path: Path) -> None:
    """240 pictures of noise with a bright disc and its edge, and maps of them."""
    draw, grid = np.random.default_rng(1), np.stack(np.meshgrid(*[np.arange(16)] * 2, indexing="ij"))
    names = ("background", "disc", "edge")
    with VolumeWriter(
        path, task="segmentation", shape=(1, 16, 16), dtype="int16", num_samples=240, class_names=names
    ) as writer:
        for number in range(240):
            far = np.hypot(*(grid - draw.uniform(5, 11, (2, 1, 1))))
            target = (far < 4).astype(np.uint8) + ((far < 4) & (far >= 3))
            picture = (60 * target + draw.normal(0, 40, target.shape)).astype(np.int16)
            split = "train" if number < 192 else "validation"
            writer.add(picture[None], target, id=f"map{number:03d}", split=split, scale=0.01)


@cache
def _packed() -> Path:
    """A folder with the scans and their HDF5 file."""
    base = Path(_BASE.name)
    make_scans(base / "scans")
    packing = Playing(Row("pack", "scans into HDF5", ""), base)
    packing.command("hpc pack scans/*.nii -o scans.h5 --labels scans/labels.csv --split 80/20/0")
    make_maps(base / "maps.h5")
    return base


def furnish(folder: Path, here: bool) -> Path:
    """A folder as a user has it: the data, a network of their own, an experiment for this machine or the cluster."""
    with _LOCKS["scans"]:
        base = _packed()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scans").symlink_to(base / "scans")
    shutil.copy(base / "scans.h5", folder)
    shutil.copy(base / "maps.h5", folder)
    shutil.copy(NET, folder)
    for name, text in (("tiny.yaml", EXPERIMENT), ("maps.yaml", MAPS)):
        (folder / name).write_text(text.replace("cedia-a100-40gb, gpus: 1", "laptop") if here else text)
    return folder


@cache
def _undisturbed(name: str) -> Playing:
    folder = furnish(Path(_BASE.name) / name, here=True)
    return play(UNDISTURBED[name], folder, undisturbed)


def undisturbed(name: str) -> Playing:
    """The run that others of the same layout must equal; done when it is first asked for."""
    with _LOCKS[name]:
        return _undisturbed(name)


def played(row: Row, folder: Path) -> Playing:
    """The row, in a folder of its own. Raises AssertionError, with all that it printed."""
    return play(row, furnish(folder, row.cluster is None), undisturbed)
