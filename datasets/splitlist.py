"""Splits and folds that are fixed by a list of ids, such as nnU-Net's splits_final.json."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets.partition import SPLITS, UNSET
from datasets.tables import SPLIT_NAMES, Row, plain_id, refuse_missing, resolve_rows


def read_list(path: Path) -> dict[str, Row]:
    """Fixed splits by volume id, from JSON; ValueError says what is wrong.

    {"train": [ids], "validation": [ids], "test": [ids]}, or a fold per entry as in nnU-Net's splits_final.json:
    [{"train": [ids], "val": [ids]}, ...], where each id is the validation of one and trained on in all others. A "test"
    there is the same in each entry.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {' '.join(str(error).split())}") from error
    entries = [_named_ids(path, entry) for entry in (found if isinstance(found, list) else [found])]
    rows: dict[str, Row] = {}
    for number, entry in enumerate(entries):
        for split, ids in entry.items():
            where = Row(split=split)
            if isinstance(found, list) and SPLITS[split] == "train":
                continue  # what is not the validation of this fold is of another
            if isinstance(found, list) and SPLITS[split] == "validation":
                where = Row(fold=number)
            for id in ids:
                if rows.setdefault(id, where) != where:
                    raise ValueError(f"{path} puts {id!r} into two parts; keep one of them")
    if not rows:
        raise ValueError(f"{path} names no sample")
    if isinstance(found, list):
        _check_trained(path, entries)
    return rows


def merge_list(path: Path, table: dict[str, Row] | None, ids: Sequence[str]) -> dict[str, Row]:
    """The table's rows with the splits and folds of the list; those that the table alone puts into a split stay.

    An id of nnU-Net's is that of its first channel, too. ValueError where they contradict each other, or miss an id.
    """
    known, listed, rows = set(ids), read_list(path), table or {}
    listed = {(f"{id}_0000" if id not in known and f"{id}_0000" in known else id): row for id, row in listed.items()}
    listed = resolve_rows(path, listed, ids)
    refuse_missing(path, [id for id in ids if id not in listed and rows.get(id, Row()).split == UNSET], listed)
    merged = {}
    for id in ids:
        own, fixed = rows.get(id, Row()), listed.get(id, Row())
        both = [(own.split, fixed.split), (own.fold, fixed.fold)]
        if any(UNSET not in pair and pair[0] != pair[1] for pair in both) or (
            own.split != UNSET and fixed.fold != UNSET
        ):
            raise ValueError(f"{path} and the table put {id!r} into two parts; keep one of them")
        merged[id] = replace(own, split=max(own.split, fixed.split), fold=max(own.fold, fixed.fold))
    return merged


def _named_ids(path: Path, entry: Any) -> dict[int, list[str]]:
    names = {name: split for name, split in SPLIT_NAMES.items() if name.isalpha()}
    good = isinstance(entry, dict) and all(
        key.lower() in names and isinstance(ids, list) and all(isinstance(id, str) for id in ids)
        for key, ids in entry.items()
    )
    if not good:
        raise ValueError(f'{path} is not {{"train": [ids], "validation": [ids], "test": [ids]}}, or a list of such')
    parts: dict[int, list[str]] = {}
    for key, ids in entry.items():
        parts.setdefault(names[key.lower()], []).extend(plain_id(id) for id in ids)
    return parts


def _check_trained(path: Path, entries: Sequence[dict[int, list[str]]]) -> None:
    """A fold trains on the validation of all others, and on nothing else: so the file is packed."""
    train, validation = SPLITS.index("train"), SPLITS.index("validation")
    every = {id for entry in entries for id in entry.get(validation, [])}
    for number, entry in enumerate(entries):
        wrong = set(entry.get(train, every - set(entry.get(validation, [])))) ^ (every - set(entry.get(validation, [])))
        if wrong:
            raise ValueError(
                f"{path}: fold {number} does not train on just what the other folds validate on: see {min(wrong)!r}; "
                "use a column 'split' for such a split"
            )
