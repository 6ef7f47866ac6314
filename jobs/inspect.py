"""`hpc inspect`: what is in a volume file, and is it sound. Run alone: python -m jobs.inspect --help

Exit code 0: sound as far as looked. 1: samples are damaged. 2: not a volume file.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from datasets.layout import VolumeFile, open_volumes
from datasets.partition import SPLITS

PROG = "hpc inspect"
LOOKED_AT = 64
"""samples whose intensities are read"""
PER_CLASS = 6
MAX_CLASSES = 24
"""rows and columns of the montage"""
TITLE = 18
"""characters of an id that fit over its picture; ids tend to differ at their end"""


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        volumes = open_volumes(given.files)
        facts = describe(volumes)
        if given.verify:
            facts["damaged"] = [volumes.ids[sample] for sample in volumes.verify()]
        if given.png:
            draw_montage(volumes, given.png)
    except (ValueError, OSError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(facts, indent=2)) if given.json else _show(facts)
    for name in facts.get("damaged", []):
        print(f"{PROG}: damaged: {name}; its bytes differ from those packed, pack the file again", file=sys.stderr)
    return 1 if facts.get("damaged") else 0


def describe(volumes: VolumeFile) -> dict[str, Any]:
    """The facts as plain data: shape (C, x, y, z), samples per class and split, spacing in mm, intensities, twins."""
    return {
        "files": [str(path) for path in volumes.paths],
        "num_samples": len(volumes),
        "shape": list(volumes.shape),
        "dtype": volumes.dtype.name,
        "task": volumes.task,
        "splits": {split: len(volumes.indices(split)) for split in SPLITS},
        "groups": {split: len({volumes.groups[i] for i in volumes.indices(split)}) for split in SPLITS},
        "folds": [len(volumes.fold(number).indices("validation")) for number in range(volumes.num_folds)],
        "classes": _count_classes(volumes),
        "spacing_mm": _spacings(volumes),
        "intensities": _intensities(volumes),
        "duplicates": _duplicates(volumes),
        "sources": len(volumes.source),
        "packing": volumes.packing,
        "fingerprint": volumes.fingerprint,
    }


def draw_montage(volumes: VolumeFile, path: Path) -> None:
    """PNG of middle slices along the last axis, a row per class, grey from the 1st to the 99th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _montage_rows(volumes)
    figure, axes = pyplot.subplots(
        len(rows), PER_CLASS, figsize=(1.6 * PER_CLASS, 1.7 * len(rows)), squeeze=False, layout="constrained"
    )
    for (name, samples), line in zip(rows.items(), axes, strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for sample, axis in zip(samples, line, strict=False):
            image = volumes.read(sample)[0][0]
            image = image[..., image.shape[-1] // 2] if image.ndim == 3 else image
            low, high = np.percentile(image, (1, 99))
            axis.imshow(image.T, cmap="gray", origin="lower", vmin=low, vmax=max(high, low + 1e-6))
            axis.set_title(_shorten(volumes.ids[sample]), fontsize=5)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
    try:
        figure.savefig(path, dpi=120, format="png")
    finally:
        pyplot.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG, description="Says what is in a volume file and whether it is sound.", allow_abbrev=False
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.h5", help="a volume file, or its shards")
    parser.add_argument("--verify", action="store_true", help="read every sample and compare its checksum")
    parser.add_argument("--png", type=Path, metavar="OUT", help="draw the middle slices of some samples of each class")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    return parser


def _count_classes(volumes: VolumeFile) -> dict[str, dict[str, int]]:
    """class -> split -> samples (multi-label: samples that have the class). Empty for label maps."""
    if volumes.task == "segmentation":
        return {}
    counts: dict[str, dict[str, int]] = {}
    for number, name in enumerate(volumes.class_names):
        has = _has_class(volumes, number)
        tally = Counter(volumes.split[has].tolist())
        counts[name] = {split: tally[code] for code, split in enumerate(SPLITS)}
    return counts


def _has_class(volumes: VolumeFile, number: int) -> NDArray[np.bool_]:
    targets = volumes.targets
    found: NDArray[np.bool_] = targets == number if targets.ndim == 1 else targets[:, number] == 1
    return found


def _spacings(volumes: VolumeFile) -> list[list[float]]:
    """Voxel sizes that occur, in mm."""
    sizes = np.unique(np.linalg.norm(volumes.affine[:, :3, :3], axis=1).round(4), axis=0)
    return [[float(axis) for axis in size] for size in sizes]


def _intensities(volumes: VolumeFile) -> dict[str, Any]:
    """Range as stored, and mean and standard deviation as normalised, of samples spread evenly over the file."""
    chosen = np.unique(np.linspace(0, len(volumes) - 1, LOOKED_AT).round().astype(int))
    low, high, total, squares, count = np.inf, -np.inf, 0.0, 0.0, 0
    for sample in chosen.tolist():
        stored = volumes.read(sample)[0].reshape(volumes.shape[0], -1).astype(np.float64)
        low, high = min(low, float(stored.min())), max(high, float(stored.max()))
        normal = stored * volumes.scale[sample][:, None] + volumes.offset[sample][:, None]
        total, squares, count = total + float(normal.sum()), squares + float((normal**2).sum()), count + normal.size
    mean = total / count
    deviation = max(squares / count - mean**2, 0.0) ** 0.5
    return {"samples": len(chosen), "stored": [low, high], "normalised_mean": mean, "normalised_std": deviation}


def _duplicates(volumes: VolumeFile) -> list[list[str]]:
    """Ids of samples with equal checksums."""
    twins: dict[int, list[str]] = {}
    for name, checksum in zip(volumes.ids, volumes.checksums.tolist(), strict=True):
        twins.setdefault(checksum, []).append(name)
    return [names for names in twins.values() if len(names) > 1]


def _montage_rows(volumes: VolumeFile) -> dict[str, list[int]]:
    if volumes.task == "segmentation":
        return {"all": list(range(min(PER_CLASS, len(volumes))))}
    rows: dict[str, list[int]] = {}
    for number, name in enumerate(volumes.class_names[:MAX_CLASSES]):
        samples = np.flatnonzero(_has_class(volumes, number))
        spread = np.unique(np.linspace(0, max(len(samples) - 1, 0), PER_CLASS).round().astype(int))
        rows[name] = samples[spread].tolist() if len(samples) else []
    return rows


def _shorten(name: str) -> str:
    return name if len(name) <= TITLE else "..." + name[3 - TITLE :]


def _show(facts: dict[str, Any]) -> None:
    console = Console(soft_wrap=True)
    shape = "x".join(map(str, facts["shape"]))
    print(f"{' '.join(facts['files'])}: {facts['num_samples']} samples of {shape} {facts['dtype']}, {facts['task']}")
    table = Table("class", *SPLITS, "all")
    for name, counts in facts["classes"].items():
        table.add_row(escape(name), *(str(counts[split]) for split in SPLITS), str(sum(counts.values())))
    table.add_section()
    table.add_row("samples", *(str(facts["splits"][split]) for split in SPLITS), str(facts["num_samples"]))
    table.add_row("groups", *(str(facts["groups"][split]) for split in SPLITS), str(sum(facts["groups"].values())))
    console.print(table)
    if facts["folds"]:
        print(f"{len(facts['folds'])} folds of {', '.join(map(str, facts['folds']))} samples, for data.fold")
    seen = facts["intensities"]
    spacings = "; ".join(" x ".join(f"{size:g}" for size in spacing) for spacing in facts["spacing_mm"][:3])
    print(f"spacing {spacings} mm, from {facts['sources']} source file(s)")
    print(
        f"stored {seen['stored'][0]:g} to {seen['stored'][1]:g}, normalised mean {seen['normalised_mean']:.3f} and "
        f"standard deviation {seen['normalised_std']:.3f} ({seen['samples']} samples read)"
    )
    if facts["duplicates"]:
        print(f"{len(facts['duplicates'])} set(s) of equal samples, the first: {', '.join(facts['duplicates'][0])}")
    if "damaged" in facts:
        print(f"checksums: {len(facts['damaged'])} of {facts['num_samples']} samples are damaged")
    print(f"fingerprint {facts['fingerprint']}")


if __name__ == "__main__":
    sys.exit(main())
