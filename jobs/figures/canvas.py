"""A figure without a display, and its PNG: of bounded size, of few colours, the same bytes each time."""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING, Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from jobs.figures import text

if TYPE_CHECKING:
    from PIL.Image import Image

DPI = 110
MOST_INCHES = 13.0
MOST_PIXELS = int(MOST_INCHES * DPI)
"""of either side"""
COLOURS, FEW_COLOURS = 256, 4096
"""in a PNG: a third of the bytes of full colours; those of plots, which have few, are exact"""
SMALL_FILE = 250_000
"""bytes up to which pictures in many colours keep all"""
INK, FAINT, PALE = "#1a1a1a", "#6e6e6e", "#e6e6e6"
TITLE, LABEL, SMALL = 11, 9, 8
"""font sizes in points; SMALL also of names, down to TINY where there are many"""
TINY = 6
_LETTERS_AN_INCH = 11.5
"""of a title, of wide letters"""


Layout = Literal["constrained", "compressed"]


def new(width: float, height: float, layout: Layout | None = "constrained") -> Figure:
    """An empty figure of so many inches, at most MOST_INCHES each. compressed: for axes of a fixed aspect."""
    size = min(width, MOST_INCHES), min(height, MOST_INCHES)
    figure = Figure(figsize=size, dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def of_pixels(pixels: NDArray[np.uint8]) -> Figure:
    """(height, width, 3), row 0 on top, pixel by pixel; larger pictures than MOST_PIXELS are cut."""
    pixels = pixels[:MOST_PIXELS, :MOST_PIXELS]
    figure = new((pixels.shape[1] + 0.01) / DPI, (pixels.shape[0] + 0.01) / DPI, layout=None)
    figure.figimage(pixels, origin="upper")
    return figure


def rendered(figure: Figure) -> NDArray[np.uint8]:
    """(height, width, 3)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba", dpi=DPI)
    width, height = figure.canvas.get_width_height()
    return np.frombuffer(buffer.getvalue(), np.uint8).reshape(height, width, 4)[..., :3].copy()


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    return encoded(rendered(figure))


def encoded(pixels: NDArray[np.uint8]) -> bytes:
    """(height, width, 3) as a PNG file's bytes."""
    from PIL import Image

    image = Image.fromarray(pixels)
    photograph = image.getcolors(FEW_COLOURS) is None
    if photograph and len(whole := _save(image)) <= SMALL_FILE:
        return whole
    # MAXCOVERAGE keeps rare colours, which frames and legends are; a median cut takes them for their neighbours.
    return _save(image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE))


def _save(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def wrapped(title: str, inches: float) -> str:
    """In lines that fit a figure of this width."""
    fits = max(int(inches * _LETTERS_AN_INCH), 12)
    return "\n".join("\n".join(textwrap.wrap(line, fits)) for line in title.split("\n"))


def write_title(figure: Figure, title: str) -> None:
    lines = wrapped(text.printable_lines(title), figure.get_figwidth())
    figure.suptitle(text.literal(lines), fontsize=TITLE)


def say_nothing_to_draw(figure: Figure, title: str, why: str) -> Figure:
    """A figure that says why it shows nothing else."""
    lines = text.literal(wrapped(text.printable_lines(title), figure.get_figwidth()))
    figure.text(0.5, 0.66, lines, ha="center", va="center", fontsize=TITLE, color=INK)
    figure.text(0.5, 0.3, why, ha="center", va="center", fontsize=LABEL, color=FAINT)
    return figure
