"""What a user should know of a volume file before training on it, read off the facts of `describe`."""

from collections.abc import Iterator, Sequence
from typing import Any

SHOWN = 3
"""ids or names that a sentence lists"""


def find_alarms(facts: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """(grave, sentence). Grave: scores or weights would be wrong."""
    yield from _twins(facts["duplicates"], facts["near_duplicates"])
    yield from _voxels(facts["voxels"])
    if facts["segmentation"]:
        yield from _label_maps(facts["segmentation"])
    yield from _splits(facts)


def listing(names: Sequence[str], num: int) -> str:
    """Some names, and how many more there are of `num`."""
    shown = list(names[:SHOWN])
    return ", ".join(shown) + (f" and {num - len(shown)} more" if num > len(shown) else "")


def _twins(equal: dict[str, Any], near: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    remedy = "give them one group and pack again"
    for one in (one for one in equal["listed"][:1] if equal["leaking"]):
        where = _places(one)
        yield True, f"{_sets(equal['leaking'])} of equal samples in different splits or folds: {where}; {remedy}"
    for one in (one for one in near["listed"][:1] if near["leaking"]):
        pairs = f"{near['leaking']} pair{'s' * (near['leaking'] > 1)}"
        where = f"{_places(one)}; compare them, and give one volume one group"
        yield True, f"{pairs} of samples in different splits or folds look alike (by a perceptual hash): {where}"
    if equal["differently_labelled"]:
        one = next(one for one in equal["listed"] if len(one["labels"]) > 1)
        labels = listing(one["labels"], len(one["labels"]))
        where = f"{listing(one['ids'], one['samples'])} ({labels}); correct the table"
        yield True, f"{_sets(equal['differently_labelled'])} of equal samples with different labels: {where}"


def _sets(num: int) -> str:
    return f"{num} set{'s' * (num > 1)}"


def _places(one: dict[str, Any]) -> str:
    """The first sample, and the first one that lies elsewhere."""
    places = one["places"]
    other = next((number for number, place in enumerate(places) if place != places[0]), len(places) - 1)
    return f"{one['ids'][0]} ({places[0]}) and {one['ids'][other]} ({places[other]})"


def _voxels(voxels: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    for key, what in (("nan", "NaN"), ("infinite", "infinite")):
        if num := voxels[key]["samples"]:
            plural = "s" * (voxels[key]["voxels"] > 1)
            yield True, f"{voxels[key]['voxels']} {what} voxel{plural} in {listing(voxels[key]['ids'], num)}"
    if num := voxels["constant"]["samples"]:
        yield True, f"all voxels are equal in {listing(voxels['constant']['ids'], num)}"


def _label_maps(found: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    if values := found["unnamed_values"]:
        yield True, f"label maps hold {listing([str(value) for value in values], len(values))}, which no class names"
    if num := found["background_only"]:
        first = next(iter(found["classes"]))
        yield False, f"{num} label map{'s' * (num > 1)} of {first} alone"


def _splits(facts: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    splits = facts["splits"]
    if not splits["train"]:
        yield True, "no sample is in the training split"
    if not splits["validation"] and not facts["folds"]:
        yield False, "no sample is in the validation split"
    absent = [name for name, counts in facts["classes"].items() if not any(counts[split] for split in splits)]
    if absent:
        yield False, f"no sample of {listing(absent, len(absent))}"
    for split in (split for split, num in splits.items() if num):
        here = [name for name, counts in facts["classes"].items() if not counts[split] and name not in absent]
        if here:
            yield split == "train", f"no {split} sample of {listing(here, len(here))}"
    held = [name for name, counts in facts["classes"].items() if 0 in counts.get("folds", ()) and name not in absent]
    if held:
        yield False, f"some fold has no sample of {listing(held, len(held))}"
