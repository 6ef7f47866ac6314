"""A sweep: rows from axes (`train.seed=0:5 train.optimizer.lr=1e-3,3e-4`), each a run, together one job array."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc import instances, payload, template, yamlfile
from hpc.arrays import most_tasks
from hpc.errors import UserError
from hpc.experiment import Experiment, Source, flatten, is_duration
from hpc.instances import Instance
from hpc.plan import Carrier, make_whole
from hpc.rundir import RunDir, all_runs, run_id
from hpc.submission import choose_cluster
from hpc.sweepdir import Chunk, SweepDir

MOST_ROWS = 100_000
_RANGE = re.compile(r"(-?\d+):(-?\d+)(?::(-?\d+))?")


@dataclass(frozen=True)
class Row:
    """One run that is not made yet; its folder will be `name` in the sweep's."""

    name: str
    overrides: tuple[str, ...]
    experiment: Experiment
    delta: dict[str, Any]


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that is not made yet."""

    axes: dict[str, list[str]]
    rows: list[Row]
    finished: list[RunDir]
    """Equal runs that are finished: their rows are left out."""
    cluster: str
    instance: Instance
    sweep: SweepDir
    chunks: list[Chunk]
    scripts: list[str]
    """Text of each chunk."""


def make(file: Path, axes: Sequence[str], runs: Path, zipped: bool = False, parallel: int | None = None) -> SweepPlan:
    """Resolve every row, choose the cluster, and render the chunks' scripts. Raises UserError."""
    values = dict(parse_axis(axis) for axis in axes)
    if len(values) < len(axes):
        raise UserError(f"an axis stands twice in: {' '.join(axes)}")
    source = Source(file)
    variants = [_variant(source, overrides) for overrides in combine(values, zipped)]
    rows, finished = _place(variants, runs)
    if not rows:
        raise UserError(f"all {len(finished)} rows are finished: see 'hpc ls'; for more, add seeds: train.seed=5:10")
    _share_one_request(rows)
    first = rows[0].experiment
    cluster = choose_cluster(first.launch.cluster)
    instance = instances.find(first.launch.instance)
    sweep = SweepDir(_folder(runs, rows))
    chunks = cut(len(rows), most_tasks(cluster) or len(rows), parallel)
    scripts = [template.render_array(first, instance, sweep, chunk, sys.executable) for chunk in chunks]
    return SweepPlan(values, rows, finished, cluster, instance, sweep, chunks, scripts)


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Key and values of `key=a,b,c`, `key=0:5` (0 to 4) or `key=0:10:2`. Raises UserError."""
    key, equals, values = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"{text!r} is no axis; write train.seed=0:5 or train.optimizer.lr=1e-3,3e-4")
    found = [value for part in _split(values) for value in (_expand(part, text) if not is_duration(key) else [part])]
    if not found or "" in found:
        raise UserError(f"{text!r} has an empty value; write {key}=1,2,3, or {key}=null for the default")
    if len(found) > MOST_ROWS:
        raise UserError(f"{text!r} has {len(found)} values; a sweep has at most {MOST_ROWS} rows")
    return key, found


def _split(text: str) -> list[str]:
    """At commas outside brackets, braces and quotes: model.hidden=[8,8],[16,16] has two values."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _expand(value: str, axis: str) -> list[str]:
    match = _RANGE.fullmatch(value)
    if not match:
        return [value]
    start, stop, step = int(match[1]), int(match[2]), int(match[3] or 1)
    if step == 0 or not (numbers := range(start, stop, step)):
        raise UserError(f"{axis!r}: {value} holds no number; write 0:5 for 0, 1, 2, 3, 4 or 0:10:2")
    if len(numbers) > MOST_ROWS:
        raise UserError(f"{axis!r}: {value} has {len(numbers)} values; a sweep has at most {MOST_ROWS} rows")
    return [str(number) for number in numbers]


def combine(axes: dict[str, list[str]], zipped: bool) -> list[tuple[str, ...]]:
    """Overrides of each row: every combination, or with `zipped` the first values, the second, and so on."""
    columns = [[f"{key}={value}" for value in values] for key, values in axes.items()]
    if zipped:
        lengths = {key: len(values) for key, values in axes.items() if len(values) > 1}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{key} {length}" for key, length in lengths.items())
            raise UserError(
                f"--zip pairs axes of one length, and these differ: {told}; use --grid for all combinations"
            )
        length = max(lengths.values(), default=1)
        return list(zip(*[column * (length if len(column) == 1 else 1) for column in columns], strict=True))
    total = 1
    for column in columns:
        total *= len(column)
    if total > MOST_ROWS:
        raise UserError(f"{total} combinations; a sweep has at most {MOST_ROWS} rows")
    return list(itertools.product(*columns))


