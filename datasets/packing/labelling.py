"""What each source is labelled with, and the part of the data it belongs to, before any voxel is packed."""

from collections.abc import Mapping
from dataclasses import dataclass

from datasets.atlas import Atlas, read_atlas
from datasets.folders import read_folders
from datasets.masks import Classes, pair_masks, read_classes, table_masks
from datasets.packing.recipe import FOLDERS, PackOptions
from datasets.partition import UNSET
from datasets.sources import Source
from datasets.splitlist import merge_list
from datasets.tables import Columns, Row, Table, match_rows, read_table


@dataclass(frozen=True)
class Labelling:
    """Rows by source id, and what the classes are."""

    task: str
    rows: Mapping[str, Row]
    class_names: list[str]
    """empty while the values of label maps have no names"""
    atlas: Atlas | None = None
    masks: Mapping[str, Source] | None = None
    """of a segmentation task; sources that have none are left out"""
    classes: Classes | None = None

    def group(self, id: str) -> str:
        return self.rows[id].group or id

    def number(self, id: str) -> int:
        """Class number of a whole source."""
        return self.class_names.index(self.rows[id].labels[0])


def read_labelling(options: PackOptions, sources: Mapping[str, Source]) -> Labelling:
    """ValueError with one line for labels that do not fit the sources, or one another."""
    table = _read_table(options, sources)
    known = None if table is None else table.rows
    if options.split_list is not None:
        known = merge_list(options.split_list, known, list(sources))
    rows = {id: (known or {}).get(id, Row()) for id in sources}
    _require_folds(options, rows)
    if options.atlas is not None and options.regions is not None:
        atlas = read_atlas(options.atlas, options.regions)
        return Labelling("classification", rows, atlas.class_names, atlas)
    masks = _masks(options, sources, rows)
    if masks is not None:
        classes = None if options.classes is None else read_classes(options.classes)
        return Labelling("segmentation", rows, classes.names if classes else [], masks=masks, classes=classes)
    assert table is not None
    if table.several and options.recipe.patch is not None:
        raise ValueError("--patch cuts patches of one class each, but a sample has several here; leave --patch out")
    return Labelling("multilabel" if table.several else "classification", rows, table.class_names)


def _read_table(options: PackOptions, sources: Mapping[str, Source]) -> Table | None:
    if options.labels is None:
        return None
    if str(options.labels) == FOLDERS and not options.labels.is_file():
        return read_folders({id: source.folder for id, source in sources.items()})
    bare = options.atlas is not None or options.masks is not None or options.by_mask
    labels = () if bare else options.label
    columns = Columns(
        id=options.id, labels=labels, separator=options.separator, none=options.no_label, group=options.group
    )
    table = read_table(options.labels, columns)
    return Table(match_rows(options.labels, table.rows, list(sources)), table.class_names, table.several)


def _masks(options: PackOptions, sources: Mapping[str, Source], rows: Mapping[str, Row]) -> Mapping[str, Source] | None:
    if options.masks is not None:
        return pair_masks(options.masks, sources)
    return table_masks({id: row.mask for id, row in rows.items()}) if options.by_mask else None


def _require_folds(options: PackOptions, rows: Mapping[str, Row]) -> None:
    most = max((row.fold for row in rows.values()), default=UNSET)
    if most != UNSET and options.folds is None:
        raise ValueError(f"{options.split_list or options.labels} has folds: add --folds {most + 1}")
