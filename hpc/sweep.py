"""A sweep: rows from axes (`train.seed=0:5 train.optimizer.lr=1e-3,3e-4`), each a run, together one job array."""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc import instances, ledger, payload, template, yamlfile
from hpc.arrays import most_tasks
from hpc.errors import UserError
from hpc.experiment import Experiment, Source, flatten, is_duration
from hpc.instances import Instance
from hpc.plan import Carrier, make_whole
from hpc.rundir import RunDir, all_runs, run_id
from hpc.submission import choose_cluster
from hpc.sweepdir import Chunk, SweepDir

MOST_ROWS = 100_000
_QUOTED = re.compile(r"""\"(?:\\.|[^"\\])*\"|'(?:''|[^'])*'""", re.DOTALL)
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
    left_out: dict[str, str]
    """Equal runs that are finished or under way, with their states: they have no row."""
    cluster: str
    instance: Instance
    sweep: SweepDir
    chunks: list[Chunk]
    scripts: list[str]
    """Text of each chunk."""


def make(
    file: Path,
    axes: Sequence[str],
    runs: Path,
    zipped: bool = False,
    parallel: int | None = None,
    tiny: bool = False,
) -> SweepPlan:
    """Resolve every row, choose the cluster, and render the chunks' scripts. Raises UserError."""
    values = dict(parse_axis(axis) for axis in axes)
    if len(values) < len(axes):
        raise UserError(f"an axis stands twice in: {' '.join(axes)}")
    source = Source(file, tiny)
    variants = [_variant(source, overrides) for overrides in combine(values, zipped)]
    rows, left_out = _place(variants, runs)
    if not rows:
        told = ", ".join(f"{count} {state}" for state, count in Counter(left_out.values()).items())
        raise UserError(
            f"nothing to submit: there are equal runs of all rows ({told}), see 'hpc ls'; add seeds for more"
        )
    _share_one_request(rows)
    first = rows[0].experiment
    cluster = choose_cluster(first.launch.cluster)
    instance = instances.find(first.launch.instance)
    sweep = SweepDir(_folder(runs, rows))
    chunks = cut(len(rows), most_tasks(cluster) or len(rows), parallel)
    experiments = [row.experiment for row in rows]
    scripts = [template.render_array(experiments, instance, sweep, chunk, sys.executable) for chunk in chunks]
    return SweepPlan(values, rows, left_out, cluster, instance, sweep, chunks, scripts)


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
    """At commas outside brackets, braces and quotes: model.hidden=[8,8],[16,16] has two values.

    As in YAML a quote opens only where a value begins.
    """
    parts, depth, before, at = [""], 0, ",", 0
    while at < len(text):
        quoted = _QUOTED.match(text, at) if before in ",:[{" else None
        piece = quoted[0] if quoted else text[at]
        at += len(piece)
        depth += (piece in "[{") - (piece in "]}")
        if piece == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += piece
        before = before if piece.isspace() else piece
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


_Variant = tuple[tuple[str, ...], Experiment, dict[str, Any]]
"""Overrides, the experiment that they make, and its delta."""


def _variant(source: Source, overrides: tuple[str, ...]) -> _Variant:
    """A row's delta names every axis, also where the row has the base's value."""
    experiment, delta = source.resolve(overrides)
    values = flatten(experiment.as_dict())
    axes = [override.partition("=")[0] for override in overrides]
    return overrides, experiment, {**delta, **{key: values[key] for key in axes if key in values}}


def _place(variants: list[_Variant], runs: Path) -> tuple[list[Row], dict[str, str]]:
    """Rows under free names, and the equal runs that are finished or under way, with their states."""
    known = {run.name: run for run in all_runs(runs)}
    names = [_names(experiment, known) for _, experiment, _ in variants]
    first: dict[str, int] = {}
    for row, taken in enumerate(names):
        if (other := first.setdefault(taken[0], row)) != row:
            both = " and ".join(" ".join(variants[number][0]) for number in (other, row))
            raise UserError(f"rows {other} and {row} are equal ({both}): leave one of them out")
    equal = [known[name] for taken in names for name in taken[:-1]]
    settled = {s.run: s.state for s in ledger.statuses(equal) if s.state == "finished" or s.live} if equal else {}
    rows = [
        Row(taken[-1], overrides, experiment, delta)
        for (overrides, experiment, delta), taken in zip(variants, names, strict=True)
        if not settled.keys() & set(taken)
    ]
    return rows, settled


def _names(experiment: Experiment, known: Container[str]) -> list[str]:
    """The names of equal runs that are there, and last the name that the next one has."""
    names: list[str] = []
    resolved = experiment.as_dict()
    while not names or names[-1] in known:
        names.append(f"{experiment.name}-{run_id(resolved, len(names))}")
    return names


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
