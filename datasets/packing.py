"""Packs NIfTI volumes and their labels into one volume file: whole volumes, or patches drawn from them.

Two passes with one volume in memory at a time: the first measures every source (so that one dtype and a known number
of samples fit all), the second writes. A volume that cannot be used is skipped and reported; any other error leaves
nothing behind.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.atlas import Atlas, read_atlas
from datasets.duplicates import (
    ACTIONS,
    Print,
    find_twins,
    fingerprint,
    refuse_any,
    refuse_leaks,
    told,
    without_equals,
)
from datasets.layout import open_volumes
from datasets.nifti import (
    SUFFIXES,
    NotNifti,
    UnusableVolume,
    Volume,
    check_header,
    describe_source,
    read_volume,
    volume_id,
)
from datasets.order import philox_bits
from datasets.partition import SPLITS, UNSET, fold_samples, split_samples
from datasets.prepare import (
    DTYPES,
    NORMALISATIONS,
    Intensities,
    centre_fit,
    choose_storage,
    cut_patch,
    measure,
    move_origin,
    normalisation,
    resolve_dtype,
    store,
)
from datasets.splitlist import merge_list
from datasets.tables import Columns, Row, match_rows, read_table, sort_names
from datasets.writer import VolumeWriter, require_replaceable

Progress = Callable[[int, int, str], None]
"""called with volumes done, volumes to do (both passes), and the name of the next file"""


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What `hpc pack` was asked for. ValueError for options that contradict each other."""

    sources: tuple[Path, ...]
    """NIfTI files, or folders that are searched for them"""
    output: Path
    labels: Path | None = None
    """table with columns id, label[, group][, split][, fold]; beside an atlas it has no column label"""
    group: str | None = None
    """column of the table that names the group; default: 'group' if there is one"""
    split: tuple[float, float, float] = (0.7, 0.15, 0.15)
    split_list: Path | None = None
    """JSON with the ids of each split, or of each fold"""
    folds: int | None = None
    """of cross-validation: all samples that are not of the test split are in one; then the validation share is 0"""
    seed: int = 0
    atlas: Path | None = None
    regions: Path | None = None
    """table with columns value, label: the classes of the atlas"""
    patch: tuple[int, int, int] | None = None
    """voxels of a patch in x, y, z (RAS)"""
    per_class: int | None = None
    """patches drawn of each class in each volume"""
    size: tuple[int, int, int] | None = None
    """voxels that whole volumes are cropped or padded to"""
    dtype: str = "keep"
    normalise: str = "zscore"
    duplicates: str | None = None
    """keep, drop or error; None: kept and told, but an error where two splits have them"""

    def __post_init__(self) -> None:
        if (self.atlas is None) != (self.regions is None):
            raise ValueError("an atlas and its regions go together: give both --atlas A.nii.gz and --regions R.csv")
        if self.labels is None and self.atlas is None:
            raise ValueError("no labels: give --labels TABLE (columns id,label), or --atlas A.nii.gz --regions R.csv")
        if self.atlas is not None and self.patch is None:
            raise ValueError("an atlas gives the class of a place, not of a whole volume: add --patch, for example 24")
        if self.patch is not None and self.size is not None:
            raise ValueError("--size is for whole volumes and --patch for parts of them; give one of the two")
        if self.per_class is not None and (self.patch is None or self.per_class < 1):
            raise ValueError(f"--per-class {self.per_class} counts patches, from 1 on; it needs --patch")
        if self.patch is not None and self.per_class is None:
            raise ValueError("how many patches of each class in each volume? add --per-class, for example 100")
        for name, shape in (("--patch", self.patch), ("--size", self.size)):
            if shape is not None and (len(shape) != 3 or min(shape) < 1):
                raise ValueError(f"{name} {shape} is not one or three numbers of voxels above 0")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype!r} is unknown; use {', '.join(DTYPES)}")
        if self.normalise not in NORMALISATIONS:
            raise ValueError(f"--normalise {self.normalise!r} is unknown; use {', '.join(NORMALISATIONS)}")
        if self.duplicates not in (None, *ACTIONS):
            raise ValueError(f"--duplicates {self.duplicates!r} is unknown; use {', '.join(ACTIONS)}")
        if self.group is not None and self.labels is None:
            raise ValueError(f"--group {self.group} is a column of a table; add --labels TABLE")
        if self.folds is not None and self.split[SPLITS.index("validation")]:
            shares = "/".join(f"{100 * share:g}" for share in self.split)
            raise ValueError(
                f"--folds {self.folds}: each fold is the validation once; write --split 85/0/15, not {shares}"
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"--seed {self.seed} is out of range; use 0 to 2**64 - 1")


