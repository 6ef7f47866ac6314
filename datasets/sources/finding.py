"""Finds the sources among files and folders: by name only, but for DICOM, whose headers tell series apart."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from datasets.sources import dicom
from datasets.sources.contract import SUFFIXES, NotASource, Source, split_name


@dataclass(frozen=True)
class _Item:
    """One source before ids are settled."""

    name: str
    """its id, unless another one below the same folder has it"""
    place: str
    """path from that folder, without suffix; '' for a file given by name"""
    folder: str
    kind: str
    files: tuple[Path, ...]
    channels: int = 0


def find(entries: Sequence[Path], channels: Sequence[str] = (), apart: bool = False) -> dict[str, Source]:
    """Id -> source of files and folders (searched recursively, sorted, hidden ones skipped), in the order given.

    An id is a file's name without suffix, a DICOM series' folder name. Ids that collide below one folder become paths
    from it: cat/1, dog/1.
    With `apart` those that collide between folders become paths from what these have in common, too.
    A file that is named twice is one. With `channels`, files ID_CHANNEL are one source ID; other names are left out.
    Raises NotASource (nothing there, nothing that is read) and ValueError (an id twice, a channel missing).
    """
    named: list[Source] = []
    for items in _groups(entries):
        joined = _join_channels(items, tuple(channels)) if channels else items
        times = Counter(item.name for item in joined)
        for item in joined:
            name = item.place if times[item.name] > 1 and item.place else item.name
            named.append(Source(name, item.files, item.kind, item.folder, item.channels))
    found: dict[str, Source] = {}
    for source in _told_apart(_once(named)) if apart else _once(named):
        if source.id in found:
            raise ValueError(
                f"two files have the id {source.id!r}: {found[source.id].path} and {source.path}; "
                "rename one, or give one of them"
            )
        found[source.id] = source
    if not found:
        raise NotASource("no source was given; name files or folders")
    return found


def _once(named: list[Source]) -> list[Source]:
    """Without those that stand for the same files under the same id a second time."""
    once: dict[tuple[str | Path, ...], Source] = {}
    for source in named:
        once.setdefault((source.id, *map(Path.resolve, source.files)), source)
    return list(once.values())


def _told_apart(named: list[Source]) -> list[Source]:
    """Ids that several sources have with the folders before them that tell these apart: A/scan, B/scan."""
    times = Counter(source.id for source in named)
    folders = {source: source.files[0].resolve().parent for source in named if times[source.id] > 1}
    if len(set(folders.values())) < 2:
        return named
    top = Path(os.path.commonpath(folders.values()))
    told = []
    for source in named:
        if source in folders:
            above = folders[source].relative_to(top)
            same = len(source.files) > 1 and above.name == PurePath(source.id).name  # a series is its folder
            source = replace(source, id=(above if same else above / PurePath(source.id).name).as_posix())
        told.append(source)
    return told


def _groups(entries: Sequence[Path]) -> Iterator[list[_Item]]:
    """The items of each folder; those of all files given by name together, as a shell's pattern gives them."""
    named = [entry for entry in entries if not entry.is_dir()]
    for entry in entries:
        if entry.is_dir():
            items = _merge_series([_item(path, entry) for path in _walk(entry)], entry)
            if not items:
                raise NotASource(f"{entry} holds no file that is read; known are {', '.join(SUFFIXES)} and DICOM")
            yield items
        elif named and entry == named[0]:
            yield _merge_series([_item(path, None) for path in named], None)


def _walk(folder: Path) -> Iterator[Path]:
    """The files of a known format below a folder, sorted; DICOM without a suffix is known by its contents."""
    paths: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        found = Path(root).stat()
        if (found.st_dev, found.st_ino) in seen:  # a link in a circle, or a second way to one folder
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [Path(root, name) for name in names if not name.startswith(".") and name.upper() != "DICOMDIR"]
    for path in sorted(paths):
        unknown = split_name(path.name)[1] is None
        if unknown and (path.suffix[1:].isalpha() or not dicom.sniff(path)):
            continue
        if path.is_file():
            yield path


def _item(path: Path, entry: Path | None) -> _Item:
    """A file as a source of its own. NotASource for a named one that is missing or of no known format."""
    if entry is None and not path.is_file():
        raise NotASource(f"{path} does not exist; give files ({', '.join(SUFFIXES)}), or folders that hold some")
    stem, kind = split_name(path.name)
    if kind is None and entry is None and not dicom.sniff(path):
        half = "; it is half of an .hdr/.img pair, convert it to .nii.gz" if path.suffix in (".hdr", ".img") else ""
        raise NotASource(f"{path} has no suffix that is read{half}; known are {', '.join(SUFFIXES)} and DICOM")
    place, folder = "", ""
    inside = path.name if entry is None else str(path.relative_to(entry))
    if not inside.isprintable():  # it would break a message's line, or could not be stored as UTF-8
        raise NotASource(f"the name {os.fsencode(inside)!r} in {entry or path.parent} is not printable text; rename it")
    if entry is not None:
        within = path.relative_to(entry).parent
        place, folder = (within / stem).as_posix(), _text(within)
    return _Item(stem, place, folder, kind or "dicom", (path,))


