"""Compressed streams as bounded chunks: gzip by igzip, zstd, and for imports bzip2 and xz.

The kind is read off the first bytes: media types lie often enough that Docker and containerd do the same. No chunk is
larger than CHUNK however small its input was, so a bomb costs time, not memory.
"""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Callable, Iterator
from enum import Enum
from typing import BinaryIO, Protocol, cast

import zstandard
from isal import igzip_lib

from dolium.errors import InvalidArgument

CHUNK = 1 << 20
_INPUT = 256 << 10
_IsalError = cast(type[Exception], igzip_lib.IsalError)  # its stub declares an instance


class Compression(Enum):
    """What a stream begins with."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"
    BZIP2 = "bzip2"
    XZ = "xz"


class _Decompressor(Protocol):
    """The interface bz2, lzma and igzip share."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def detect(head: bytes) -> Compression:
    """The compression of a stream that begins with ``head`` (6 bytes are enough)."""
    if head.startswith(b"\x1f\x8b"):
        return Compression.GZIP
    # RFC 8878: a frame, or a skippable frame in front of one.
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return Compression.ZSTD
    if head.startswith(b"BZh"):
        return Compression.BZIP2
    if head.startswith(b"\xfd7zXZ\x00"):
        return Compression.XZ
    return Compression.NONE


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """The decompressed content of ``file`` from its position, in pieces of at most CHUNK bytes, none empty.

    Raises InvalidArgument when the stream is damaged or (but for zstd) cut short. Members and frames that follow one
    another are one stream. The C parts run without the GIL.
    """
    head = _read_head(file)
    kind = detect(head)
    if kind is Compression.NONE:
        return _plain(head, file)
    if kind is Compression.ZSTD:
        return _zstd(head, file)
    return _members(_DECOMPRESSORS[kind], kind, head, file)


def _read_head(file: BinaryIO) -> bytes:
    head = b""
    while len(head) < 6 and (more := file.read(_INPUT)):
        head += more
    return head


def _plain(head: bytes, file: BinaryIO) -> Iterator[bytes]:
    if head:
        yield head
    while data := file.read(CHUNK):
        yield data


def _gzip() -> _Decompressor:
    decompressor: _Decompressor = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    return decompressor


_DECOMPRESSORS: dict[Compression, Callable[[], _Decompressor]] = {
    Compression.GZIP: _gzip,
    Compression.BZIP2: bz2.BZ2Decompressor,
    Compression.XZ: lzma.LZMADecompressor,
}


def _members(make: Callable[[], _Decompressor], kind: Compression, data: bytes, file: BinaryIO) -> Iterator[bytes]:
    decompressor = make()
    try:
        while True:
            if decompressor.eof:
                # gzip members follow one another; zeros behind the last one are padding (as gzip(1) has it).
                data = decompressor.unused_data
                while not data.lstrip(b"\0"):
                    data = file.read(_INPUT)
                    if not data:
                        return
                data = data.lstrip(b"\0")
                decompressor = make()
            elif decompressor.needs_input and not data:
                data = file.read(_INPUT)
                if not data:
                    raise InvalidArgument(f"the {kind.value} stream is cut short")
            out = decompressor.decompress(data, CHUNK)
            data = b""
            if out:
                yield out
    except (_IsalError, OSError, EOFError, lzma.LZMAError) as error:
        raise InvalidArgument(f"the {kind.value} stream is damaged: {error}") from None


class _Rejoined:
    """A file with the bytes that were read off its front put back: as much of a file as zstandard asks for."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        self._head = head
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        return self._file.read(size)


def _zstd(head: bytes, file: BinaryIO) -> Iterator[bytes]:
    # The library caps a frame's window at 128 MiB, and does not tell a cut frame from the end: the diff ID does.
    try:
        source = cast(BinaryIO, _Rejoined(head, file))
        with zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True) as reader:
            while data := reader.read(CHUNK):
                yield data
    except zstandard.ZstdError as error:
        raise InvalidArgument(f"the zstd stream is damaged: {error}") from None
