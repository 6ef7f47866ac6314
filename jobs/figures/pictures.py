"""Prediction pictures: samples with truth and prediction, and label maps with their errors, on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hpc.metrics import decimals
from jobs import palette
from jobs.figures import canvas, text
from jobs.figures.examples import Example
from jobs.sheet import Picture, Row, Sheet
from jobs.slices import Slice, blend, face, fit, is_colour, level, resize, to_bytes

CELL, PER_ROW = 150, 6
"""pixels of a picture's longer side; pictures in a row"""
MAP_CELLS = (190, 170, 150)
"""as CELL, of four with label maps: the largest for which all rows and the legend fit into one figure"""
BORDER = 4
IGNORE = 255
"""the label that is left out of loss and counts"""
LONG_NAME, LONG_ID = 22, 24
THRESHOLD = 0.5
"""above which a label is taken as found"""
_GREYS = 8
"""steps between two greys of a picture: fewer bytes in a PNG, and no difference that one sees"""
_SIDES = "the patient's left is on the left, the front on top"


def predictions(examples: Sequence[Example], names: Sequence[str], title: str) -> Figure:
    """A picture of each sample: the middle slice, with truth, prediction and probability, and a green border and a tick
    or an orange border and a cross. With label maps four: the slice with most label, truth, prediction and errors.
    """
    return _sheet(examples, names, title, planes=False)


def worst_samples(examples: Sequence[Example], names: Sequence[str], title: str) -> Figure:
    """As `predictions`, with the loss of each; of volumes the middle slices of all three axes."""
    return _sheet(examples, names, title, planes=True)


def _sheet(examples: Sequence[Example], names: Sequence[str], title: str, planes: bool) -> Figure:
    if not examples:
        return canvas.say_nothing_to_draw(canvas.new(5, 2), title, "no sample to show")
    axes, names = examples[0].image.ndim - 1, text.readable(names)
    if np.ndim(examples[0].truth) > 1:
        words = [f"slices with most label voxels; {_SIDES}"] if axes == 3 else []
        return canvas.of_pixels(_map_sheet(examples, names, [title, *words]))
    triple = planes and axes == 3
    cell, each = (2 * CELL, 3) if triple else (CELL, PER_ROW)
    drawn = [_picture(example, names, cell, triple, told_loss=planes) for example in examples]
    rows = [Row("", drawn[first : first + each]) for first in range(0, len(drawn), each)]
    planes_shown = "axial, coronal and sagittal" if triple else "axial"
    words = [f"{planes_shown} middle slices; {_SIDES}"] if axes == 3 else []
    legend = [("✓ right", palette.RIGHT), ("✗ wrong", palette.WRONG)]
    sheet = np.asarray(Sheet([title, *words], rows, legend, cell).draw())
    if len(sheet) > canvas.MOST_PIXELS and len(rows) > 1:  # of high pictures fewer rows
        return _sheet(examples[: (len(rows) - 1) * each], names, title, planes)
    return canvas.of_pixels(sheet)


def _map_sheet(examples: Sequence[Example], names: Sequence[str], caption: Sequence[str]) -> Slice:
    """As many of the first examples as fit with the legend of their colours, at least one."""
    for cell in MAP_CELLS:
        labels: set[int] = set()
        rows = [_map_row(example, names, labels, cell) for example in examples]
        sheet: Slice = np.asarray(Sheet(caption, rows, _legend(labels, names), cell).draw())
        if len(sheet) <= canvas.MOST_PIXELS:
            return sheet
    return _map_sheet(examples[:-1], names, caption) if len(examples) > 1 else sheet


def _map_row(example: Example, names: Sequence[str], labels: set[int], cell: int) -> Row:
    heading = f"{text.printable(example.id)}   loss {example.loss:.3g}"
    if example.damaged or example.prediction is None:
        return Row(heading, [Picture(example.damaged or "no prediction", "", None)])
    truth, found = np.asarray(example.truth), np.asarray(example.prediction)
    heading += f", Dice {decimals(_mean_dice(truth, found, len(names)), 2)}"
    shown, spacing = _shown(example.image), example.spacing[:2]
    if truth.ndim == 3:
        known = np.where(truth == IGNORE, 0, truth)
        at = level(known if known.any() else found, truth.shape[2])
        shown, truth, found = face(shown[..., at]), face(truth[..., at]), face(found[..., at])
        spacing = spacing[1::-1]
    size = fit(shown.shape[1:], spacing, cell)
    plain = _fewer_greys(resize(to_bytes(shown), size))
    truth, found = (resize(np.ascontiguousarray(part, dtype=np.uint8), size, nearest=True) for part in (truth, found))
    pictures = [
        Picture("input", "", plain),
        Picture("truth", "", _coloured(plain, truth, len(names), labels)),
        Picture("prediction", "", _coloured(plain, found, len(names), labels)),
        Picture("errors", "", _errors(plain, truth, found)),
    ]
    return Row(heading, pictures)


def _mean_dice(truth: NDArray[Any], found: NDArray[Any], num: int) -> float:
    """Over the classes but the background that are in either; NaN where none is."""
    known = truth != IGNORE
    truth, found = truth[known], found[known]
    true, called = (np.bincount(part.ravel(), minlength=num)[1:num] for part in (truth, found))
    both = np.bincount(truth[truth == found].ravel(), minlength=num)[1:num]
    there = true + called > 0
    return float((2 * both[there] / (true + called)[there]).mean()) if there.any() else float("nan")


def _coloured(plain: Slice, values: NDArray[Any], num: int, labels: set[int]) -> Slice:
    out = plain.copy()
    for value in np.unique(values[values > 0]).tolist():
        ignored = value >= num
        blend(out, values == value, palette.IGNORED if ignored else palette.class_colour(value), 0.6)
        labels.add(IGNORE if ignored else value)
    return out


