"""The compressions that a volume file may use, and the HDF5 filters they are."""

from collections.abc import Sequence

CODECS = ("blosc2-lz4", "blosc2-zstd", "zstd", "bitshuffle-lz4")
BLOSC2, ZSTD, BITSHUFFLE = 32026, 32015, 32008
"""numbers of the filters, https://github.com/HDFGroup/hdf5_plugins/blob/master/docs/RegisteredFilterPlugins.md"""
_BLOSC2_CODECS = {1: "blosc2-lz4", 5: "blosc2-zstd"}
_LZ4 = 2


def by_filter(number: int, values: Sequence[int]) -> str | None:
    """The codec of an HDF5 filter and its parameters; None: not one of ours."""
    if number == BLOSC2 and len(values) > 6:
        return _BLOSC2_CODECS.get(values[6])
    if number == BITSHUFFLE and len(values) > 4 and values[4] == _LZ4:
        return "bitshuffle-lz4"
    return "zstd" if number == ZSTD else None


def encoded_bound(size: int) -> int:
    """More bytes than `size` bytes ever become."""
    return size + size // 128 + 65_536
