"""Tasks without a volume file, `toy("multilabel", name="bce")`, and random outputs and targets for them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc.training import Loss
from jobs.tasks import build
from jobs.tasks.contract import Stored, Task
from jobs.tasks.counts import Counts, Kept
from jobs.tasks.options import Options

CPU = torch.device("cpu")
NAMES = ("one", "two", "three", "four")


def toy(
    task: str, classes: int = 3, weights: Any = None, positive: Any = None, negative: Any = None, **loss: Any
) -> Task:
    """A task of so many classes; `loss` are keys of train.loss."""
    settings, names = Loss(**loss), NAMES[:classes]
    ignored = tuple(names.index(name) for name in settings.ignore)
    return build(task, Options(names, settings, settings.of_task(task), weights, positive, negative, ignored), CPU)


def samples(task: str, number: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(outputs, targets) of `number` samples; of a segmentation maps of 4 x 5 with some 255."""
    generator = torch.Generator().manual_seed(seed)
    if task == "segmentation":
        targets = torch.randint(0, classes, (number, 4, 5), generator=generator, dtype=torch.uint8)
        targets[torch.rand(targets.shape, generator=generator) < 0.1] = 255
        return torch.randn(number, classes, 4, 5, generator=generator), targets
    outputs = torch.randn(number, classes, generator=generator)
    if task == "multilabel":
        return outputs, torch.randint(0, 2, (number, classes), generator=generator, dtype=torch.uint8)
    return outputs, torch.randint(0, classes, (number,), generator=generator)


def seen(task: Task, outputs: Tensor, targets: Tensor, sizes: list[int]) -> tuple[Counts, Stored]:
    """What an evaluation keeps of samples 0, 1, ... in batches of these sizes."""
    counts, kept = Counts(task.cells, CPU), Kept(task)
    numbers = torch.arange(len(outputs))
    for x, y, one in zip(outputs.split(sizes), targets.split(sizes), numbers.split(sizes), strict=True):
        if len(y):
            losses = task.losses(x, y)
            counts.add(task, x, y, losses.mean())
            kept.add(one, x, y, losses)
    found, labels, rows, losses = (column.numpy() for column in kept.columns())
    return counts, Stored(found, labels if labels.ndim == 1 or labels.shape[1] else None, rows, losses)


def scores_of(task: Task, outputs: Tensor, targets: Tensor) -> Any:
    counts, stored = seen(task, outputs, targets, [len(outputs)])
    return task.scores(counts.cells.numpy(), counts.total_loss() / max(counts.samples, 1), counts.samples, stored)


def logits(probabilities: Any) -> Tensor:
    """(N, K) logits of which the softmax is these rows."""
    return torch.from_numpy(np.log(np.asarray(probabilities, np.float64))).float()
