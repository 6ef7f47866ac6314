"""Labels, groups, splits and masks from a table with a row per sample: CSV, TSV, semicolons or Parquet."""

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets.partition import MAX_FOLDS, SPLITS, UNSET
from datasets.sources.contract import library, split_name

_SPELLINGS = (("train", "training", "0"), ("validation", "val", "valid", "1"), ("test", "testing", "2"), ("",))
SPLIT_NAMES = {name: number for number, names in zip((0, 1, 2, UNSET), _SPELLINGS, strict=True) for name in names}
EVERY_COLUMN = "*"
_OTHERS = ("split", "fold", "mask")
_TRUTH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True)
class Row:
    """What is known of a sample before it is read; an empty group or mask is None, a free split or fold -1."""

    labels: tuple[str, ...] = ()
    """names of its classes: one, or with several labels any number"""
    group: str | None = None
    split: int = UNSET
    fold: int = UNSET
    mask: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table hold what. ValueError for options that contradict each other."""

    id: str = "id"
    labels: tuple[str, ...] = ("label",)
    """one; or several of 0 and 1, each a class (('*',): all that are left); or none, beside an atlas or masks"""
    separator: str | None = None
    """parts the names of several classes in one cell, as in 'Effusion|Mass'"""
    none: str | None = None
    """the name in such a cell that stands for no class, as 'No Finding'"""
    group: str | None = None
    """default: 'group', if there is one"""

    def __post_init__(self) -> None:
        if self.separator is not None and (len(self.labels) != 1 or not self.separator.strip()):
            raise ValueError(f"separator {self.separator!r} parts the names in one column: give one, and one sign")
        if self.none is not None and self.separator is None:
            raise ValueError(f"{self.none!r} can stand for no class where a cell holds several: give a separator")

    @property
    def several(self) -> bool:
        """A sample may have any number of classes."""
        return len(self.labels) > 1 or self.labels == (EVERY_COLUMN,) or self.separator is not None


@dataclass(frozen=True)
class Table:
    """Rows by id, and the classes in order."""

    rows: dict[str, Row]
    class_names: list[str] = field(default_factory=list)
    several: bool = False
    """a sample may have any number of classes"""


def read_table(path: Path, columns: Columns | None = None) -> Table:
    """Columns id, label[, group][, split][, fold][, mask]; others are ignored. A mask's path is the table's folder's.

    The ids are without a file's suffix, but keep a folder. ValueError names the line.
    """
    columns = columns or Columns()
    header, lines = read_cells(path)
    labels = _label_columns(path, header, columns)
    for column in (columns.id, *labels, *([columns.group] if columns.group else [])):
        require_column(path, header, column)
    rows: dict[str, Row] = {}
    for where, cells in lines:
        name = plain_id(cells[columns.id])
        if not name:
            raise ValueError(f"{where} has no {columns.id}; fill the cell or remove the line")
        if name in rows:
            raise ValueError(f"{where} gives the id {name!r} a second time; keep one line for each sample")
        rows[name] = _row(path, where, name, cells, columns, labels)
    if not rows:
        raise ValueError(f"{path} names no sample; write a line for each: {','.join((columns.id, *labels))}")
    names = {label for row in rows.values() for label in row.labels}
    if not columns.several:
        _refuse_joined(path, names)
    in_order = list(labels) if columns.several and columns.separator is None else sort_names(names)
    return Table(rows, in_order, columns.several)


def match_rows(table: Path, rows: dict[str, Row], ids: Sequence[str]) -> dict[str, Row]:
    """The rows by the ids of the files; refuses (ValueError) rows without a file and files without a row."""
    found = resolve_rows(table, rows, ids)
    refuse_missing(table, [id for id in ids if id not in found], rows)
    return found


def resolve_rows(table: Path, rows: dict[str, Row], ids: Sequence[str]) -> dict[str, Row]:
    """The rows by the ids of the files, which may lack the row's folder, or have one that the row lacks.

    Refuses (ValueError) rows without a file.
    """
    known, by_name = set(ids), dict[str, list[str]]()
    for id in ids:
        by_name.setdefault(id.rpartition("/")[2], []).append(id)
    found: dict[str, Row] = {}
    strays: list[str] = []
    for name, row in rows.items():
        fits = [name]
        if name not in known:
            others = by_name.get(name.rpartition("/")[2], [])
            fits = [id for id in others if id.endswith(f"/{name}") or name.endswith(f"/{id}")]
        if len(fits) > 1:
            raise ValueError(f"{table}: {name!r} may be {fits[0]!r} or {fits[1]!r}; write the folder, too")
        if not fits:
            strays.append(name)
            continue
        own = fits[0]
        if own in found:
            raise ValueError(f"{table}: two lines name {own!r}, one of them as {name!r}; keep one for each sample")
        found[own] = row
    _refuse(table, "no file is given for", strays, [id for id in ids if id not in found], ids)
    return found


def refuse_missing(table: Path, missing: Sequence[str], rows: Iterable[str]) -> None:
    """Refuse (ValueError) files that the table has no row for."""
    _refuse(table, "no line names", missing, rows)


def _refuse(table: Path, what: str, strays: Sequence[str], *others: Iterable[str]) -> None:
    if strays:
        close = [name for names in others for name in get_close_matches(strays[0], list(names), n=1)]
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        more = f" and {len(strays) - 1} more" if len(strays) > 1 else ""
        raise ValueError(f"{table}: {what} {strays[0]!r}{more}{hint}; the id is the file's name without its suffix")


def read_values(path: Path) -> dict[int, str]:
    """The class of each value of an atlas or of masks, from a table with the columns value, label.

    Several values may share a label. ValueError names the line.
    """
    header, lines = read_cells(path)
    for column in ("value", "label"):
        require_column(path, header, column)
    labels: dict[int, str] = {}
    for where, cells in lines:
        try:
            value = int(cells["value"])
        except ValueError:
            raise ValueError(f"{where}: value {cells['value']!r} is not a whole number") from None
        if value in labels or not cells["label"]:
            what = f"value {value} occurs twice" if value in labels else "the label is empty"
            raise ValueError(f"{where}: {what}; write one line value,label for each value")
        labels[value] = cells["label"]
    if not labels:
        raise ValueError(f"{path} names no class; write lines value,label")
    return labels


def plain_id(text: str) -> str:
    """An id as a file's name would give it: without ./ and a known suffix; folders stay, parted by /."""
    folder, slash, name = text.strip().replace("\\", "/").removeprefix("./").rpartition("/")
    return folder + slash + split_name(name)[0]


