"""Figures of a run: arrays in, a matplotlib Figure out, drawn without a display.

    for name, figure in drawings("classification", scores, stored, names, title).items():
        write_bytes(run.figure(name), png(figure))

At most a dozen for one evaluation, none larger than 1430 pixels in either direction; the same input gives the same
bytes.
"""

from jobs.figures.canvas import png
from jobs.figures.drawings import History, Shown, drawings, plans, step_series
from jobs.figures.examples import MOST, MOST_MAPS, Example, read_examples, spread, worst
from jobs.figures.matrices import confusion_matrix

__all__ = [
    "MOST",
    "MOST_MAPS",
    "Example",
    "History",
    "Shown",
    "confusion_matrix",
    "drawings",
    "plans",
    "png",
    "read_examples",
    "spread",
    "step_series",
    "worst",
]
