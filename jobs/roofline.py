"""The least time of a training step on a GPU, from shapes alone: FLOPs and bytes of each operator as eager executes it.

    python -m jobs.roofline [--instance cedia-a100-40gb]      # the table of docs/performance.md

An operator must read its inputs and write its outputs once each, and cannot be faster than either its arithmetic or
that traffic: max(FLOPs / rate, bytes / bandwidth), Williams et al. 2009 (doi 10.1145/1498765.1498785). The floor of a
step is the sum over its operators, one after another; fusing some of them (torch.compile) may go below it, real kernels
stay above. Nothing here is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from hpc import instances
from hpc.errors import UserError
from hpc.instances import Instance
from hpc.optimisation import Optimizer
from jobs.flops import of_conv_backward
from jobs.memory import Step, estimate, largest_batch
from jobs.optimize import build_optimizer
from models3d import create_model, example_input

__all__ = ["Floor", "Traffic", "floor", "table"]

SEEDS = ("resnet3d", "transformer3d")
CLASSES = 3
WAYS = (("tf32", False), ("tf32", True), ("bf16", False), ("bf16", True))
"""Precision, and whether activations are computed anew."""
_MOST = 64
"""Samples of a batch that is looked for: beyond that the floor of a sample does not change."""
_FORMULAS = {**flop_registry, torch.ops.aten.convolution_backward: shape_wrapper(of_conv_backward)}  # type: ignore[no-untyped-call]
_UNWRITTEN = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_local_scalar_dense")


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """FLOPs and bytes of the operators that run inside, by the data type that each computes in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: list[tuple[str, torch.dtype, int, int]] = []
        """(operator, data type, FLOPs, bytes)"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        count = _FORMULAS.get(_registered(func))
        flops = int(count(*args, **kwargs, out_val=result)) if count else 0
        size = 0 if name in _UNWRITTEN else _bytes_of(func, args, kwargs, result)
        if size or flops:
            kinds = [t.dtype for t in _tensors((args, kwargs)) if t.dtype.is_floating_point]
            self.rows.append((name, torch.bfloat16 if torch.bfloat16 in kinds else torch.float32, flops, size))
        return result


def _registered(func: Any) -> Any:
    """The attention of the CPU has that of CUDA's FLOPs, under another name."""
    packet = func._overloadpacket
    name = packet.__name__.removesuffix("_for_cpu")
    return getattr(torch.ops.aten, name) if name != packet.__name__ else packet


def _bytes_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Read and written; nothing by a view."""
    given = {id(t.untyped_storage()): t for t in _tensors((args, kwargs))}
    changed = 0
    for argument, value in zip(func._schema.arguments, [*args, *kwargs.values()], strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed += sum(_size(t) for t in _tensors(value))
    made = sum(_size(t) for t in _tensors(result) if id(t.untyped_storage()) not in given)
    if not changed and not made:
        return 0
    return changed + made + sum(_size(t) for t in given.values())


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))


def _size(tensor: torch.Tensor) -> int:
    """Bytes of memory that its elements are in: an expanded one has fewer than elements."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@dataclass(frozen=True)
class Floor:
    """Of one sample, in a batch of so many."""

    model: str
    precision: str
    checkpoint: bool
    batch: int
    """The largest that fits the memory; 0: none does, and the figures are those of a batch of one."""
    memory: int
    """Peak of a step with that batch, bytes."""
    flops: float
    bytes: float
    arithmetic_s: float
    """All FLOPs at the rate of the type that each is done in."""
    traffic_s: float
    """All bytes at the bandwidth."""
    floor_s: float
    """The sum over the operators of the longer of the two."""

    @property
    def bound(self) -> str:
        return "arithmetic" if self.arithmetic_s > self.traffic_s else "bandwidth"


def floor(name: str, precision: str, checkpoint: bool, instance: Instance) -> Floor:
    """Of a training step with AdamW at the model's usual input, on one GPU of an instance.

    Raises UserError where the instance's file does not say what its GPU can do.
    """
    rates = _rates(instance, precision)
    sample = example_input(name)
    if sample is None or not instance.gpu_mem_gb:
        raise UserError(f"{name}: no usual size of its input, or no gpu_mem_gb of {instance.name}")
    options = {"checkpoint": True} if checkpoint else {}
    with torch.device("meta"):
        model = create_model(name, sample[0], CLASSES, **options)
    seen: dict[int, tuple[int, Traffic]] = {}

    def peak(batch: int) -> int:
        traffic = Traffic()
        step = Step(partial(build_optimizer, Optimizer()), precision, "cuda", watched=traffic)
        seen[batch] = estimate(model, (batch, *sample), step).peak, traffic
        return seen[batch][0]

    batch = largest_batch(peak, int(instance.gpu_mem_gb * 1e9), first=1, most=_MOST)
    shown = max(batch, 1)
    memory, traffic = seen[shown]
    bandwidth = (instance.gpu_bandwidth_gb_s or 0) * 1e9
    times = [(flops / (rates[kind] * 1e12), size / bandwidth) for _, kind, flops, size in traffic.rows]
    return Floor(
        model=name,
        precision=precision,
        checkpoint=checkpoint,
        batch=batch,
        memory=memory,
        flops=sum(row[2] for row in traffic.rows) / shown,
        bytes=sum(row[3] for row in traffic.rows) / shown,
        arithmetic_s=sum(one for one, _ in times) / shown,
        traffic_s=sum(one for _, one in times) / shown,
        floor_s=sum(max(pair) for pair in times) / shown,
    )


def _rates(instance: Instance, precision: str) -> dict[torch.dtype, float]:
    """TFLOP/s by the data type of an operator."""
    peaks = instance.gpu_tflops
    single = peaks.of("fp32" if precision == "fp32" else "tf32") if peaks else None
    half = peaks.of("bf16") if peaks else None
    if not single or not half or not instance.gpu_bandwidth_gb_s:
        raise UserError(
            f"{instance.name}: its file must say what its GPU can do: gpu_tflops with fp32, tf32 and bf16, and "
            f"gpu_bandwidth_gb_s, as its data sheet has them"
        )
    return {torch.float32: single, torch.bfloat16: half}


_COLUMNS = (
    "model", "precision", "checkpoint", "largest batch", "peak GB", "TFLOP", "GB moved", "arithmetic ms", "traffic ms",
    "floor ms", "bound",
)  # fmt: skip


def table(floors: Sequence[Floor]) -> str:
    """Markdown; FLOPs, bytes and times of one sample. The lowest floor of each model among those that fit is bold."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for one in floors:
        fitting = [other for other in floors if other.model == one.model and other.batch]
        best = fitting and one is min(fitting, key=lambda other: other.floor_s)
        cells = [
            f"`{one.model}`",
            one.precision,
            "on" if one.checkpoint else "off",
            str(one.batch) if one.batch < _MOST else f"{_MOST} or more",
            f"{one.memory / 1e9:.1f}",
            f"{one.flops / 1e12:.3g}",
            f"{one.bytes / 1e9:.3g}",
            f"{one.arithmetic_s * 1e3:.3g}",
            f"{one.traffic_s * 1e3:.3g}",
            f"{one.floor_s * 1e3:.3g}",
            one.bound,
        ]
        lines.append("| " + " | ".join(f"**{cell}**" if best else cell for cell in cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0, or 2 and one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m jobs.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--instance", default="cedia-a100-40gb", help="whose GPU (cedia-a100-40gb)")
    try:
        instance = instances.find(parser.parse_args(argv).instance)
        print(table([floor(name, *way, instance) for name in SEEDS for way in WAYS]))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
