"""Metrics that a validation split leaves undefined, whatever the model says: nothing may follow them."""

from __future__ import annotations

from collections.abc import Sequence

from datasets.layout import VolumeFile
from datasets.reading import Reader
from hpc.errors import UserError
from hpc.experiment import Experiment


def refuse(experiment: Experiment, volumes: VolumeFile) -> None:
    """UserError where a metric that the run follows is undefined in each of its evaluations.

    No voxel is read: of label maps the table of foreground tells, and without one there is no answer.
    """
    undefined = _undefined(experiment, volumes)
    for key, metric in {"train.monitor": experiment.monitor, **experiment.train.metrics()}.items():
        if metric in undefined:
            raise UserError(f"{key} {metric} is undefined: {undefined[metric]} of {experiment.data.file}; {_NEXT}")


_NEXT = "use loss, or pack it again"


def never(experiment: Experiment, volumes: VolumeFile, evaluations: int) -> UserError:
    """Of a run in none of whose evaluations the monitored metric was defined."""
    metric = experiment.monitor
    why = _undefined(experiment, volumes).get(metric) or _seen(experiment, volumes)
    times = "the evaluation" if evaluations == 1 else f"each of {evaluations} evaluations"
    said = f"train.monitor {metric} was undefined in {times}, so no epoch is the best: {why}"
    return UserError(f"{said} of {experiment.data.file}; {_NEXT}")


def _seen(experiment: Experiment, volumes: VolumeFile) -> str:
    if experiment.task == "segmentation":
        return f"no voxel of {', '.join(_counted(experiment, volumes))} is there or predicted in the validation samples"
    return "no class has what it needs in the validation samples that were looked at"


def _undefined(experiment: Experiment, volumes: VolumeFile) -> dict[str, str]:
    """Metric -> why."""
    validation = volumes.indices("validation").tolist()
    if experiment.task == "segmentation":
        counted = _counted(experiment, volumes)
        there = not counted or _any_voxel(volumes, validation, [volumes.class_names.index(name) for name in counted])
        return {} if there else {"dice": f"no voxel of {', '.join(counted)} in the validation samples"}
    labels = volumes.targets[validation]
    if experiment.task == "classification":
        one = len(set(labels.tolist())) < 2
        return {"roc_auc": "all validation samples are of one class"} if one else {}
    why = "no label is both there and not there in the validation samples"
    undefined = {"roc_auc": why} if (labels == labels[0]).all() else {}
    return undefined | ({} if labels.any() else {"map": "no label in the validation samples"})


def _counted(experiment: Experiment, volumes: VolumeFile) -> list[str]:
    """The classes whose mean Dice is."""
    loss, names = experiment.train.loss, list(volumes.class_names)
    weights = loss.class_weights if isinstance(loss.class_weights, list) else [1.0] * len(names)
    shown = [name for name, weight in zip(names, weights, strict=False) if weight > 0 and name not in loss.ignore]
    return [name for name in shown if name != names[0] or loss.include_background]


def _any_voxel(volumes: VolumeFile, samples: Sequence[int], classes: Sequence[int]) -> bool:
    """Whether a sample has a voxel of one of the classes; True where the file does not tell."""
    if any(shard.foreground is None for shard in volumes.shards):
        return True
    with Reader(volumes) as reader:
        return any((reader.foreground(sample)[classes] >= 0).any() for sample in samples)
