"""What `hpc models` shows: parameters, output shape, forward FLOPs and training memory of networks, from shapes alone.

python -m jobs.models [NAME] [--input C,D,H,W] [--batch N] [--classes K] [--option k=v]... [--layers] [--png FOLDER]
                      [--optimizer O] [--precision P] [--checkpoint] [--memory 40GB] [--device D] [--fetch [TAG]]
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml

from hpc import tables
from hpc.errors import UserError
from hpc.optimisation import OPTIMIZERS, Optimizer
from hpc.training import Train
from hpc.units import gigabytes
from jobs.memory import Estimate, Step
from jobs.model_card import Card, batch_within, card
from jobs.optimize import build_optimizer
from models3d import example_input, fetch, list_models, takes

__all__ = ["main"]

_PRECISIONS = [name for name in get_args(Train.model_fields["precision"].annotation) if name != "auto"]
_NOT_COUNTED = "not counted: workspace of the kernels, CUDA's context, a second copy of the gradients under DDP"


def _rows(cards: list[Card], fits: dict[str, int], memory: float | None) -> list[dict[str, str]]:
    shaped = any(c.input for c in cards)
    rows = []
    for c in cards:
        row = {"model": c.name, "parameters": f"{c.parameters:,}"}
        if shaped and c.input and c.output and c.flops is not None and c.memory:
            row |= {"input": _shape(c.input), "output": _shape(c.output), "forward GFLOP": _giga(c.flops)}
            row |= {"activations": _bytes(c.memory.activations), "peak": _bytes(c.memory.peak)}
        if memory is not None:
            row[f"batch in {memory:g} GB"] = f"{fits[c.name]:,}"
        rows.append(row)
    return rows


def _group_rows(c: Card) -> list[dict[str, str]]:
    rows = []
    for group in c.groups:
        row = {"part": group.name, "parameters": f"{group.parameters:,}"}
        if group.flops is not None:
            row |= {"forward GFLOP": _giga(group.flops), "activations": _bytes(group.activations or 0)}
        rows.append(row)
    return rows


def _memory_line(memory: Estimate) -> str:
    parts = {
        "weights": memory.parameters + memory.buffers,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "batch": memory.inputs,
        "activations": memory.activations,
    }
    return f"peak {_bytes(memory.peak)}; " + ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())


def _shape(sizes: Sequence[int]) -> str:
    return "x".join(str(n) for n in sizes)


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.3f}"


def _bytes(size: int) -> str:
    """Decimal, three digits: 38.5 GB, 812 MB, 4.1 kB."""
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "B")) if size >= 0.9995 * u)
    return f"{size / unit:.3g} {name}" if unit else f"{size} B"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; 'hpc models --help' shows the usage")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hpc models", description="Parameters, shapes, FLOPs and training memory of networks.")
    add = parser.add_argument
    add("name", nargs="?", help="one model; without it all registered ones")
    add("--input", type=_sizes, metavar="C,D,H,W", help="channels and size of a sample (a usual one of the model)")
    add("--batch", type=_positive, default=1, metavar="N", help="samples that one process has at a time (1)")
    add("--classes", type=_positive, default=2, metavar="K", help="width of the logits (2)")
    add("--option", type=_option, action="append", default=[], metavar="k=v", help="of the model")
    add("--layers", action="store_true", help="the parts of the model NAME, too")
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="(adamw)")
    add("--precision", default="fp32", choices=_PRECISIONS, help="(fp32)")
    add("--checkpoint", action="store_true", help="compute activations anew in the backward pass")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="whose allocator and optimizer are counted (cuda)")
    add("--memory", type=_memory, metavar="40GB", help="how large a batch fits?")
    add("--png", type=Path, metavar="FOLDER", help="a figure of each model's parts")
    add("--fetch", nargs="?", const=True, metavar="TAG", help="download the pretrained weights of NAME into the cache")
    add("--json", action="store_true", help="a list of objects instead of tables")
    return parser


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(argv)
    needing = {"--option": arguments.option, "--layers": arguments.layers, "--fetch": arguments.fetch}
    for option, given in needing.items():
        if given and arguments.name is None:
            parser.error(f"{option} needs the NAME of a model")
    if arguments.name and not arguments.input and example_input(arguments.name) is None:
        for option in ("memory", "png"):
            if getattr(arguments, option):
                parser.error(f"--{option} needs --input for {arguments.name}, e.g. --input 3,224,224")
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


def _memory(text: str) -> float:
    try:
        return gigabytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form k=v")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"the value of {text!r} is not YAML") from None


def _samples(arguments: argparse.Namespace) -> dict[str, list[int] | None]:
    """The models to show, and the sample of each; an input picks those that read as many axes."""
    if arguments.name is not None:
        example = example_input(arguments.name)
        return {arguments.name: arguments.input or (None if example is None else list(example))}
    examples = {name: list(example_input(name) or ()) for name in list_models()}
    if arguments.input is None:
        return dict(examples.items())
    return {name: arguments.input for name, example in examples.items() if len(example) == len(arguments.input)}


def _cards(arguments: argparse.Namespace) -> tuple[list[Card], dict[str, int]]:
    """The figures of each model, and the largest batch within --memory."""
    optimizer = Optimizer(name=arguments.optimizer)
    step = Step(partial(build_optimizer, optimizer), arguments.precision, arguments.device)
    options = dict(arguments.option) | ({"checkpoint": True} if arguments.checkpoint else {})
    cards, fits = [], {}
    for name, sample in _samples(arguments).items():
        shape = None if sample is None else [arguments.batch, *sample]
        cards.append(card(name, shape, arguments.classes, options, step))
        if arguments.memory is not None and sample is not None:
            limit = int(arguments.memory * 1e9)
            fits[name] = batch_within(limit, name, sample, arguments.classes, options, step)
    return cards, fits


def _show(arguments: argparse.Namespace, cards: list[Card], fits: dict[str, int]) -> None:
    columns = shutil.get_terminal_size((200, 24)).columns
    tables.print_rows(_rows(cards, fits, arguments.memory), columns, ("output", "activations", "input"))
    way = ", ".join([arguments.optimizer, arguments.precision, *(["checkpointing"] if arguments.checkpoint else [])])
    if any(c.memory for c in cards):
        print(f"\nactivations and peak: of a training step with {way}; {_NOT_COUNTED}")
    if arguments.name is None:
        return
    if cards[0].memory:
        print(_memory_line(cards[0].memory))
    if known := takes(arguments.name):
        print(f"options: {', '.join(sorted(known))}")
    if not cards[0].input:
        print("shapes and memory: add --input C,D,H,W or C,H,W")
    for name, batch in fits.items():
        room = f"up to batch {batch}" if batch else "not even with one sample"
        print(f"{name} fits {arguments.memory:g} GB {room}, with {way}")
    if arguments.layers:
        print()
        tables.print_rows(_group_rows(cards[0]), columns, ())


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures; 0, or 2 and one line on stderr for a user's mistake."""
    try:
        arguments = _arguments(argv)
        if arguments.fetch:
            print("\n".join(fetch(arguments.name, arguments.fetch, dict(arguments.option))))
            return 0
        cards, fits = _cards(arguments)
        pictures = _draw(arguments.png, cards) if arguments.png else []
    except (ValueError, UserError) as error:
        print(f"hpc models: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        rows = [asdict(c) | ({"largest_batch": fits[c.name]} if c.name in fits else {}) for c in cards]
        print(json.dumps(rows, indent=2))
        return 0
    _show(arguments, cards, fits)
    print("".join(f"{path}\n" for path in pictures), end="")
    return 0


def _draw(folder: Path, cards: list[Card]) -> list[Path]:
    """One figure per model, as PNG in the folder."""
    from jobs.models_figure import parts_figure

    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for c in cards:
            paths.append(folder / f"{c.name.replace(':', '-').replace('/', '-')}.png")
            parts_figure(c).savefig(paths[-1], dpi=120)
    except OSError as error:
        raise ValueError(f"--png {folder} cannot be written: {error}") from error
    return paths


if __name__ == "__main__":
    sys.exit(main())
