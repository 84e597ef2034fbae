"""The relay's process: ``python -I -m dolium.network.relay FD TABLE SOCKET``. It passes on what the host sends to ::1 at
published ports.

The kernel lets no answer from a link through to ::1, so nothing but a process can do it. The firewall leads such connections
to the one socket that this process was handed (FD); which port was meant, connection tracking tells, and where that leads,
the map ``targets`` of the firewall's TABLE: nothing is kept here, so nothing can be out of date. It outlives the daemon
that started it. The next one starts its own and connects to SOCKET: then this one takes no more, and ends with its last
connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import resource
import signal
import socket
import sys

from dolium.errors import DoliumError
from dolium.network.firewall import Nft

_log = logging.getLogger(__name__)
_ORIGINAL_DST = 80  # IP6T_SO_ORIGINAL_DST
_CONNECT_SECONDS = 10.0
_AT_ONCE = 4096
_PIECE = 1 << 16
_BACKLOG = 128
_FDS = 1 << 16


def target_in(listing: str, port: int) -> tuple[str, int] | None:
    """Where a port of TCP leads, by nft's own text of an element of ``targets``; None when it is not told."""
    found = re.search(rf"\btcp \. {port} : ([0-9a-f:.]+) \. (\d+)", listing)
    return (found.group(1), int(found.group(2))) if found else None


class Relay:
    """All connections of one listening socket."""

    def __init__(self, table: str, nft: Nft | None = None) -> None:
        """``nft``: writes text, not JSON."""
        self._table, self._nft = table, nft or Nft(json=False)
        self.talking: set[asyncio.Task[None]] = set()
        self.idle = asyncio.Event()
        self.idle.set()

    def _target(self, port: int) -> tuple[str, int] | None:
        try:
            return target_in(self._nft.run(f"get element ip6 {self._table} targets {{ tcp . {port} }}\n"), port)
        except DoliumError as error:  # it was withdrawn just now
            _log.info("port %d leads nowhere: %s", port, error)
            return None

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until both sides have ended it. What cannot be passed on is reset."""
        task = asyncio.current_task()
        assert task is not None
        if len(self.talking) >= _AT_ONCE:
            writer.transport.abort()
            return
        self.talking.add(task)
        self.idle.clear()
        try:
            raw = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_IPV6, _ORIGINAL_DST, 28)
            target = self._target(int.from_bytes(raw[2:4], "big"))  # 0.2 ms
            if target is None:
                raise ConnectionRefusedError
            async with asyncio.timeout(_CONNECT_SECONDS):
                answers, asks = await asyncio.open_connection(*target)
            try:
                await asyncio.gather(_pump(reader, asks), _pump(answers, writer))
            finally:
                asks.close()
        except (OSError, TimeoutError):
            _reset(writer)
        finally:
            writer.close()
            self.talking.discard(task)
            if not self.talking:
                self.idle.set()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_PIECE):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """The client is told that it has failed, not that it is at its end."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()


async def serve(listener: socket.socket, table: str, path: str) -> None:
    """Until another one takes over, and no connection is left."""
    relay, over = Relay(table), asyncio.Event()
    server = await asyncio.start_server(relay.talk, sock=listener, backlog=_BACKLOG)

    async def retire(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.close()
        over.set()
        writer.close()

    fresh = f"{path}.{os.getpid()}"
    control = await asyncio.start_unix_server(retire, fresh)
    os.chmod(fresh, 0o600)
    os.rename(fresh, path)
    try:
        print("ready", flush=True)
    except BrokenPipeError:  # the daemon has died: the next one starts its own
        os.unlink(path)
        return
    await over.wait()
    control.close()
    await relay.idle.wait()


def main() -> None:
    """The program."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(_FDS, hard), hard))
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], sys.argv[3]))


if __name__ == "__main__":
    main()
