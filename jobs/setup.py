"""From an experiment to what a training step needs, and whether model and data fit together."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from datasets.augment import Augment
from datasets.layout import VolumeFile
from hpc.errors import UserError
from hpc.experiment import Experiment
from jobs import foreign_weights
from jobs.check import open_data
from jobs.tasks.classification import class_weights
from models3d import create_model, takes


@dataclass(frozen=True)
class Parts:
    """What an experiment and its data file determine before any device is chosen."""

    volumes: VolumeFile
    num_classes: int
    weights: list[float] | None
    """Class weights of the loss."""
    model_options: dict[str, Any]

    def build_model(self, name: str, deterministic: bool = False) -> nn.Module:
        """The network, on the current default device."""
        options = dict(self.model_options)
        if deterministic and "deterministic_pooling" in takes(name):
            options["deterministic_pooling"] = True
        model = create_model(name, in_channels=self.volumes.shape[0], num_classes=self.num_classes, **options)
        _refuse_unsaved(name, model)
        return model


def _refuse_unsaved(name: str, model: nn.Module) -> None:
    """Raises UserError for what a checkpoint could not bring back."""
    if lazy := [key for key, value in model.named_parameters() if is_lazy(value)]:
        raise UserError(f"model {name}: {lazy[0]} has no size before the first batch: write its layer with all sizes")
    if other := [key for key, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]:
        raise UserError(
            f"model {name}: {other[0]} is no tensor: state must be parameters and buffers (register_buffer), or a "
            f"resumed run would go on without it"
        )


def prepare(experiment: Experiment) -> Parts:
    """Open the data file and compare it with the experiment. Raises ValueError or UserError with one line."""
    volumes = open_data(experiment)
    classes = len(volumes.class_names)
    train = volumes.indices("train")
    counts = [int((volumes.targets[train] == label).sum()) for label in range(classes)]
    Augment.from_mapping(experiment.data.augment)
    options = experiment.model.options
    if "input_size" in takes(experiment.model.name):
        options.setdefault("input_size", tuple(volumes.shape[1:]))
    return Parts(volumes, classes, class_weights(experiment.train.loss, counts), options)


def load_weights(experiment: Experiment, model: nn.Module) -> list[str]:
    """Start from the file of model.weights, where there is one; a line each for what it gave. Raises UserError."""
    if experiment.model.weights is None:
        return []
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # a check loads into no memory
        return foreign_weights.load(Path(experiment.model.weights), model)


def check(experiment: Experiment) -> list[str]:
    """What was found to fit, a line each. Raises ValueError or UserError with one line for what does not."""
    parts = prepare(experiment)
    volumes = parts.volumes
    sizes = {split: len(volumes.indices(split)) for split in ("train", "validation", "test")}
    shape = " x ".join(str(size) for size in volumes.shape)
    with torch.device("meta"):
        model = parts.build_model(experiment.model.name)
        outputs = model(torch.empty(2, *volumes.shape))
    if tuple(outputs.shape) != (2, parts.num_classes):
        raise UserError(
            f"model {experiment.model.name} gives scores of shape {tuple(outputs.shape[1:])} for a sample, "
            f"not ({parts.num_classes},): {experiment.task} needs one per class"
        )
    count = sum(p.numel() for p in model.parameters())
    weights = load_weights(experiment, model)
    return [
        f"data: {sum(sizes.values())} samples of {shape} {volumes.dtype}, "
        + ", ".join(f"{number} {split}" for split, number in sizes.items())
        + f", {parts.num_classes} classes",
        f"model: {experiment.model.name}, {count:,} parameters",
        *(f"weights: {line}" for line in weights),
    ]
