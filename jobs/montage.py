"""Pictures of a volume file as one PNG: slices per class, or label maps in colours over the slices that have most.

    draw_montage(open_volumes("scans.h5"), Path("scans.png"))

Volumes lie as in nibabel and nnU-Net's viewers: the patient's left is on the left, the front on top (RAS, slices along
the last axis). Images are drawn as they are, row 0 on top.
"""

import colorsys
import io
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.census import has_class, mean_bytes, spacings
from datasets.layout import VolumeFile
from datasets.partition import SPLITS
from datasets.repeats import places
from jobs.sheet import Picture, Row, Sheet

PER_ROW, MOST_ROWS = 6, 48
"""pictures of a class (with label maps two of a sample, without and with them), and classes"""
CELL, LARGE_CELL, FEW_ROWS = 150, 240, 3
"""pixels of a picture's longer side, and where there are few rows"""
LONG_ID = 24
"""characters that fit over a picture"""
MOST_BYTES = 1 << 31
"""read for all pictures together; of large volumes each class shows fewer"""
SIGNATURE = b"\x89PNG\r\n\x1a\n"
NAN_COLOUR, UNNAMED_COLOUR, OPACITY = (255, 0, 255), (255, 255, 255), 0.5

Slice = NDArray[np.uint8]
"""(height, width, 3), row 0 on top"""


def require_png(path: Path) -> None:
    """Refuse (ValueError) a name that cannot be written, or that would destroy something else than a PNG."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "cannot be written: its folder does not exist"
        raise ValueError(f"--png {path} {what}; give the name of a file in an existing folder")
    if path.exists():
        with path.open("rb") as file:
            if path.stat().st_size and file.read(len(SIGNATURE)) != SIGNATURE:
                raise ValueError(f"--png {path} exists and is no PNG, so it is not replaced; give another name")


def draw_montage(
    volumes: VolumeFile,
    path: Path,
    report: Callable[[int, int], None] | None = None,
    damaged: Collection[int] = (),
) -> None:
    """Write the PNG. `report` is told samples drawn, and all. What is `damaged` or cannot be read is drawn as such."""
    rows, painter = _choose(volumes), Painter(volumes, damaged)
    painter.cell = CELL if len(rows) > FEW_ROWS else LARGE_CELL
    total, done, drawn = sum(map(len, rows.values())), 0, []
    titles = _titles(volumes, [sample for samples in rows.values() for sample in samples])
    for name, samples in rows.items():
        pictures: list[Picture] = []
        for sample in samples:
            pictures += painter.paint(sample, titles[sample])
            if report:
                report(done := done + 1, total)
        drawn.append(Row(name, pictures))
    legend = [(volumes.class_names[value], _colour(value)) for value in sorted(painter.labels)]
    buffer = io.BytesIO()
    Sheet(_caption(volumes), drawn, legend, painter.cell).draw().save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def _choose(volumes: VolumeFile) -> dict[str, list[int]]:
    """Heading -> sample numbers: a row per class, or with label maps per split."""
    found: list[tuple[str, NDArray[np.int64]]]
    if volumes.task == "segmentation":
        found = [(split, volumes.indices(split)) for split in SPLITS if len(volumes.indices(split))]
    else:
        names = volumes.class_names[:MOST_ROWS]
        found = [(name, np.flatnonzero(has_class(volumes, number))) for number, name in enumerate(names)]
    if volumes.task == "multilabel":
        bare = np.flatnonzero(~volumes.targets.any(axis=1))
        found += [("no class", bare)] if len(bare) else []
    most = PER_ROW // 2 if volumes.task == "segmentation" else PER_ROW
    most = int(np.clip(MOST_BYTES // (mean_bytes(volumes) * len(found)), 1, most))
    rows = {}
    for name, samples in found:
        plural = "" if len(samples) == 1 else "s"
        which = np.unique(np.linspace(0, max(len(samples) - 1, 0), most).round().astype(int))
        rows[f"{name}: {len(samples)} sample{plural}"] = samples[which].tolist() if len(samples) else []
    return rows


def _caption(volumes: VolumeFile) -> list[str]:
    names, files = len(volumes.class_names), [path.name for path in volumes.paths]
    lines = [f"{files[0]}{f' and {len(files) - 1} more' * (len(files) > 1)}: {len(volumes)} samples, {volumes.task}"]
    if volumes.spatial_axes == 3:
        where = "with most label voxels" if volumes.task == "segmentation" else "in the middle"
        if volumes.orientation == "RAS":
            lines.append(f"axial slices {where}; the patient's left is on the left, the front on top")
        else:
            lines.append(
                f"slices along the last axis {where}; axes are {volumes.orientation}: first to the right, second up"
            )
    channels = volumes.channels
    if _is_colour(volumes):
        lines.append("channels 0, 1 and 2 as red, green and blue")
    else:
        of = f"channel 0 of {channels}, " if channels > 1 else ""
        missing = "; magenta: NaN" if volumes.dtype.kind == "f" else ""
        lines.append(f"{of}black to white: 1st to 99th percentile of each slice{missing}")
    if volumes.task != "segmentation" and names > MOST_ROWS:
        lines.append(f"the first {MOST_ROWS} of {names} classes")
    return lines


def _titles(volumes: VolumeFile, samples: Sequence[int]) -> dict[int, str]:
    """Ids; long ones without what all begin and end with."""
    ids = {sample: volumes.ids[sample] for sample in samples}
    if len(set(ids.values())) < 2 or max(map(len, ids.values())) <= LONG_ID:
        return ids
    head = _num_shared(list(ids.values()))
    tail = _num_shared([id[head:][::-1] for id in ids.values()])
    before, after = "..." * (head > 0), "..." * (tail > 0)
    return {sample: f"{before}{id[head : len(id) - tail]}{after}" for sample, id in ids.items()}


def _num_shared(texts: Sequence[str]) -> int:
    """Characters that all begin with."""
    columns = enumerate(zip(*texts, strict=False))
    return next((number for number, letters in columns if len(set(letters)) > 1), min(map(len, texts)))


class Painter:
    """Samples to pictures; `labels` are the values drawn so far."""

    def __init__(self, volumes: VolumeFile, damaged: Collection[int] = ()) -> None:
        self.volumes, self._damaged, self._spacings = volumes, damaged, spacings(volumes)
        self.cell = CELL
        self.labels = set[int]()

    def paint(self, sample: int, title: str) -> list[Picture]:
        """One picture, or two where there is a label map: without it, and with it."""
        volumes, place = self.volumes, places(self.volumes, [sample])[0]
        place += ", damaged" if sample in self._damaged else ""
        try:
            inputs, target = volumes.read(sample)
        except (OSError, ValueError):
            return [Picture(title, f"{place}, cannot be read", None)]
        maps = volumes.task == "segmentation"
        shown, spacing = inputs[:3] if _is_colour(volumes) else inputs[:1], self._spacings[sample]
        if volumes.spatial_axes == 3:
            level = _level(target if maps else None, inputs.shape[3])
            shown, target = _face(shown[..., level]), _face(target[..., level]) if maps else target
            spacing = spacing[1::-1]
        note = f"{place}, constant" if (shown == shown.flat[0]).all() else place
        size = _fit(shown.shape[1:], spacing, self.cell)
        plain = _resize(_to_bytes(shown), size)
        pictures = [Picture(title, note, plain)]
        if maps:
            note = "with labels" if target.any() else "no label voxel"
            pictures.append(Picture("", note, self._overlay(plain, target, size)))
        return pictures

    def _overlay(self, plain: Slice, labels: NDArray[Any], size: tuple[int, int]) -> Slice:
        out, num = plain.copy(), len(self.volumes.class_names)
        values = _resize(np.ascontiguousarray(labels), size, nearest=True)
        for value in np.unique(values[values > 0]).tolist():
            here = values == value
            colour = np.array(_colour(value) if value < num else UNNAMED_COLOUR)
            out[here] = (out[here] * (1 - OPACITY) + colour * OPACITY).round().astype(np.uint8)
            self.labels |= {value} if value < num else set()
        return out


def _face(plane: NDArray[Any]) -> NDArray[Any]:
    """(..., x, y) in RAS to (..., row, column): x to the right, y upwards."""
    return plane[..., ::-1].swapaxes(-2, -1)


def _fit(sides: Sequence[int], spacing: Sequence[float], cell: int) -> tuple[int, int]:
    """(height, width) in pixels of true proportions, the longer one the cell's."""
    true = np.array(sides) * np.where(np.isfinite(spacing) & (np.asarray(spacing) > 0), spacing, 1.0)
    height, width = np.maximum((true * (cell / true.max())).round(), 1).astype(int).tolist()
    return height, width


