"""What the tables of a volume file say, without reading a voxel: counts, shapes, spacings, weights, equal samples.

Everything is plain data for JSON, and vectorised: a million samples take a second or two.
"""

import zlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from datasets.layout import SHAPES, TARGET_DTYPES, VolumeFile
from datasets.partition import HELD_OUT, SPLITS

MOST_FREQUENT = 10
"""values that are listed of those that occur"""


def sample_shapes(volumes: VolumeFile) -> NDArray[np.int64]:
    """(N, 1 + spatial axes): the shape (C, *spatial) of each sample."""
    if volumes.ragged:
        return np.concatenate([shard.tables[SHAPES] for shard in volumes.shards])
    return np.broadcast_to(np.array(volumes.shape), (len(volumes), len(volumes.shape)))


def mean_bytes(volumes: VolumeFile) -> int:
    """Bytes of a sample's inputs and label map, in the mean over the samples."""
    shapes = sample_shapes(volumes)
    each = shapes[0, 0] * volumes.dtype.itemsize + (volumes.task == "segmentation")
    return max(1, int(shapes[:, 1:].prod(axis=1).mean() * each))


def take_census(volumes: VolumeFile) -> dict[str, Any]:
    """The facts of all samples that the tables hold; docs/data.md says what each is."""
    return {
        "files": [str(path) for path in volumes.paths],
        "num_samples": len(volumes),
        "task": volumes.task,
        "dtype": volumes.dtype.name,
        "channels": volumes.channels,
        "shapes": spread(sample_shapes(volumes)),
        "orientation": volumes.orientation,
        "splits": {split: len(volumes.indices(split)) for split in SPLITS},
        "groups": {split: _num_groups(volumes, code) for code, split in enumerate(SPLITS)},
        "folds": _fold_counts(volumes),
        "classes": {} if volumes.task == "segmentation" else _class_counts(volumes),
        "labels": _label_sets(volumes) if volumes.task == "multilabel" else None,
        "spacing_mm": spread(spacings(volumes)),
        "source_shapes": spread(volumes.source_shape),
        "sources": len(volumes.source),
        "packing": volumes.packing,
        "fingerprint": volumes.fingerprint,
    }


def spacings(volumes: VolumeFile) -> NDArray[np.float64]:
    """(N, spatial axes) voxel sizes in mm, to four decimals; not finite where the affine is not, or huge."""
    columns = volumes.affine[:, :3, : volumes.spatial_axes]
    with np.errstate(all="ignore"):  # an affine may hold anything: what is no size is infinite or NaN
        sizes: NDArray[np.float64] = np.sqrt((columns**2).sum(axis=1)).round(4)
    return sizes


def spread(rows: NDArray[Any]) -> dict[str, Any]:
    """Of (N, axes) numbers: how many rows differ, the most frequent ones, and least, median and most of each axis."""
    first, number_of = distinct_rows(rows)
    counts = np.bincount(number_of)
    often = np.argsort(-counts, kind="stable")[:MOST_FREQUENT]
    return {
        "distinct": len(first),
        "most_frequent": [{"value": rows[first[row]].tolist(), "samples": int(counts[row])} for row in often],
        "min": rows.min(axis=0).tolist(),
        "median": np.median(rows, axis=0).tolist(),
        "max": rows.max(axis=0).tolist(),
    }


