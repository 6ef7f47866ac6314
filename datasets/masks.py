"""Label maps from mask files: which mask is an image's, whether it fits, its classes, and voxels of each of them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.order import philox_bits
from datasets.sources import Header, Source, UnusableSource, find, header, read
from datasets.sources.contract import library
from datasets.tables import read_values

MAX_CLASSES = 255
"""A label map is of bytes, and 255 stays free."""
_VOID = "; where 255 means void, name it in a table of --classes (255,void) and train with train.loss.ignore: [void]"
NEAR = 0.1
"""Part of a voxel that the corners of image and mask may lie apart."""
_MARK = re.compile(r"[_.-](seg|segmentation|mask|label|labels)$", re.IGNORECASE)
_FIRST_CHANNEL = re.compile(r"_0000$")
_LARGEST_VALUE = 65535
_SLAB = 2**20
"""Voxels that are looked at together: their 8-byte indices stay in the cache."""
_BLOCK = 4096
"""Voxels that are counted together, and searched for one that was drawn."""


@dataclass(frozen=True)
class Classes:
    """The classes of label maps in order, and the number of the class of each value that a mask may have."""

    names: list[str]
    number_of: dict[int, int]

    def number(self, mask: NDArray[Any]) -> NDArray[np.uint8]:
        """A mask of uint8 or uint16 as a map of class numbers, uint8. UnusableSource for a value that is no class."""
        table = np.full(np.iinfo(mask.dtype).max + 1, MAX_CLASSES, np.uint8)
        for value, number in self.number_of.items():
            if value < len(table):
                table[value] = number
        numbers = np.empty(mask.shape, np.uint8)
        flat, out = mask.reshape(-1), numbers.reshape(-1)
        for first in range(0, mask.size, _SLAB):
            out[first : first + _SLAB] = table[flat[first : first + _SLAB]]
        if numbers.size and numbers.max() == MAX_CLASSES:
            value = int(flat[np.argmax(out == MAX_CLASSES)])
            known = ", ".join(map(str, sorted(self.number_of)[:20]))
            fault = f"its mask has the value {value}, which is no class; the classes have {known}"
            raise UnusableSource(fault + _VOID if value == MAX_CLASSES else fault)
        return numbers


def pair_masks(folder: Path, images: Mapping[str, Source]) -> dict[str, Source]:
    """The mask of each image: the file in the folder that has its id, or its id and _seg, -mask, _label and so on.

    The image case_0000 may have nnU-Net's case. An image without a mask is left out. Raises ValueError where none has
    one, where two files would serve, and for a folder that holds nothing that is read.
    """
    taken = {file for image in images.values() for file in image.files}
    exact, marked = dict[str, Source](), dict[str, list[Source]]()
    for id, mask in find([folder]).items():
        if taken.isdisjoint(mask.files):
            exact[id] = mask
            if _MARK.search(id):
                marked.setdefault(_MARK.sub("", id), []).append(mask)
    found, owner = dict[str, Source](), dict[str, str]()
    for id in images:
        names = [name for whole in (id, id.rpartition("/")[2]) for name in (whole, _FIRST_CHANNEL.sub("", whole))]
        fits = [exact[name] for name in names if name in exact][:1]
        fits = fits or next((marked[name] for name in names if name in marked), [])
        if len(fits) > 1:
            raise ValueError(f"{id!r} has two masks: {fits[0].path} and {fits[1].path}; move one away")
        for mask in fits:
            found[id] = mask
            if owner.setdefault(mask.id, id) != id:
                raise ValueError(f"{mask.path} would be the mask of {owner[mask.id]!r} and {id!r}; name one for each")
    if not found:
        first = next(iter(images), "")
        others = ", ".join(list(exact)[:3]) or "nothing else"
        raise ValueError(f"{folder} holds no mask of an image: {first!r} wants {first} or {first}_seg, not {others}")
    return found


def table_masks(masks: Mapping[str, Path | None]) -> dict[str, Source]:
    """The masks that a table names, by the image's id; those of empty cells are left out. ValueError for a bad file."""
    return {id: next(iter(find([path]).values())) for id, path in masks.items() if path is not None}


