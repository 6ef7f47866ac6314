"""A sheet of small pictures with titles, in rows under headings, with a caption and a legend of colours."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image as Drawn

MARGIN, GAP, LINE, SWATCH, NARROWEST = 14, 10, 17, 11, 600
"""pixels round the sheet, between pictures, of a line of text, of a colour's square, of the sheet's width"""
INK, FAINT, EMPTY = (20, 20, 20), (110, 110, 110), (225, 225, 225)
HEADING_SIZE, TITLE_SIZE = 14, 11


@dataclass(frozen=True)
class Picture:
    title: str
    note: str
    pixels: NDArray[np.uint8] | None
    """(height, width, 3) of at most the cell's side; None: there is none"""


@dataclass(frozen=True)
class Row:
    heading: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Sheet:
    caption: Sequence[str]
    rows: Sequence[Row]
    legend: Sequence[tuple[str, tuple[int, int, int]]]
    cell: int
    """pixels of a picture's side"""

    @property
    def width(self) -> int:
        """For the longest row, and at least for the caption to be readable."""
        longest = max((len(row.pictures) for row in self.rows), default=0)
        return max(2 * MARGIN + longest * (self.cell + GAP) - GAP, NARROWEST)

    def draw(self) -> "Drawn":
        """The whole sheet as a PIL image in RGB."""
        from PIL import Image, ImageDraw

        caption, legend = [*self._caption_lines()], [*self._legend_places()]
        top = MARGIN + LINE * len(caption)
        tops = [*accumulate(map(self._height, self.rows), initial=top + GAP)]
        height = tops[-1] + MARGIN + (legend[-1][1] + LINE if legend else 0)
        image = Image.new("RGB", (self.width, height), (255, 255, 255))
        pen = ImageDraw.Draw(image)
        for number, line in enumerate(caption):
            pen.text((MARGIN, MARGIN + number * LINE), line, INK if number == 0 else FAINT, self._heading)
        for row, place in zip(self.rows, tops, strict=False):
            self._draw_row(image, pen, row, place)
        for (name, colour), (left, down) in zip(self.legend, legend, strict=True):
            down += tops[-1]
            pen.rectangle((left, down + 2, left + SWATCH, down + 2 + SWATCH), colour)
            pen.text((left + SWATCH + 5, down), name, INK, self._title)
        return image

    def _draw_row(self, image: "Drawn", pen: Any, row: Row, top: int) -> None:
        from PIL import Image

        pen.text((MARGIN, top), shorten(row.heading, self._heading, self.width - 2 * MARGIN), INK, self._heading)
        for number, picture in enumerate(row.pictures):
            left, down = MARGIN + number * (self.cell + GAP), top + LINE + 4
            pen.text((left, down), shorten(picture.title, self._title, self.cell), INK, self._title)
            pen.text((left, down + LINE - 3), shorten(picture.note, self._title, self.cell), FAINT, self._title)
            corner = left, down + 2 * LINE - 2
            if picture.pixels is None:
                pen.rectangle((*corner, corner[0] + self.cell - 1, corner[1] + self.cell - 1), EMPTY)
            else:
                image.paste(Image.fromarray(picture.pixels), corner)

    def _height(self, row: Row) -> int:
        """From this row's heading to the next one's."""
        sides = [self.cell if one.pixels is None else one.pixels.shape[0] for one in row.pictures]
        return GAP + LINE + (2 * LINE + 2 + max(sides) if sides else 0)

    def _caption_lines(self) -> Iterator[str]:
        for text in self.caption:
            yield from wrap(text, self._heading, self.width - 2 * MARGIN)

    def _legend_places(self) -> Iterator[tuple[int, int]]:
        """Left and top of each entry, from the legend's corner."""
        left, top = MARGIN, 0
        for name, _ in self.legend:
            size = SWATCH + 5 + round(self._title.getlength(name))
            if left > MARGIN and left + size > self.width - MARGIN:
                left, top = MARGIN, top + LINE
            yield left, top
            left += size + 2 * GAP

    @cached_property
    def _heading(self) -> Any:
        return _font(HEADING_SIZE)

    @cached_property
    def _title(self) -> Any:
        return _font(TITLE_SIZE)


def shorten(text: str, font: Any, width: int) -> str:
    """The text if it fits into `width` pixels, else its end after dots: ids tend to differ there."""
    if font.getlength(text) <= width:
        return text
    return next(("..." + text[n:] for n in range(1, len(text)) if font.getlength("..." + text[n:]) <= width), "...")


def wrap(text: str, font: Any, width: int) -> Iterator[str]:
    """The text in lines that fit into `width` pixels."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            yield shorten(line, font, width)
            longer = word
        line = longer
    yield shorten(line, font, width)


def _font(size: int) -> Any:
    """DejaVu Sans, which matplotlib brings along: Latin, Greek, Cyrillic."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