def sort_names(names: set[str]) -> list[str]:
    """Class names in order: as numbers if all are whole numbers, else as text."""
    return sorted(names, key=int) if all(re.fullmatch(r"-?[0-9]+", name) for name in names) else sorted(names)


def require_column(path: Path, header: Sequence[str], column: str) -> None:
    """Raises ValueError, with the name that is nearest, where the table has no such column."""
    if column not in header:
        close = get_close_matches(column.lower(), [name.lower() for name in header], n=1)
        hint = "".join(f" (is it {name!r}?)" for name in header if close and name.lower() == close[0])
        raise ValueError(f"{path} has no column {column!r}{hint}; its columns are {', '.join(header)}")


def read_cells(path: Path) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """The names of the columns, and of each line its place, as messages name it, and its cells as text without blanks.

    Raises ValueError for a file that cannot be read or is no table, and, while iterating, for a broken line.
    """
    try:
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        header, lines = _parquet_cells(path) if is_parquet else _text_cells(path, path.read_bytes())
    except OSError as error:
        raise ValueError(f"table {path} cannot be read: {error.strerror or error}") from error
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice:
        raise ValueError(f"{path} has the column {twice!r} {header.count(twice)} times; keep one of them")
    return header, lines


def _text_cells(path: Path, data: bytes) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"table {path} is not UTF-8 text (line {line}); export it as CSV in UTF-8") from error
    first = text.partition("\n")[0]
    if not first.strip():
        raise ValueError(f"table {path} is empty; its first line must name the columns")
    bare = re.sub(r'"[^"]*"', "", first)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=next((mark for mark in "\t;" if mark in bare), ","))
    header = [cell.strip() for cell in next(reader)]
    return header, _text_lines(path, header, reader)


