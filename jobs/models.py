"""What `hpc models` shows: parameters, output shape and forward FLOPs of networks, from shapes alone.

    python -m jobs.models [NAME] [--input C,D,H,W] [--batch N] [--classes K] [--option k=v]... [--json]

Networks are built on the meta device, so the largest takes no memory and no time. A multiply-add counts as two FLOPs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models3d import create_model, list_models, takes

__all__ = ["Card", "Group", "card", "main"]


@dataclass(frozen=True)
class Group:
    """A part of a network: number of parameters, and forward FLOPs for the whole batch (None without an input)."""

    name: str
    parameters: int
    flops: int | None


@dataclass(frozen=True)
class Card:
    """The figures of one network; shapes start with the batch."""

    name: str
    parameters: int
    input: list[int] | None
    output: list[int] | None
    flops: int | None
    groups: list[Group]


def card(name: str, shape: Sequence[int] | None, classes: int, options: dict[str, Any]) -> Card:
    """The figures of one model. shape: (N, C, *spatial) or None.

    Raises ValueError for an unknown model or option, and for an input that the model does not take.
    """
    model = _build(name, shape, classes, options)
    output, counts = (None, None) if shape is None else _forward(name, model, shape)
    total = None if counts is None else sum(counts["Global"].values())
    return Card(
        name=name,
        parameters=sum(p.numel() for p in model.parameters()),
        input=None if shape is None else list(shape),
        output=output,
        flops=total,
        groups=_groups(model, counts),
    )


def _build(name: str, shape: Sequence[int] | None, classes: int, options: dict[str, Any]) -> nn.Module:
    if shape is not None and len(shape) == 5 and "input_size" in takes(name):
        options = {"input_size": tuple(shape[2:])} | options
    image = name.startswith(("timm:", "torchvision:"))
    channels = shape[1] if shape is not None else 3 if image else 1
    try:
        with torch.device("meta"):
            return create_model(name, channels, classes, **options).eval()
    except (NotImplementedError, RuntimeError):  # its constructor computes with values
        return create_model(name, channels, classes, **options).to("meta").eval()


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


def _groups(model: nn.Module, counts: dict[str, Any] | None) -> list[Group]:
    """Parameters that the model itself holds, then its children, with lists of layers opened once; no part twice."""
    parts: list[tuple[str, nn.Module | nn.Parameter]] = list(model.named_parameters(recurse=False))
    for name, child in model.named_children():
        listed = isinstance(child, nn.Sequential | nn.ModuleList)
        parts += [(f"{name}.{n}", c) for n, c in child.named_children()] if listed else [(name, child)]
    groups, seen = [], set()
    for name, part in parts:
        tensors = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        new = {id(t): t.numel() for t in tensors if id(t) not in seen}
        seen |= set(new)
        flops = None if counts is None else _flops(counts, f"{type(model).__name__}.{name}", part)
        if new or flops:
            groups.append(Group(name, sum(new.values()), flops))
    return groups


def _flops(counts: dict[str, Any], path: str, part: nn.Module | nn.Parameter) -> int:
    """FLOPs of a part; of its children where only they were called."""
    if path in counts or not isinstance(part, nn.Module):
        return sum(counts.get(path, {}).values())
    return sum(_flops(counts, f"{path}.{name}", child) for name, child in part.named_children())


def _table(cards: list[Card]) -> Table:
    table = Table("model", box=None, header_style="bold")
    table.add_column("parameters", justify="right")
    shaped = cards[0].input is not None
    if shaped:
        for column in ("input", "output", "forward GFLOP"):
            table.add_column(column, justify="right")
    for c in cards:
        row = [c.name, f"{c.parameters:,}"]
        if c.input is not None and c.output is not None and c.flops is not None:
            row += [_shape(c.input), _shape(c.output), _giga(c.flops)]
        table.add_row(*row)
    return table


def _group_table(c: Card) -> Table:
    table = Table("part", box=None, header_style="bold")
    table.add_column("parameters", justify="right")
    if c.flops is not None:
        table.add_column("forward GFLOP", justify="right")
    for group in c.groups:
        flops = [] if group.flops is None else [_giga(group.flops)]
        table.add_row(group.name, f"{group.parameters:,}", *flops)
    return table


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(str(n) for n in sizes)


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.3f}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; 'hpc models --help' shows the usage")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="hpc models", description="Parameters, output shape and forward FLOPs of networks.")
    parser.add_argument("name", nargs="?", help="one model; without it all registered ones")
    parser.add_argument("--input", type=_sizes, metavar="C,D,H,W", help="channels and size of a sample, in voxels")
    parser.add_argument("--batch", type=_positive, default=1, metavar="N", help="samples (1)")
    parser.add_argument("--classes", type=_positive, default=2, metavar="K", help="width of the logits (2)")
    parser.add_argument("--option", type=_option, action="append", default=[], metavar="k=v", help="of the model")
    parser.add_argument("--json", action="store_true", help="a list of objects instead of tables")
    arguments = parser.parse_args(argv)
    if arguments.option and arguments.name is None:
        parser.error("--option needs the NAME of a model")
    return arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _sizes(text: str) -> list[int]:
    sizes = [_positive(part.strip()) for part in text.split(",")]
    if len(sizes) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} has no size; give channels and sizes, e.g. 1,190,190,190")
    return sizes


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form k=v")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"the value of {text!r} is not YAML") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures; 0, or 2 and one line on stderr for a user's mistake."""
    try:
        arguments = _arguments(argv)
        shape = None if arguments.input is None else [arguments.batch, *arguments.input]
        names = list_models() if arguments.name is None else [arguments.name]
        cards = [card(name, shape, arguments.classes, dict(arguments.option)) for name in names]
    except ValueError as error:
        print(f"hpc models: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps([asdict(c) for c in cards], indent=2))
        return 0
    console = Console()
    console.print(_table(cards))
    if arguments.name is not None:
        console.print()
        console.print(_group_table(cards[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
