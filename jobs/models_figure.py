"""One figure for a network: parameters, forward FLOPs and activations of its parts, as bars beside each other."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.model_card import Card

__all__ = ["parts_figure"]

_MOST = 40  # bars; of more parts the smallest are drawn as one
_ROW = 0.24  # inches of a bar
_COLORS = ("#4c72b0", "#dd8452", "#55a868")


def parts_figure(card: Card) -> Figure:
    """Bars per part, from input to output; the card must have an input."""
    if card.input is None or card.memory is None:
        raise ValueError(f"{card.name} has no input to draw its parts for")
    rows = _rows(card)
    figure = Figure(figsize=(12, 1.7 + _ROW * max(len(rows), 4)), layout="constrained")
    size = " x ".join(map(str, card.input))
    figure.suptitle(f"{card.name}: {card.parameters:,} parameters, input {size}", fontsize=12)
    columns = [
        ("parameters, M", [row[1] / 1e6 for row in rows]),
        ("forward GFLOP", [row[2] / 1e9 for row in rows]),
        ("activations, MB", [row[3] / 1e6 for row in rows]),
    ]
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (title, values), color in zip(axes, columns, _COLORS, strict=True):
        _bars(axis, title, [row[0] for row in rows], values, color)
    axes[0].invert_yaxis()
    return figure


def _rows(card: Card) -> list[tuple[str, int, int, int]]:
    """Name, parameters, FLOPs and bytes of activations."""
    rows = [(g.name, g.parameters, g.flops or 0, g.activations or 0) for g in card.groups]
    if len(rows) <= _MOST:
        return rows
    totals = [max(sum(values), 1) for values in ([r[1] for r in rows], [r[2] for r in rows], [r[3] for r in rows])]
    ranked = sorted(rows, key=lambda row: -max(row[1] / totals[0], row[2] / totals[1], row[3] / totals[2]))
    large = set(ranked[: _MOST - 1])
    others = [row for row in rows if row not in large]
    sums = (sum(row[1] for row in others), sum(row[2] for row in others), sum(row[3] for row in others))
    return [*(row for row in rows if row in large), (f"{len(others)} other parts", *sums)]


def _bars(axis: Axes, title: str, names: list[str], values: list[float], color: str) -> None:
    places = range(len(names))
    axis.barh(places, values, color=color, height=0.75)
    axis.set_yticks(places, names, fontsize=8)
    total, most = sum(values), max([*values, 1e-12])
    axis.set_title(f"{title} (sum {_digits(total)})", fontsize=10)
    axis.set_xlim(0, 1.22 * most)
    axis.set_ylim(-0.6, len(names) - 0.4)
    for place, value in zip(places, values, strict=True):
        if value:
            axis.text(value + 0.01 * most, place, _digits(value), va="center", fontsize=7)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _digits(value: float) -> str:
    """Three digits, and no powers of ten: 3,763; 11.9; 0.0283; and what is less than a thousandth."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1e-3 else "<0.001"
