"""The compressions that a volume file may use, through the libraries that hdf5plugin ships, without HDF5 and its lock.

Damaged or hostile bytes raise ValueError, or give wrong bytes that a checksum finds. The C libraries check what they
decode against the end of the target; what they take for granted is checked here first: the sizes in each header, and
that all parts lie within the source. What `encode` makes is what the HDF5 filter of that name makes and reads.

Formats: RFC 8878 (zstd), github.com/kiyo-masui/bitshuffle src/bshuf_h5filter.c, and README_CFRAME_FORMAT.rst and
README_CHUNK_FORMAT.rst of github.com/Blosc/c-blosc2.
"""

import ctypes
import math
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CODECS = ("blosc2-lz4", "blosc2-zstd", "zstd", "bitshuffle-lz4")
BLOSC2, ZSTD, BITSHUFFLE = 32026, 32015, 32008
"""numbers of the filters, https://github.com/HDFGroup/hdf5_plugins/blob/master/docs/RegisteredFilterPlugins.md"""

_BLOSC2_NAMES = {1: "blosc2-lz4", 5: "blosc2-zstd"}
_LEVELS = {"blosc2-lz4": 5, "blosc2-zstd": 3, "zstd": 3}
_BITSHUFFLE_LZ4 = 2
_BLOSC_BITSHUFFLE = 2
_ENCODING = threading.Lock()
"""Blosc keeps the compressor to use in a global variable"""
_THREAD = threading.local()
_FRAME = struct.Struct(">2x8sxixQ6xqxq40x")
"""of a Blosc2 frame: magic, then bytes of the header, of the frame, of the data, of the chunk"""
_CHUNK = struct.Struct("<BBBBiii6sBB6sBB")
"""of a Blosc2 chunk: versions, flags, item, bytes of the data, of a block, of the chunk, filters, codec, flags"""
_ITEMSIZE = 0x30
"""where a frame keeps the bytes of an item, by which the filter makes runs of zeros"""
_PLAIN_FILTERS = {0, 1, 2}
"""none, shuffle, bitshuffle"""
_CHUNK_CODECS, _COPIED = {1, 4}, 2
"""lz4 and zstd; not compressed at all"""
_SPECIAL_ZERO = 0x10
_ZEROS = bytes(7) + b"\x81"


def by_filter(number: int, values: Sequence[int]) -> str | None:
    """The codec of an HDF5 filter and its parameters; None: not one of ours."""
    if number == BLOSC2 and len(values) > 6:
        return _BLOSC2_NAMES.get(values[6])
    if number == BITSHUFFLE and len(values) > 4 and values[4] == _BITSHUFFLE_LZ4:
        return "bitshuffle-lz4"
    return "zstd" if number == ZSTD else None


def to_filter(codec: str) -> tuple[int, tuple[int, ...]]:
    """HDF5 filter number and parameters of a codec."""
    require_known(codec)
    if codec == "zstd":
        return ZSTD, (_LEVELS[codec],)
    if codec == "bitshuffle-lz4":
        return BITSHUFFLE, (0, _BITSHUFFLE_LZ4)
    code = next(number for number, name in _BLOSC2_NAMES.items() if name == codec)
    return BLOSC2, (0, 0, 0, 0, _LEVELS[codec], _BLOSC_BITSHUFFLE, code)


def encoded_bound(size: int) -> int:
    """More bytes than `size` bytes ever become."""
    return size + size // 128 + 65_536


def require_known(codec: str) -> None:
    if codec not in CODECS:
        raise ValueError(f"codec {codec!r} is unknown; use {', '.join(CODECS)}")


def require_library() -> None:
    """ImportError with the command that installs what compressed files need."""
    try:
        import hdf5plugin  # noqa: F401
    except ImportError as error:
        raise ImportError("compressed volume files need hdf5plugin: pip install 'hpc-batch[compress]'") from error


def encode(codec: str, data: memoryview, itemsize: int) -> bytes:
    """Compress the bytes of a chunk (C order) of items of `itemsize` bytes, as the HDF5 filter of that codec does."""
    require_known(codec)
    source = np.frombuffer(data, np.uint8)
    if not source.size or source.size % itemsize or source.size >= 2**31 - 2**16:
        raise ValueError(f"{source.size} bytes of items of {itemsize} cannot be one chunk; use 1 item to 2 GiB")
    return _ENCODERS[codec](codec, source, itemsize)


