"""Where classes come from: a table with a row per volume, or an atlas that names the region at a place in the body."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.nifti import NotNifti, UnusableVolume, Volume, read_volume, volume_id
from datasets.partition import MAX_FOLDS, SPLITS, UNSET

SPLIT_NAMES = {"train": 0, "validation": 1, "val": 1, "valid": 1, "test": 2, "0": 0, "1": 1, "2": 2, "": UNSET}


@dataclass(frozen=True)
class Row:
    """What a table says of one volume; empty cells are None, a free split or fold is -1."""

    label: str | None
    group: str | None
    split: int
    fold: int = UNSET


def read_table(path: Path, group_column: str | None = None, need_label: bool = True) -> dict[str, Row]:
    """Rows by volume id from CSV, TSV or semicolons; columns id, label[, group][, split][, fold].

    ValueError names the line.
    """
    header, lines = _read_rows(path)
    for column in ("id", *(["label"] if need_label else []), *([group_column] if group_column else [])):
        _require_column(path, header, column)
    if not need_label and "label" in header:
        raise ValueError(f"{path} has a column 'label', but the labels come from the atlas; leave out one of the two")
    rows: dict[str, Row] = {}
    for number, cells in lines:
        where = f"{path} line {number}"
        name = volume_id(Path(cells["id"]))
        if not name or (need_label and not cells["label"]):
            raise ValueError(f"{where} has no {'label' if name else 'id'}; fill the cell or remove the line")
        if name in rows:
            raise ValueError(f"{where} gives the id {name!r} a second time; keep one line for each volume")
        split, fold = _parse_split(cells.get("split", ""), where), _parse_fold(cells.get("fold", ""), where)
        if UNSET not in (split, fold) and SPLITS[split] != "train":
            raise ValueError(f"{where} gives {name!r} a fold and the split {SPLITS[split]}; keep one of them")
        rows[name] = Row(
            label=cells["label"] if need_label else None,
            group=cells.get(group_column or "group") or None,
            split=split,
            fold=fold,
        )
    if not rows:
        raise ValueError(f"{path} names no volume; write a line for each: id,{'label' if need_label else 'group'}")
    return rows


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
            where = Row(None, None, split)
            if isinstance(found, list) and SPLITS[split] == "train":
                continue  # what is not the validation of this fold is of another
            if isinstance(found, list) and SPLITS[split] == "validation":
                where = Row(None, None, UNSET, number)
            for id in ids:
                if rows.setdefault(id, where) != where:
                    raise ValueError(f"{path} puts {id!r} into two parts; keep one of them")
    if not rows:
        raise ValueError(f"{path} names no volume")
    if isinstance(found, list):
        _check_trained(path, entries)
    return rows


def merge_list(path: Path, table: dict[str, Row] | None, ids: Sequence[str]) -> dict[str, Row]:
    """The table's rows with the splits and folds of the list; those that the table alone puts into a split stay.

    An id of nnU-Net's is that of its first channel, too. ValueError where they contradict each other, or miss an id.
    """
    known, listed = set(ids), read_list(path)
    listed = {(f"{id}_0000" if id not in known and f"{id}_0000" in known else id): row for id, row in listed.items()}
    rows = table or {}
    match_rows(path, listed, [id for id in ids if id in listed or id not in rows or rows[id].split == UNSET])
    merged = {}
    for id in ids:
        own, fixed = rows.get(id, Row(None, None, UNSET)), listed.get(id, Row(None, None, UNSET))
        both = [(own.split, fixed.split), (own.fold, fixed.fold)]
        if any(UNSET not in pair and pair[0] != pair[1] for pair in both) or (
            own.split != UNSET and fixed.fold != UNSET
        ):
            raise ValueError(f"{path} and the table put {id!r} into two parts; keep one of them")
        merged[id] = Row(own.label, own.group, max(own.split, fixed.split), max(own.fold, fixed.fold))
    return merged


def _named_ids(path: Path, entry: Any) -> dict[int, list[str]]:
    names = {name: split for name, split in SPLIT_NAMES.items() if name.isalpha()}
    good = isinstance(entry, dict) and all(
        key.lower() in names and isinstance(ids, list) and all(isinstance(id, str) for id in ids)
        for key, ids in entry.items()
    )
    if not good:
        raise ValueError(f'{path} is not {{"train": [ids], "validation": [ids], "test": [ids]}}, or a list of such')
    return {names[key.lower()]: [volume_id(Path(id)) for id in ids] for key, ids in entry.items()}


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


def match_rows(table: Path, rows: dict[str, Row], ids: Sequence[str]) -> None:
    """Refuse (ValueError) rows without a file and files without a row."""
    for what, extra in (
        ("no file is given for", [name for name in rows if name not in set(ids)]),
        ("no line names", [name for name in ids if name not in rows]),
    ):
        if extra:
            close = get_close_matches(extra[0], list(ids) if what.startswith("no file") else list(rows), n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise ValueError(f"{table}: {what} {extra[0]!r}{more}{hint}; the id is the file's name without .nii.gz")


def sort_names(names: set[str]) -> list[str]:
    """Class names in order: as numbers if all are whole numbers, else as text."""
    return sorted(names, key=int) if all(name.lstrip("-").isdigit() for name in names) else sorted(names)


@dataclass(frozen=True)
class Atlas:
    """A label volume in world space and the class of each of its values."""

    volume: Volume
    class_names: list[str]
    class_of: dict[int, int]

    def classes(self, shape: tuple[int, ...], affine: NDArray[Any]) -> NDArray[np.int16]:
        """Class number at each voxel of a grid, -1 where there is none: the atlas voxel nearest in world position."""
        grid = np.linalg.inv(self.volume.affine) @ affine
        lookup = self._lookup()
        out = np.empty(shape, np.int16)
        y, z = np.ogrid[: shape[1], : shape[2]]
        for x in range(shape[0]):  # one plane at a time: memory stays small
            # half-way positions go up, also when rounding left them a hair below
            index = [np.floor(g[0] * x + g[1] * y + g[2] * z + g[3] + 0.5 + 1e-6).astype(np.int64) for g in grid[:3]]
            inside = np.ones(shape[1:], bool)
            for axis, size in enumerate(self.volume.data.shape):
                inside &= (index[axis] >= 0) & (index[axis] < size)
            clipped = tuple(
                np.clip(places, 0, size - 1) for places, size in zip(index, self.volume.data.shape, strict=True)
            )
            out[x] = np.where(inside, lookup[clipped], UNSET)
        return out

    def _lookup(self) -> NDArray[np.int16]:
        values, places = np.unique(self.volume.data, return_inverse=True)
        numbers = np.array([self.class_of.get(int(value), UNSET) for value in values], np.int16)
        return numbers[places].reshape(self.volume.data.shape)


def read_atlas(path: Path, regions: Path) -> Atlas:
    """Atlas (NIfTI label volume) and regions (table with columns value, label; several values may share a label)."""
    header, lines = _read_rows(regions)
    for column in ("value", "label"):
        _require_column(regions, header, column)
    labels: dict[int, str] = {}
    for number, cells in lines:
        try:
            value = int(cells["value"])
        except ValueError:
            raise ValueError(f"{regions} line {number}: value {cells['value']!r} is not a whole number") from None
        if value in labels or not cells["label"]:
            what = f"value {value} occurs twice" if value in labels else "the label is empty"
            raise ValueError(f"{regions} line {number}: {what}; write one line value,label for each value")
        labels[value] = cells["label"]
    if not labels:
        raise ValueError(f"{regions} names no class; write lines value,label")
    names = sort_names(set(labels.values()))
    try:
        volume = read_volume(path)
    except UnusableVolume as error:
        raise NotNifti(f"{path} cannot serve as an atlas: {error}") from error
    return Atlas(volume, names, {value: names.index(label) for value, label in labels.items()})


def _read_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"table {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"table {path} is not UTF-8 text; export it as CSV") from error
    lines = text.splitlines()
    if not lines:
        raise ValueError(f"table {path} is empty; its first line must name the columns")
    delimiter = next((mark for mark in "\t;" if mark in lines[0]), ",")
    reader = csv.reader(lines, delimiter=delimiter)
    header = [cell.strip() for cell in next(reader)]
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice:
        raise ValueError(f"{path} has the column {twice!r} {header.count(twice)} times; keep one of them")
    rows = []
    for cells in reader:
        if any(cell.strip() for cell in cells):
            if len(cells) != len(header):
                raise ValueError(f"{path} line {reader.line_num} has {len(cells)} cells, its header {len(header)}")
            rows.append((reader.line_num, dict(zip(header, (cell.strip() for cell in cells), strict=True))))
    return header, rows


def _require_column(path: Path, header: list[str], column: str) -> None:
    if column not in header:
        close = get_close_matches(column, header, n=1)
        hint = f" (is it {close[0]!r}?)" if close else ""
        raise ValueError(f"{path} has no column {column!r}{hint}; its columns are {', '.join(header)}")


def _parse_split(text: str, where: str) -> int:
    if text.lower() not in SPLIT_NAMES:
        raise ValueError(f"{where}: split {text!r} is unknown; use {', '.join(SPLITS)}")
    return SPLIT_NAMES[text.lower()]


def _parse_fold(text: str, where: str) -> int:
    if text and not (text.isdecimal() and int(text) < MAX_FOLDS):
        raise ValueError(f"{where}: fold {text!r} is not a whole number from 0 to {MAX_FOLDS - 1}")
    return int(text) if text else UNSET