def _variant(source: Source, overrides: tuple[str, ...]) -> tuple[tuple[str, ...], Experiment, dict[str, Any]]:
    """A row's delta names every axis, also where the row has the base's value."""
    experiment, delta = source.resolve(overrides)
    values = flatten(experiment.as_dict())
    axes = [override.partition("=")[0] for override in overrides]
    return overrides, experiment, {**delta, **{key: values[key] for key in axes if key in values}}


def _place(
    variants: list[tuple[tuple[str, ...], Experiment, dict[str, Any]]], runs: Path
) -> tuple[list[Row], list[RunDir]]:
    """Rows under free names, and the finished runs that equal one."""
    known = {run.name: run for run in all_runs(runs)}
    taken, rows, finished = set(known), [], []
    for overrides, experiment, delta in variants:
        resolved = experiment.as_dict()
        for count in itertools.count():
            name = f"{experiment.name}-{run_id(resolved, count)}"
            if name not in taken:
                taken.add(name)
                rows.append(Row(name, overrides, experiment, delta))
                break
            if name in known and known[name].result.exists():
                finished.append(known[name])
                break
    return rows, finished


def _share_one_request(rows: list[Row]) -> None:
    first = rows[0].experiment
    for row in rows:
        if row.experiment.launch != first.launch or row.experiment.name != first.name:
            differing = ", ".join(text for text in row.overrides if text.startswith(("launch.", "name=")))
            raise UserError(f"{differing}: the rows of a sweep share one name and one request; make a sweep for each")


def _folder(runs: Path, rows: list[Row]) -> Path:
    names = {"rows": [row.name for row in rows]}
    count = 0
    while (path := runs / f"{rows[0].experiment.name}-sweep-{run_id(names, count)}").exists():
        count += 1
    return path


def cut(count: int, limit: int, parallel: int | None) -> list[Chunk]:
    """Chunks of at most `limit` rows, of even size; never more than `parallel` tasks at a time over all of them.

    SLURM knows no cap over several arrays, so each chunk has a share of it; with more chunks than the cap, a chunk
    waits for the end of another.
    """
    number = -(-count // limit)
    sizes = [count // number + (index < count % number) for index in range(number)]
    chunks, first = [], 0
    for index, size in enumerate(sizes):
        share = after = None
        if parallel is not None:
            lanes = min(number, parallel)
            share = parallel // lanes + (index % lanes < parallel % lanes)
            after = index - lanes if index >= lanes else None
        chunks.append(Chunk(index, first, size, share, after))
        first += size
    return chunks


def create(plan: SweepPlan, check: Callable[[], None]) -> SweepDir:
    """The sweep's folder with all its rows, whole or not at all; `check` runs beside, and raises to refuse the sweep.

    Raises UserError.
    """

    def fill(aside: Path) -> None:
        with ThreadPoolExecutor(1) as beside:
            checked = beside.submit(check)
            _fill(plan, SweepDir(aside))
            checked.result()

    make_whole(plan.sweep.path, fill)
    return plan.sweep


def _fill(plan: SweepPlan, aside: SweepDir) -> None:
    payload.snapshot(aside.code)
    carrier = Carrier(aside.code, plan.sweep.code)
    for row in plan.rows:
        run = RunDir(aside.path / row.name)
        for folder in (run.path, run.events, run.logs):
            folder.mkdir()
        # Not synced one by one: a thousand rows would wait for the disk three thousand times.
        run.experiment.write_text(yamlfile.dump(carrier.carry(row.experiment)))
        run.delta.write_text(yamlfile.dump(row.delta))
        run.code.symlink_to(Path("..") / aside.code.name)
    aside.rows_file.write_text("".join(f"{row.name}\n" for row in plan.rows))
    aside.write_chunks(plan.chunks, axes=plan.axes)
    for chunk, text in zip(plan.chunks, plan.scripts, strict=True):
        aside.script(chunk.number).write_text(text)
    aside.logs.mkdir()