def read_mask(mask: Source, image: Source, wanted: Header) -> NDArray[Any]:
    """The values of an image's mask, (*spatial) uint8 or uint16; PNG gives palette indices or grey values.

    wanted: the image's header. Raises UnusableSource with the reason: another shape or place than the image's, or
    values that are no labels.
    """
    if mask.kind == "image":
        return _as_labels(mask, _read_indices(mask, wanted.shape[1:]))
    found = header(mask)
    if found.shape[0] != 1:
        raise UnusableSource(f"its mask {mask.path.name} has {found.shape[0]} channels; a mask has one")
    _check_shape(mask, found.shape[1:], wanted.shape[1:])
    if image.kind != "image":
        _check_place(mask, found.affine, wanted)
    return _as_labels(mask, read(mask).data[0])


def mask_values(mask: NDArray[Any]) -> list[int]:
    """The values that occur, ascending. UnusableSource where they are more than there can be classes."""
    present = np.zeros(np.iinfo(mask.dtype).max + 1, bool)
    flat = mask.reshape(-1)
    for first in range(0, mask.size, _SLAB):
        present[flat[first : first + _SLAB]] = True
    values: list[int] = np.flatnonzero(present).tolist()
    if len(values) > MAX_CLASSES:
        raise UnusableSource(f"its mask has {len(values)} different values, and {MAX_CLASSES} are the most; is it one?")
    return values


def found_classes(values: Mapping[int, Path]) -> Classes:
    """Classes of masks that nobody named: the values themselves, 0 to 254, or 0 and 255 of masks in black and white.

    values: what occurs, and the first mask that has it. Raises ValueError for others.
    """
    wrong = [] if set(values) <= {0, 255} else [value for value in values if value >= MAX_CLASSES]
    if wrong:
        raise ValueError(
            f"{values[min(wrong)]} has the value {min(wrong)}, and {MAX_CLASSES - 1} is the largest of a class without "
            "a name; name all by --classes TABLE (columns value,label)"
        )
    return _numbered({value: str(value) for value in values})


def read_classes(given: str) -> Classes:
    """'background,liver,tumour' (values from 0 on), or a file: nnU-Net's dataset.json, or a table value,label.

    Several values of a table may share a label. Raises ValueError.
    """
    path = Path(given)
    if path.suffix.lower() == ".json":
        return _numbered(_read_nnunet(path))
    if path.suffix.lower() in (".csv", ".tsv", ".txt", ".parquet") or path.is_file():
        return _numbered(read_values(path))
    names = [name.strip() for name in given.split(",")]
    if "" in names or len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"classes {given!r} are not two names or more, nor a file; write background,liver,tumour")
    return _numbered(dict(enumerate(names)))


def foreground(labels: NDArray[np.uint8], num_classes: int, count: int, key: tuple[int, int]) -> NDArray[np.int32]:
    """(num_classes, count) flat places (C order) of up to `count` voxels of each class, in the order drawn, then -1.

    labels: a map of class numbers. key: the seed and a number of the sample. Drawn without repeats, from raw Philox
    bits alone. Raises ValueError for maps of 2**31 voxels or more.
    """
    if labels.size >= 2**31:
        raise ValueError(f"a label map of {labels.size} voxels is too large: places are numbers below 2**31")
    flat = labels.reshape(-1)
    counts = _count_blocks(flat, num_classes)
    places = np.full((num_classes, count), -1, np.int32)
    for number in range(num_classes):
        ends = np.cumsum(counts[:, number])
        ranks = _draw(int(counts[:, number].sum()), count, key, number)
        blocks = np.searchsorted(ends, ranks, side="right")
        for block in np.unique(blocks).tolist():
            here = np.flatnonzero(flat[block * _BLOCK : (block + 1) * _BLOCK] == number)
            mine = np.flatnonzero(blocks == block)
            before = ends[block] - counts[block, number]
            places[number, mine] = block * _BLOCK + here[ranks[mine] - before]
    return places


def _draw(among: int, count: int, key: tuple[int, int], number: int) -> NDArray[np.int64]:
    """Up to `count` different numbers below `among`, in the order drawn."""
    if among <= 2 * count:
        return np.argsort(philox_bits(key, (0, 0, number, 1), among), kind="stable")[:count]
    tries = 2 * count
    while True:
        drawn = (philox_bits(key, (0, 0, number, 1), tries) % np.uint64(among)).astype(np.int64)
        first = np.sort(np.unique(drawn, return_index=True)[1])
        if len(first) >= count:
            return drawn[first[:count]]
        tries *= 2