def decode(codec: str, source: memoryview, target: memoryview, itemsize: int) -> None:
    """Decompress one chunk into `target`, whose size must be that of the decoded chunk. Releases the GIL.

    Raises ValueError for damaged bytes; nothing is written outside of `target`, whose content is then undefined.
    """
    require_known(codec)
    _DECODERS[codec](np.frombuffer(source, np.uint8), np.frombuffer(target, np.uint8), itemsize)


def _encode_zstd(codec: str, source: NDArray[np.uint8], itemsize: int) -> bytes:
    library = _library("zstd")
    made = np.empty(library.ZSTD_compressBound(source.size), np.uint8)
    count = library.ZSTD_compress(_at(made), made.size, _at(source), source.size, _LEVELS[codec])
    if library.ZSTD_isError(count):
        raise ValueError("zstd cannot compress this")
    return made[:count].tobytes()


def _decode_zstd(source: NDArray[np.uint8], target: NDArray[np.uint8], itemsize: int) -> None:
    library = _library("zstd")
    claimed = library.ZSTD_getFrameContentSize(_at(source), source.size)
    _require(claimed == target.size, "zstd", f"it claims {claimed} bytes, not {target.size}")
    with _context("zstd") as context:
        count = library.ZSTD_decompressDCtx(context, _at(target), target.size, _at(source), source.size)
        _require(count == target.size, "zstd", "the stream is damaged")


def _encode_bitshuffle(codec: str, source: NDArray[np.uint8], itemsize: int) -> bytes:
    library, items = _library("bshuf"), source.size // itemsize
    block = library.bshuf_default_block_size(itemsize)
    made = np.empty(library.bshuf_compress_lz4_bound(items, itemsize, block), np.uint8)
    count = library.bshuf_compress_lz4(_at(source), _at(made), items, itemsize, block)
    if count < 0:
        raise ValueError(f"bitshuffle cannot compress this (error {count})")
    return struct.pack(">QI", source.size, block * itemsize) + made[:count].tobytes()


def _decode_bitshuffle(source: NDArray[np.uint8], target: NDArray[np.uint8], itemsize: int) -> None:
    library, name = _library("bshuf"), "bitshuffle"
    _require(source.size >= 12, name, "it is cut short")
    claimed, block = struct.unpack_from(">QI", source.data)
    _require(claimed == target.size, name, f"it claims {claimed} bytes, not {target.size}")
    _require(block > 0 and block % (8 * itemsize) == 0 and target.size % itemsize == 0, name, f"blocks of {block}")
    _check_blocks(source, target.size, block, itemsize)
    count = library.bshuf_decompress_lz4(
        _at(source) + 12, _at(target), target.size // itemsize, itemsize, block // itemsize
    )
    _require(count == source.size - 12, name, f"a block is damaged (error {count})")


