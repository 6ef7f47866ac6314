"""A sheet of small pictures with titles, in rows under headings, with a caption and a legend of colours."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image as Drawn

MARGIN, GAP, LINE, SWATCH = 14, 10, 17, 11
"""pixels round the sheet, between pictures, of a line of text, of a colour's square"""
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
    per_row: int

    @property
    def width(self) -> int:
        return 2 * MARGIN + self.per_row * self.cell + (self.per_row - 1) * GAP

    def draw(self) -> "Drawn":
        """The whole sheet as a PIL image in RGB."""
        from PIL import Image, ImageDraw

        caption, legend = [*self._caption_lines()], [*self._legend_places()]
        top = MARGIN + LINE * len(caption)
        height = top + len(self.rows) * self._row_height + MARGIN
        if legend:
            height += legend[-1][1] + LINE + GAP
        image = Image.new("RGB", (self.width, height), (255, 255, 255))
        pen = ImageDraw.Draw(image)
        for number, line in enumerate(caption):
            pen.text((MARGIN, MARGIN + number * LINE), line, INK if number == 0 else FAINT, self._heading)
        for number, row in enumerate(self.rows):
            self._draw_row(image, pen, row, top + GAP + number * self._row_height)
        floor = top + GAP + len(self.rows) * self._row_height
        for (name, colour), (left, down) in zip(self.legend, legend, strict=True):
            pen.rectangle((left, floor + down + 2, left + SWATCH, floor + down + 2 + SWATCH), colour)
            pen.text((left + SWATCH + 5, floor + down), name, INK, self._title)
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
                continue
            height, width = picture.pixels.shape[:2]
            place = corner[0] + (self.cell - width) // 2, corner[1] + (self.cell - height) // 2
            image.paste(Image.fromarray(picture.pixels), place)

    @property
    def _row_height(self) -> int:
        return 3 * LINE + 2 + self.cell + GAP

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
