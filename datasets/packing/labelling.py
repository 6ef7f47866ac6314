"""What each source is labelled with, and the part of the data it belongs to, before any voxel is read."""

from collections.abc import Mapping
from dataclasses import dataclass

from datasets.atlas import Atlas, read_atlas
from datasets.folders import read_folders
from datasets.masks import find_masks, read_classes
from datasets.packing.recipe import FOLDERS, PackOptions
from datasets.partition import UNSET
from datasets.sources import Source
from datasets.splitlist import merge_list
from datasets.tables import Columns, Row, match_rows, read_table


@dataclass(frozen=True)
class Labelling:
    """Rows by source id, and what the classes are."""

    task: str
    rows: Mapping[str, Row]
    class_names: list[str] | None
    """None: the values that the label maps turn out to hold"""
    atlas: Atlas | None = None
    masks: Mapping[str, Source] | None = None
    values: dict[int, int] | None = None
    """class number of each value of a label map"""

    def group(self, id: str) -> str:
        return self.rows[id].group or id

    def number(self, id: str) -> int:
        """Class number of a whole source."""
        assert self.class_names is not None
        return self.class_names.index(self.rows[id].labels[0])


def read_labelling(options: PackOptions, sources: Mapping[str, Source]) -> Labelling:
    """ValueError with one line for labels that do not fit the sources, or one another."""
    ids = list(sources)
    rows, names, several = _read_rows(options, sources)
    if options.split_list is not None:
        rows = merge_list(options.split_list, rows, ids)
    rows = {id: (rows or {}).get(id, Row()) for id in ids}
    _require_folds(options, rows)
    if options.atlas is not None and options.regions is not None:
        atlas = read_atlas(options.atlas, options.regions)
        return Labelling("classification", rows, atlas.class_names, atlas)
    masks = _find_masks(options, sources, rows)
    if masks is not None:
        found = None if options.classes is None else read_classes(options.classes)
        return Labelling(
            "segmentation",
            rows,
            None if found is None else found.names,
            masks=masks,
            values=None if found is None else found.values,
        )
    return Labelling("multilabel" if several else "classification", rows, names)


def _read_rows(
    options: PackOptions, sources: Mapping[str, Source]
) -> tuple[dict[str, Row] | None, list[str] | None, bool]:
    """Rows of the table or the folders, the classes in order, whether a sample may have several."""
    if options.labels is None:
        return None, None, False
    if str(options.labels) == FOLDERS and not options.labels.is_file():
        found = read_folders({id: source.folder for id, source in sources.items()})
        return found.rows, found.class_names, False
    labels = () if options.atlas is not None or options.masks is not None or options.label == () else options.label
    columns = Columns(labels=labels, separator=options.separator, none=options.no_label, group=options.group)
    table = read_table(options.labels, columns)
    return match_rows(options.labels, table.rows, list(sources)), table.class_names, table.several


def _find_masks(
    options: PackOptions, sources: Mapping[str, Source], rows: Mapping[str, Row]
) -> Mapping[str, Source] | None:
    if options.masks is not None:
        return find_masks(options.masks, sources)
    if any(row.mask for row in rows.values()):
        raise ValueError("unreachable until masks of tables are wired")
    return None


def _require_folds(options: PackOptions, rows: Mapping[str, Row]) -> None:
    most = max((row.fold for row in rows.values()), default=UNSET)
    if most != UNSET and options.folds is None:
        raise ValueError(f"{options.split_list or options.labels} has folds: add --folds {most + 1}")

