"""The cold compiler: one request on a socket, one plan back, end.

Started by the front as ``python -I -S -E``. Its import cost is a contract: sys, posix, json and this package's cold
modules, nothing else (``tests/unit/test_cold_imports.py``); every module more is a millisecond on each `run`.
"""

from __future__ import annotations

import posix
import sys

from dolium.runtime.cli import compile_request
from dolium.runtime.facts import Facts, Need
from dolium.runtime.plan import encode_string
from dolium.runtime.wire import FRAME_LIMIT, decode_fields, frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def _read_exactly(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = posix.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_frame(fd: int) -> bytes:
    """One frame's body. Raises EOFError when the other side is gone."""
    size = int.from_bytes(_read_exactly(fd, 4), "little")
    if size > FRAME_LIMIT:
        raise ValueError(f"a frame of {size} bytes")
    return _read_exactly(fd, size)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[posix.write(fd, view) :]


def answer(request: dict[str, list[bytes]], known: dict[str, list[bytes]]) -> bytes:
    """The body of the answer: N and wishes, P and a plan, or E and an error. Pure."""
    try:
        plan, error = compile_request(request, Facts(known))
    except Need as need:
        return b"N" + b"".join(encode_string(query) for query in need.queries)
    if plan is not None:
        return b"P" + plan.encode()
    assert error is not None
    message, log, log_format, code = error
    return b"E" + b"".join(encode_string(text) for text in (str(code), message, log, log_format))


def serve(fd: int, answer: Callable[[dict[str, list[bytes]], dict[str, list[bytes]]], bytes]) -> None:
    """Answer one front on ``fd`` until it has its plan."""
    request: dict[str, list[bytes]] = {}
    known: dict[str, list[bytes]] = {}
    while True:
        try:
            fields = decode_fields(read_frame(fd))
        except EOFError:
            return
        if not request:
            request = fields
        else:
            known.update(fields)
        body = answer(request, known)
        _write(fd, frame(body))
        if body[:1] != b"N":
            sys.stdout.flush()
            return


def main(fd: int) -> None:
    """The cold compiler of dolium-runtime."""
    serve(fd, answer)
