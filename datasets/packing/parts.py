"""Which samples stay, which class each has, and which split and fold it goes to, when all sources have been read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.duplicates import Print, Twins, find_twins, refuse_any, refuse_leaks, told, without_equals
from datasets.packing.journal import Entry, Finished
from datasets.packing.labelling import Labelling
from datasets.packing.recipe import PackOptions
from datasets.partition import SPLITS, UNSET, fold_samples, split_samples

TRAIN, TEST = SPLITS.index("train"), SPLITS.index("test")


@dataclass(frozen=True)
class Packed:
    """All samples of the pack in order, and what is told of them."""

    sources: list[Finished]
    samples: list[tuple[Finished, Entry]]
    ids: list[str]
    groups: list[str]
    split: NDArray[np.uint8]
    fold: NDArray[np.uint8] | None
    """None without --folds; of test samples it means nothing"""
    classes: NDArray[Any]
    """(N,) class numbers, or (N, K) 1 where the sample has the class"""
    class_names: list[str]
    notes: list[str]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """class -> split -> samples (that have it)"""
        has = self.classes if self.classes.ndim == 2 else np.eye(len(self.class_names), dtype=int)[self.classes]
        found = [has[self.split == code].sum(axis=0) for code in range(len(SPLITS))]
        return {
            name: {split: int(found[code][number]) for code, split in enumerate(SPLITS)}
            for number, name in enumerate(self.class_names)
        }

    @property
    def splits(self) -> dict[str, int]:
        return {split: int((self.split == code).sum()) for code, split in enumerate(SPLITS)}

    @property
    def folds(self) -> list[int]:
        """Samples of each fold."""
        return [] if self.fold is None else np.bincount(self.fold[self.split != TEST]).tolist()


@dataclass(frozen=True)
class _Known:
    """A source as datasets.duplicates compares them."""

    id: str
    path: Path
    labels: tuple[str, ...]
    split: int
    fold: int
    print: Print


def rehearse(options: PackOptions, labelling: Labelling, ids: Sequence[str]) -> None:
    """Raise what the division will raise for want of groups, before hours are spent on reading."""
    _divide(options, labelling, ids, np.zeros(len(ids), np.int64))


def divide(
    options: PackOptions,
    labelling: Labelling,
    done: list[Finished],
    paths: Mapping[str, Path],
    bad: Sequence[tuple[Path, str]],
) -> Packed:
    """ValueError (one line) for duplicates that are refused, a class without a sample, groups that cannot be split."""
    known = [_known(labelling, source, paths[source.id]) for source in done]
    twins = find_twins(known)
    if options.duplicates == "error":
        refuse_any(twins)
    if options.duplicates == "drop":
        stay = {volume.id for volume in without_equals(known, twins)}
        done = [source for source in done if source.id in stay]
    samples = [(source, entry) for source in done for entry in source.samples]
    names, classes = _classes(labelling, samples)
    if labelling.task != "segmentation" and labelling.atlas is None:
        _require_all(names, classes, bad)
    split, fold = _divide(options, labelling, [source.id for source, _ in samples], classes)
    homes = {
        source.id: (SPLITS[code], None if fold is None or code == TEST else int(fold[number]))
        for number, ((source, _), code) in enumerate(zip(samples, split.tolist(), strict=True))
    }
    if options.duplicates != "keep":
        refuse_leaks(homes, twins)
    patches = options.recipe.patch is not None
    counters: dict[str, int] = {}
    ids = [f"{source.id}/{_count(counters, source.id):05d}" if patches else source.id for source, _ in samples]
    groups = [labelling.group(source.id) for source, _ in samples]
    notes = _notes(labelling, names, classes, split, fold, twins, options)
    return Packed(done, samples, ids, groups, split, fold, classes, names, notes)


def _count(counters: dict[str, int], id: str) -> int:
    counters[id] = counters.get(id, -1) + 1
    return counters[id]


def _known(labelling: Labelling, source: Finished, path: Path) -> _Known:
    row = labelling.rows[source.id]
    bits = np.frombuffer(bytes.fromhex(source.hash), np.uint64)
    # two label maps that differ decide as two labels do
    labels = (f"map {source.samples[0].checksum:08x}",) if labelling.task == "segmentation" else row.labels
    return _Known(source.id, path, labels, row.split, row.fold, Print(source.digest, bits, source.num_bits))


def _classes(labelling: Labelling, samples: Sequence[tuple[Finished, Entry]]) -> tuple[list[str], NDArray[Any]]:
    """Names, and numbers (N,) or (N, K) 1 where the sample has the class."""
    names = labelling.class_names
    if labelling.task == "segmentation":
        present = np.zeros((len(samples), len(names)), np.int64)
        for row, (source, _) in zip(present, samples, strict=True):
            row[: len(source.counts)] = np.array(source.counts) > 0
        return names, present
    numbers = {name: number for number, name in enumerate(names)}
    if labelling.task == "multilabel":
        hot = np.zeros((len(samples), len(names)), np.int64)
        for row, (source, _) in zip(hot, samples, strict=True):
            row[[numbers[label] for label in labelling.rows[source.id].labels]] = 1
        return names, hot
    found = [
        entry.label if entry.label is not None else numbers[labelling.rows[source.id].labels[0]]
        for source, entry in samples
    ]
    return names, np.array(found, np.int64)


def _require_all(names: Sequence[str], classes: NDArray[Any], bad: Sequence[tuple[Path, str]]) -> None:
    counts = classes.sum(axis=0) if classes.ndim == 2 else np.bincount(classes, minlength=len(names))
    missing = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    if missing:
        skipped = "".join(f"; {path} was skipped: {reason}" for path, reason in bad)
        raise ValueError(
            f"class {missing[0]!r} has no sample in any usable volume; remove it or add a volume with it{skipped}"
        )


def _divide(
    options: PackOptions, labelling: Labelling, ids: Sequence[str], classes: NDArray[Any]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Split and fold of each sample, given by the id of its source."""
    rows = [labelling.rows[id] for id in ids]
    groups = [labelling.group(id) for id in ids]
    # where the fold is given, the sample is trained on or validated
    given = [TRAIN if row.split == UNSET and row.fold != UNSET else row.split for row in rows]
    split = split_samples(classes, groups, options.split, options.recipe.seed, given)
    if options.folds is None:
        return split, None
    _refuse_folds(options.folds, labelling)
    inside = np.flatnonzero(split != TEST)
    if not len(inside):
        raise ValueError(f"--folds {options.folds}: all samples are in the test split; give it less (--split 85/0/15)")
    own = [rows[number].fold for number in inside]
    fold = np.zeros(len(rows), np.uint8)
    some = [groups[number] for number in inside]
    fold[inside] = fold_samples(classes[inside], some, options.folds, options.recipe.seed, own)
    return split, fold