def _text(folder: PurePath) -> str:
    return "" if folder == PurePath() else folder.as_posix()


def _merge_series(items: list[_Item], entry: Path | None) -> list[_Item]:
    """DICOM files of one series in one folder become one item, at the place of the first; objects without pixels go."""
    merged: list[_Item | None] = list(items)
    folders: dict[Path, list[tuple[int, dicom.Label]]] = {}
    for number, item in enumerate(items):
        if item.kind == "dicom":
            label = dicom.label(item.files[0])
            if label.pixels or entry is None:
                folders.setdefault(item.files[0].parent, []).append((number, label))
            else:
                merged[number] = None
    for folder, members in folders.items():
        series: dict[str, list[tuple[int, dicom.Label]]] = {}
        for number, label in members:
            series.setdefault(label.series or f"file {number}", []).append((number, label))
        several = [found for found in series.values() if len(found) > 1]  # one file keeps its own name
        for tail, found in zip(_tails([found[0][1] for found in several]), several, strict=True):
            first, *others = (number for number, _ in found)
            merged[first] = _series_item([items[number] for number, _ in found], folder, entry, tail)
            for number in others:
                merged[number] = None
    return [item for item in merged if item is not None]


def _series_item(items: list[_Item], folder: Path, entry: Path | None, tail: str) -> _Item:
    files = tuple(item.files[0] for item in items)
    name = folder.resolve().name + tail
    if entry is None:
        return _Item(name, "", "", "dicom", files)
    within = folder.relative_to(entry)
    above = "" if folder == entry else _text(within.parent)
    place = name if folder == entry else within.as_posix() + tail
    return _Item(name, place, above, "dicom", files)


def _tails(series: list[dicom.Label]) -> list[str]:
    """What tells the series of one folder apart: nothing for one alone, else number, description or end of the UID."""
    if len(series) < 2:
        return [""] * len(series)
    choices = (
        [label.number for label in series],
        [f"{label.number}_{label.description}".strip("_") for label in series],
        [label.series.rpartition(".")[2] for label in series],
    )
    for names in choices:
        if all(names) and len(set(names)) == len(names):
            return [f"_{name}" for name in names]
    return [f"_{label.series}" for label in series]


def _join_channels(items: list[_Item], channels: tuple[str, ...]) -> list[_Item]:
    """Items ID_CHANNEL beside each other become one item ID. ValueError: a channel missing, twice, or of other kind."""
    samples: dict[tuple[Path, str], dict[str, _Item]] = {}
    for item in items:
        for channel in channels:
            if item.name.endswith(f"_{channel}") and len(item.name) > len(channel) + 1:
                key = (item.files[0].parent, item.name[: -len(channel) - 1])
                before = samples.setdefault(key, {}).setdefault(channel, item)
                if before is not item:
                    raise ValueError(f"channel {channel!r} of {key[1]!r} is there twice: {_both(before, item)}")
                break
    if not samples:
        wanted = ", ".join(f"ID_{channel}" for channel in channels)
        raise NotASource(f"no file is named after the channels: {items[0].files[0]} is none of {wanted}")
    return [_sample(folder, name, found, channels) for (folder, name), found in samples.items()]


def _sample(folder: Path, name: str, found: dict[str, _Item], channels: tuple[str, ...]) -> _Item:
    missing = [channel for channel in channels if channel not in found]
    if missing:
        there = ", ".join(found[channel].files[0].name for channel in channels if channel in found)
        raise ValueError(f"{name!r} lacks channel {missing[0]!r}: {folder} holds only {there}; add {name}_{missing[0]}")
    parts = [found[channel] for channel in channels]
    for part in parts:
        if part.kind != parts[0].kind:
            raise ValueError(f"channels of {name!r} are of two formats: {_both(parts[0], part)}; convert one")
        if len(part.files) > 1:
            raise ValueError(f"a channel is one file, and {part.files[0].parent} is a DICOM series; convert it first")
    place = parts[0].place[: -len(channels[0]) - 1]
    return replace(
        parts[0], name=name, place=place, files=tuple(part.files[0] for part in parts), channels=len(channels)
    )


def _both(one: _Item, other: _Item) -> str:
    return f"{one.files[0]} and {other.files[0]}"