@dataclass
class PackSummary:
    """What was packed. counts: class -> split -> samples; bad: (file, reason) of skipped volumes."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    num_samples: int
    size_bytes: int
    fingerprint: str
    counts: dict[str, dict[str, int]]
    bad: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """One sample to be: class number and, for a patch, its first voxel."""

    label: int
    start: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class _Survey:
    """One usable source after the first pass."""

    id: str
    path: Path
    row: Row | None
    shape: tuple[int, ...]
    intensities: Intensities
    places: list[_Place]
    manifest: dict[str, Any]
    print: Print

    @property
    def group(self) -> str:
        return (self.row and self.row.group) or self.id

    @property
    def labels(self) -> tuple[str, ...]:
        return self.row.labels if self.row else ()

    @property
    def split(self) -> int:
        return self.row.split if self.row else UNSET

    @property
    def fold(self) -> int:
        return self.row.fold if self.row else UNSET


@dataclass(frozen=True)
class _Labels:
    class_names: list[str]
    rows: dict[str, Row] | None
    atlas: Atlas | None


def pack(options: PackOptions, progress: Progress | None = None) -> PackSummary:
    """Write `options.output` and say what is in it. ValueError (one line) for a user's mistake, nothing left behind."""
    sources = find_sources(options.sources)
    _protect_inputs(options, list(sources.values()))
    require_replaceable(options.output)
    labels = _read_labels(options, list(sources))
    steps = _Steps(2 * len(sources), progress)
    surveys, bad = _survey_all(options, sources, labels, steps)
    if not surveys:
        raise ValueError(f"no volume can be packed; the first, {bad[0][0]}: {bad[0][1]}")
    twins = find_twins(surveys)
    if options.duplicates == "error":
        refuse_any(twins)
    if options.duplicates == "drop":
        surveys = without_equals(surveys, twins)
    _require_all_classes(labels, surveys, bad)
    shape = _common_shape(options, surveys)
    dtype = resolve_dtype(options.dtype, [survey.intensities for survey in surveys])
    split = _split(options, surveys)
    if options.duplicates != "keep":
        ids = (survey.id for survey in surveys for _ in survey.places)
        refuse_leaks(dict(zip(ids, split, strict=True)), twins)
    parts = iter(split)
    with VolumeWriter(
        options.output,
        shape=(1, *shape),
        dtype=dtype,
        num_samples=sum(len(survey.places) for survey in surveys),
        class_names=labels.class_names,
        packing=resolved(options, dtype),
        source=[survey.manifest for survey in surveys],
        folds=options.folds is not None,
    ) as writer:
        for survey in surveys:
            steps.next(survey.path.name)
            _write(writer, options, survey, dtype, parts)
    summary = _summarise(options.output, bad)
    summary.notes += [*_notes(labels, surveys, split), *told(twins, options.duplicates == "drop")]
    return summary


def find_sources(given: Sequence[Path]) -> dict[str, Path]:
    """Volume id -> file, in the order given, folders sorted. ValueError: nothing there, no NIfTI, an id twice."""
    found: dict[str, Path] = {}
    for path in (file for entry in given for file in _expand(entry)):
        check_header(path)
        name = volume_id(path)
        if name in found:
            raise ValueError(
                f"two files have the id {name!r}: {found[name]} and {path}; rename one, or give one of them"
            )
        found[name] = path
    if not found:
        raise ValueError("no source was given; name NIfTI files or folders")
    return found


def resolved(options: PackOptions, dtype: str) -> dict[str, Any]:
    """The options as stored in the file, with what `keep` came to and the rules that predict has to replay."""
    plain = asdict(options)
    for name in ("labels", "split_list", "atlas", "regions"):
        plain[name] = plain[name].name if plain[name] else None
    del plain["sources"], plain["output"]
    rules = {"orientation": "RAS", "foreground": "above 0, or all voxels when none is 0", "pad": "minimum"}
    return plain | rules | {"dtype": dtype}


