from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dolium.errors import InvalidArgument
from dolium.images import decompress
from dolium.images.decompress import Compression, detect

PACKERS: dict[Compression, Callable[[bytes], bytes]] = {
    Compression.NONE: bytes, Compression.GZIP: gzip.compress, Compression.ZSTD: zstandard.ZstdCompressor().compress,
    Compression.BZIP2: bz2.compress, Compression.XZ: lzma.compress,
}


def unpack(data: bytes) -> bytes:
    parts = list(decompress.chunks(io.BytesIO(data)))
    assert all(0 < len(part) <= decompress.CHUNK for part in parts)
    return b"".join(parts)


@pytest.mark.parametrize("kind", list(PACKERS))
@pytest.mark.parametrize("size", [0, 1, 5, 3_000_000])
def test_round_trip(kind: Compression, size: int) -> None:
    data = (b"some text " * (size // 10 + 1))[:size]
    packed = PACKERS[kind](data)
    assert detect(packed) is kind
    assert unpack(packed) == data


@pytest.mark.parametrize("kind", [Compression.GZIP, Compression.ZSTD, Compression.BZIP2, Compression.XZ])
def test_members_follow_one_another(kind: Compression) -> None:
    pack = PACKERS[kind]
    assert unpack(pack(b"one") + pack(b"two")) == b"onetwo"


def test_gzip_padding_is_no_damage() -> None:
    assert unpack(gzip.compress(b"one") + b"\0" * 700_000) == b"one"
    with pytest.raises(InvalidArgument, match="damaged"):
        unpack(gzip.compress(b"one") + b"garbage" * 10)


def test_zstd_may_begin_with_a_skippable_frame() -> None:
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    assert unpack(skippable + zstandard.ZstdCompressor().compress(b"one")) == b"one"


@pytest.mark.parametrize("kind", [Compression.GZIP, Compression.BZIP2, Compression.XZ])
def test_a_cut_stream_is_named(kind: Compression) -> None:
    with pytest.raises(InvalidArgument, match="cut short"):
        unpack(PACKERS[kind](b"x" * 100_000)[:-3])


def test_a_wrong_checksum_is_damage() -> None:
    packed = bytearray(gzip.compress(b"x" * 100_000))
    packed[-6] ^= 1
    with pytest.raises(InvalidArgument, match="damaged"):
        unpack(bytes(packed))


@given(st.sampled_from([Compression.GZIP, Compression.ZSTD, Compression.BZIP2, Compression.XZ]), st.data())
def test_damage_raises_nothing_else(kind: Compression, data: st.DataObject) -> None:
    packed = bytearray(PACKERS[kind](b"hello " * 50))
    position = data.draw(st.integers(0, len(packed) - 1))
    packed[position] = data.draw(st.integers(0, 255))
    try:
        unpack(bytes(packed))
    except InvalidArgument:
        return