def _count_blocks(flat: NDArray[np.uint8], num_classes: int) -> NDArray[np.int64]:
    """(blocks, classes) voxels of each class in each block."""
    counts = [np.zeros((0, num_classes), np.int64)]
    for first in range(0, flat.size, _SLAB):
        part = flat[first : first + _SLAB].astype(np.int64)
        part += np.arange(len(part)) // _BLOCK * num_classes
        blocks = -(-len(part) // _BLOCK)
        counts.append(np.bincount(part, minlength=blocks * num_classes).reshape(blocks, num_classes))
    return np.concatenate(counts)


def _numbered(label_of: Mapping[int, str]) -> Classes:
    """Classes in the order of their lowest values."""
    names = list(dict.fromkeys(label_of[value] for value in sorted(label_of)))
    if len(names) > MAX_CLASSES:
        raise ValueError(f"{len(names)} classes are too many for a label map; {MAX_CLASSES} are the most")
    wrong = [value for value in label_of if not 0 <= value <= _LARGEST_VALUE]
    if wrong:
        raise ValueError(f"class {label_of[wrong[0]]!r} has the value {wrong[0]}; use 0 to {_LARGEST_VALUE}")
    return Classes(names, {value: names.index(label_of[value]) for value in sorted(label_of)})


def _read_nnunet(path: Path) -> dict[int, str]:
    """The labels of a dataset.json: {name: value}, or {value: name} as in its old form and the Decathlon's."""
    try:
        labels = json.loads(path.read_text(encoding="utf-8-sig"))["labels"]
        pairs: list[tuple[Any, Any]] = list(labels.items())
        if all(isinstance(name, str) for _, name in pairs):
            pairs = [(name, value) for value, name in pairs]
        values = {int(value): str(name) for name, value in pairs}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f'{path} has no "labels" such as {{"background": 0, "liver": 1}} (regions of several values are not read)'
        ) from error
    if len(values) < len(pairs) or not values:
        raise ValueError(f'{path}: "labels" gives no value, or one value twice')
    if "ignore" in values.values():
        raise ValueError(f"{path} has the label 'ignore', which training cannot leave out; pack without such cases")
    return values


def _read_indices(mask: Source, shape: tuple[int, ...]) -> NDArray[Any]:
    """(H, W) palette indices or grey values; colours serve where all three are equal."""
    pillow: Any = library("PIL.Image", "Pillow", "images")
    try:
        with pillow.open(mask.path) as image:
            if image.format in ("JPEG", "MPO"):
                raise UnusableSource(f"its mask {mask.path.name} is a JPEG, which blurs labels; save masks as PNG")
            _check_shape(mask, image.size[::-1], shape)
            data = np.asarray(image)
    except (OSError, SyntaxError, pillow.DecompressionBombError) as error:
        raise UnusableSource(f"its mask {mask.path.name} is broken ({' '.join(str(error).split())})") from error
    if data.ndim == 3:
        colours = data[..., : 1 if data.shape[2] < 3 else 3]
        if (colours != colours[..., :1]).any():
            raise UnusableSource(f"its mask {mask.path.name} is in colour; save palette indices or grey values")
        data = data[..., 0]
    return data


def _check_shape(mask: Source, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        sizes = " and the image ".join("x".join(map(str, one)) for one in (shape, wanted))
        raise UnusableSource(f"its mask {mask.path.name} is {sizes}; resample the mask to the image")


def _check_place(mask: Source, affine: NDArray[Any], wanted: Header) -> None:
    last = [size - 1 for size in (*wanted.shape[1:], 1, 1)[:3]]
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*last, 1]
    apart = float(np.linalg.norm(corners @ (affine - wanted.affine).T, axis=1).max())
    voxel = float(np.linalg.norm(wanted.affine[:3, :3], axis=0).min())
    if not apart <= NEAR * voxel:
        raise UnusableSource(
            f"its mask {mask.path.name} lies elsewhere, {apart:.3g} mm apart; resample the mask to the image"
        )


def _as_labels(mask: Source, data: NDArray[Any]) -> NDArray[Any]:
    if data.dtype in (np.uint8, np.bool_) or not data.size:
        return np.ascontiguousarray(data, np.uint8)
    if data.dtype.kind == "f" and not (np.rint(data) == data).all():
        value = float(data[np.rint(data) != data][0])
        raise UnusableSource(f"its mask {mask.path.name} has the value {value:g}, which is no whole number")
    low, high = int(data.min()), int(data.max())
    if low < 0 or high > _LARGEST_VALUE:
        value = low if low < 0 else high
        raise UnusableSource(f"its mask {mask.path.name} has the value {value}; labels are 0 to {_LARGEST_VALUE}")
    return np.ascontiguousarray(data, np.uint8 if high < 256 else np.uint16)
