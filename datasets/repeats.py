"""Samples that a volume file holds twice, or nearly so, and whether they lie in different splits or folds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.census import equal_sums, mean_bytes
from datasets.duplicates import Print, find_twins
from datasets.layout import VolumeFile
from datasets.partition import HELD_OUT, SPLITS

MOST_LISTED, MOST_IDS = 20, 10
"""sets or pairs that are listed, and ids of one set"""


@dataclass(frozen=True)
class Equals:
    """Samples with the same bytes, whatever their class."""

    samples: tuple[int, ...]
    confirmed: bool
    """compared byte for byte (by SHA-256), not by the 32 bits of the checksums alone"""
    leaks: bool
    """in different splits or folds: one is trained on, the other scored"""


@dataclass(frozen=True)
class _Sample:
    """A sample as `find_twins` wants it."""

    number: int
    id: str
    path: Path
    print: Print
    labels: tuple[str, ...] = ()
    split: int = 0
    fold: int = 0


def candidates(volumes: VolumeFile, max_bytes: float) -> tuple[list[list[int]], list[int]]:
    """Sets of samples with equal checksums, those that would leak first, and the samples to read to be sure of them."""
    sets = sorted(equal_sums(volumes), key=lambda samples: not leaks(volumes, samples))
    chosen, most = list[int](), max_bytes / mean_bytes(volumes)
    for samples in sets:
        if len(chosen) + len(samples) > most:
            break
        chosen += samples
    return sets, chosen


def confirm(volumes: VolumeFile, sets: Iterable[Sequence[int]], digests: dict[int, bytes]) -> list[Equals]:
    """The sets by what their bytes are, where all of a set were read."""
    found = []
    for samples in sets:
        read = all(sample in digests for sample in samples)
        alike: dict[bytes, list[int]] = {}
        for sample in samples:
            alike.setdefault(digests[sample] if read else b"", []).append(sample)
        found += [Equals(tuple(one), read, leaks(volumes, one)) for one in alike.values() if len(one) > 1]
    return found


def near_pairs(volumes: VolumeFile, prints: dict[int, Print], equal: Iterable[Equals]) -> list[tuple[int, int]]:
    """Pairs of samples that look alike without being equal, those that leak first."""
    home = {sample: number for number, one in enumerate(equal) for sample in one.samples}
    known = [
        _Sample(number, volumes.ids[number], volumes.paths[volumes.locate(number)[0]], prints[number])
        for number in sorted(prints)
    ]
    pairs = [(twins.first.number, twins.second.number) for twins in find_twins(known)]
    apart = [(a, b) for a, b in pairs if home.get(a, -1) != home.get(b, -2)]
    return sorted(apart, key=lambda pair: (not leaks(volumes, pair), pair))


def leaks(volumes: VolumeFile, samples: Sequence[int]) -> bool:
    """Whether samples that are the same lie in different splits or folds."""
    return len(set(places(volumes, samples))) > 1


def places(volumes: VolumeFile, samples: Sequence[int]) -> list[str]:
    """The split of each sample, or its fold."""
    return [_place(volumes, sample) for sample in samples]


def describe_equals(volumes: VolumeFile, equal: Sequence[Equals]) -> dict[str, Any]:
    """Counts, and some sets in full: first one that leaks and one of different labels, if there are."""
    labels = [sorted(_labels(volumes, one.samples)) for one in equal]
    order = sorted(range(len(equal)), key=lambda number: (not equal[number].leaks, len(labels[number]) < 2, number))
    differ = [number for number in order if len(labels[number]) > 1]
    listed = list(dict.fromkeys([*order[:1], *differ[:1], *order]))[:MOST_LISTED]
    return {
        "sets": len(equal),
        "samples": sum(len(one.samples) for one in equal),
        "leaking": sum(one.leaks for one in equal),
        "confirmed": sum(one.confirmed for one in equal),
        "differently_labelled": len(differ),
        "listed": [
            {
                "ids": [volumes.ids[sample] for sample in equal[number].samples[:MOST_IDS]],
                "samples": len(equal[number].samples),
                "places": places(volumes, equal[number].samples[:MOST_IDS]),
                "labels": labels[number],
                "leaks": equal[number].leaks,
                "confirmed": equal[number].confirmed,
            }
            for number in listed
        ],
    }


def describe_near(volumes: VolumeFile, compared: int, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Counts, and the first pairs; two of one group (patches of a volume that overlap) are counted only."""
    strangers = [pair for pair in pairs if volumes.groups[pair[0]] != volumes.groups[pair[1]]]
    return {
        "compared": compared,
        "pairs": len(pairs),
        "of_one_group": len(pairs) - len(strangers),
        "leaking": sum(leaks(volumes, pair) for pair in strangers),
        "listed": [
            {
                "ids": [volumes.ids[sample] for sample in pair],
                "places": places(volumes, pair),
                "leaks": leaks(volumes, pair),
            }
            for pair in strangers[:MOST_LISTED]
        ],
    }


def _place(volumes: VolumeFile, sample: int) -> str:
    if volumes.folds is not None and (fold := int(volumes.folds[sample])) != HELD_OUT:
        return f"fold {fold}"
    return SPLITS[int(volumes.split[sample])]


def _labels(volumes: VolumeFile, samples: Sequence[int]) -> set[str]:
    if volumes.task == "segmentation":
        return set()
    if volumes.task == "classification":
        return {volumes.class_names[volumes.targets[sample]] for sample in samples}
    rows = (volumes.targets[sample].nonzero()[0] for sample in samples)
    return {"+".join(volumes.class_names[number] for number in row) or "none" for row in rows}
