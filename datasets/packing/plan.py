"""What a pack will come to, from the headers alone: one dtype, one shape, and the files that hold which source."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from datasets import drafts, sources
from datasets.packing.geometry import final_shape, resampled_shape
from datasets.packing.labelling import Labelling
from datasets.packing.prepare import ends, resolve_dtype
from datasets.packing.recipe import PackOptions, Recipe, expand
from datasets.sources import Header, Source, UnusableSource

LARGEST = 2**31
"""voxels of a sample"""
VERSION = 2
"""of the bytes that a recipe makes: when they change, nothing of an earlier run is kept"""


@dataclass(frozen=True)
class Plan:
    """Spatial axes are x, y, z or rows, columns."""

    sources: Mapping[str, Source]
    shapes: Mapping[str, tuple[int, ...]]
    """(C, *spatial) of each source's samples, of those whose header could be read"""
    bad: Mapping[str, str]
    """the reason for each other source"""
    shape: tuple[int, ...] | None
    """of all samples; None: each its own"""
    dtype: str
    chunk: tuple[int, ...] | None
    """voxels of a chunk"""
    compress: str | None
    """codec of the chunks"""
    in_place: bool
    """whole volumes, not chunked: written where they stay, if nothing is left out"""
    key: str
    """what the samples' bytes depend on, beside the sources"""

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Bytes of a sample's inputs, not compressed."""
        return math.prod(shape) * np.dtype(self.dtype).itemsize

    def form(self, task: str, shapes: Sequence[tuple[int, ...]]) -> drafts.Plan:
        """A file of samples of these shapes."""
        uneven = None if self.shape is not None else np.array(shapes, np.int64)
        return drafts.Plan(self.dtype, task, len(shapes), self.shape, uneven, self.chunk, self.compress)

    def draft_name(self, ids: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> str:
        """The same for the same volumes in the same order: what a stopped pack has written there is in its place."""
        told = json.dumps([list(ids), [list(shape) for shape in shapes]])
        return f"rows-{hashlib.sha256(told.encode()).hexdigest()[:16]}.dat"


def read_headers(
    found: Mapping[str, Source], masks: Mapping[str, Source] | None
) -> tuple[dict[str, Header], dict[str, str]]:
    """The header of each source, or the reason why it cannot be packed; masks: those that sources must have."""
    headers, bad = {}, {}
    for id, source in found.items():
        if masks is not None and id not in masks:
            bad[id] = "it has no mask"
            continue
        try:
            headers[id] = sources.header(source)
        except UnusableSource as error:
            bad[id] = str(error)
        except OSError as error:
            bad[id] = f"it cannot be read ({error.strerror or error})"
    return headers, bad


def make_plan(
    options: PackOptions,
    found: Mapping[str, Source],
    headers: Mapping[str, Header],
    bad: Mapping[str, str],
    labelling: Labelling,
    wide: bool,
) -> Plan:
    """ValueError where the sources do not fit into one file. wide: as in `resolve_dtype`."""
    recipe = options.recipe
    if (recipe.spacing or recipe.resize) and find_spec("scipy") is None:
        raise ValueError("--spacing and --resize need scipy: pip install -e '.[formats]'")
    headers = _coloured(found, headers)
    odd = _unlike(headers)
    odd |= _ill_sized(recipe, {id: header for id, header in headers.items() if id not in odd})
    bad, headers = {**bad, **odd}, {id: header for id, header in headers.items() if id not in odd}
    if not headers:
        id = next(id for id in found if id in bad)
        raise ValueError(f"nothing can be packed; the first, {found[id].path}: {bad[id]}")
    channels, *spatial = next(iter(headers.values())).shape
    axes = len(spatial)
    _check_kind(options, headers, channels, axes)
    shapes = {id: (channels, *final_shape(header.shape[1:], header.affine, recipe)) for id, header in headers.items()}
    shape = None if options.ragged else _common_shape(shapes)
    dtype = resolve_dtype(recipe.dtype, (header.dtype for header in headers.values()), wide)
    chunk = None if options.chunk is None else expand(options.chunk, axes, "--chunk")
    if chunk is not None and shape is not None and any(c > s for c, s in zip(chunk, shape[1:], strict=True)):
        raise ValueError(f"--chunk {chunk} is larger than a sample {shape[1:]}; leave it out, or give less")
    return Plan(
        sources=found,
        shapes=shapes,
        bad=bad,
        shape=shape,
        dtype=dtype,
        chunk=chunk,
        in_place=recipe.patch is None and options.compress is None and chunk is None,
        compress=options.compress,
        key=_key(options, labelling, dtype, shape, chunk),
    )


def _coloured(found: Mapping[str, Source], headers: Mapping[str, Header]) -> Mapping[str, Header]:
    """Grey images of 8 bits count as colour ones where most images are: they are packed as red = green = blue."""
    grey, colour = (
        [id for id, header in headers.items() if found[id].kind == "image" and header.shape[0] == channels]
        for channels in (1, 3)
    )
    if len(colour) <= len(grey):
        return headers
    turned = {id for id in grey if headers[id].dtype == np.uint8}
    return {
        id: replace(header, shape=(3, *header.shape[1:])) if id in turned else header for id, header in headers.items()
    }


def _unlike(headers: Mapping[str, Header]) -> dict[str, str]:
    """Sources of another number of channels or axes than most."""
    kinds = {id: (header.shape[0], len(header.shape) - 1) for id, header in headers.items()}
    (most, _), *others = Counter(kinds.values()).most_common() or [((0, 0), 0)]
    told = "{} channel(s) and {} axes"
    return {
        id: f"it has {told.format(*kind)}, most others {told.format(*most)}; pack these apart"
        for id, kind in kinds.items()
        if others and kind != most
    }


def _ill_sized(recipe: Recipe, headers: Mapping[str, Header]) -> dict[str, str]:
    """Volumes that no patch fits into, or that resampling would blow up."""
    odd = {}
    for id, header in headers.items():
        have = resampled_shape(header.shape[1:], header.affine, recipe)
        want = None if recipe.patch is None else expand(recipe.patch, len(have), "--patch")
        if want is not None and any(here < there for here, there in zip(have, want, strict=True)):
            odd[id] = f"its {have} voxels are smaller than the patch {want}"
        if math.prod(have) > LARGEST:
            odd[id] = (
                f"resampled it would have {math.prod(have):,} voxels; is its spacing right? {LARGEST:,} are the most"
            )
    return odd


def _check_kind(options: PackOptions, headers: Mapping[str, Header], channels: int, axes: int) -> None:
    recipe = options.recipe
    kinds = {header.dtype for header in headers.values()}
    if recipe.normalise == "imagenet" and (channels != 3 or kinds != {np.dtype(np.uint8)}):
        raise ValueError(
            f"--normalise imagenet is for red, green and blue of 8 bits; the sources have {channels} channel(s) of "
            f"{', '.join(sorted(map(str, kinds)))}"
        )
    if options.atlas is not None and axes != 3:
        raise ValueError("--atlas is for volumes, and the sources are images")
    if recipe.window is not None:
        for kind in kinds:
            ends(recipe.window, kind)


def into_files(sizes: Sequence[int], limit: int | None) -> list[list[int]]:
    """Numbers of the samples in each file: in order, as many as fit into `limit` bytes, at least one."""
    files: list[list[int]] = [[]]
    room = limit or math.inf
    for number, size in enumerate(sizes):
        if files[-1] and size > room:
            files.append([])
            room = limit or math.inf
        files[-1].append(number)
        room -= size
    return files


def file_names(output: Path, count: int, sharded: bool) -> list[Path]:
    """`scans.h5`; with --shard-size scans-00001-of-00004.h5 and so on."""
    if not sharded:
        return [output]
    return [output.with_name(f"{output.stem}-{n:05d}-of-{count:05d}{output.suffix}") for n in range(1, count + 1)]


def _common_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    counts = Counter(shapes.values())
    if len(counts) > 1:
        spatial = [shape[1:] for shape in counts]
        listed = ", ".join(f"{'x'.join(map(str, shape[1:]))} ({n})" for shape, n in counts.most_common(4))
        odd = next(id for id, shape in shapes.items() if shape == counts.most_common()[-1][0])
        size = ",".join(str(max(axis)) for axis in zip(*spatial, strict=True))
        raise ValueError(
            f"the volumes differ in shape: {listed}, such as {odd!r}; add --size (the largest: {size}), --resize, "
            "--patch, or --ragged"
        )
    return next(iter(counts))


def _key(
    options: PackOptions,
    labelling: Labelling,
    dtype: str,
    shape: tuple[int, ...] | None,
    chunk: tuple[int, ...] | None,
) -> str:
    atlas = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (options.atlas, options.regions) if path]
    recipe = asdict(options.recipe)
    if options.recipe.patch is None and labelling.task != "segmentation":
        del recipe["seed"]  # nothing is drawn
    told = [VERSION, recipe, dtype, shape, chunk, options.compress, options.ragged, options.channels]
    told += [atlas, sorted(labelling.classes.number_of.items()) if labelling.classes else [], labelling.task]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
