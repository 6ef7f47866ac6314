"""Pictures of a volume file as one PNG: slices per class, or label maps in colours over the slices that have most.

    draw_montage(open_volumes("scans.h5"), Path("scans.png"))

Which way up things lie is told in jobs/slices.py.
"""

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
from jobs.palette import class_colour
from jobs.sheet import Picture, Row, Sheet
from jobs.slices import Slice, blend, face, fit, is_colour, level, resize, to_bytes

PER_ROW, MOST_ROWS = 6, 48
"""pictures of a class (with label maps two of a sample, without and with them), and classes"""
CELL, LARGE_CELL, FEW_ROWS = 150, 240, 3
"""pixels of a picture's longer side, and where there are few rows"""
LONG_ID = 24
"""characters that fit over a picture"""
MOST_BYTES = 1 << 31
"""read for all pictures together; of large volumes each class shows fewer"""
SIGNATURE = b"\x89PNG\r\n\x1a\n"
UNNAMED_COLOUR = (255, 255, 255)


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
    legend = [(volumes.class_names[value], class_colour(value)) for value in sorted(painter.labels)]
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
            number = level(target if maps else None, inputs.shape[3])
            shown, target = face(shown[..., number]), face(target[..., number]) if maps else target
            spacing = spacing[1::-1]
        note = f"{place}, constant" if (shown == shown.flat[0]).all() else place
        size = fit(shown.shape[1:], spacing, self.cell)
        plain = resize(to_bytes(shown), size)
        pictures = [Picture(title, note, plain)]
        if maps:
            note = "with labels" if target.any() else "no label voxel"
            pictures.append(Picture("", note, self._overlay(plain, target, size)))
        return pictures

    def _overlay(self, plain: Slice, labels: NDArray[Any], size: tuple[int, int]) -> Slice:
        out, num = plain.copy(), len(self.volumes.class_names)
        values = resize(np.ascontiguousarray(labels), size, nearest=True)
        for value in np.unique(values[values > 0]).tolist():
            blend(out, values == value, class_colour(value) if value < num else UNNAMED_COLOUR)
            self.labels |= {value} if value < num else set()
        return out


def _is_colour(volumes: VolumeFile) -> bool:
    return is_colour(volumes.channels, volumes.spatial_axes, volumes.dtype)
