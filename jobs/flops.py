"""The work of a training step, counted once from shapes: achieved FLOP/s, and their share of the GPUs' peak.

A multiply-add is two FLOPs. Counted are the matrix products and convolutions of the forward and the backward pass
(torch's FlopCounterMode), as the model needs them: what activation checkpointing computes anew is no progress and is
left out, and so are gradients that frozen layers do not get. The share is the model FLOPs utilisation of Chowdhery et
al. (arXiv 2204.02311).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from hpc import instances
from hpc.errors import UserError
from hpc.experiment import Experiment
from hpc.steptimes import FLOPS, MFU, SECONDS, STEP
from jobs import learner
from jobs.stages import Stages

if TYPE_CHECKING:
    from jobs.engine import Engine
    from jobs.setup import Parts

_LOG = logging.getLogger(__name__)
_SAMPLES = 2
"""BatchNorm after global pooling takes no single one."""


@dataclass(frozen=True)
class Work:
    """Of one optimizer step of a run, over all ranks."""

    flops: tuple[float, ...] = ()
    """Of a sample's forward and backward pass, by stage; empty where the model cannot be counted."""
    batch: int = 1
    """Samples of a step."""
    peak: float | None = None
    """FLOP/s of all GPUs together at the run's precision; None on a CPU, or where the instance does not say."""

    def timing(self, stage: int, seconds: Mapping[str, float]) -> dict[str, Any]:
        """Steps that take so long (StepClock), and their FLOP/s and MFU without the time of saving.

        As metrics.jsonl names them; what is not known is left out.
        """
        if not seconds:
            return {}
        return {SECONDS: dict(seconds), **self.rates(stage, self.batch / max(seconds[STEP] - seconds["save"], 1e-9))}

    def rates(self, stage: int, samples_per_second: float) -> dict[str, float]:
        """FLOP/s and MFU at this speed of all ranks."""
        if not self.flops:
            return {}
        achieved = self.flops[stage] * samples_per_second
        return {FLOPS: achieved} | ({MFU: achieved / self.peak} if self.peak else {})


def work_of(experiment: Experiment, parts: Parts, engine: Engine) -> Work:
    """The work of a run's steps; where it cannot be counted one line in the log says why."""
    try:
        flops = per_sample(experiment, parts)
    except Exception as error:  # whatever a user's model raises on the meta device
        _LOG.info(
            "the model's FLOPs are not counted: %s", (str(error).strip().splitlines() or [type(error).__name__])[0]
        )
        flops = ()
    return Work(flops, experiment.data.batch_size, peak(experiment, engine.device, engine.world_size))


def peak(experiment: Experiment, device: torch.device, gpus: int) -> float | None:
    """FLOP/s of so many GPUs of the instance at the precision of the run."""
    if device.type != "cuda":
        return None
    try:
        known = instances.find(experiment.launch.instance).gpu_tflops
    except UserError:  # its file is not on this machine
        return None
    each = known.of(experiment.train.precision) if known else None
    return None if each is None else 1e12 * each * gpus


def per_sample(experiment: Experiment, parts: Parts) -> tuple[float, ...]:
    """FLOPs of one sample's forward and backward pass in each stage. Raises what the model raises."""
    options = {key: value for key, value in parts.model_options.items() if key != "checkpoint"}
    with torch.device("meta"):
        model = replace(parts, model_options=options).build_model(experiment.model.name).train()
    layers = learner.resolve_all(experiment, Stages(experiment.train, 1), model)
    counted = []
    for one in layers:
        one.freeze(model)
        counted.append(_count(model, (_SAMPLES, *parts.shape)) / _SAMPLES)
    return tuple(counted)


def of_conv_backward(gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, **_: Any) -> int:
    """FLOPs of a convolution's backward pass from shapes: as many as forward for each gradient that is asked for.

    The formula that torch 2.14 registers forgets the groups in the weights' gradient: 64 times too much for a
    depthwise convolution of 64 channels.
    """
    transposed, asked = rest[4], rest[7]
    return int(conv_flop_count(list(x), list(weight), list(gradient), transposed) * sum(asked[:2]))


def counter() -> Any:
    """torch's FlopCounterMode with that formula."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: of_conv_backward})


def _count(model: nn.Module, shape: tuple[int, ...]) -> float:
    counting = counter()
    with counting, torch.device("meta"):
        outputs = model(torch.empty(shape))
        outputs.sum().backward()
    model.zero_grad(set_to_none=True)
    return float(counting.get_total_flops())
