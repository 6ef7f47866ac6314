"""ROC and precision-recall curves of each class against the rest, with their mean over the classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from jobs import palette
from jobs.figures import canvas, ranking, text
from jobs.figures.ranking import Floats

NAMED = 8
"""classes with a colour and a name; of more the most difficult ones, the others are grey"""
MOST_SCORES = 1 << 24
"""samples times classes; of more every n-th sample is taken, and the title says so"""
MOST_POINTS = 1000
"""of one drawn curve"""
_GRID = np.linspace(0, 1, 501)


@dataclass(frozen=True)
class Curve:
    """One class against the rest: points to draw, the area, and the mean's share at _GRID."""

    number: int
    x: Floats
    y: Floats
    area: float
    on_grid: Floats


@dataclass(frozen=True)
class Ranked:
    """Truths and scores of the samples whose scores are all finite. truth, scores: (N, K)."""

    truth: NDArray[np.bool_]
    scores: NDArray[Any]
    note: str
    """What was left out."""


def ranked(targets: NDArray[Any], scores: NDArray[Any]) -> Ranked:
    """targets: (N,) or (N, K); scores: (N, K) probabilities."""
    every = -(-scores.size // MOST_SCORES)
    notes = [f"every {every}th sample"] if every > 1 else []
    targets, scores = np.asarray(targets)[::every], np.asarray(scores)[::every]
    finite = np.isfinite(scores).all(axis=1)
    if not finite.all():
        notes.append(f"{(~finite).sum()} of {len(finite)} samples are left out: not finite")
    truth = ranking.one_hot(targets, scores.shape[1])
    return Ranked(truth[finite], scores[finite], "; ".join(notes))


def roc(targets: NDArray[Any], scores: NDArray[Any], names: Sequence[str], title: str) -> Figure:
    """targets: (N,) class numbers or (N, K) of 0 and 1; scores: (N, K) probabilities. AUC: mean over the classes.

    Classes without a positive or without a negative sample have no curve, and are left out of the mean.
    """
    data = ranked(targets, scores)
    found = _each(data, _roc_curve)
    figure, axes = _frame("false positive rate", "true positive rate", title, data.note)
    axes.plot([0, 1], [0, 1], ls=":", color=canvas.FAINT, lw=1, label="chance 0.500")
    return _draw(figure, axes, found, names, "AUC", steps=False)


def precision_recall(targets: NDArray[Any], scores: NDArray[Any], names: Sequence[str], title: str) -> Figure:
    """As `roc`; the area is the average precision (AP), chance the mean prevalence of the classes that occur."""
    data = ranked(targets, scores)
    found = _each(data, _precision_recall_curve)
    figure, axes = _frame("recall", "precision", title, data.note)
    if found:
        prevalence = float(data.truth[:, [curve.number for curve in found]].mean())
        axes.axhline(prevalence, ls=":", color=canvas.FAINT, lw=1, label=f"prevalence {prevalence:.3f}")
    return _draw(figure, axes, found, names, "AP", steps=True)


def _each(data: Ranked, make: Callable[[int, NDArray[Any], NDArray[Any]], Curve | None]) -> list[Curve]:
    if not len(data.truth):
        return []
    curves = (make(number, data.truth[:, number], data.scores[:, number]) for number in range(data.truth.shape[1]))
    return [curve for curve in curves if curve]


def _roc_curve(number: int, truth: NDArray[Any], scores: NDArray[Any]) -> Curve | None:
    if truth.all() or not truth.any():
        return None
    x, y, _ = ranking.roc_points(truth, scores)
    return Curve(number, *_thinned(x, y), ranking.area(x, y), np.interp(_GRID, x, y))


def _precision_recall_curve(number: int, truth: NDArray[Any], scores: NDArray[Any]) -> Curve | None:
    if not truth.any():
        return None
    y, x, _ = ranking.precision_recall_points(truth, scores)
    rising, precision = x[::-1], y[::-1]
    at = np.searchsorted(rising, _GRID, side="left").clip(0, len(rising) - 1)
    return Curve(number, *_thinned(x, y), ranking.average_precision(y, x), precision[at])


def _thinned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    chosen = np.unique(np.linspace(0, len(x) - 1, min(MOST_POINTS, len(x))).round().astype(int))
    return x[chosen], y[chosen]


def _frame(x: str, y: str, title: str, note: str) -> tuple[Figure, Axes]:
    figure = canvas.new(7.6, 4.8)
    axes = figure.add_subplot()
    axes.set_xlabel(x, fontsize=canvas.LABEL)
    axes.set_ylabel(y, fontsize=canvas.LABEL)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
    axes.tick_params(labelsize=canvas.SMALL)
    axes.grid(alpha=0.25)
    canvas.write_title(figure, f"{title}\n{note}" if note else title)
    return figure, axes


def _draw(figure: Figure, axes: Axes, found: list[Curve], names: Sequence[str], word: str, steps: bool) -> Figure:
    shown, style = text.labels(names), "steps-post" if steps else "default"
    hardest = sorted(found, key=lambda curve: curve.area)[:NAMED]
    named = {curve.number for curve in hardest} if len(found) > NAMED else {curve.number for curve in found}
    for curve in found:
        if curve.number not in named:
            axes.plot(curve.x, curve.y, color="#b0b0b0", lw=0.6, alpha=0.6, drawstyle=style)
    for curve in sorted(found, key=lambda curve: curve.area):
        if curve.number in named:
            label = f"{shown[curve.number]} {curve.area:.3f}"
            colour, dash = palette.shade(curve.number), palette.dash(curve.number)
            axes.plot(curve.x, curve.y, color=colour, ls=dash, lw=1.4, drawstyle=style, label=label)
    if found:
        mean = np.mean([curve.on_grid for curve in found], axis=0)
        label = f"mean of {len(found)} {float(np.mean([curve.area for curve in found])):.3f}"
        axes.plot(_GRID, mean, color="k", lw=2.2, label=label)
    else:
        axes.text(0.5, 0.5, "no class with and without samples", ha="center", color=canvas.FAINT)
    head = f"{word}, the {NAMED} most difficult" if len(found) > NAMED else word
    if len(found) < len(names):
        head += f"\n({len(names) - len(found)} of {len(names)} classes: no curve)"
    figure.legend(title=head, loc="outside right center", fontsize=canvas.SMALL, title_fontsize=canvas.SMALL)
    return figure