def distinct_rows(rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(first, number_of): where each distinct row of (N, axes) occurs first, and for each row which one it is, (N,)."""
    number_of = np.zeros(len(rows), np.int64)
    first = np.zeros(1, np.int64)
    for column in rows.T:
        if (column != column[0]).any():
            values, codes = np.unique(column, return_inverse=True)
            _, first, number_of = np.unique(number_of * len(values) + codes, return_index=True, return_inverse=True)
    return first, number_of


def has_class(volumes: VolumeFile, number: int) -> NDArray[np.bool_]:
    """(N,) whether a sample is, or of several labels has, class `number`."""
    targets = volumes.targets
    found: NDArray[np.bool_] = targets == number if targets.ndim == 1 else targets[:, number] == 1
    return found


def balanced_weights(counts: ArrayLike) -> list[float]:
    """One weight per class, all / (classes that occur * count), as class_weights: balanced has it; 0 for count 0."""
    number = np.asarray(counts, np.float64)
    share = np.full(len(number), number.sum() / max((number > 0).sum(), 1))
    weights: list[float] = np.divide(share, number, out=np.zeros_like(share), where=number > 0).tolist()
    return weights


def positive_weights(counts: ArrayLike, num_samples: int) -> list[float]:
    """Per label: samples without it for each that has it, a binary cross entropy's pos_weight; 0 where none has."""
    number = np.asarray(counts, np.float64)
    weights: list[float] = np.divide(num_samples - number, number, out=np.zeros_like(number), where=number > 0).tolist()
    return weights


def equal_sums(volumes: VolumeFile) -> list[list[int]]:
    """Sets of samples whose input bytes have one CRC-32, whatever their class: equal, but for one pair in 2**32.

    With label maps: whose inputs and maps have one together.
    """
    sums = _input_sums(volumes)
    order = np.argsort(sums, kind="stable")
    edges = np.flatnonzero(np.diff(sums[order])) + 1
    sizes = np.diff(edges, prepend=0, append=len(sums))
    starts = np.concatenate([[0], edges])
    repeated = np.flatnonzero(sizes > 1)
    return sorted(order[starts[one] : starts[one] + sizes[one]].tolist() for one in repeated)


def _input_sums(volumes: VolumeFile) -> NDArray[np.uint32]:
    """(N,) numbers that are equal where the CRC-32 of the inputs alone are: the checksum goes over the target, too.

    crc(inputs + target) is crc(target) xor a one-to-one function of crc(inputs), the same for targets of one length.
    """
    if volumes.task == "segmentation":
        return volumes.checksums
    rows = volumes.targets.astype(TARGET_DTYPES[volumes.task])
    first, number_of = distinct_rows(_packed(rows))
    own = np.array([zlib.crc32(rows[row].tobytes()) for row in first], np.uint32)
    return volumes.checksums ^ own[number_of]


def _packed(targets: NDArray[Any]) -> NDArray[Any]:
    """(N, columns) that differ where targets do: eight labels in one column, or (N, 1) class numbers."""
    return np.packbits(targets, axis=1) if targets.ndim == 2 else targets[:, None]


def _num_groups(volumes: VolumeFile, code: int) -> int:
    return len(set(volumes.groups.stored[volumes.split == code].tolist()))


def _fold_counts(volumes: VolumeFile, chosen: Any = slice(None)) -> list[int]:
    """Samples of each fold; empty where there are none."""
    if volumes.folds is None:
        return []
    counts: list[int] = np.bincount(volumes.folds[chosen], minlength=HELD_OUT)[: volumes.num_folds].tolist()
    return counts


def _class_counts(volumes: VolumeFile) -> dict[str, dict[str, Any]]:
    """class -> samples of each split, and in `folds` of each fold; of several labels: samples that have it."""
    counts: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(volumes.class_names):
        has = has_class(volumes, number)
        counts[name] = dict(zip(SPLITS, np.bincount(volumes.split[has], minlength=len(SPLITS)).tolist(), strict=True))
        if volumes.folds is not None:
            counts[name]["folds"] = _fold_counts(volumes, has)
    return counts


def _label_sets(volumes: VolumeFile) -> dict[str, Any]:
    """The sets of labels that occur together, the most frequent first, and samples without any."""
    names = volumes.class_names
    first, number_of = distinct_rows(_packed(volumes.targets))
    counts = np.bincount(number_of)
    often = np.argsort(-counts, kind="stable")[:MOST_FREQUENT]
    bare = ~volumes.targets.any(axis=1)
    return {
        "without_any": dict(zip(SPLITS, np.bincount(volumes.split[bare], minlength=3).tolist(), strict=True)),
        "per_sample": float(volumes.targets.sum(axis=1, dtype=np.int64).mean()),
        "distinct": len(first),
        "most_frequent": [
            {"classes": [names[k] for k in np.flatnonzero(volumes.targets[first[row]])], "samples": int(counts[row])}
            for row in often
        ],
    }
