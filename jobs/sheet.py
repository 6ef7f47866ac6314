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
HEADING_SIZE, TITLE_SIZE, NOTE_LINE = 14, 11, 14
ROWS_A_COLUMN, MOST_COLUMNS, ALLEY = 12, 4, 40
"""rows above each other, columns of rows, pixels between those"""


@dataclass(frozen=True)
class Picture:
    title: str
    note: str
    """under the title; one line, or several"""
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
        """At least for the caption to be readable."""
        return max(self.num_columns * (self._column_width + ALLEY) - ALLEY + 2 * MARGIN, NARROWEST)

    @property
    def num_columns(self) -> int:
        """Many rows stand side by side, so that the sheet is not much higher than wide."""
        return min(-(-len(self.rows) // ROWS_A_COLUMN), MOST_COLUMNS)

    def draw(self) -> "Drawn":
        """The whole sheet as a PIL image in RGB."""
        from PIL import Image, ImageDraw

        caption, legend = [*self._caption_lines()], [*self._legend_places()]
        top = MARGIN + LINE * len(caption)
        each = -(-len(self.rows) // max(self.num_columns, 1))
        columns = [self.rows[first : first + each] for first in range(0, len(self.rows), each or 1)]
        tops = [[*accumulate(map(self._height, rows), initial=top + GAP)] for rows in columns]
        floor = max((places[-1] for places in tops), default=top)
        height = floor + MARGIN + (legend[-1][1] + LINE if legend else 0)
        image = Image.new("RGB", (self.width, height), (255, 255, 255))
        pen = ImageDraw.Draw(image)
        for number, line in enumerate(caption):
            pen.text((MARGIN, MARGIN + number * LINE), line, INK if number == 0 else FAINT, self._heading)
        for number, (rows, places) in enumerate(zip(columns, tops, strict=True)):
            for row, place in zip(rows, places, strict=False):
                self._draw_row(image, pen, row, MARGIN + number * (self._column_width + ALLEY), place)
        for (name, colour), (left, down) in zip(self.legend, legend, strict=True):
            down += floor
            pen.rectangle((left, down + 2, left + SWATCH, down + 2 + SWATCH), colour)
            pen.text((left + SWATCH + 5, down), self._legend_name(name), INK, self._title)
        return image

    def _draw_row(self, image: "Drawn", pen: Any, row: Row, edge: int, top: int) -> None:
        from PIL import Image

        room = self._column_width if self.num_columns > 1 else self.width - 2 * MARGIN
        pen.text((edge, top), shorten(row.heading, self._heading, room), INK, self._heading)
        for number, picture in enumerate(row.pictures):
            left, down = edge + number * (self.cell + GAP), top + (LINE + 4 if row.heading else 0)
            pen.text((left, down), shorten(picture.title, self._title, self.cell), INK, self._title)
            for line, note in enumerate(picture.note.split("\n")):
                place = left, down + LINE - 3 + line * NOTE_LINE
                pen.text(place, shorten(note, self._title, self.cell), FAINT, self._title)
            corner = left, down + 2 * LINE - 2 + (_num_notes(row) - 1) * NOTE_LINE
            if picture.pixels is None:
                pen.rectangle((*corner, corner[0] + self.cell - 1, corner[1] + self.cell - 1), EMPTY)
            else:
                image.paste(Image.fromarray(picture.pixels), corner)

    @property
    def _column_width(self) -> int:
        longest = max((len(row.pictures) for row in self.rows), default=0)
        return max(longest * (self.cell + GAP) - GAP, 2 * self.cell)

    def _height(self, row: Row) -> int:
        """From this row's heading to the next one's."""
        sides = [self.cell if one.pixels is None else one.pixels.shape[0] for one in row.pictures]
        return (
            GAP
            + LINE * bool(row.heading)
            + (2 * LINE + 2 + (_num_notes(row) - 1) * NOTE_LINE + max(sides) if sides else 0)
        )

    def _caption_lines(self) -> Iterator[str]:
        for text in self.caption:
            yield from wrap(text, self._heading, self.width - 2 * MARGIN)

    def _legend_places(self) -> Iterator[tuple[int, int]]:
        """Left and top of each entry, from the legend's corner."""
        left, top = MARGIN, 0
        for name, _ in self.legend:
            size = SWATCH + 5 + round(self._title.getlength(self._legend_name(name)))
            if left > MARGIN and left + size > self.width - MARGIN:
                left, top = MARGIN, top + LINE
            yield left, top
            left += size + 2 * GAP

    def _legend_name(self, name: str) -> str:
        return shorten(name, self._title, self.width - 2 * MARGIN - SWATCH - 5)

    @cached_property
    def _heading(self) -> Any:
        return _font(HEADING_SIZE)

    @cached_property
    def _title(self) -> Any:
        return _font(TITLE_SIZE)


def _num_notes(row: Row) -> int:
    """Lines under the titles."""
    return max((len(picture.note.splitlines()) for picture in row.pictures), default=1)


def shorten(text: str, font: Any, width: int) -> str:
    """The text if it fits into `width` pixels, else its end after dots: ids tend to differ there."""
    text = "".join(sign if sign.isprintable() else " " for sign in text)
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
