"""Tensors as safetensors files in flat memory: laid out once, filled by copies, written and read as they lie.

Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, the tensors without holes). The
tensors of a file are sorted by size of element, then name, and begin at a multiple of 64 bytes: each is aligned.
"""

from __future__ import annotations

import ctypes
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_ALIGNMENT = 64
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WORDS = {kind: word for word, kind in _TYPES.items()}

Spec = tuple[str, torch.dtype, tuple[int, ...]]


def specs_of(tensors: Mapping[str, Tensor]) -> tuple[Spec, ...]:
    """Name, type and shape of each. Raises TypeError for a type that the format does not have."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _WORDS:
            raise TypeError(f"{name} is {tensor.dtype}; a checkpoint holds {', '.join(map(str, _WORDS))}")
    return tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())


class Layout:
    """Where each tensor of one file lies; a function of names, types and shapes alone."""

    def __init__(self, specs: Iterable[Spec]) -> None:
        entries, places, offset = {}, [], 0
        for name, kind, shape in sorted(specs, key=lambda spec: (-spec[1].itemsize, spec[0])):
            end = offset + math.prod(shape) * kind.itemsize
            entries[name] = {"dtype": _WORDS[kind], "shape": list(shape), "data_offsets": [offset, end]}
            places.append((name, kind, shape, offset, end))
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self.header = struct.pack("<Q", len(text)) + text
        self.size = len(self.header) + offset
        self._places = places

    def views(self, content: Tensor) -> dict[str, Tensor]:
        """The tensors as views of the file's bytes (1-D uint8, `size` long, aligned to 8 bytes)."""
        data = content[len(self.header) :]
        return {name: data[start:end].view(kind).view(shape) for name, kind, shape, start, end in self._places}


def read(content: Tensor) -> dict[str, Tensor]:
    """The tensors of a file written by `Pages`, as views of its bytes. Raises ValueError for any other content."""
    view = content.numpy().data
    try:
        (length,) = struct.unpack("<Q", view[:8])
        entries = json.loads(bytes(view[8 : 8 + length]))
        layout = Layout((name, _TYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in entries.items())
        # A header that says the same of other places, of more bytes or of fewer is not ours.
        if layout.header != view[: len(layout.header)] or layout.size != len(view):
            raise ValueError("its header does not fit its content")
        return layout.views(content)
    except (struct.error, KeyError, TypeError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        raise ValueError(f"no tensors in our layout ({type(error).__name__})") from None


class Pages:
    """Files of tensors in one flat buffer on the CPU, made once and filled again by every save.

    A fresh clone of the tensors costs several times the copy: the memory is new each time.
    """

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._specs: dict[str, tuple[Spec, ...]] = {}
        self._views: dict[str, dict[str, Tensor]] = {}
        self.files: dict[str, memoryview] = {}
        """The bytes of each file, as they were filled last."""

    def fill(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy each file's tensors to their places; when all are there, the caller may change them."""
        specs = {file: specs_of(tensors) for file, tensors in groups.items()}
        self.lay_out(specs)
        devices = set()
        with torch.no_grad():
            for file, tensors in groups.items():
                views = self._views[file]
                for name, tensor in tensors.items():
                    _copy(views[name], tensor, self._pinned)
                    devices.add(tensor.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def lay_out(self, specs: dict[str, tuple[Spec, ...]]) -> None:
        """Make the buffer for these files, unless it is there."""
        if specs == self._specs:
            return
        self.files, self._views, self._specs = {}, {}, {}  # the old buffer goes before the new one comes
        layouts = {file: Layout(kinds) for file, kinds in specs.items()}
        room = [-(-layout.size // _ALIGNMENT) * _ALIGNMENT for layout in layouts.values()]
        buffer = torch.zeros(sum(room), dtype=torch.uint8, pin_memory=self._pinned)
        start = 0
        for (file, layout), length in zip(layouts.items(), room, strict=True):
            content = buffer[start : start + layout.size]
            self.files[file] = content.numpy().data
            self.files[file][: len(layout.header)] = layout.header
            self._views[file] = layout.views(content)
            start += length
        self._specs = specs

    @property
    def specs(self) -> dict[str, tuple[Spec, ...]]:
        return self._specs


def _copy(target: Tensor, source: Tensor, pinned: bool) -> None:
    """Plain memory is moved by this thread alone: torch's threads would meet after every tensor, on busy cores late."""
    plain = source.device.type == "cpu" and source.layout == torch.strided and not source.is_neg()
    if plain and type(source) in (Tensor, nn.Parameter) and source.is_contiguous():
        ctypes.memmove(target.data_ptr(), source.data_ptr(), target.nbytes)
    else:
        target.copy_(source, non_blocking=pinned)


# Nested values (an optimizer's state_dict) as JSON and tensors.

_TAG = "$"


def apart(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """`value` as JSON, its tensors put into `tensors` under their dotted path: `state.0.exp_avg`.

    Tuples and dicts with keys that are no strings keep what they are. Raises TypeError for anything else.
    """
    below = f"{path}." if path else ""
    if isinstance(value, Tensor):
        while path in tensors:  # keys with dots of their own
            path += "'"
        tensors[path] = value
        return {_TAG: "tensor", "of": path}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and _TAG not in value:
            return {key: apart(item, tensors, f"{below}{key}") for key, item in value.items()}
        pairs = [[key, apart(item, tensors, f"{below}{key}")] for key, item in value.items()]
        if all(isinstance(key, str | int) for key in value):
            return {_TAG: "dict", "of": pairs}
    if isinstance(value, list | tuple):
        items = [apart(item, tensors, f"{below}{number}") for number, item in enumerate(value)]
        return items if isinstance(value, list) else {_TAG: "tuple", "of": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path or 'the optimizer'} is a {type(value).__name__}: a checkpoint holds tensors and JSON")


def together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `apart` took apart. Raises ValueError for content that it did not write."""
    if isinstance(value, list):
        return [together(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: together(item, tensors) for key, item in value.items()}
    makers: dict[str, Callable[[Any], Any]] = {
        "tensor": lambda name: tensors[name],
        "tuple": lambda items: tuple(together(item, tensors) for item in items),
        "dict": lambda pairs: {key: together(item, tensors) for key, item in pairs},
    }
    try:
        return makers[value[_TAG]](value["of"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not an optimizer's state ({type(error).__name__})") from None