class _Steps:
    """Counts volumes over both passes for the progress bar."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = -1, total, progress

    def next(self, name: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total, name)


def _expand(entry: Path) -> list[Path]:
    if not entry.is_dir():
        return [entry]
    files = sorted(path for path in entry.rglob("*") if path.name.lower().endswith(SUFFIXES))
    if not files:
        raise NotNifti(f"{entry} holds no .nii or .nii.gz file; give another folder")
    return files


def _protect_inputs(options: PackOptions, sources: list[Path]) -> None:
    target = options.output.resolve()
    for path in (*sources, options.labels, options.split_list, options.atlas, options.regions):
        if path is not None and path.resolve() == target:
            raise ValueError(f"--output {options.output} would overwrite the input {path}; give another name")


def _read_labels(options: PackOptions, ids: list[str]) -> _Labels:
    rows = None
    if options.labels is not None:
        columns = Columns(labels=("label",) if options.atlas is None else (), group=options.group)
        rows = match_rows(options.labels, read_table(options.labels, columns).rows, ids)
    if options.split_list is not None:
        rows = merge_list(options.split_list, rows, ids)
    if rows is not None and options.folds is None and any(row.fold != UNSET for row in rows.values()):
        most = max(row.fold for row in rows.values())
        raise ValueError(f"{options.split_list or options.labels} has folds: add --folds {most + 1}")
    if options.atlas is not None and options.regions is not None:
        atlas = read_atlas(options.atlas, options.regions)
        return _Labels(atlas.class_names, rows, atlas)
    assert rows is not None
    return _Labels(sort_names({name for row in rows.values() for name in row.labels}), rows, None)


def _survey_all(
    options: PackOptions, sources: dict[str, Path], labels: _Labels, steps: _Steps
) -> tuple[list[_Survey], list[tuple[Path, str]]]:
    surveys: list[_Survey] = []
    bad: list[tuple[Path, str]] = []
    for name, path in sources.items():
        steps.next(path.name)
        try:
            surveys.append(_survey(options, name, path, labels))
        except UnusableVolume as error:
            bad.append((path, str(error)))
    return surveys, bad


def _survey(options: PackOptions, name: str, path: Path, labels: _Labels) -> _Survey:
    volume = read_volume(path)
    row = labels.rows[name] if labels.rows else None
    label = labels.class_names.index(row.labels[0]) if row and row.labels else None
    places = [_Place(label)] if options.patch is None and label is not None else []
    if options.patch is not None:
        places = _draw_patches(options, name, volume, labels.atlas, label)
    return _Survey(
        name,
        path,
        row,
        volume.data.shape,
        measure(volume.data),
        places,
        describe_source(path),
        fingerprint(volume.data[None]),
    )


def _draw_patches(
    options: PackOptions, name: str, volume: Volume, atlas: Atlas | None, label: int | None
) -> list[_Place]:
    """per_class places of each class, drawn without repeats among the centres whose patch lies inside the volume."""
    assert options.patch is not None and options.per_class is not None
    rooms = tuple(have - want + 1 for have, want in zip(volume.data.shape, options.patch, strict=True))
    if min(rooms) < 1:
        raise UnusableVolume(f"its {volume.data.shape} voxels are smaller than the patch {options.patch}")
    inner = tuple(slice(want // 2, want // 2 + room) for want, room in zip(options.patch, rooms, strict=True))
    if atlas is not None:
        classes = atlas.classes(volume.data.shape, volume.affine)[inner].ravel()
        candidates = {number: np.flatnonzero(classes == number) for number in range(len(atlas.class_names))}
    else:
        assert label is not None
        centres = volume.data[inner].ravel()
        candidates = {label: np.flatnonzero(centres > 0) if (centres > 0).any() else np.arange(centres.size)}
    drawn = [
        _Place(number, start)
        for number, among in candidates.items()
        for start in _draw(among, rooms, options.per_class, (options.seed, zlib.crc32(name.encode()), number))
    ]
    if not drawn:
        raise UnusableVolume("no class of the atlas lies inside it; do both share one world space?")
    return drawn


def _draw(among: NDArray[Any], rooms: tuple[int, ...], count: int, key: tuple[int, int, int]) -> list[Any]:
    """`count` of the flat positions `among` (all, if fewer) as corners, by raw Philox bits of (seed, source, class)."""
    if among.size == 0:
        return []
    bits = philox_bits(key[:2], (0, 0, key[2], 0), among.size)
    chosen = among[np.argsort(bits, kind="stable")[:count]]
    return [tuple(int(axis) for axis in corner) for corner in np.stack(np.unravel_index(chosen, rooms), axis=1)]


def _require_all_classes(labels: _Labels, surveys: list[_Survey], bad: list[tuple[Path, str]]) -> None:
    present = {place.label for survey in surveys for place in survey.places}
    missing = [name for number, name in enumerate(labels.class_names) if number not in present]
    if missing:
        skipped = "".join(f"; {path} was skipped: {reason}" for path, reason in bad)
        raise ValueError(
            f"class {missing[0]!r} has no sample in any usable volume; remove it or add a volume with it{skipped}"
        )


def _common_shape(options: PackOptions, surveys: list[_Survey]) -> tuple[int, ...]:
    if options.patch or options.size:
        return options.patch or options.size or ()
    shapes = Counter(survey.shape for survey in surveys)
    if len(shapes) > 1:
        listed = ", ".join(f"{'x'.join(map(str, shape))} ({count})" for shape, count in shapes.most_common(4))
        size = ",".join(str(max(axis)) for axis in zip(*shapes, strict=True))
        raise ValueError(f"the volumes differ in shape: {listed}; add --size (the largest: {size}) or --patch")
    return surveys[0].shape


def _split(options: PackOptions, surveys: list[_Survey]) -> list[tuple[str, int | None]]:
    """Split and fold of each sample."""
    samples = [(place.label, survey) for survey in surveys for place in survey.places]
    labels, groups = np.array([label for label, _ in samples]), [survey.group for _, survey in samples]
    train = SPLITS.index("train")  # where the fold is given
    given = [train if survey.split == UNSET and survey.fold != UNSET else survey.split for _, survey in samples]
    split = split_samples(labels, groups, options.split, options.seed, given)
    folds: list[int | None] = [None] * len(samples)
    if options.folds is not None:
        _refuse_folds(options.folds, surveys)
        inside = np.flatnonzero(split != SPLITS.index("test"))
        if not len(inside):
            raise ValueError(
                f"--folds {options.folds}: all samples are in the test split; give it less (--split 85/0/15)"
            )
        own = [samples[number][1].fold for number in inside]
        found = fold_samples(labels[inside], [groups[number] for number in inside], options.folds, options.seed, own)
        for number, fold in zip(inside.tolist(), found.tolist(), strict=True):
            folds[number] = fold
    return list(zip((SPLITS[number] for number in split), folds, strict=True))


def _refuse_folds(folds: int, surveys: list[_Survey]) -> None:
    for survey in surveys:
        if survey.fold >= folds:
            raise ValueError(f"{survey.id!r} is given fold {survey.fold}, but --folds {folds} ends at {folds - 1}")
        if survey.split == SPLITS.index("validation"):
            raise ValueError(f"{survey.id!r} is given validation, but with --folds each fold is that once")


def _write(
    writer: VolumeWriter, options: PackOptions, survey: _Survey, dtype: str, parts: Iterator[tuple[str, int | None]]
) -> None:
    try:
        volume = read_volume(survey.path)
    except UnusableVolume as error:
        raise ValueError(f"{survey.path} changed while it was packed: {error}; pack again") from error
    storage = choose_storage(survey.intensities, dtype)
    scale, offset = normalisation(survey.intensities, storage, options.normalise)
    stored = store(volume.data, storage)
    for number, place in enumerate(survey.places):
        split, fold = next(parts)
        if place.start is not None and options.patch is not None:
            part, affine = cut_patch(stored, place.start, options.patch), move_origin(volume.affine, place.start)
        else:
            part, affine = centre_fit(stored, volume.affine, options.size or survey.shape)
        writer.add(
            part[None],
            place.label,
            id=survey.id if place.start is None else f"{survey.id}/{number:05d}",
            group=survey.group,
            split=split,
            fold=fold,
            affine=affine,
            scale=scale,
            offset=offset,
            source_shape=survey.shape,
        )


def _notes(labels: _Labels, surveys: list[_Survey], split: list[tuple[str, int | None]]) -> list[str]:
    notes = []
    if any(survey.split != UNSET for survey in surveys):
        notes.append("splits come from the table's column 'split', or from the list, where they are given")
    homes: dict[int, set[int | None]] = {}
    for place, (name, fold) in zip((place for survey in surveys for place in survey.places), split, strict=True):
        if name != "test":
            homes.setdefault(place.label, set()).add(fold)
    for number, folds in sorted(homes.items()):
        if len(folds) == 1 and folds != {None}:
            notes.append(
                f"class {labels.class_names[number]!r} is in fold {folds.pop()} alone: its run cannot learn it"
            )
    if len(labels.class_names) == 1:
        notes.append(f"there is only one class, {labels.class_names[0]!r}: nothing to tell apart")
    return notes


def _summarise(path: Path, bad: list[tuple[Path, str]]) -> PackSummary:
    volumes = open_volumes(path)
    tally = Counter(zip(volumes.targets.tolist(), volumes.split.tolist(), strict=True))
    counts = {
        name: {split: tally[number, code] for code, split in enumerate(SPLITS)}
        for number, name in enumerate(volumes.class_names)
    }
    size = path.stat().st_size
    unlearned = [name for name, splits in counts.items() if not splits[SPLITS[0]]]
    notes = [f"class {name!r} has no sample in train: a network cannot learn it" for name in unlearned]
    found = volumes.fingerprint
    return PackSummary(path, volumes.shape, volumes.dtype.name, len(volumes), size, found, counts, bad, notes)