def _refuse_folds(folds: int, labelling: Labelling) -> None:
    for id, row in labelling.rows.items():
        if row.fold >= folds:
            raise ValueError(f"{id!r} is given fold {row.fold}, but --folds {folds} ends at {folds - 1}")
        if row.split == SPLITS.index("validation"):
            raise ValueError(f"{id!r} is given validation, but with --folds each fold is that once")


def _notes(
    labelling: Labelling,
    names: Sequence[str],
    classes: NDArray[Any],
    split: NDArray[np.uint8],
    fold: NDArray[np.uint8] | None,
    twins: Sequence[Twins[_Known]],
    options: PackOptions,
) -> list[str]:
    notes = []
    if any(row.split != UNSET for row in labelling.rows.values()):
        notes.append("splits come from the table's column 'split', the folders, or the list, where they are given")
    for number, name in enumerate(names):
        has = classes[:, number] == 1 if classes.ndim == 2 else classes == number
        inside = has & (split != TEST)
        if not (has & (split == TRAIN)).any():
            notes.append(f"class {name!r} has no sample in train: a network cannot learn it")
        if fold is not None and inside.any() and len(alone := set(fold[inside].tolist())) == 1:
            notes.append(f"class {name!r} is in fold {alone.pop()} alone: its run cannot learn it")
    if len(names) == 1 and labelling.task == "classification":
        notes.append(f"there is only one class, {names[0]!r}: nothing to tell apart")
    return [*notes, *told(twins, options.duplicates == "drop")]
