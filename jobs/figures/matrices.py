"""Confusion matrices: one of all classes as counts or shares, or one of two by two for each label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from jobs.figures import canvas, text

NUMBERS_FIT, NAMES_FIT = 20, 60
"""classes: more show no number in each cell; more show no name beside each row, but the commonest confusions"""
CONFUSIONS = 24
"""listed where names do not fit"""
LABELS_FIT = 30
"""matrices of two by two in one figure: those of most errors"""
_EMPTY = canvas.PALE


def confusion_matrix(matrix: NDArray[Any], names: Sequence[str], title: str, normalised: bool = False) -> Figure:
    """(K, K) counts [truth, prediction]. The colour follows the root of the count, or of the share of the true class:
    rare errors are seen.

    Rows of classes that do not occur are grey when normalised. More than NAMES_FIT classes: see `_large`.
    """
    matrix = np.asarray(matrix, np.float64)
    values = _shares(matrix) if normalised else matrix
    if len(names) > NAMES_FIT:
        return _large(matrix, values, names, title, normalised)
    num = max(len(names), 1)
    shown = text.labels(names)
    cell = 0.62 if num <= 8 else 0.42 if num <= NUMBERS_FIT else 0.165
    beside = 0.075 * max(map(len, shown), default=0)
    wide = max(num * cell + beside + 1.6, 5.0)
    figure = canvas.new(wide, num * cell + 0.72 * beside + 1.2, "compressed")
    axes = figure.add_subplot()
    _paint(figure, axes, values, normalised)
    size = canvas.SMALL if num <= NUMBERS_FIT else canvas.TINY + 0.5
    axes.set_xticks(range(len(names)), shown, rotation=45 if num <= NUMBERS_FIT else 90, fontsize=size)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right" if num <= NUMBERS_FIT else "center")
        label.set_rotation_mode("anchor" if num <= NUMBERS_FIT else "default")
    axes.set_yticks(range(len(names)), shown, fontsize=size)
    if num <= NUMBERS_FIT:
        _write_numbers(axes, values, normalised)
    canvas.write_title(figure, title)
    return figure


def _shares(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the true class; NaN where it does not occur."""
    sums = matrix.sum(axis=1, keepdims=True)
    return np.where(sums > 0, matrix / np.maximum(sums, 1), np.nan)


def _paint(figure: Figure, axes: Axes, values: NDArray[np.float64], normalised: bool) -> None:
    most = 1.0 if normalised else max(float(np.nanmax(values, initial=0)), 1.0)
    axes.set_facecolor(_EMPTY)
    image = axes.imshow(values, cmap="Blues", norm=PowerNorm(0.5, 0, most), interpolation="nearest")
    axes.set_xlabel("predicted", fontsize=canvas.LABEL)
    axes.set_ylabel("true", fontsize=canvas.LABEL)
    word = "share of the true class" if normalised else "count"
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label(word, fontsize=canvas.SMALL)
    parts = (0, 0.01, 0.1, 0.25, 0.5, 1) if normalised else (0, 1 / 16, 1 / 4, 9 / 16, 1)
    ticks = [most * part for part in parts] if normalised else sorted({round(most * part) for part in parts})
    bar.set_ticks(ticks, labels=[f"{tick:g}" if normalised else text.compact(tick) for tick in ticks])
    bar.ax.tick_params(labelsize=canvas.SMALL)


def _write_numbers(axes: Axes, values: NDArray[np.float64], normalised: bool) -> None:
    """Zeros stay empty: what is there is seen at once."""
    most = 1.0 if normalised else max(float(np.nanmax(values, initial=0)), 1.0)
    size = canvas.LABEL if len(values) <= 8 else canvas.SMALL - 1
    for (row, column), value in np.ndenumerate(values):
        if value > 0:
            dark = np.sqrt(value / most) > 0.6
            number = f"{value:.2f}" if normalised else text.compact(value)
            axes.text(column, row, number, ha="center", va="center", fontsize=size, color="w" if dark else "k")


