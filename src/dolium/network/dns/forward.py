"""Questions that are not about containers go to other servers: from the host's namespace, each with a deadline, and one that
does not answer is asked last for a while."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Sequence

from dolium.network.dns.wire import answers_query

SECONDS = 1.5  # for one server; a resolver in a container gives up after five
SHUNNED = 30.0  # seconds for which one that did not answer is asked last
AT_ONCE = 1024
RESOLV_CONF = "/etc/resolv.conf"
_FALLBACK = ("8.8.8.8", "8.8.4.4")
_LARGEST = 65535


class Forwarder:
    """``asked``: questions under way."""

    def __init__(self, resolv_conf: str = RESOLV_CONF) -> None:
        self._path = resolv_conf
        self._seen: tuple[int, int] = (0, 0)
        self._host: list[str] = list(_FALLBACK)
        self._shunned: dict[str, float] = {}
        self.asked = 0

    def host_servers(self) -> list[str]:
        """Those of the host's own resolv.conf, which is read again when it has changed."""
        with contextlib.suppress(OSError):
            status = os.stat(self._path)
            seen = (status.st_mtime_ns, status.st_ino)
            if seen != self._seen:
                with open(self._path, errors="replace") as file:
                    words = [line.split() for line in file]
                found = [line[1] for line in words if len(line) > 1 and line[0] == "nameserver"]
                self._host, self._seen = found or list(_FALLBACK), seen
        return self._host

    async def ask(self, query: bytes, servers: Sequence[str], *, tcp: bool) -> bytes | None:
        """The first answer that comes; None when there is none, or too many questions are under way."""
        if self.asked >= AT_ONCE:
            return None
        self.asked += 1
        try:
            now = time.monotonic()
            for server in sorted(servers, key=lambda one: self._shunned.get(one, 0.0) > now):
                try:
                    async with asyncio.timeout(SECONDS):
                        reply = await (self._by_tcp if tcp else self._by_udp)(query, server)
                except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError):
                    self._shunned[server] = time.monotonic() + SHUNNED
                    continue
                self._shunned.pop(server, None)
                return reply
            return None
        finally:
            self.asked -= 1

    async def _by_udp(self, query: bytes, server: str) -> bytes:
        """By a port and an id of its own for each question (RFC 5452)."""
        loop = asyncio.get_running_loop()
        asked = os.urandom(2) + query[2:]
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
            sock.connect((server, 53))
            await loop.sock_sendall(sock, asked)
            while True:
                reply = await loop.sock_recv(sock, _LARGEST)
                if answers_query(reply, asked):
                    return query[:2] + reply[2:]

    async def _by_tcp(self, query: bytes, server: str) -> bytes:
        reader, writer = await asyncio.open_connection(server, 53)
        try:
            writer.write(struct.pack("!H", len(query)) + query)
            await writer.drain()
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            reply = await reader.readexactly(length)
        finally:
            writer.close()
        if not answers_query(reply, query):
            raise ValueError("an answer to something else")
        return reply
