"""Taking an HTTP connection over: after the 101 answer its socket goes to a shim, which speaks to the client itself."""

from __future__ import annotations

import fcntl
import os
import socket

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from dolium.errors import Unavailable

_UPGRADED = (b"HTTP/1.1 101 UPGRADED\r\nContent-Type: %s\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
_PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n\r\n"


class Hijacked(web.StreamResponse):
    """The answer was written by hand and the connection is not this server's any more."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Nothing to send."""
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing to send."""


class Connection:
    """A client's connection on its way out of the server. ``fd`` is a duplicate that the holder closes."""

    def __init__(self, request: web.Request) -> None:
        """Stop the server from reading: bytes behind the request stay in the kernel. The body must be read already."""
        transport = request.transport
        if transport is None or transport.is_closing():
            raise Unavailable("the client has gone")
        self._transport = transport
        transport.pause_reading()
        sock: socket.socket = transport.get_extra_info("socket")
        self.fd = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
        self._upgrade = "upgrade" in request.headers.get("Connection", "").lower()

    def answer(self, content_type: str = "application/vnd.docker.raw-stream") -> None:
        """Write the 101 (or the old 200) answer."""
        os.write(self.fd, (_UPGRADED if self._upgrade else _PLAIN) % content_type.encode())

    def release(self) -> Hijacked:
        """Close the server's own copy, without a shutdown, and give the handler its response."""
        self._transport.abort()
        return Hijacked()


def detach_bytes(keys: str) -> bytes:
    """The bytes of ``ctrl-p,ctrl-q``. Raises ValueError."""
    out = bytearray()
    for key in filter(None, keys.split(",")):
        if len(key) == 1:
            out += key.encode()
            continue
        name, _, letter = key.partition("-")
        special = {"@": 0, "[": 27, "\\": 28, "]": 29, "^": 30, "_": 31}
        if name != "ctrl" or len(letter) != 1 or not (letter.isalpha() or letter in special):
            raise ValueError(f"Unknown character: '{key}'")
        out.append(special.get(letter, ord(letter.lower()) - 96) if not letter.isalpha() else ord(letter.lower()) - 96)
    return bytes(out)
