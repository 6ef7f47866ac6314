"""Whether an experiment's training step fits the memory of its instance, what does, and which switch buys what.

The step is the experiment's own: task and loss, optimizer, precision, parts of a batch, averaged weights, strategy, and
of several stages the one that trains most. It is a prediction from shapes alone (jobs/memory.py), of eager kernels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from datasets.layout import VolumeFile
from datasets.loader import COPIED_AHEAD
from hpc import instances, yamlfile
from hpc.errors import UserError
from hpc.experiment import Experiment, validate
from jobs import learner
from jobs.memory import Estimate, Shards, Step, estimate, largest_batch
from jobs.optimize import build_optimizer
from jobs.setup import Parts
from jobs.stages import Stages
from jobs.strategies.zero import BUCKET
from jobs.tasks import build
from jobs.tasks.options import Options
from models3d import takes

__all__ = ["MemoryPlan", "NotPlanned", "Switch", "plan_memory"]

_GIB_PER_GB = 2**30 / 10**9
"""A GPU of 40 GB has 40 * 2**30 bytes (nvidia-smi), 7 % more: what fits 40 * 10**9 leaves that for CUDA's context,
workspace and fragments; what does not fit 40 * 2**30 cannot run."""
_LIBRARIES = 0.5e9
"""Bytes of a process on the CPU that has imported torch, about."""
_CHECKPOINT = "model.checkpoint=true"
_WORTH = 0.01
"""A switch that changes the peak by a smaller share is not told."""


class NotPlanned(Exception):
    """Why a step has no prediction, in one line."""


@dataclass(frozen=True)
class Switch:
    """Keys to type, and the peak with them, in bytes."""

    keys: str
    peak: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process: on a GPU, or on the CPU with its share of the node's memory."""

    place: str
    """`one GPU of cedia-a100-40gb`, `one process on laptop`."""
    on_gpu: bool
    capacity: int
    """What is there; a peak above `surely` cannot run."""
    surely: int
    estimate: Estimate
    ahead: int
    """Batches on the device before they are asked for."""
    largest_batch: int | None = None
    """data.batch_size that fits with everything else as it is; 0: none; None: not looked for."""
    enough: bool = False
    """Whether that is all that the training split has."""
    switches: list[Switch] = field(default_factory=list)
    tuned: bool = False
    """train.autotune will try checkpointing where the file's way does not fit."""

    @property
    def peak(self) -> int:
        return self.estimate.peak + self.ahead

    @property
    def refusal(self) -> str | None:
        """One line, where it surely does not fit: what does, as keys to type."""
        if self.peak <= self.surely or self._found_by_tuning:
            return None
        fitting = [f"{s.keys} ({_gb(s.peak)})" for s in self.switches if s.peak <= self.capacity]
        if self.largest_batch:
            fitting.append(f"data.batch_size={self.largest_batch}")
        fits = f"what fits: {', or '.join(fitting)}" if fitting else "no switch makes it fit: use a smaller data.patch"
        return f"memory: a training step takes {_gb(self.peak)}, but {self.place} has {_gb(self.capacity)}; {fits}"

    @property
    def _found_by_tuning(self) -> int | None:
        """The peak with what autotune will come upon."""
        tried = (switch.peak for switch in self.switches if self.tuned and switch.keys == _CHECKPOINT)
        return next((peak for peak in tried if peak <= self.surely), None)

    def lines(self) -> list[str]:
        """What there is to say of one that may fit."""
        e = self.estimate
        parts = {
            "weights": e.parameters + e.buffers,
            "gradients": e.gradients,
            "copies": e.copies,
            "optimizer": e.optimizer,
            "averaged weights": e.ema,
            "batches": e.inputs + self.ahead,
            "activations": e.activations,
        }
        words = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size)
        found = [f"memory: a training step takes {_gb(self.peak)} of {_gb(self.capacity)}, {self.place}: {words}"]
        if self.largest_batch:
            most = ", as many as the training split has" if self.enough else ""
            found.append(f"memory: data.batch_size up to {self.largest_batch} fits{most}")
        return found

    @property
    def caution(self) -> str | None:
        """One line, where it may not fit."""
        if self.refusal or self.peak + (0 if self.on_gpu else _LIBRARIES) <= self.capacity:
            return None
        if self.peak > self.surely and self._found_by_tuning:
            return (
                f"memory: a training step takes {_gb(self.peak)}, but {self.place} has {_gb(self.capacity)}: "
                f"train.autotune will find {_CHECKPOINT} ({_gb(self._found_by_tuning)})"
            )
        return (
            f"memory: a training step takes {_gb(self.peak)} of the {_gb(self.capacity)} of {self.place}, which "
            f"libraries and workspace of kernels need some of; it may not fit"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, bytes."""
        parts = dataclasses.asdict(self.estimate)
        parts.pop("groups")
        return {
            "place": self.place,
            "capacity": self.capacity,
            "peak": self.peak,
            "parts": {**parts, "ahead": self.ahead},
            "largest_batch": self.largest_batch,
            "switches": [dataclasses.asdict(switch) for switch in self.switches],
        }


def plan_memory(experiment: Experiment, parts: Parts, model: nn.Module, details: bool = True) -> MemoryPlan:
    """The prediction for an experiment whose model (on no device) is built.

    details: the largest batch and the switches, which take a second or two; always where it does not fit.
    Raises NotPlanned where the model computes with values, or does not train on fake tensors.
    """
    look = _Look(experiment, parts, model)
    try:
        found = look.plan()
        return look.detailed(found) if details or found.refusal else found
    except Exception as error:  # the user's own model may raise anything; the run itself may well work
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotPlanned(f"memory of a training step: {words}") from error


class _Look:
    def __init__(self, experiment: Experiment, parts: Parts, model: nn.Module) -> None:
        self._experiment, self._parts, self._model = experiment, parts, model
        launch = experiment.launch
        instance = instances.find(launch.instance)
        request = instance.request(launch)
        self._world = request.world_size
        self._on_gpu = experiment.train.device != "cpu" and request.gpus > 0 and instance.gpu_mem_gb is not None
        if self._on_gpu:
            self._place, gb = f"one GPU of {instance.name}", instance.gpu_mem_gb or 0.0
        else:
            self._place, gb = f"one process on {instance.name}", request.mem_gb / request.tasks_per_node
        self._capacity = int(gb * 1e9)
        self._surely = int(self._capacity * (_GIB_PER_GB if self._on_gpu else 1))
        self._whole: Estimate | None = None

    def plan(self) -> MemoryPlan:
        found = self._estimate(self._experiment, self._model, self._samples(self._experiment))
        ahead = self._ahead(self._experiment.data.batch_size)
        tuned = self._experiment.train.autotune
        return MemoryPlan(self._place, self._on_gpu, self._capacity, self._surely, found, ahead, tuned=tuned)

    def detailed(self, found: MemoryPlan) -> MemoryPlan:
        """With the largest batch and the switches."""
        whole = self._samples(self._experiment)
        step = self._experiment.data.batch_size // whole
        split = len(self._parts.volumes.indices("train")) * self._experiment.data.views
        most = max(split // step, 1)
        known = {whole: found.peak}

        def peak(samples: int) -> int:
            if samples not in known:
                here = self._estimate(self._experiment, self._model, samples).peak
                known[samples] = here + self._ahead(samples * step)
            return known[samples]

        largest = largest_batch(peak, self._capacity, first=min(whole, most), most=most)
        switches = [switch for switch in self._switches() if abs(switch.peak - found.peak) > _WORTH * found.peak]
        found = dataclasses.replace(found, largest_batch=largest * step, enough=largest == most, switches=switches)
        return dataclasses.replace(found, switches=[*switches, *self._together(found)])

    def _samples(self, experiment: Experiment) -> int:
        """Of one pass of one process."""
        train = experiment.train
        passes = train.virtual_ranks if train.deterministic == "layout" else self._world * train.accumulate
        return math.ceil(experiment.data.batch_size / passes)

    def _ahead(self, batch: int) -> int:
        """Bytes of the batches on their way to the GPU, as they are stored, of a global batch of so many."""
        if not self._on_gpu:
            return 0
        stored = math.prod(self._parts.shape) * self._parts.volumes.dtype.itemsize
        return COPIED_AHEAD * math.ceil(batch / self._world) * stored

    def _estimate(self, experiment: Experiment, model: nn.Module, samples: int) -> Estimate:
        """The optimizer, half of the work, is looked at once: nothing that is varied here changes it, but shards."""
        step = self._step(experiment, model, samples)
        if step.shards is None:
            step = dataclasses.replace(step, like=self._whole)
        found = estimate(model, (samples, *self._parts.shape), step)
        self._whole = found if step.shards is None else self._whole
        return found

    def _step(self, experiment: Experiment, model: nn.Module, samples: int) -> Step:
        train = experiment.train
        virtual = train.deterministic == "layout"
        passes = max(train.virtual_ranks // self._world, 1) if virtual else train.accumulate
        copies = 0
        if virtual:
            copies = max(1, int(math.log2(passes)))
        elif self._world > 1 and train.strategy == "ddp":
            copies = 1
        loss, targets = _scored(experiment, self._parts.volumes, self._parts.shape)
        return Step(
            optimizer=partial(_largest_optimizer, experiment),
            precision=train.precision,
            device="cuda" if self._on_gpu else "cpu",
            loss=loss,
            targets=targets,
            passes=passes,
            validation=samples if virtual else samples * passes,
            ema=train.ema is not None,
            gradient_copies=copies,
            shards=_shards(experiment, self._world),
        )

    def _switches(self) -> Iterator[Switch]:
        for keys in self._keys():
            if (peak := self._with(keys)) is not None:
                yield Switch(keys, peak)

    def _together(self, found: MemoryPlan) -> list[Switch]:
        """The fewest switches that fit together, most useful first, where none does alone."""
        fits = [*found.switches, Switch("", found.peak)] if found.peak <= found.capacity else found.switches
        if found.peak <= found.surely or any(switch.peak <= found.capacity for switch in fits):
            return []
        keys, used = "", set[str]()
        for switch in sorted(found.switches, key=lambda one: one.peak):
            if (name := switch.keys.split("=")[0]) in used or switch.peak >= found.peak:
                continue
            used.add(name)
            keys = f"{keys} {switch.keys}".strip()
            peak = self._with(keys) if " " in keys else None
            if peak is not None and peak <= found.capacity:
                return [Switch(keys, peak)]
        return []

    def _with(self, keys: str) -> int | None:
        """The peak with these overrides; None where they are refused, or the model cannot be so."""
        values = self._experiment.as_dict()
        for word in keys.split():
            path, _, value = word.partition("=")
            *sections, last = path.split(".")
            place = values
            for section in sections:
                place[section] = place = place.get(section) or {}
            place[last] = yamlfile.parse(f"value: {value}", word)["value"]
        try:
            other = validate(values, "memory")
            if other.batch_fault(self._world):
                return None
            model = self._model
            if other.model != self._experiment.model:
                options = {**self._parts.model_options, **other.model.options}
                with torch.device("meta"):
                    model = dataclasses.replace(self._parts, model_options=options).build_model(other.model.name)
            found = self._estimate(other, model, self._samples(other))
        except (UserError, ValueError):
            return None
        return found.peak + self._ahead(other.data.batch_size)

    def _keys(self) -> Iterator[str]:
        """Those that this experiment does not have and may have."""
        section, train = self._experiment.model, self._experiment.train
        if "checkpoint" in takes(section.name) and not section.options.get("checkpoint"):
            yield _CHECKPOINT
        if train.precision not in ("bf16", "fp16"):
            yield "train.precision=bf16"
        samples, layout = self._samples(self._experiment), train.deterministic == "layout"
        if samples > 1 and not layout:
            parts = next(n for n in range(2, samples + 1) if samples % n == 0)
            yield f"train.accumulate={parts * train.accumulate}"
        if self._world > 1 and train.strategy == "ddp" and not layout:
            yield "train.strategy=fsdp"
            yield "train.strategy=deepspeed"


def _shards(experiment: Experiment, world: int) -> Shards | None:
    train = experiment.train
    if train.strategy == "fsdp" and world > 1:
        return Shards(world, 3, by_block=True)
    if train.strategy != "deepspeed":
        return None
    stage, offload = (2, False) if train.zero is None else (train.zero.stage, train.zero.offload)
    return Shards(world, stage, offload, bucket=4 * BUCKET) if world > 1 or offload else None


def _largest_optimizer(experiment: Experiment, model: nn.Module) -> torch.optim.Optimizer:
    """That of the stage that trains most; its layers are the ones that are trained."""
    stages = Stages(experiment.train, 1)
    parameters = dict(model.named_parameters())
    found = learner.resolve_all(experiment, stages, model)
    layers = max(found, key=lambda one: sum(parameters[name].numel() for name in one.rates))
    layers.freeze(model)
    return build_optimizer(experiment.train.optimizer, model, layers.rates)


def _scored(
    experiment: Experiment, volumes: VolumeFile, shape: tuple[int, ...]
) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[int], Tensor]]:
    """The task's loss with weights that take as much memory as its own, and targets of so many samples."""
    names, settings = tuple(volumes.class_names), experiment.train.loss
    ones = (1.0,) * len(names)
    name = settings.of_task(experiment.task)
    ignored = tuple(names.index(one) for one in settings.ignore)
    both = name == "weighted_bce"
    options = Options(
        names,
        settings,
        name,
        ones if settings.class_weights is not None else None,
        ones if both or settings.pos_weight is not None else None,
        ones if both else None,
        ignored,
    )

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return build(experiment.task, options, torch.device("cpu")).loss(outputs, targets)

    def targets(samples: int) -> Tensor:
        if experiment.task == "segmentation":
            return torch.zeros((samples, *shape[1:]), dtype=torch.uint8)
        if experiment.task == "multilabel":
            return torch.zeros((samples, len(names)), dtype=torch.uint8)
        return torch.zeros(samples, dtype=torch.int64)

    return loss, targets


def _gb(size: float) -> str:
    """Decimal, three digits: 38.5 GB, 812 MB."""
    return f"{size / 1e9:.3g} GB" if size >= 0.9995e9 else f"{size / 1e6:.3g} MB"
