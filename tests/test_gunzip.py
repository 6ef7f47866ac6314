"""A gzip stream in pieces: whatever its members, the pieces and what is asked for, the bytes are the stream's."""

import gzip
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.sources import packed
from datasets.sources.contract import UnusableSource
from datasets.sources.packed import Gunzip

LIBRARIES = [pytest.param(packed.fastest, id="isal"), pytest.param(zlib, id="zlib")]
DRAWN = {"size": st.integers(0, 3000), "piece": st.integers(1, 700), "seed": st.integers(0, 9)}


def stream(size: int, members: int, seed: int) -> tuple[bytes, bytes]:
    """Bytes, half of them easy to compress, and a gzip stream of them."""
    draw = np.random.default_rng(seed)
    raw = bytes(draw.integers(0, 256, size // 2, np.uint8)) + bytes(size - size // 2)
    cuts = sorted(draw.integers(0, size + 1, members - 1).tolist())
    parts = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, size], strict=True)]
    return raw, b"".join(map(gzip.compress, parts))


@pytest.mark.parametrize("library", LIBRARIES)
@settings(max_examples=200, deadline=None)
@given(members=st.integers(1, 4), asked=st.integers(1, 3000), padding=st.integers(0, 600), **DRAWN)
def test_what_is_taken_is_the_stream(
    library: Any, size: int, piece: int, seed: int, members: int, asked: int, padding: int
) -> None:
    raw, given_bytes = stream(size, members, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "PIECE", piece)
        patch.setattr(packed, "fastest", library)
        gunzip = Gunzip(given_bytes + bytes(padding))
        taken = b"".join(bytes(gunzip.take(min(asked, size - at))) for at in range(0, size, asked))
        gunzip.finish()
    assert taken == raw and gunzip.taken == size


@pytest.mark.parametrize("library", LIBRARIES)
@settings(max_examples=200, deadline=None)
@given(lost=st.integers(1, 3000), **DRAWN)
def test_a_stream_that_is_cut_off_is_never_whole(library: Any, size: int, piece: int, seed: int, lost: int) -> None:
    _, given_bytes = stream(size, 1, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "PIECE", piece)
        patch.setattr(packed, "fastest", library)
        gunzip = Gunzip(given_bytes[: max(len(given_bytes) - lost, 1)])
        with pytest.raises(UnusableSource, match=r"ends after|cut off after"):
            gunzip.take(size)
            gunzip.finish()


@pytest.mark.parametrize("library", LIBRARIES)
@settings(max_examples=100, deadline=None)
@given(more=st.integers(1, 500), **DRAWN)
def test_a_stream_that_goes_on_is_told(library: Any, size: int, piece: int, seed: int, more: int) -> None:
    _, given_bytes = stream(size + more, 2, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "PIECE", piece)
        patch.setattr(packed, "fastest", library)
        gunzip = Gunzip(given_bytes)
        gunzip.take(size)
        with pytest.raises(UnusableSource, match=f"more than the {size:,} bytes"):
            gunzip.finish()