def _large(
    matrix: NDArray[np.float64], values: NDArray[np.float64], names: Sequence[str], title: str, normalised: bool
) -> Figure:
    """The matrix with class numbers at its edges; beside it the commonest confusions by name."""
    figure = canvas.new(12.6, 7.6)
    left, right = figure.subplots(1, 2, width_ratios=(7.4, 5.0))
    _paint(figure, left, values, normalised)
    every = next(step for step in (10, 20, 50, 100, 200, 500, 1000, 10**9) if len(names) / step <= 12)
    left.set_xticks(range(0, len(names), every))
    left.set_yticks(range(0, len(names), every))
    left.tick_params(labelsize=canvas.SMALL)
    right.set_axis_off()
    lines = _confusions(matrix, names, normalised)
    empty = int((matrix.sum(axis=1) == 0).sum())
    head = f"the {len(lines)} commonest confusions of {len(names)} classes" if lines else "no confusion"
    right.text(0, 1, head, fontsize=canvas.LABEL, va="top", transform=right.transAxes, weight="bold")
    for number, line in enumerate(lines):
        place = 0.955 - number * 0.037
        right.text(0, place, line, fontsize=canvas.SMALL - 1, va="top", transform=right.transAxes)
    if empty:
        note = f"{empty} classes do not occur" if empty > 1 else "one class does not occur"
        right.text(0, 0.02, note, fontsize=canvas.SMALL, color=canvas.FAINT, transform=right.transAxes)
    canvas.write_title(figure, title)
    return figure


def _confusions(matrix: NDArray[np.float64], names: Sequence[str], normalised: bool) -> list[str]:
    """`true -> predicted: how many`, the most frequent first: by count, or by share of the true class."""
    errors = matrix * (1 - np.eye(len(matrix)))
    ranked = np.nan_to_num(_shares(matrix)) * (1 - np.eye(len(matrix))) if normalised else errors
    flat = np.argsort(-ranked, axis=None, kind="stable")[:CONFUSIONS]
    shown = [text.label(name, 20) for name in names]
    sums = matrix.sum(axis=1)
    return [
        f"{row} {shown[row]} → {column} {shown[column]}: "
        f"{text.compact(errors[row, column])} of {text.compact(sums[row])}"
        for row, column in zip(*(axis.tolist() for axis in np.unravel_index(flat, matrix.shape)), strict=True)
        if errors[row, column] > 0
    ]


def label_matrices(matrices: NDArray[Any], names: Sequence[str], title: str) -> Figure:
    """(K, 2, 2) counts [label, truth, prediction]: for each label, what was there and what was found.

    More than LABELS_FIT: those with the largest share of errors.
    """
    matrices = np.asarray(matrices, np.float64)
    wrong = (matrices[:, 0, 1] + matrices[:, 1, 0]) / np.maximum(matrices.sum(axis=(1, 2)), 1)
    chosen = np.arange(len(names))
    if len(names) > LABELS_FIT:
        chosen = np.sort(np.argsort(-wrong, kind="stable")[:LABELS_FIT])
        title = f"{title}; the {LABELS_FIT} of {len(names)} labels with most errors"
    columns = min(max(len(chosen), 1), 6)
    rows = -(-max(len(chosen), 1) // columns)
    figure = canvas.new(max(columns * 1.75 + 0.4, 5.0), rows * 1.85 + 0.75, "compressed")
    shown = text.labels(names, 20)
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for number, axes in zip(chosen.tolist(), all_axes, strict=False):
        _two_by_two(axes, matrices[number], shown[number])
    for axes in list(figure.axes)[len(chosen) :]:
        axes.set_axis_off()
    figure.supxlabel("predicted", fontsize=canvas.LABEL)
    figure.supylabel("true", fontsize=canvas.LABEL)
    canvas.write_title(figure, title)
    return figure


def _two_by_two(axes: Axes, matrix: NDArray[np.float64], name: str) -> None:
    shares = _shares(matrix)
    axes.set_facecolor(_EMPTY)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        dark = shares[row, column] > 0.6
        number = text.compact(count)
        axes.text(column, row, number, ha="center", va="center", fontsize=canvas.LABEL, color="w" if dark else "k")
    axes.set_xticks([0, 1], ["no", "yes"], fontsize=canvas.SMALL)
    axes.set_yticks([0, 1], ["no", "yes"], fontsize=canvas.SMALL)
    axes.set_title(name, fontsize=canvas.SMALL)
