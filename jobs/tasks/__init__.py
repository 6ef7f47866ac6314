"""What is learnt: each task owns its loss, its exact counts over ranks and batches, and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from datasets.layout import VolumeFile
from hpc.errors import UserError
from hpc.experiment import Experiment
from hpc.training import Loss
from jobs.tasks.classification import Classification
from jobs.tasks.contract import Task
from jobs.tasks.multilabel import Multilabel
from jobs.tasks.options import Options, check_loss, make_options
from jobs.tasks.segmentation import Segmentation

__all__ = ["Task", "build", "check_loss", "check_outputs", "make_task"]

_TASKS: dict[str, Callable[[Options, torch.device], Task]] = {
    "classification": Classification,
    "multilabel": Multilabel,
    "segmentation": Segmentation,
}


def make_task(experiment: Experiment, volumes: VolumeFile, device: torch.device) -> Task:
    """The task of an experiment, with the weights that its training split gives.

    Where a segmentation asks for balanced weights, every label map of the training split is read.
    Raises ValueError or UserError with one line.
    """
    check_loss(experiment, volumes)
    return build(experiment.task, make_options(experiment, volumes), device)


def build(name: str, options: Options, device: torch.device) -> Task:
    """A task by its name. Raises UserError where the options leave nothing to learn."""
    return _TASKS[name](options, device)


def check_outputs(experiment: Experiment, volumes: VolumeFile, outputs: object, inputs_shape: Sequence[int]) -> None:
    """Whether a model's outputs for inputs (B, C, *spatial) are the task's logits. No sample is read.

    Raises UserError.
    """
    if not isinstance(outputs, torch.Tensor):
        raise UserError(f"it gives a {type(outputs).__name__}, not a tensor of scores")
    plain = Options(tuple(volumes.class_names), Loss(), Loss().of_task(experiment.task))
    build(experiment.task, plain, torch.device("cpu")).check_outputs(outputs.shape, inputs_shape)
