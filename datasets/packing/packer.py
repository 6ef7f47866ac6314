"""Packs volumes or images and their labels into a volume file, or several: `pack(PackOptions(...))`.

The headers give the shape and the dtype of all; then each source is read once, in several processes, and its samples'
bytes go to a work folder beside the output (journal.py); duplicates and splits are settled last, when all is known,
and the file is completed and renamed. A killed pack goes on where it was when the same command is given again.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from datasets import sources
from datasets.masks import found_classes
from datasets.packing.journal import Finished, Workshop, key_of
from datasets.packing.labelling import Labelling, read_labelling
from datasets.packing.making import TooWide
from datasets.packing.parts import Packed, divide, rehearse
from datasets.packing.plan import Plan, make_plan, read_headers
from datasets.packing.pool import WorkerDied, run, survey
from datasets.packing.publish import publish, reserve
from datasets.packing.recheck import damaged
from datasets.packing.recipe import PackOptions
from datasets.packing.samples import Bench, Task, files_of, identity
from datasets.sources import Header, Source
from datasets.writer import require_replaceable

Progress = Callable[[int, int, int, int, str], None]
"""called with bytes that are done, of all, and items that are done, of all, and what these are: masks whose values are
looked up, sources, samples that are written"""
Tell = Callable[[str], None]
"""called with what a user should know at once"""


class BadSources(ValueError):
    """Some sources cannot be packed, and nothing was written; what was read is kept for the next time."""

    def __init__(self, bad: list[tuple[Path, str]], packed: int) -> None:
        super().__init__(f"{len(bad)} of {len(bad) + packed} cannot be packed")
        self.bad = bad


@dataclass(frozen=True)
class PackSummary:
    """What was written. counts: class -> split -> samples (that have it)."""

    paths: list[Path]
    task: str
    shape: tuple[int, ...] | None
    dtype: str
    num_samples: int
    size_bytes: int
    fingerprint: str
    counts: dict[str, dict[str, int]]
    splits: dict[str, int]
    folds: list[int]
    bad: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def pack(options: PackOptions, progress: Progress | None = None, tell: Tell | None = None) -> PackSummary:
    """Write `options.output` and say what is in it.

    ValueError (one line) for a user's mistake; BadSources where some cannot be packed and `skip_bad` is not set;
    OSError where the disk is full.
    """
    progress, tell = progress or (lambda *_: None), tell or (lambda _: None)
    try:
        return _pack(options, progress, tell, wide=False)
    except TooWide:
        return _pack(options, progress, tell, wide=True)


def _pack(options: PackOptions, progress: Progress, tell: Tell, wide: bool) -> PackSummary:
    found = sources.find(options.sources, options.channels)
    _protect_inputs(options, found)
    if options.shard_bytes is None:
        require_replaceable(options.output)
    labelling = read_labelling(options, found)
    headers, unread = read_headers(found, labelling.masks)
    labelling = _with_classes(options, labelling, found, headers, progress)
    plan = make_plan(options, found, headers, unread, labelling, wide)
    if plan.key != make_plan(options, found, headers, unread, labelling, True).key == key_of(options.output):
        raise TooWide  # an earlier start has found that out
    rehearse(options, labelling, list(plan.shapes))
    anew = not wide and key_of(options.output) not in ("", plan.key)
    if anew:
        tell("an earlier start had other options for the voxels: all sources are read anew")
    with Workshop(options.output, plan.key) as shop:
        _take_up(options, plan, labelling, shop, tell)
        reasons = dict(plan.bad) | _make_samples(options, plan, labelling, shop, progress)
        bad = [(found[id].path, reasons[id]) for id in found if id in reasons]
        done = [shop.finished[id] for id in found if id not in reasons]
        if bad and not options.skip_bad:
            raise BadSources(bad, len(done))
        if not done:
            raise ValueError(f"nothing can be packed; the first, {bad[0][0]}: {bad[0][1]}")
        packed = divide(options, labelling, done, {id: source.path for id, source in found.items()}, bad)
        packed.notes.extend([*_filled(options, plan, done), *_passed_over(options, plan, labelling)])
        shop.sync()
        paths = publish(options, plan, labelling, packed, shop.folder, _writing(plan, packed, progress))
        shop.remove()
    return _summarise(paths, packed, bad)


def _filled(options: PackOptions, plan: Plan, done: Sequence[Finished]) -> list[str]:
    """A note on voxels that were NaN: what a network learns of them is `--nan`."""
    shares = {one.id: one.filled / plan.shapes[one.id][0] / math.prod(one.source_shape) for one in done if one.filled}
    if not shares:
        return []
    most, total = max(shares, key=lambda id: shares[id]), sum(one.filled for one in done)
    value, many = options.recipe.nan, f"{len(shares)} of {len(done)} sources"
    return [f"{total:,} voxels in {many} were NaN and are {value:g} now; {shares[most]:.1%} of {most}, at most"]


def _passed_over(options: PackOptions, plan: Plan, labelling: Labelling) -> list[str]:
    """A note on files in the folders that are in no sample: of other formats, of a channel that is not asked for."""
    used = [*plan.sources.values(), *(labelling.masks or {}).values()]
    known = {file for source in used for file in files_of(source)}
    known |= {path for path in (options.labels, options.split_list, options.atlas, options.regions) if path}
    others = [
        path
        for folder in options.sources
        if folder.is_dir()
        for path in sorted(folder.rglob("*"))
        if path not in known and not path.is_dir() and not path.name.startswith(".")
    ]
    return [f"{len(others)} other file(s) were passed over, such as {others[0]}"] if others else []


def _writing(plan: Plan, packed: Packed, progress: Progress) -> Callable[[int], None]:
    """Progress of the last step, by samples."""
    size = [0, *accumulate(plan.bytes_of(entry.shape) for _, entry in packed.samples)]
    return lambda done: progress(size[done], size[-1], done, len(packed.samples), "samples written")


def _with_classes(
    options: PackOptions,
    labelling: Labelling,
    found: Mapping[str, Source],
    headers: Mapping[str, Header],
    progress: Progress,
) -> Labelling:
    """Label maps whose values have no names are read once more, before the others, for the values that they have."""
    if labelling.masks is None or labelling.classes is not None or not headers:
        return labelling
    masks = [(labelling.masks[id], found[id], header) for id, header in headers.items()]
    size = [0, *accumulate(_bytes_of(mask) for mask, _, _ in masks)]

    def report(done: int) -> None:
        progress(size[done], size[-1], done, len(masks), "masks looked up")

    try:
        values = survey(masks, _workers(options, len(masks)), report)
    except WorkerDied:
        raise OSError("a process was killed while it read the masks: out of memory? Try --workers 1") from None
    classes = found_classes(values)
    return replace(labelling, classes=classes, class_names=classes.names)


def _bytes_of(source: Source) -> int:
    return sum(path.stat().st_size for path in source.files)


def _take_up(options: PackOptions, plan: Plan, labelling: Labelling, shop: Workshop, tell: Tell) -> None:
    """Of what an earlier start has finished, keep what is still of the same files, and undamaged."""
    if not shop.finished:
        return
    now = {id: identity(_task(options, plan, labelling, id)) for id in plan.shapes}
    shop.forget({id for id, done in shop.finished.items() if now.get(id) != done.identity})
    spoilt = damaged(shop.folder, shop.finished.values(), _workers(options, len(shop.finished) or 1))
    shop.forget(spoilt)
    if spoilt:
        names = ", ".join(sorted(spoilt)[:3]) + (" ..." if len(spoilt) > 3 else "")
        tell(f"what an earlier start has kept of {len(spoilt)} source(s) is damaged, they are read again: {names}")
    if shop.finished:
        tell(f"going on from an earlier start: {len(shop.finished)} of {len(now)} sources need not be read again")


def _make_samples(
    options: PackOptions, plan: Plan, labelling: Labelling, shop: Workshop, progress: Progress
) -> dict[str, str]:
    """Read what is not finished; the reason for each source that cannot be packed."""
    tasks = {id: _task(options, plan, labelling, id) for id in plan.shapes}
    rows = reserve(plan, labelling, options, shop.folder) if plan.in_place else {}
    todo = [replace(task, row=rows.get(id)) for id, task in tasks.items() if id not in shop.finished]
    size = {id: _bytes_of(plan.sources[id]) for id in plan.shapes}
    count = sum(size[id] for id in shop.finished), len(shop.finished)
    bench = Bench(
        folder=shop.folder,
        recipe=options.recipe,
        dtype=plan.dtype,
        shape=plan.shape,
        form=None if plan.shape is None else plan.form(labelling.task, [plan.shape]),
        atlas=labelling.atlas,
        classes=labelling.classes,
        channels=next(iter(plan.shapes.values()))[0],
    )
    bad = {}
    with _named_deaths(shop):
        for task, outcome in run(bench, todo, _workers(options, len(todo))):
            if isinstance(outcome, Finished):
                shop.add(outcome)
            else:
                bad[task.source.id] = outcome
            count = count[0] + size[task.source.id], count[1] + 1
            progress(count[0], sum(size.values()), count[1], len(size), "sources")
    return bad


def _task(options: PackOptions, plan: Plan, labelling: Labelling, id: str) -> Task:
    label = labelling.number(id) if options.recipe.patch is not None and labelling.atlas is None else None
    return Task(plan.sources[id], label, None if labelling.masks is None else labelling.masks[id])


@contextlib.contextmanager
def _named_deaths(shop: Workshop) -> Iterator[None]:
    try:
        yield
    except WorkerDied:
        suspects = " or ".join(shop.suspects()) or "a source"
        raise OSError(
            f"a process was killed while it read {suspects}: out of memory? What is finished is kept; "
            "give the same command again with --workers 1"
        ) from None


def _workers(options: PackOptions, tasks: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(options.workers or cores, tasks))


def _protect_inputs(options: PackOptions, found: Mapping[str, Source]) -> None:
    target = options.output.resolve()
    tables = (options.labels, options.split_list, options.atlas, options.regions)
    for path in (*(path for source in found.values() for path in source.files), *tables):
        if path is not None and path.resolve() == target:
            raise ValueError(f"--output {options.output} would overwrite the input {path}; give another name")


def _summarise(paths: list[Path], packed: Packed, bad: list[tuple[Path, str]]) -> PackSummary:
    from datasets.layout import open_volumes

    volumes = open_volumes(paths)
    size = sum(path.stat().st_size for path in paths)
    rest: Any = packed.counts, packed.splits, packed.folds, bad, packed.notes
    return PackSummary(
        paths,
        volumes.task,
        None if volumes.ragged else volumes.shape,
        volumes.dtype.name,
        len(volumes),
        size,
        volumes.fingerprint,
        *rest,
    )
