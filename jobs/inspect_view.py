"""The facts of `hpc inspect` on a terminal, whatever its width: nothing is cut, long names go over several lines."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from datasets.alarms import listing
from datasets.partition import SPLITS
from datasets.repeats import MOST_LISTED

FOLDS_A_TABLE, CHANNELS_A_TABLE, NAME_WIDTH = 6, 2, 24
CHANNELS_SHOWN, FILES_SHOWN, LABEL_SETS_SHOWN, TWINS_SHOWN = 8, 3, 5, 3
EVEN = 1.05
"""weights of classes that differ by less are not suggested"""


def show(facts: dict[str, Any], console: Console) -> None:
    console.print(Text(_headline(facts)), soft_wrap=True)
    console.print(_segmentation_table(facts) if facts["segmentation"] else _class_table(facts))
    for first in range(0, len(facts["folds"]), FOLDS_A_TABLE):
        console.print(_fold_table(facts, range(len(facts["folds"]))[first : first + FOLDS_A_TABLE]))
    num = len(facts["intensities"])
    for first in range(0, min(num, CHANNELS_SHOWN), CHANNELS_A_TABLE):
        console.print(_intensity_table(facts, range(min(num, CHANNELS_SHOWN))[first : first + CHANNELS_A_TABLE]))
    if num > CHANNELS_SHOWN:
        console.print(Text(f"{num - CHANNELS_SHOWN} more channels; --json has all"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in _lines(facts):
        grid.add_row(Text(name), Text(text))
    console.print(grid)
    _show_weights(facts, console)
    for alarm in facts["warnings"]:
        style = "bold red" if alarm["grave"] else "yellow"
        console.print(Text(f"warning: {alarm['text']}", style), soft_wrap=True)


def _headline(facts: dict[str, Any]) -> str:
    files, num = facts["files"], len(facts["files"])
    name = " ".join(files[:FILES_SHOWN]) + (f" and {num - FILES_SHOWN} more files" if num > FILES_SHOWN else "")
    shapes = facts["shapes"]
    shape = _by(shapes["min"]) if shapes["distinct"] == 1 else f"{shapes['distinct']} shapes"
    return f"{name}: {facts['num_samples']} samples of {shape} {facts['dtype']}, {facts['task']}"


def _class_table(facts: dict[str, Any]) -> Table:
    weights = facts["weights"]["class_weights"] or facts["weights"]["pos_weight"]
    table = _table("class", *SPLITS, "all", *(["weight"] if weights else []))
    for number, (name, counts) in enumerate(facts["classes"].items()):
        weight = [f"{weights[number]:.3g}"] if weights else []
        table.add_row(Text(name), *_counts(counts), *weight)
    table.add_section()
    if facts["labels"]:
        table.add_row("none of them", *_counts(facts["labels"]["without_any"]))
    table.add_row("samples", *_counts(facts["splits"]))
    table.add_row("groups", *_counts(facts["groups"]))
    return table


def _segmentation_table(facts: dict[str, Any]) -> Table:
    """Shares of voxels, then samples that have the class; of the samples looked at."""
    weights = facts["weights"]["class_weights"]
    table = _table("class", *(f"{split} %" for split in SPLITS), "with it", *(["weight"] if weights else []))
    for number, (name, found) in enumerate(facts["segmentation"]["classes"].items()):
        shares = [_percent(found["share"][split]) for split in SPLITS]
        weight = [f"{weights[number]:.3g}"] if weights else []
        table.add_row(Text(name), *shares, str(sum(found["samples"].values())), *weight)
    table.add_section()
    table.add_row("samples", *_counts(facts["splits"]))
    table.add_row("groups", *_counts(facts["groups"]))
    return table


def _fold_table(facts: dict[str, Any], folds: Sequence[int]) -> Table:
    table = _table("class in fold", *map(str, folds))
    for name, counts in facts["classes"].items():
        table.add_row(Text(name), *(str(counts["folds"][number]) for number in folds))
    table.add_section()
    table.add_row("samples", *(str(facts["folds"][number]) for number in folds))
    return table


def _intensity_table(facts: dict[str, Any], channels: Sequence[int]) -> Table:
    """Quantiles, extremes and moments: two columns for each channel."""
    several = len(facts["intensities"]) > 1
    found = [facts["intensities"][number] for number in channels]
    names = [f"{kind} {number}" if several else kind for number in channels for kind in ("stored", "normalised")]
    table = _table("channel" if several else "intensities", *names)
    for share in found[0]["stored"]:
        pairs = ((_number(one["stored"][share]), _number(one["normalised"][share], 3)) for one in found)
        table.add_row(f"{share} %", *(cell for pair in pairs for cell in pair))
    table.add_section()
    for name in ("min", "max"):
        table.add_row(name, *(cell for one in found for cell in (_number(one[name]), "")))
    for name, key in (("mean", "normalised_mean"), ("std", "normalised_std")):
        table.add_row(name, *(cell for one in found for cell in ("", _number(one[key]))))
    return table


def _lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if facts["folds"]:
        folds = facts["folds"]
        yield (
            "folds",
            f"{len(folds)} folds of {', '.join(map(str, folds))} samples, for data.fold=0 to {len(folds) - 1}",
        )
    if facts["labels"]:
        yield "labels", _label_sets(facts["labels"])
    if facts["shapes"]["distinct"] > 1:
        yield "shapes", _spread(facts["shapes"])
    yield "spacing", _spread(facts["spacing_mm"], " mm")
    yield "sources", f"{facts['sources']} files; voxels {_spread(facts['source_shapes'])}"
    yield from _seen(facts)
    yield from _twins(facts)
    yield "checked", _checked(facts)
    yield "fingerprint", facts["fingerprint"]


def _seen(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    looked, total = facts["looked_at"], facts["num_samples"]
    more = "" if looked["all"] else "; --all looks at all"
    yield "looked at", f"{looked['samples']} of {total} samples, {looked['bytes'] / 1e6:.1f} MB{more}"
    if facts["segmentation"]:
        share = facts["segmentation"]["foreground_share"]
        yield "foreground", f"{_percent(share)} % of the voxels are not {next(iter(facts['segmentation']['classes']))}"
    else:
        share = facts["voxels"]["foreground_share"]
        yield "foreground", f"{_percent(share)} % of the voxels are above the lowest of their sample"


def _twins(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    equal, near = facts["duplicates"], facts["near_duplicates"]
    if equal["sets"]:
        sure = f" ({equal['confirmed']} compared byte for byte; --all compares all)"
        sure = "" if equal["confirmed"] == equal["sets"] else sure
        yield "equal", f"{equal['sets']} set{'s' * (equal['sets'] > 1)} of {equal['samples']} samples in all{sure}"
        for one in equal["listed"][:TWINS_SHOWN]:
            yield "", listing(_housed(one), one["samples"])
        yield from _unlisted(equal["sets"], "set")
    else:
        yield "equal", "no two samples"
    strangers = near["pairs"] - near["of_one_group"]
    own = f", and {near['of_one_group']} of one group" if near["of_one_group"] else ""
    pairs = f"{strangers or 'no'} pair{'s' * (strangers != 1)}{own}"
    yield "nearly equal", f"{pairs}, of {near['compared']} samples compared"
    for one in near["listed"][:TWINS_SHOWN]:
        yield "", " and ".join(_housed(one))
    yield from _unlisted(strangers, "pair")


def _unlisted(found: int, what: str) -> Iterator[tuple[str, str]]:
    """How many more there are than are shown, and where to find them."""
    if (more := found - TWINS_SHOWN) > 0:
        there = f"the first {MOST_LISTED}" if found > MOST_LISTED else "all"
        yield "", f"and {more} more {what}{'s' * (more > 1)}; --json lists {there}"


def _housed(one: dict[str, Any]) -> list[str]:
    return [f"{id} ({place})" for id, place in zip(one["ids"], one["places"], strict=True)]


def _checked(facts: dict[str, Any]) -> str:
    bad, read, total = len(facts["damaged"]), facts["checksums_compared"], facts["num_samples"]
    if bad:
        return f"{bad} of {read} samples are damaged"
    return f"all {total} samples are sound" if read == total else f"{read} samples are sound; --verify compares all"


def _label_sets(labels: dict[str, Any]) -> str:
    often = labels["most_frequent"][:LABEL_SETS_SHOWN]
    sets = "; ".join(f"{' + '.join(one['classes']) or 'none'} {one['samples']}" for one in often)
    rest = labels["distinct"] - len(often)
    more = f"; and {rest} other sets" if rest else ""
    return f"{labels['per_sample']:.2f} a sample; most often {sets}{more}"


def _spread(found: dict[str, Any], unit: str = "") -> str:
    if found["distinct"] == 1:
        return _by(found["min"]) + unit
    span = f"from {_by(found['min'])} to {_by(found['max'])}"
    return f"median {_by(found['median'])}{unit}, {span}; {found['distinct']} different"


def _show_weights(facts: dict[str, Any], console: Console) -> None:
    """As lines of an experiment's YAML."""
    for key, weights in facts["weights"].items():
        there = [weight for weight in weights or [] if weight > 0]
        if not there:
            continue
        if key == "class_weights" and max(there) < EVEN * min(there):
            console.print(Text("the classes are balanced: no weights are needed"))
            continue
        values = ", ".join(f"{weight:.4g}" for weight in weights)
        lines = textwrap.wrap(f"{key}: [{values}]", console.width, initial_indent=" " * 4, subsequent_indent=" " * 6)
        console.print(Text("suggested weights, by the training split, for the experiment:"))
        console.print(Text("\n".join(["train:", "  loss:", *lines])), soft_wrap=True)


def _table(name: str, *columns: str) -> Table:
    table = Table()
    table.add_column(name, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _counts(counts: dict[str, Any]) -> list[str]:
    return [*(str(counts[split]) for split in SPLITS), str(sum(counts[split] for split in SPLITS))]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g}"


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.6g}"


def _by(sizes: Sequence[float | None]) -> str:
    return "x".join("?" if size is None else f"{size:g}" for size in sizes)
