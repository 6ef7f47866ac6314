"""The reliability diagram: how often what was said with a confidence came true."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from jobs import palette
from jobs.figures import canvas, ranking


def calibration(targets: NDArray[Any], scores: NDArray[Any], title: str) -> Figure:
    """targets (N,): the confidence of the class named first. targets (N, K): all labels' probabilities in one diagram,
    their expected calibration error being the mean of the labels'. scores: (N, K). Rows that are not finite are left
    out.
    """
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets)
    finite = np.isfinite(scores).all(axis=1)
    scores, targets = scores[finite], targets[finite]
    if not len(scores):
        return canvas.say_nothing_to_draw(canvas.new(5, 2), title, "no sample with finite probabilities")
    if targets.ndim == 1:
        said, right = scores.max(axis=1), scores.argmax(axis=1) == targets
        bins = ranking.reliability(said, right)
        error, words = bins.error, ("confidence of the class named", "accuracy")
    else:
        bins = ranking.reliability(scores.ravel(), targets.ravel() > 0)
        each = [ranking.reliability(scores[:, k], targets[:, k] > 0).error for k in range(scores.shape[1])]
        error, words = float(np.mean(each)), ("probability of a label, all labels", "share that has the label")
    return _diagram(bins, f"{title}\nexpected calibration error {error:.4f}", words)


def _diagram(bins: ranking.Reliability, title: str, words: tuple[str, str]) -> Figure:
    figure = canvas.new(4.9, 5.4)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    width = 1 / ranking.BINS
    middle = (np.arange(ranking.BINS) + 0.5) * width
    blue, orange = palette.shade(0), palette.shade(1)
    top.bar(middle, np.nan_to_num(bins.accuracy), width * 0.94, color=blue, label=words[1])
    low = np.fmin(bins.accuracy, bins.confidence)
    gap = np.abs(bins.accuracy - bins.confidence)
    top.bar(
        middle, gap, width * 0.94, bottom=low, fc="none", ec=orange, hatch="////", lw=1, label="gap to the confidence"
    )
    top.plot([0, 1], [0, 1], ls="--", color=canvas.FAINT, lw=1, label="perfect")
    top.set(xlim=(0, 1), ylim=(0, 1.02))
    top.set_ylabel(words[1], fontsize=canvas.LABEL)
    top.legend(fontsize=canvas.SMALL, loc="upper left")
    below.bar(middle, bins.samples / max(int(bins.samples.sum()), 1), width * 0.94, color="#8c8c8c")
    below.set_ylabel("share", fontsize=canvas.LABEL)
    below.set_xlabel(words[0], fontsize=canvas.LABEL)
    for axes in (top, below):
        axes.tick_params(labelsize=canvas.SMALL)
        axes.grid(alpha=0.25)
    canvas.write_title(figure, title)
    return figure
