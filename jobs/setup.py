"""From an experiment to what a training step needs, and whether model and data fit together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from datasets import Loader, codecs, sampling, staging
from datasets.augment import Augment
from datasets.layout import VolumeFile
from datasets.staging import Staged
from hpc.allocation import scratch_folders
from hpc.errors import UserError
from hpc.experiment import Experiment
from hpc.settings import Data
from jobs import acceleration, foreign_weights, learner
from jobs.check import open_data
from jobs.stages import Stages
from jobs.tasks import check_loss, check_outputs
from models3d import create_model, pretrained, takes

_MOST_OVER = 2
"""A patch may be so many times as long as the longest training volume."""
_VERIFIED_BYTES = 1 / 64
"""Share of the bytes read for training whose checksum is compared, where data.verify does not say."""


@dataclass(frozen=True)
class Parts:
    """What an experiment and its data file determine before any device is chosen."""

    volumes: VolumeFile
    shape: tuple[int, ...]
    """(C, *spatial) of a sample as the model gets it"""
    num_classes: int
    model_options: dict[str, Any]

    def build_model(self, name: str, deterministic: bool = False) -> nn.Module:
        """The network, on the current default device."""
        options = dict(self.model_options)
        if deterministic and "deterministic_pooling" in takes(name):
            options["deterministic_pooling"] = True
        model = create_model(name, in_channels=self.shape[0], num_classes=self.num_classes, **options)
        _refuse_unsaved(name, model)
        return model


@dataclass(frozen=True)
class Found:
    """Of an experiment that fits its data."""

    lines: list[str]
    parts: Parts
    model: nn.Module
    """On no device."""


def _refuse_unsaved(name: str, model: nn.Module) -> None:
    """Raises UserError for what a checkpoint could not bring back."""
    if lazy := [key for key, value in model.named_parameters() if is_lazy(value)]:
        raise UserError(f"model {name}: {lazy[0]} has no size before the first batch: write its layer with all sizes")
    if other := [key for key, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]:
        raise UserError(
            f"model {name}: {other[0]} is no tensor: state must be parameters and buffers (register_buffer), or a "
            f"resumed run would go on without it"
        )


def _require_codecs(volumes: VolumeFile) -> None:
    """UserError where the file is compressed and what it is read with is not installed."""
    if any(shard.inputs.chunks is not None and shard.inputs.chunks.codec for shard in volumes.shards):
        try:
            codecs.require_library()
        except ImportError as error:
            raise UserError(str(error)) from error


def prepare(experiment: Experiment, files: Sequence[Path] = ()) -> Parts:
    """Open the data file (`files`: copies of it) and compare it with the experiment. Raises ValueError or UserError."""
    volumes = open_data(experiment, files)
    _require_codecs(volumes)
    shape = _sample_shape(experiment.data, volumes)
    check_loss(experiment, volumes)
    Augment.from_mapping(experiment.data.augment).check(volumes.spatial_axes, volumes.channels)
    options = experiment.model.options
    if "input_size" in takes(experiment.model.name):
        options.setdefault("input_size", shape[1:])
    return Parts(volumes, shape, len(volumes.class_names), options)


def _sample_shape(data: Data, volumes: VolumeFile) -> tuple[int, ...]:
    if data.patch is None:
        return volumes.shape
    if len(data.patch) != volumes.spatial_axes:
        raise UserError(f"data.patch {data.patch} must have {volumes.spatial_axes} sizes, as the volumes have axes")
    extents = volumes.extents(volumes.indices("train")).max(axis=0).tolist()
    if any(size > _MOST_OVER * most for size, most in zip(data.patch, extents, strict=True)):
        longest = " x ".join(map(str, extents))
        raise UserError(
            f"data.patch {data.patch} is over {_MOST_OVER} times the largest training volume ({longest}): most of it "
            f"would be repeated edge; use sizes up to {longest}"
        )
    return (volumes.channels, *data.patch)


def stage(experiment: Experiment, volumes: VolumeFile, stopped: Callable[[], object]) -> Staged | None:
    """The node's own copy of the data file, where the experiment asks for one and nothing stops it meanwhile.

    Raises UserError, StagingError.
    """
    if experiment.data.stage == "none":
        return None
    try:
        return staging.stage(volumes, scratch_folders(), stopped)
    except staging.StagingStopped:
        return None


def make_loaders(
    experiment: Experiment, parts: Parts, device: torch.device | str, rank: int = 0, world_size: int = 1, seed: int = 0
) -> tuple[Loader, Loader]:
    """Of training and validation. Raises ValueError or UserError with one line."""
    data, volumes = experiment.data, parts.volumes
    common: dict[str, Any] = {
        "batch_size": data.batch_size,
        "seed": seed,
        "rank": rank,
        "world_size": world_size,
        "threads": data.threads,
        "device": device,
        "dtype": torch.float32,
        "patch": data.patch,
    }
    train = Loader(
        volumes,
        split="train",
        augment=data.augment or None,
        verify=_verified_share(data, volumes),
        sampler=data.sampler,
        weights=sampling.class_weights(volumes, data.weights) if data.weights else None,
        views=data.views,
        foreground=data.foreground,
        on_bad_sample=data.on_bad_sample,
        **common,
    )
    # each sample once, and no score of damaged ones
    return train, Loader(volumes, split="validation", verify=1.0 if data.patch is None else train.verify, **common)


def _verified_share(data: Data, volumes: VolumeFile) -> float:
    """Of the samples, so that data.verify None compares 1 of 64 bytes read: a patch's sample is read whole for it."""
    if data.verify is not None:
        return data.verify
    if data.patch is None:
        return _VERIFIED_BYTES
    some = volumes.indices("train")[:1000].tolist()
    voxels = sum(math.prod(volumes.sample_shape(sample)[1:]) for sample in some) / len(some)
    return _VERIFIED_BYTES * min(1.0, math.prod(data.patch) / voxels)