def _resize(pixels: NDArray[np.uint8], size: tuple[int, int], nearest: bool = False) -> NDArray[np.uint8]:
    """size: (height, width). Larger pixels as squares, smaller ones as means unless `nearest`."""
    from PIL import Image

    means = not nearest and (size[0] < pixels.shape[0] or size[1] < pixels.shape[1])
    how = Image.Resampling.BOX if means else Image.Resampling.NEAREST
    resized: NDArray[np.uint8] = np.asarray(Image.fromarray(pixels).resize(size[::-1], how))
    return resized


def _is_colour(volumes: VolumeFile) -> bool:
    """Three channels are a colour in images, and where they are bytes."""
    return volumes.channels == 3 and (volumes.spatial_axes == 2 or volumes.dtype == np.uint8)


def _level(labels: NDArray[Any] | None, num: int) -> int:
    """The slice along the last axis with most label voxels, else the middle one."""
    if labels is not None and labels.any():
        return int((labels != 0).sum(axis=(0, 1)).argmax())
    return num // 2


def _to_bytes(shown: NDArray[Any]) -> Slice:
    """(1 or 3, height, width) of any dtype to colours; one range for all three, bytes of a colour as they are."""
    missing = np.isnan(shown).any(axis=0)
    if shown.dtype != np.uint8 or len(shown) == 1:
        numbers = shown.astype(np.float64)
        finite = numbers[np.isfinite(numbers)]
        low, high = np.percentile(finite, (1, 99)) if finite.size else (0.0, 0.0)
        if low == high and finite.size:  # few voxels differ
            low, high = float(finite.min()), float(finite.max())
        share = (numbers - low) / (high - low) if high > low else np.full(shown.shape, 0.5)
        shown = (np.nan_to_num(share, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1) * 255).round().astype(np.uint8)
    colours = np.moveaxis(np.broadcast_to(shown, (3, *shown.shape[1:])), 0, -1).copy()
    colours[missing] = NAN_COLOUR
    return colours


def _colour(value: int) -> tuple[int, int, int]:
    """Hues a golden section apart, so that neighbours in number differ."""
    red, green, blue = colorsys.hsv_to_rgb((value - 1) * 0.618034 % 1, (1.0, 0.6)[value // 8 % 2], 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