def _text_lines(path: Path, header: list[str], reader: Any) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        for cells in reader:
            where = f"{path} line {reader.line_num}"
            if any(cell.strip() for cell in cells):
                if len(cells) != len(header):
                    raise ValueError(f"{where} has {len(cells)} cells, its header {len(header)}")
                yield where, dict(zip(header, (cell.strip() for cell in cells), strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num} is no line of a table: {error}") from error


def _parquet_cells(path: Path) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """Columns of lists or records are left out."""
    pyarrow, parquet = (library(name, "pyarrow", "Parquet") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"table {path} is broken Parquet: {' '.join(str(error).split())}") from error
    header = [column.name for column in file.schema_arrow if not pyarrow.types.is_nested(column.type)]

    def lines() -> Iterator[tuple[str, dict[str, str]]]:
        number = 0
        try:
            for batch in file.iter_batches(columns=header):
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    number += 1
                    yield f"{path} row {number}", dict(zip(header, map(_as_text, values), strict=True))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"table {path} is broken Parquet: {' '.join(str(error).split())}") from error

    return header, lines()


def _as_text(value: Any) -> str:
    """As CSV would have it; what is missing (null, NaN) is empty, and a whole number has no point."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).strip()


def _label_columns(path: Path, header: Sequence[str], columns: Columns) -> tuple[str, ...]:
    if not columns.labels and "label" in header:
        raise ValueError(f"{path} has a column 'label', but the labels come from elsewhere; leave out one of the two")
    if columns.labels != (EVERY_COLUMN,):
        return columns.labels
    taken = {columns.id, columns.group or "group", *_OTHERS, ""}
    return tuple(name for name in header if name not in taken)


def _row(path: Path, where: str, name: str, cells: dict[str, str], columns: Columns, labels: Sequence[str]) -> Row:
    split, fold = parse_split(cells.get("split", ""), where), _parse_fold(cells.get("fold", ""), where)
    if UNSET not in (split, fold) and SPLITS[split] != "train":
        raise ValueError(f"{where} gives {name!r} a fold and the split {SPLITS[split]}; keep one of them")
    return Row(
        labels=_parse_labels(where, cells, columns, labels),
        group=cells.get(columns.group or "group") or None,
        split=split,
        fold=fold,
        mask=path.parent / cells["mask"] if cells.get("mask") else None,
    )


def _parse_labels(where: str, cells: dict[str, str], columns: Columns, labels: Sequence[str]) -> tuple[str, ...]:
    if columns.separator is not None:
        return _parse_names(where, cells[labels[0]], columns)
    if columns.several:
        return tuple(name for name in labels if _parse_truth(where, name, cells[name]))
    if any(not cells[name] for name in labels):
        raise ValueError(f"{where} has no {labels[0]}; fill the cell or remove the line")
    return tuple(cells[name] for name in labels)


def _parse_names(where: str, cell: str, columns: Columns) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in cell.split(columns.separator)))
    if "" in names:
        raise ValueError(f"{where} has an empty name in {cell!r}; write the names with {columns.separator!r} between")
    if columns.none in names:
        if len(names) > 1:
            raise ValueError(f"{where} has {cell!r}, but {columns.none!r} stands for no class; keep one of them")
        return ()
    return names


def _parse_truth(where: str, name: str, cell: str) -> bool:
    text = cell.lower().removesuffix(".0")
    if text not in _TRUTH:
        what = f"{cell!r} in" if cell else "an empty cell in"
        raise ValueError(f"{where} has {what} column {name!r}; write 0 or 1 (also true, false, yes, no)")
    return _TRUTH[text]


def _refuse_joined(path: Path, names: set[str]) -> None:
    """A name that is put together from others was meant as several labels."""
    for name in sorted(names):
        for sign in "|;":
            parts = {part.strip() for part in name.split(sign)}
            if len(parts) > 1 and parts <= names:
                raise ValueError(f"{path}: the label {name!r} is several classes; add --separator '{sign}'")


def parse_split(text: str, where: str) -> int:
    """Number of a split by its name, -1 for none; ValueError for another."""
    if text.lower() not in SPLIT_NAMES:
        raise ValueError(f"{where}: split {text!r} is unknown; use {', '.join(SPLITS)}")
    return SPLIT_NAMES[text.lower()]


def _parse_fold(text: str, where: str) -> int:
    if text and not (text.isdecimal() and int(text) < MAX_FOLDS):
        raise ValueError(f"{where}: fold {text!r} is not a whole number from 0 to {MAX_FOLDS - 1}")
    return int(text) if text else UNSET
