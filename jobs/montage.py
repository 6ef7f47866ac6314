"""Pictures of a volume file as one PNG: slices per class, or label maps in colours over the slices that have most.

    draw_montage(open_volumes("scans.h5"), Path("scans.png"))

Volumes lie as in nibabel and nnU-Net's viewers: the patient's left is on the left, the front on top (RAS, slices along
the last axis). Images are drawn as they are, row 0 on top.
"""

import colorsys
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.census import channels_of, has_class, mean_bytes, spacings
from datasets.layout import VolumeFile
from datasets.partition import SPLITS
from datasets.repeats import places
from jobs.sheet import Picture, Row, Sheet

PER_ROW, MOST_ROWS, CELL = 6, 48, 150
"""pictures of a class, classes, pixels of a picture's longer side"""
MOST_BYTES = 1 << 31
"""read for all pictures together; of large volumes each class shows fewer"""
SIGNATURE = b"\x89PNG\r\n\x1a\n"
NAN_COLOUR, OPACITY = (255, 0, 255), 0.5

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


def draw_montage(volumes: VolumeFile, path: Path, report: Callable[[int, int], None] | None = None) -> None:
    """Write the PNG. `report` is told pictures drawn, and all. A sample that cannot be read is drawn as such."""
    rows = _choose(volumes)
    total, done = sum(len(samples) for samples in rows.values()), 0
    drawn, seen = [], set[int]()
    for name, samples in rows.items():
        pictures = []
        for sample in samples:
            pictures.append(_picture(volumes, sample, seen))
            done += 1
            if report:
                report(done, total)
        drawn.append(Row(name, pictures))
    legend = [(volumes.class_names[value], _colour(value)) for value in sorted(seen)]
    buffer = io.BytesIO()
    Sheet(_caption(volumes, rows), drawn, legend, CELL, PER_ROW).draw().save(buffer, "PNG")
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
    fewer = int(np.clip(MOST_BYTES // (mean_bytes(volumes) * len(found)), 1, PER_ROW))
    rows = {}
    for name, samples in found:
        plural = "" if len(samples) == 1 else "s"
        which = np.unique(np.linspace(0, max(len(samples) - 1, 0), fewer).round().astype(int))
        rows[f"{name}: {len(samples)} sample{plural}"] = samples[which].tolist() if len(samples) else []
    return rows


def _caption(volumes: VolumeFile, rows: dict[str, list[int]]) -> list[str]:
    names, files = len(volumes.class_names), [path.name for path in volumes.paths]
    lines = [f"{files[0]}{f' and {len(files) - 1} more' * (len(files) > 1)}: {len(volumes)} samples, {volumes.task}"]
    if _axes(volumes) == 3:
        where = "with most label voxels" if volumes.task == "segmentation" else "in the middle"
        lines.append(f"axial slices {where}; the patient's left is on the left, the front on top")
    channels = channels_of(volumes)
    if _is_colour(volumes):
        lines.append("channels 0, 1 and 2 as red, green and blue")
    else:
        of = f"channel 0 of {channels}, " if channels > 1 else ""
        lines.append(f"{of}black to white: 1st to 99th percentile of each slice; magenta: NaN")
    if volumes.task != "segmentation" and names > MOST_ROWS:
        lines.append(f"the first {MOST_ROWS} of {names} classes")
    return lines


def _picture(volumes: VolumeFile, sample: int, seen: set[int]) -> Picture:
    """seen: gets the label values drawn."""
    title, place = volumes.ids[sample], places(volumes, [sample])[0]
    try:
        inputs, target = volumes.read(sample)
    except (OSError, ValueError):
        return Picture(title, f"{place}, cannot be read", None)
    labels = target if volumes.task == "segmentation" else None
    shown = inputs[:3] if _is_colour(volumes) else inputs[:1]
    spacing = spacings(volumes)[sample]
    if _axes(volumes) == 3:
        level = _level(labels, inputs.shape[3])
        # x to the right, y upwards
        shown = shown[:, :, ::-1, level].swapaxes(1, 2)
        labels = None if labels is None else labels[:, ::-1, level].T
        spacing = spacing[1::-1]
    grey = _to_bytes(shown)
    return Picture(title, place, _lay_out(grey, labels, spacing, seen, len(volumes.class_names)))


def _axes(volumes: VolumeFile) -> int:
    return volumes.source_shape.shape[1]


def _is_colour(volumes: VolumeFile) -> bool:
    """Three channels are a colour in images, and where they are bytes."""
    return channels_of(volumes) == 3 and (_axes(volumes) == 2 or volumes.dtype == np.uint8)


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


def _lay_out(grey: Slice, labels: NDArray[Any] | None, spacing: Sequence[float], seen: set[int], names: int) -> Slice:
    """Enlarged or reduced to the cell with true proportions, label colours on it."""
    from PIL import Image

    sides = np.array(grey.shape[:2]) * np.where(np.asarray(spacing) > 0, spacing, 1.0)
    height, width = np.maximum((sides * (CELL / sides.max())).round(), 1).astype(int).tolist()
    smaller = Image.Resampling.BOX if height < grey.shape[0] or width < grey.shape[1] else Image.Resampling.NEAREST
    out: Slice = np.asarray(Image.fromarray(grey).resize((width, height), smaller))
    if labels is None:
        return out
    near = Image.Resampling.NEAREST
    values = np.asarray(Image.fromarray(np.ascontiguousarray(labels)).resize((width, height), near))
    out = out.copy()
    for value in np.unique(values[values > 0]).tolist():
        here = values == value
        colour = np.array(_colour(value) if value < names else NAN_COLOUR)
        out[here] = (out[here] * (1 - OPACITY) + colour * OPACITY).round().astype(np.uint8)
        seen |= {value} if value < names else set()
    return out


def _colour(value: int) -> tuple[int, int, int]:
    """Hues a golden section apart, so that neighbours in number differ."""
    red, green, blue = colorsys.hsv_to_rgb((value - 1) * 0.618034 % 1, (1.0, 0.6)[value // 8 % 2], 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
