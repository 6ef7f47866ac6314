"""What tests ask of a figure: that it shows something in each of its axes, and that its words are whole and apart."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Tick
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from jobs.figures import canvas

LEAST_INK = 0.001
"""share of the pixels inside an axes' frame"""


def pixels(content: bytes) -> np.ndarray:
    """(height, width, 3) of a PNG."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def assert_drawn(figure: Figure) -> np.ndarray:
    """Not blank, of bounded size, each axes with more than its frame; returns the pixels of its PNG."""
    shown = pixels(canvas.png(figure))
    assert max(shown.shape[:2]) <= canvas.MOST_INCHES * canvas.DPI
    assert ink(shown) > LEAST_INK, "blank"
    for axes in figure.axes:
        if axes.axison or axes.texts or axes.lines:
            assert ink(inside(shown, axes)) > LEAST_INK, f"nothing in the axes {axes.get_title()!r}"
    assert_readable(figure)
    return shown


def ink(shown: np.ndarray) -> float:
    """Share of the pixels that differ from the commonest one."""
    counts = Image.fromarray(np.ascontiguousarray(shown)).getcolors(1 << 24)
    return 1 - max(count for count, _ in counts) / sum(count for count, _ in counts)


def inside(shown: np.ndarray, axes: Axes, frame: int = 4) -> np.ndarray:
    box = axes.get_window_extent()
    top = shown.shape[0]
    rows = slice(max(int(top - box.y1) + frame, 0), max(int(top - box.y0) - frame, 1))
    return shown[rows, int(box.x0) + frame : int(box.x1) - frame]


def words(figure: Figure) -> list[Text]:
    """All that is drawn: of the labels of ticks those within the axes' limits."""
    every = [*figure.axes, *(child for one in figure.axes for child in one.child_axes)]
    axes = [axis for one in every for axis in (one.xaxis, one.yaxis)]
    ticks = {
        id(label): False for axis in axes for tick in (*axis.majorTicks, *axis.minorTicks) for label in _labels(tick)
    }
    for axis in axes:
        if axis.axes.axison:
            ticks |= {id(label): True for tick in axis._update_ticks() for label in _labels(tick)}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [text for text in texts if ticks.get(id(text), True)]


def _labels(tick: Tick) -> tuple[Text, Text]:
    """Of both sides."""
    return tick.label1, tick.label2


def assert_readable(figure: Figure) -> None:
    """No word is cut by the figure's edge, no two names of one axis overlap."""
    width, height = figure.bbox.width, figure.bbox.height
    for text in words(figure):
        box = text.get_window_extent()
        within = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert within, f"{text.get_text()!r} is cut: {box.extents.round()} of {width:.0f} x {height:.0f}"
    for axes in figure.axes:
        if axes.axison:
            names = [tick.label1 for tick in axes.yaxis._update_ticks() if tick.label1.get_text().strip()]
            boxes = sorted((label.get_window_extent() for label in names), key=lambda box: box.y0)
            for lower, upper in pairwise(boxes):
                assert lower.y1 <= upper.y0 + 2, "names overlap"
