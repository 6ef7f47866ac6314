"""Runs of seconds of the other tasks (see tests/tiny_run.py): 14 samples of 6 x 8, a network of two convolutions.

run = make_run(folder / "run", make_data(folder, "segmentation"), "segmentation", "train.seed=3")
"""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from datasets.layout import UNLABELLED
from datasets.writer import VolumeWriter
from hpc.experiment import load
from hpc.rundir import RunDir

SPLITS = {"train": 9, "validation": 5}
BATCH, EPOCHS, STEPS_PER_EPOCH = 4, 2, 2
STEPS = EPOCHS * STEPS_PER_EPOCH
BOUNDARIES = 1 + STEPS + 2 * EPOCHS
CLASSES = {"multilabel": ("bright", "striped", "rare"), "segmentation": ("background", "disc", "edge")}
SHAPE = (6, 8)

NETS = """
from torch import nn

def body(in_channels):
    return (nn.Conv2d(in_channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1))

class Labels(nn.Sequential):
    def __init__(self, in_channels, num_classes):
        super().__init__(*body(in_channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))

class Maps(nn.Sequential):
    def __init__(self, in_channels, num_classes):
        super().__init__(*body(in_channels), nn.Conv2d(6, num_classes, 1))
"""
NET = {"multilabel": "Labels", "segmentation": "Maps"}


def make_data(folder: Path, task: str, splits: dict[str, int] = SPLITS) -> Path:
    """Pictures of noise with what their labels or maps say; a few voxels are 255."""
    generator, path = np.random.default_rng(11), folder / f"{task}.h5"
    options: dict[str, Any] = {"shape": (1, *SHAPE), "dtype": "int16", "num_samples": sum(splits.values())}
    with VolumeWriter(path, task=task, class_names=CLASSES[task], **options) as writer:
        for split, count in splits.items():
            for number in range(count):
                picture = generator.integers(-30, 30, (1, *SHAPE)).astype("int16")
                target = (_labels if task == "multilabel" else _map)(picture, number)
                writer.add(picture, target, id=f"{split}{number}", split=split, scale=0.02)
    return path


def _labels(picture: np.ndarray, number: int) -> np.ndarray:
    labels = np.array([number % 2, number % 3 == 0, number % 5 == 4], np.uint8)
    picture += np.int16(40 * labels[0])
    picture[:, ::2] += np.int16(40 * labels[1])
    return labels


def _map(picture: np.ndarray, number: int) -> np.ndarray:
    found = np.zeros(SHAPE, np.uint8)
    row = number % 3
    found[row : row + 3, 2:6] = 1
    found[row, 2:6] = 2
    picture[0] += 40 * found.astype(np.int16)
    found[5, number % 8] = UNLABELLED
    return found


def make_run(folder: Path, data: Path, task: str, *overrides: str) -> RunDir:
    """A run folder as the login node leaves it."""
    run = RunDir(folder)
    run.path.mkdir(parents=True)
    net = folder / "net.py"
    net.write_text(NETS)
    values = {
        "name": "tiny",
        "task": task,
        "model": {"name": f"file:{net}:{NET[task]}"},
        "data": {"file": str(data), "batch_size": BATCH, "augment": {"flip": [0]}, "verify": 0, "threads": 1},
        "train": {"epochs": EPOCHS, "device": "cpu", "figures": "few", "optimizer": {"lr": 0.02}},
    }
    run.experiment.write_text(yaml.safe_dump(values))
    resolved, _ = load(run.experiment, list(overrides))
    run.experiment.write_text(yaml.safe_dump(resolved.as_dict()))
    return run
