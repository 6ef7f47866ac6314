"""Labels from folders, one of each class as in torchvision's ImageFolder, below train/val/test or not."""

from collections.abc import Mapping
from pathlib import PurePosixPath

from datasets.partition import SPLITS
from datasets.tables import SPLIT_NAMES, Row, Table, sort_names


def read_folders(folders: Mapping[str, str]) -> Table:
    """Rows of samples by the folder that each lies in, as `Source.folder` has it: cat, cat/white or train/cat.

    The class is the first folder. Where all first ones are names of splits (train, val, test, ...), they give the
    split, and the class is the second. Raises ValueError for a sample in no folder of a class.
    """
    parts = {id: PurePosixPath(folder).parts for id, folder in folders.items()}
    for id, path in parts.items():
        if not path:
            raise ValueError(f"{id!r} lies in no folder of a class; give the folder above: cat/ and dog/ in it")
    first = {path[0] for path in parts.values()}
    splits = all(map(_is_split, first))
    if not splits and len({SPLIT_NAMES[name.lower()] for name in first if _is_split(name)}) > 1:
        named = ", ".join(f"{name}/" for name in sorted(first, key=_is_split))
        raise ValueError(f"some folders are splits and some are not: {named}; give the folders of splits alone")
    rows = {id: _row(id, path, splits) for id, path in parts.items()}
    return Table(rows, sort_names({row.labels[0] for row in rows.values()}))


def _is_split(name: str) -> bool:
    return name.isalpha() and name.lower() in SPLIT_NAMES


def _row(id: str, path: tuple[str, ...], splits: bool) -> Row:
    if not splits:
        return Row((path[0],))
    if len(path) < 2:
        split = SPLITS[SPLIT_NAMES[path[0].lower()]]
        raise ValueError(f"{id!r} lies in {path[0]}/, the folder of a split ({split}), but in no folder of a class")
    return Row((path[1],), split=SPLIT_NAMES[path[0].lower()])
