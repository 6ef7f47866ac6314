"""The figures of one network from shapes alone: parameters, output shape, forward FLOPs, and memory of a training step.

Networks are built on the meta device, so the largest takes no memory and no time. A multiply-add counts as two FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from jobs.memory import Estimate, Step, estimate, largest_batch, parts_of
from models3d import create_model, example_input, takes

__all__ = ["Card", "Group", "batch_within", "card"]


@dataclass(frozen=True)
class Group:
    """A part of a network; its figures for the whole batch are None without an input."""

    name: str
    parameters: int
    """Their number."""
    flops: int | None
    """Of the forward pass."""
    activations: int | None
    """Bytes that it leaves for the backward pass."""


@dataclass(frozen=True)
class Card:
    """The figures of one network; shapes start with the batch."""

    name: str
    parameters: int
    input: list[int] | None
    output: list[int] | None
    flops: int | None
    memory: Estimate | None
    """Bytes of a training step."""
    groups: list[Group]


def card(
    name: str, shape: Sequence[int] | None, classes: int, options: dict[str, Any], step: Step | None = None
) -> Card:
    """The figures of one model. shape: (N, C, *spatial) or None; step: how it is trained.

    Raises ValueError for an unknown model or option, and for an input that the model does not take.
    """
    model = _build(name, shape, classes, options)
    parts = parts_of(model)
    output, counts, memory = None, None, None
    if shape is not None:
        output, counts = _forward(name, model, shape)
        modules = [part for part, item in parts if isinstance(item, nn.Module)]
        try:
            memory = estimate(model, shape, step, modules)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return Card(
        name=name,
        parameters=sum(p.numel() for p in model.parameters()),
        input=None if shape is None else list(shape),
        output=output,
        flops=None if counts is None else sum(counts["Global"].values()),
        memory=memory,
        groups=_groups(model, parts, counts, None if memory is None else memory.groups),
    )


def batch_within(
    memory: int, name: str, sample: Sequence[int], classes: int, options: dict[str, Any], step: Step
) -> int:
    """The most samples, each (C, *spatial), whose training step stays within `memory` bytes; 0 for none."""
    model = _build(name, [1, *sample], classes, options)
    return largest_batch(lambda batch: estimate(model, [batch, *sample], step).peak, memory)


def _build(name: str, shape: Sequence[int] | None, classes: int, options: dict[str, Any]) -> nn.Module:
    if shape is not None and "input_size" in takes(name):
        options = {"input_size": tuple(shape[2:])} | options
    image = name.startswith(("timm:", "torchvision:", "smp:"))
    channels = shape[1] if shape is not None else (example_input(name) or (3 if image else 1,))[0]
    with torch.device("meta"):
        return create_model(name, channels, classes, **options).eval()


def _forward(name: str, model: nn.Module, shape: Sequence[int]) -> tuple[list[int], dict[str, Any]]:
    """Output shape, and FLOPs per module and operator."""
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            output = model(torch.empty(*shape, device="meta"))
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{name} does not take an input of {tuple(shape)}: {reason[0]}") from error
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"{name} gives a {type(output).__name__}; a model must give one tensor of logits")
    return list(output.shape), counter.get_flop_counts()


def _groups(
    model: nn.Module,
    parts: list[tuple[str, nn.Module | nn.Parameter]],
    counts: dict[str, Any] | None,
    activations: dict[str, int] | None,
) -> list[Group]:
    """The parts with their figures; no parameter twice."""
    groups, seen = [], set()
    for name, part in parts:
        tensors = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        new = {id(t): t.numel() for t in tensors if id(t) not in seen}
        seen |= set(new)
        flops = None if counts is None else _flops(counts, f"{type(model).__name__}.{name}", part)
        kept = None if activations is None else activations.get(name, 0)
        if new or flops or kept:
            groups.append(Group(name, sum(new.values()), flops, kept))
    return groups


def _flops(counts: dict[str, Any], path: str, part: nn.Module | nn.Parameter) -> int:
    """FLOPs of a part; of its children where only they were called."""
    if path in counts or not isinstance(part, nn.Module):
        return sum(counts.get(path, {}).values())
    return sum(_flops(counts, f"{path}.{name}", child) for name, child in part.named_children())
