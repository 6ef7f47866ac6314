"""Curves over the training: metrics of both splits by epoch, and the loss of each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from jobs import palette
from jobs.figures import canvas

MOST_PANELS = 9
COLUMNS = 3
MOST_POINTS = 2000
"""of the batch loss: more steps are drawn as least and most of each stretch"""
_UNBOUNDED = ("loss",)
"""metrics that do not lie between 0 and 1"""
_ROBUST = 99.5
"""percentile of the batch loss up to which the picture reaches"""

Steps = tuple[NDArray[np.int64], NDArray[np.float64]]
"""step numbers, values"""


def curves(
    lines: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    best_epoch: int | None,
    baseline: Mapping[str, float],
    title: str = "",
    learning_rate: Steps | None = None,
) -> Figure:
    """The lines of metrics.jsonl, {epoch, step, train: {...}, metrics: {...}}: one panel for each of the metrics.

    Both splits where both have the metric; the best epoch is marked, the baseline's value dashed. Last, and small, the
    learning rate by epoch.
    """
    lines = sorted(lines, key=lambda line: line["epoch"])
    names = [name for name in metrics if any(name in line["metrics"] or name in line["train"] for line in lines)]
    names = names[:MOST_PANELS]
    if not names:
        return canvas.say_nothing_to_draw(canvas.new(5, 2), title or "curves", "no evaluation yet")
    panels = len(names) + (learning_rate is not None and len(learning_rate[0]) > 0)
    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    figure = canvas.new(max(3.6 * columns, 5.0), 2.6 * rows + 0.5)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, name in zip(grid, names, strict=False):
        _panel(axes, lines, name, best_epoch, baseline.get(name))
    if panels > len(names) and learning_rate:
        _rate(grid[len(names)], lines, learning_rate, best_epoch)
    for axes in grid[panels:]:
        axes.set_axis_off()
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=canvas.SMALL
    )
    if title:
        canvas.write_title(figure, title)
    return figure


def _panel(
    axes: Axes, lines: Sequence[Mapping[str, Any]], name: str, best_epoch: int | None, baseline: float | None
) -> None:
    splits = {"train": ("train", palette.shade(5), "s--"), "metrics": ("validation", palette.shade(0), "o-")}
    many = len(lines) > 40
    lowest = 0.0
    for key, (label, colour, style) in splits.items():
        found = [(line["epoch"], _number(line[key][name])) for line in lines if name in line[key]]
        if found:
            epochs, values = zip(*found, strict=True)
            style = style[1:] if many else style
            axes.plot(epochs, values, style, color=colour, ms=3, lw=1.4, label=label)
            lowest = min([lowest, *(value for value in values if np.isfinite(value))])
    if not any(np.isfinite(line.get_ydata(orig=False)).any() for line in axes.get_lines()):
        axes.text(
            0.5,
            0.5,
            "no finite value" if name in _UNBOUNDED else "undefined",
            ha="center",
            transform=axes.transAxes,
            color=canvas.FAINT,
        )
    if baseline is not None and np.isfinite(baseline):
        axes.axhline(baseline, color=canvas.FAINT, ls=":", lw=1.2, label="baseline")
    _mark(axes, lines, name, best_epoch)
    axes.margins(y=0.12)
    first, last = lines[0]["epoch"], lines[-1]["epoch"]
    room = 0.04 * (last - first) or 1
    axes.set_xlim(first - room, last + room)
    if name not in _UNBOUNDED:
        axes.set_ylim(bottom=lowest - 0.02, top=1.06)
    _style(axes, name)


def _mark(axes: Axes, lines: Sequence[Mapping[str, Any]], name: str, best_epoch: int | None) -> None:
    if best_epoch is None:
        return
    axes.axvline(best_epoch, color=canvas.INK, lw=0.8, label=f"best epoch {best_epoch}")
    value = next((_number(line["metrics"].get(name)) for line in lines if line["epoch"] == best_epoch), np.nan)
    if np.isfinite(value):
        late = 2 * best_epoch > lines[0]["epoch"] + lines[-1]["epoch"]
        axes.plot([best_epoch], [value], "*", color=canvas.INK, ms=9)
        axes.annotate(
            f"{value:.3f}",
            (best_epoch, value),
            (-5 if late else 5, 5),
            textcoords="offset points",
            ha="right" if late else "left",
            fontsize=canvas.SMALL - 1,
        )


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=canvas.LABEL)
    axes.set_xlabel("epoch", fontsize=canvas.SMALL)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.tick_params(labelsize=canvas.SMALL)
    axes.grid(alpha=0.25)


def _rate(axes: Axes, lines: Sequence[Mapping[str, Any]], steps: Steps, best_epoch: int | None) -> None:
    per_epoch = max(lines[-1]["step"] / max(lines[-1]["epoch"], 1), 1)
    at, values = steps
    chosen = np.unique(np.linspace(0, len(at) - 1, min(len(at), MOST_POINTS)).round().astype(int))
    axes.plot(at[chosen] / per_epoch, values[chosen], color=palette.shade(2), lw=1.2)
    if best_epoch is not None:
        axes.axvline(best_epoch, color=canvas.INK, lw=0.8)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    axes.yaxis.get_offset_text().set_fontsize(canvas.SMALL)
    _style(axes, "learning rate")


def batch_loss(loss: Steps, each: float, title: str = "") -> Figure:
    """The loss of each step (thin; more than MOST_POINTS as bands from least to most), and its running mean of an
    epoch (`each` steps), or of a twentieth of the steps where that is shorter. The picture ends at
    the 99.5th percentile, and spikes leave it.
    """
    at, values = loss
    figure = canvas.new(9.0, 3.4)
    finite = np.isfinite(values)
    if not finite.any():
        return canvas.say_nothing_to_draw(figure, title or "batch loss", "no step with a finite loss")
    axes = figure.add_subplot()
    grey = "#9a9a9a"
    if len(at) > MOST_POINTS:
        left, low, high = _bands(at, values)
        axes.fill_between(left, low, high, color=grey, alpha=0.6, lw=0, label="batches, least to most")
    else:
        axes.plot(at, values, color=grey, lw=0.7, label="batch")
    window = int(np.clip(min(each, len(at) / 20), 1, None))
    if window > 1:
        mean = _running_mean(values, window)
        axes.plot(at, mean, color=palette.shade(1), lw=1.6, label=f"mean of the last {window} steps")
    least, most = float(values[finite].min()), float(np.percentile(values[finite], _ROBUST))
    if most > least:
        axes.set_ylim(least - 0.05 * (most - least), most + 0.15 * (most - least))
    room = max(0.01 * (at[-1] - at[0]), 0.5)
    axes.set_xlim(at[0] - room, at[-1] + room)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    above = axes.secondary_xaxis("top", functions=(lambda s: np.divide(s, each), lambda e: np.multiply(e, each)))
    above.set_xlabel("epoch", fontsize=canvas.SMALL)
    above.tick_params(labelsize=canvas.SMALL)
    axes.set_xlabel("step", fontsize=canvas.SMALL)
    axes.set_ylabel("loss", fontsize=canvas.SMALL)
    axes.tick_params(labelsize=canvas.SMALL)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=canvas.SMALL)
    canvas.write_title(figure, title or "batch loss")
    return figure


def _bands(at: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """First step, least and most finite value of each stretch."""
    starts = np.unique(np.linspace(0, len(at), MOST_POINTS, endpoint=False).astype(int))
    low = np.minimum.reduceat(np.where(np.isfinite(values), values, np.inf), starts)
    high = np.maximum.reduceat(np.where(np.isfinite(values), values, -np.inf), starts)
    return at[starts], np.where(np.isfinite(low), low, np.nan), np.where(np.isfinite(high), high, np.nan)


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Of the last `window` steps, those that are finite; NaN where none is."""
    finite = np.isfinite(values)
    sums, counts = np.cumsum(np.where(finite, values, 0)), np.cumsum(finite)
    sums[window:], counts[window:] = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(counts > 0, sums / counts, np.nan))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