def _check_blocks(source: NDArray[np.uint8], size: int, block: int, itemsize: int) -> None:
    """Each block is preceded by its length, which the library believes; what is less than 8 items is stored plain."""
    whole, plain = divmod(size, 8 * itemsize)
    read, end = struct.Struct(">I").unpack_from, source.size - plain
    data, place = source.data, 12
    for _ in range(-(-whole * 8 * itemsize // block)):
        _require(place + 4 <= end, "bitshuffle", "it is cut short")
        place += 4 + read(data, place)[0]
    _require(place == end, "bitshuffle", "its blocks do not fill it")


def _encode_blosc2(codec: str, source: NDArray[np.uint8], itemsize: int) -> bytes:
    library = _library("blosc2")
    made = np.empty(source.size + 32, np.uint8)
    with _ENCODING:
        library.blosc1_set_compressor(codec.removeprefix("blosc2-").encode())
        count = library.blosc2_compress(
            _LEVELS[codec], _BLOSC_BITSHUFFLE, itemsize, _at(source), source.size, _at(made), made.size
        )
    if count <= 0:
        raise ValueError(f"blosc2 cannot compress this (error {count})")
    frame = library.blosc2_schunk_new(ctypes.byref(library.blosc2_get_blosc2_storage_defaults()))
    try:
        place, owned = ctypes.c_void_p(), ctypes.c_bool()
        library.blosc2_schunk_append_chunk(frame, _at(made), True)
        length = library.blosc2_schunk_to_buffer(frame, ctypes.byref(place), ctypes.byref(owned))
        if length <= 0:
            raise ValueError(f"blosc2 cannot store this (error {length})")
        content = ctypes.string_at(place, length)
        if owned:
            library.free(place)
    finally:
        library.blosc2_schunk_free(frame)
    return content[:_ITEMSIZE] + struct.pack(">i", itemsize) + content[_ITEMSIZE + 4 :]


def _decode_blosc2(source: NDArray[np.uint8], target: NDArray[np.uint8], itemsize: int) -> None:
    name = "blosc2"
    _require(source.size >= _FRAME.size, name, "it is cut short")
    magic, header, length, raw, stored = _FRAME.unpack_from(source.data)
    _require(magic == b"b2frame\0" and _FRAME.size <= header <= source.size == length, name, "it is no whole frame")
    boxes = _boxes(source[:header].tobytes(), target.size // itemsize)
    padded = target.size if boxes is None else itemsize * math.prod(boxes.padded)
    _require(raw in (target.size, padded), name, f"it claims {raw} bytes, not {target.size}")
    _require(0 <= stored <= source.size - header, name, "its chunk reaches over its end")
    if stored == 0:  # its only chunk is a run of zeros: a mark in the index is all there is
        _require(source[header + 32 : header + 40].tobytes() == _ZEROS, name, "it has no chunk")
        target[:] = 0
        return
    room = target if boxes is None else np.empty(padded, np.uint8)
    _decode_blosc2_chunk(source[header : header + stored], room)
    if boxes is not None:
        boxes.put_in_order(room, target, itemsize)


def _decode_blosc2_chunk(chunk: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
    """A chunk of a known codec and known filters only: others would make the library look for a plugin."""
    library, name = _library("blosc2"), "blosc2"
    _require(chunk.size >= _CHUNK.size, name, "its chunk is cut short")
    _, _, flags, _, raw, block, stored, filters, _, _, _, more, special = _CHUNK.unpack_from(chunk.data)
    _require(raw == target.size and stored == chunk.size and 0 < block <= raw, name, f"its chunk claims {raw} bytes")
    known = flags & 5 == 5 and (flags >> 5 in _CHUNK_CODECS or flags & _COPIED) and set(filters) <= _PLAIN_FILTERS
    _require(bool(known), name, "its codec or a filter is unknown")
    _require(more == 0 and special in (0, _SPECIAL_ZERO), name, "its chunk is of a special kind")
    with _context("blosc2") as context:
        count = library.blosc2_decompress_ctx(context, _at(chunk), chunk.size, _at(target), target.size)
        _require(count == target.size, name, f"its chunk is damaged (error {count})")


@dataclass(frozen=True)
class _Boxes:
    """The HDF5 filter cuts a chunk of several axes into boxes, each whole in C order, those at the end padded."""

    shape: tuple[int, ...]
    box: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(-(-size // step) for size, step in zip(self.shape, self.box, strict=True))

    @property
    def padded(self) -> tuple[int, ...]:
        return tuple(count * step for count, step in zip(self.grid, self.box, strict=True))

    def put_in_order(self, source: NDArray[np.uint8], target: NDArray[np.uint8], itemsize: int) -> None:
        axes = range(len(self.shape))
        boxes = source.view(f"u{itemsize}").reshape(self.grid + self.box)
        whole = boxes.transpose([axis + half for axis in axes for half in (0, len(axes))]).reshape(self.padded)
        target.view(f"u{itemsize}").reshape(self.shape)[...] = whole[tuple(map(slice, self.shape))]


def _boxes(header: bytes, items: int) -> _Boxes | None:
    """Read from the metadata of a frame, README_B2ND_METALAYER.rst; None: the chunk is in C order."""
    mark = header.find(b"\xa4b2nd\xd2")
    if mark < 0:
        return None
    try:
        start = int.from_bytes(header[mark + 6 : mark + 10], "big") + 5
        axes = header[start + 2]
        numbers = struct.unpack_from(f">4x{'xq' * axes}x{'xi' * axes}x{'xi' * axes}", header, start)
    except (struct.error, IndexError) as error:
        raise ValueError("damaged blosc2 data: its axes are cut short") from error
    shape, chunk, box = numbers[:axes], numbers[axes : 2 * axes], numbers[2 * axes :]
    fits = all(0 < step <= size for step, size in zip(box, shape, strict=True))
    _require(shape == chunk and fits and math.prod(shape) == items, "blosc2", f"its axes are {shape[:9]}")
    boxes = _Boxes(shape, box)
    first = next((axis for axis, step in enumerate(box) if step > 1), 0)
    return None if boxes.padded == shape and box[first + 1 :] == shape[first + 1 :] else boxes


_ENCODERS: dict[str, Callable[[str, NDArray[np.uint8], int], bytes]] = {
    "blosc2-lz4": _encode_blosc2,
    "blosc2-zstd": _encode_blosc2,
    "zstd": _encode_zstd,
    "bitshuffle-lz4": _encode_bitshuffle,
}
_DECODERS: dict[str, Callable[[NDArray[np.uint8], NDArray[np.uint8], int], None]] = {
    "blosc2-lz4": _decode_blosc2,
    "blosc2-zstd": _decode_blosc2,
    "zstd": _decode_zstd,
    "bitshuffle-lz4": _decode_bitshuffle,
}


class _Opaque(ctypes.Structure):
    """Room for a structure that the library fills and takes back: its fields differ between versions."""

    _fields_ = (("raw", ctypes.c_uint64 * 64),)


_PLACE, _SIZE, _INT, _LONG = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32, ctypes.c_int64
_FUNCTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "zstd": {
        "ZSTD_compressBound": (_SIZE, _SIZE),
        "ZSTD_compress": (_SIZE, _PLACE, _SIZE, _PLACE, _SIZE, _INT),
        "ZSTD_isError": (ctypes.c_uint, _SIZE),
        "ZSTD_getFrameContentSize": (ctypes.c_uint64, _PLACE, _SIZE),
        "ZSTD_createDCtx": (_PLACE,),
        "ZSTD_freeDCtx": (_SIZE, _PLACE),
        "ZSTD_decompressDCtx": (_SIZE, _PLACE, _PLACE, _SIZE, _PLACE, _SIZE),
    },
    "bshuf": {
        "bshuf_default_block_size": (_SIZE, _SIZE),
        "bshuf_compress_lz4_bound": (_SIZE, _SIZE, _SIZE, _SIZE),
        "bshuf_compress_lz4": (_LONG, _PLACE, _PLACE, _SIZE, _SIZE, _SIZE),
        "bshuf_decompress_lz4": (_LONG, _PLACE, _PLACE, _SIZE, _SIZE, _SIZE),
    },
    "blosc2": {
        "blosc2_init": (None,),
        "blosc1_set_compressor": (_INT, ctypes.c_char_p),
        "blosc2_compress": (_INT, _INT, _INT, _INT, _PLACE, _INT, _PLACE, _INT),
        "blosc2_get_blosc2_storage_defaults": (_Opaque,),
        "blosc2_schunk_new": (_PLACE, _PLACE),
        "blosc2_schunk_append_chunk": (_LONG, _PLACE, _PLACE, ctypes.c_bool),
        "blosc2_schunk_to_buffer": (_LONG, _PLACE, _PLACE, _PLACE),
        "blosc2_schunk_free": (_INT, _PLACE),
        "blosc2_get_blosc2_dparams_defaults": (_Opaque,),
        "blosc2_create_dctx": (_PLACE, _Opaque),
        "blosc2_decompress_ctx": (_INT, _PLACE, _PLACE, _INT, _PLACE, _INT),
        "blosc2_free_ctx": (None, _PLACE),
        "free": (None, _PLACE),
    },
}
"""of each library what is called: type of the result, then of the arguments"""


@cache
def _library(name: str) -> Any:
    require_library()
    import hdf5plugin

    library = ctypes.CDLL(str(next(Path(hdf5plugin.PLUGIN_PATH).glob(f"libh5{name}.*"))))
    for function, (result, *arguments) in _FUNCTIONS[name].items():
        handle = getattr(library, function)
        handle.restype, handle.argtypes = result, arguments
    if name == "blosc2":
        library.blosc2_init()
    return library


class _Decompressor:
    """Working memory of a library for one thread."""

    def __init__(self, name: str) -> None:
        library = _library(name)
        if name == "zstd":
            self.place, self._free = library.ZSTD_createDCtx(), library.ZSTD_freeDCtx
        else:
            self.place = library.blosc2_create_dctx(library.blosc2_get_blosc2_dparams_defaults())
            self._free = library.blosc2_free_ctx

    def __del__(self) -> None:
        self._free(self.place)


@contextmanager
def _context(name: str) -> Iterator[int]:
    """The thread's decompressor: for small chunks, making one takes longer than decoding. After an error, a new one."""
    kept: dict[str, _Decompressor] = _THREAD.__dict__
    found = kept.pop(name, None) or _Decompressor(name)
    yield found.place
    kept[name] = found


def _at(array: NDArray[np.uint8]) -> int:
    return int(array.__array_interface__["data"][0])


def _require(sound: bool, codec: str, reason: str) -> None:
    if not sound:
        raise ValueError(f"damaged {codec} data: {reason}")