def _errors(plain: Slice, truth: NDArray[Any], found: NDArray[Any]) -> Slice:
    out = plain // 2 + 40  # paler than the colours on it
    known, wrong = truth != IGNORE, truth != found
    blend(out, known & wrong & (truth == 0), palette.FALSE_POSITIVE, 0.9)
    blend(out, known & wrong & (found == 0), palette.FALSE_NEGATIVE, 0.9)
    blend(out, known & wrong & (truth > 0) & (found > 0), palette.OTHER_CLASS, 0.9)
    blend(out, ~known, palette.IGNORED, 0.6)
    return out


def _legend(labels: set[int], names: Sequence[str]) -> list[tuple[str, palette.Colour]]:
    entries = [(text.cut(names[value], 40), palette.class_colour(value)) for value in sorted(labels - {IGNORE})]
    if IGNORE in labels:
        entries.append(("ignored", palette.IGNORED))
    bare = text.cut(names[0], 40)
    entries.append((f"error: labelled, but {bare}", palette.FALSE_POSITIVE))
    entries.append((f"error: called {bare}", palette.FALSE_NEGATIVE))
    if len(names) > 2:
        entries.append(("error: another class", palette.OTHER_CLASS))
    return entries


def _picture(example: Example, names: Sequence[str], cell: int, triple: bool, told_loss: bool) -> Picture:
    right, lines = _verdict(example, names)
    name = text.cut(text.printable(example.id), LONG_ID if cell == CELL else 2 * LONG_ID)
    title = f"{name}   loss {example.loss:.3g}" if told_loss else name
    if told_loss and cell == CELL:
        title, lines = name, [f"loss {example.loss:.3g}", *lines]
    if example.damaged:
        return Picture(title, "\n".join([*lines[:-1], example.damaged]), None)
    shown, room = _shown(example.image), cell - 2 * BORDER
    if shown.ndim == 3:
        pixels = resize(to_bytes(shown), fit(shown.shape[1:], example.spacing[:2], room))
    elif triple:
        pixels = _three_planes(shown, example.spacing, room)
    else:
        plane = face(shown[..., shown.shape[3] // 2])
        pixels = resize(to_bytes(plane), fit(plane.shape[1:], example.spacing[1::-1], room))
    colour = palette.RIGHT if right else palette.WRONG
    return Picture(title, "\n".join(lines), _framed(_fewer_greys(pixels), colour))


def _verdict(example: Example, names: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether the prediction is right, and two lines: the truth, and the prediction with its sign and probability."""
    said = np.asarray(example.probabilities, np.float64)
    several = np.ndim(example.truth) > 0
    present = np.asarray(example.truth) > 0 if several else np.arange(len(names)) == int(example.truth)
    there = text.cut(", ".join(names[k] for k in np.flatnonzero(present).tolist()) or "no class", LONG_NAME)
    if np.isnan(said).any():
        return False, [there, "✗ not a number"]
    if not several:
        called = int(said.argmax())
        words = f"{text.cut(names[called], LONG_NAME - 5)} {said[called]:.2f}"
        return bool(present[called]), [there, f"{'✓' if present[called] else '✗'} {words}"]
    found = said > THRESHOLD
    wrong = [f"-{names[k]} {said[k]:.2f}" for k in np.flatnonzero(present & ~found).tolist()]
    wrong += [f"+{names[k]} {said[k]:.2f}" for k in np.flatnonzero(found & ~present).tolist()]
    return not wrong, [there, f"✗ {text.cut(', '.join(wrong), LONG_NAME)}" if wrong else "✓"]


def _three_planes(shown: NDArray[Any], spacing: Sequence[float], room: int) -> Slice:
    """Axial, coronal and sagittal middle slices of (C, x, y, z) at one scale side by side, `room` pixels wide."""
    x, y, z = (side // 2 for side in shown.shape[1:])
    planes = [face(shown[..., z]), face(shown[:, :, y]), face(shown[:, x])]
    axes = [(1, 0), (2, 0), (2, 1)]
    true = [step if step > 0 else 1.0 for step in spacing]
    wide = sum(plane.shape[2] * true[across] for plane, (_, across) in zip(planes, axes, strict=True))
    scale = (room - 4) / max(wide, 1e-9)
    out = []
    for plane, (up, across) in zip(planes, axes, strict=True):
        size = max(int(plane.shape[1] * true[up] * scale), 1), max(int(plane.shape[2] * true[across] * scale), 1)
        out.append(resize(to_bytes(plane), (min(size[0], room), size[1])))
    high = max(part.shape[0] for part in out)
    padded = [np.pad(part, ((0, high - part.shape[0]), (0, 2), (0, 0)), constant_values=255) for part in out]
    return np.concatenate(padded, axis=1)[:, :-2]


def _shown(image: NDArray[Any]) -> NDArray[Any]:
    """The three channels that are a colour, or the first one."""
    return image[:3] if is_colour(len(image), image.ndim - 1, image.dtype) else image[:1]


def _fewer_greys(pixels: Slice) -> Slice:
    """Greys in steps; colours stay."""
    grey = (pixels == pixels[..., :1]).all(axis=2, keepdims=True)
    return np.where(grey, pixels // _GREYS * _GREYS + _GREYS // 2, pixels).astype(np.uint8)


def _framed(pixels: Slice, colour: palette.Colour) -> Slice:
    out = np.empty((pixels.shape[0] + 2 * BORDER, pixels.shape[1] + 2 * BORDER, 3), np.uint8)
    out[:] = colour
    out[BORDER:-BORDER, BORDER:-BORDER] = pixels
    return out
