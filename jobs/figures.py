"""Figures of a run: confusion matrix and curves, drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def confusion_matrix(matrix: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """(K, K) counts [truth, prediction]; the colour is the share of the true class, the number the count."""
    size = 2.2 + 0.62 * len(names)
    figure = _figure(size + 1.0, size)
    axes = figure.add_subplot()
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=11)
    for row in range(len(names)):
        for column in range(len(names)):
            color = "white" if share[row, column] > 0.6 else "black"
            axes.text(column, row, str(int(matrix[row, column])), ha="center", va="center", color=color, fontsize=9)
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046, pad=0.04)
    return figure


def curves(lines: Sequence[dict[str, Any]], best_epoch: int, majority: float) -> Figure:
    """Loss and accuracy of both splits over the epochs, from the lines of metrics.jsonl; the best epoch is marked."""
    figure = _figure(9.5, 3.6)
    epochs = [line["epoch"] for line in lines]
    for position, name in enumerate(("loss", "accuracy")):
        axes = figure.add_subplot(1, 2, position + 1)
        axes.plot(epochs, [line["train"][name] for line in lines], "o-", ms=3, label="train")
        axes.plot(epochs, [line["metrics"][name] for line in lines], "o-", ms=3, label="validation")
        axes.axvline(best_epoch, color="gray", ls=":", label=f"best epoch {best_epoch}")
        if name == "accuracy":
            axes.axhline(majority, color="gray", ls="--", lw=1, label="majority class")
            axes.set_ylim(0, 1.02)
        axes.set_xlabel("epoch")
        axes.set_title(name, fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
