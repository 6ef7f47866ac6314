"""Classes compared: the table with the most difficult first, and the Dice of each sample by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hpc.metrics import by_difficulty
from jobs import palette
from jobs.figures import canvas, text

MOST_ROWS = 45
"""classes in one figure: the most difficult ones"""
COLUMNS = ("dice", "iou", "recall", "precision", "f1", "ap", "auc")
_POINTS = 400
"""of one class, drawn one by one; of more every n-th"""

Rows = Sequence[Mapping[str, Any]]


def _sorted(values: NDArray[np.float64]) -> list[int]:
    """Positions, the lowest value first, NaN last."""
    return [int(place) for place in np.lexsort((np.arange(len(values)), values, np.isnan(values)))]


def per_class_table(task: str, rows: Rows, title: str) -> Figure:
    """rows: {name, support, and recall, precision, f1, ...} of each class in order; at most MOST_ROWS are drawn.

    A bar behind each number; a class that does not occur is grey.
    """
    order = by_difficulty(task, rows)
    shown, names = order[:MOST_ROWS], text.labels([str(row["name"]) for row in rows], 34)
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    if len(order) > MOST_ROWS:
        title += f"\nthe {MOST_ROWS} most difficult of {len(order)} classes"
    beside = 0.075 * max((len(names[number]) for number in shown), default=1) + 0.3
    wide, high = beside + 0.75 + 1.0 * len(keys), 0.215 * (max(len(shown), 1) + 1)
    full = max(wide + 0.2, 5.0)
    title = canvas.wrapped(text.printable_lines(title), full)
    lines = 1 + title.count("\n")
    figure = canvas.new(full, high + 0.22 * lines + 0.2, layout=None)
    axes = figure.add_axes(
        (0.1 / full, 0.05 / (high + 0.22 * lines + 0.2), wide / full, high / (high + 0.22 * lines + 0.2))
    )
    axes.set(xlim=(0, wide), ylim=(len(shown), -1))
    axes.set_axis_off()
    for number, head in enumerate(["support", *keys]):
        right = beside + 0.7 + number * 1.0
        axes.text(right, -0.5, head, ha="right", va="center", fontsize=canvas.SMALL, weight="bold")
    _bars(axes, [rows[number] for number in shown], shown, beside, keys)
    for place, number in enumerate(shown):
        _write_row(axes, place + 0.5, rows[number], names[number], beside, keys)
    figure.suptitle(text.literal(title), fontsize=canvas.TITLE, y=0.99, va="top")
    return figure


def _bars(axes: Axes, rows: Rows, numbers: Sequence[int], beside: float, keys: Sequence[str]) -> None:
    middles = np.arange(len(rows)) + 0.5
    axes.barh(middles, 0.12, 0.6, color=[palette.shade(number) for number in numbers])
    for column, key in enumerate(keys):
        left = beside + 0.78 + column
        values = np.array([_value(row, key) if row.get("support") else np.nan for row in rows])
        axes.barh(middles, 0.92, 0.76, left=left, color="#f1f1f1")
        axes.barh(middles, 0.92 * np.nan_to_num(values).clip(0, 1), 0.76, left=left, color="#b9d7ee")


def _write_row(
    axes: Axes, middle: float, row: Mapping[str, Any], name: str, beside: float, keys: Sequence[str]
) -> None:
    there = bool(row.get("support"))
    ink = canvas.INK if there else "#a0a0a0"
    axes.text(0.2, middle, name, va="center", fontsize=canvas.SMALL, color=ink)
    support = text.compact(float(row.get("support") or 0))
    axes.text(beside + 0.7, middle, support, ha="right", va="center", fontsize=canvas.SMALL, color=ink)
    for column, key in enumerate(keys):
        said = text.share(_value(row, key)) if there else "-"
        place = beside + 0.78 + column + 0.88
        axes.text(place, middle, said, ha="right", va="center", fontsize=canvas.SMALL, color=ink)


def _value(row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) else float("nan")


def sample_dice(rows: NDArray[Any]) -> NDArray[np.float64]:
    """(N, 3K) intersection, predicted and true voxels of each class -> (N, K) Dice; NaN where a class is in neither."""
    both, predicted, true = np.split(np.asarray(rows, np.float64), 3, axis=1)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(predicted + true > 0, 2 * both / (predicted + true), np.nan))


def dice_by_sample(rows: NDArray[Any], names: Sequence[str], title: str) -> Figure:
    """(N, 3K), see `sample_dice`: a point for each sample that has the class or was given it, the median as a bar.

    At most MOST_ROWS classes, the lowest medians first.
    """
    dice = sample_dice(rows)
    with np.errstate(all="ignore"):
        medians = np.array(
            [np.median(column[~np.isnan(column)]) if (~np.isnan(column)).any() else np.nan for column in dice.T]
        )
    order = _sorted(medians)[:MOST_ROWS]
    if not np.isfinite(medians).any():
        return canvas.say_nothing_to_draw(canvas.new(7.6, 2), title, "no sample has a class, or was given one")
    if len(names) > MOST_ROWS:
        title += f"\nthe {MOST_ROWS} most difficult of {len(names)} classes"
    shown = text.labels(names)
    figure = canvas.new(7.6, 0.24 * max(len(order), 2) + 1.3)
    axes = figure.add_subplot()
    for place, number in enumerate(order):
        values = np.sort(dice[~np.isnan(dice[:, number]), number])
        values = values[:: -(-len(values) // _POINTS) or 1]
        spread = (np.arange(len(values)) * 0.618034 % 1 - 0.5) * 0.55
        axes.plot(values, place + spread, "o", ms=3, alpha=0.55, mew=0, color=palette.shade(number))
        axes.plot([medians[number]] * 2, [place - 0.38, place + 0.38], color=canvas.INK, lw=2)
    labels = [f"{shown[number]} ({(~np.isnan(dice[:, number])).sum()})" for number in order]
    axes.set_yticks(range(len(order)), labels, fontsize=canvas.SMALL)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(order) - 0.4, -0.6))
    axes.set_xlabel("Dice of each sample; bar: median; in brackets: samples that have the class", fontsize=canvas.SMALL)
    axes.tick_params(labelsize=canvas.SMALL)
    axes.grid(alpha=0.25, axis="x")
    canvas.write_title(figure, title)
    return figure