def load_weights(experiment: Experiment, parts: Parts, model: nn.Module) -> list[str]:
    """Start from model.weights or model.pretrained, where given; a line each for what it gave.

    Raises UserError or ValueError with one line.
    """
    section = experiment.model
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # a check loads into no memory
        if section.weights is not None:
            return foreign_weights.load(Path(section.weights), model, section.weights_match)
        if section.pretrained:
            found = pretrained(section.name, parts.shape[0], parts.model_options, section.pretrained)
            return foreign_weights.load_pretrained(found, model)
    return []


def _check_model(experiment: Experiment, parts: Parts) -> nn.Module:
    """The model, on no device. Raises UserError where its outputs do not fit the task."""
    with torch.device("meta"):
        model = parts.build_model(experiment.model.name)
        inputs = torch.empty(2, *parts.shape)
        try:
            outputs = model(inputs)
        except (UserError, ValueError) as error:
            raise UserError(_of_model(experiment, error)) from None
    try:
        check_outputs(experiment, parts.volumes, outputs, inputs.shape)
    except UserError as error:
        raise UserError(_of_model(experiment, error)) from None
    if not outputs.requires_grad:
        raise UserError(
            f"model {experiment.model.name}: its output does not depend on its parameters, so nothing can be trained: "
            f"look for no_grad, detach() or requires_grad=False in its forward pass"
        )
    return model


def _of_model(experiment: Experiment, error: Exception) -> str:
    name = experiment.model.name
    return str(error) if str(error).startswith(name) else f"model {name}: {error}"


def _check_single(experiment: Experiment, parts: Parts, model: nn.Module) -> None:
    """UserError where a model on no device cannot train on parts of one sample, which is all that it will get."""
    train, launch, size = experiment.train, experiment.launch, experiment.data.batch_size
    tasks = launch.nodes * (launch.tasks_per_node or max(1, launch.gpus or 0))
    if size > (train.virtual_ranks if train.deterministic == "layout" else tasks * train.accumulate):
        return
    for layers in learner.resolve_all(experiment, Stages(train, 1), model):
        model.train()
        for norm in layers.norms:
            norm.eval()
        try:
            with torch.device("meta"):
                model(torch.empty(1, *parts.shape))
        except ValueError as error:  # torch's, of a batch without spread
            raise UserError(
                f"model {experiment.model.name} cannot train on one sample at a time ({error}): use a larger "
                f"data.batch_size than {size}, or fewer parts"
            ) from None
    model.train()


def check(experiment: Experiment) -> list[str]:
    """What was found to fit, a line each. Raises ValueError or UserError with one line for what does not."""
    return look(experiment).lines


def look(experiment: Experiment) -> Found:
    """The same with what was made for it. Raises as `check` does."""
    parts = prepare(experiment)
    volumes = parts.volumes
    sizes = {split: len(volumes.indices(split)) for split in ("train", "validation", "test")}
    make_loaders(experiment, parts, "cpu")
    shape = "different shapes" if volumes.ragged else " x ".join(str(size) for size in volumes.shape)
    patch = "" if experiment.data.patch is None else f", in patches of {' x '.join(map(str, experiment.data.patch))}"
    model = _check_model(experiment, parts)
    _check_single(experiment, parts, model)
    acceleration.targets(model, experiment.train.compile)
    count = sum(p.numel() for p in model.parameters())
    weights, stages = load_weights(experiment, parts, model), learner.check(experiment, model)
    lines = [
        f"data: {sum(sizes.values())} samples of {shape} {volumes.dtype}{patch}, "
        + ", ".join(f"{number} {split}" for split, number in sizes.items())
        + f", {parts.num_classes} classes",
        f"model: {experiment.model.name}, {count:,} parameters",
        *(f"weights: {line}" for line in weights),
        *stages,
    ]
    return Found(lines, parts, model)
