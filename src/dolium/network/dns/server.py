"""The name server's process: ``python -I -m dolium.network.dns.server SOCKET``.

It answers on sockets that the daemon has opened in containers' namespaces and handed over, and goes on when the daemon is
dead: the next one finds it at the same socket. Commands are JSON objects, one a message of a SOCK_SEQPACKET connection,
descriptors beside them; each is answered by ``{"ok": true, ...}`` or ``{"error": text}``:

    {"op": "hello"}                                        -> version, pid, sandboxes and across (ids)
    {"op": "sandbox", "container", "networks": [{"id", "name", "names": [name ...], "address",
     "address6"} ...],
     "servers": [address ...] or null, "forward": bool,
     "egress": [text ...] or null}                         with two descriptors, UDP and TCP, and the namespace when it
                                                           has "egress"; without: of one that is there
    {"op": "gone", "container"}                            it is forgotten
    {"op": "across", "network", "across"}                  how an overlay's other hosts are asked, and who may ask
                                                           (``across.Across``; null for no more) -> trouble (text)
    {"op": "stop"}
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import struct
import sys
from dataclasses import dataclass, field
from typing import Any

from dolium.errors import DoliumError
from dolium.network.dns import wire
from dolium.network.dns.across import Across, Neighbours
from dolium.network.dns.forward import Forwarder
from dolium.network.dns.names import Entry, Names
from dolium.network.dns.pins import Pins, open_pins

_log = logging.getLogger(__name__)
VERSION = 4
LARGEST = 1 << 18  # of a command
TTL = 600  # seconds, as Docker's
_IDLE_SECONDS = 30.0
_OF_ONE = 64  # TCP connections of one container at once
_ASKED = 128  # its questions under way to other servers
_FDS = 1 << 16


@dataclass(slots=True)
class Sandbox:
    """A container as it asks. ``servers``: None for the host's own; ``forward``: may it ask about the world? ``pins``: when
    it may reach some names alone."""

    networks: list[str]
    servers: list[str] | None
    forward: bool
    udp: asyncio.DatagramTransport | None = None
    tcp: asyncio.Server | None = None
    pins: Pins | None = None
    talking: set[asyncio.Task[None]] = field(default_factory=set)
    asked: int = 0  # questions passed on that have no answer yet

    def close(self) -> None:
        """Its sockets go, and with them what keeps its namespace."""
        if self.udp is not None:
            self.udp.close()
        if self.tcp is not None:
            self.tcp.close()
        for task in list(self.talking):
            task.cancel()
        if self.pins is not None:
            self.pins.close()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: Server, sandbox: Sandbox) -> None:
        self._server, self._sandbox = server, sandbox

    def datagram_received(self, data: bytes, address: Any) -> None:
        self._server.datagram(self._sandbox, data, address)


class Server:
    """All sandboxes, all names."""

    def __init__(self, forwarder: Forwarder | None = None) -> None:
        self.names = Names()
        self.neighbours = Neighbours(self.names, TTL)
        self.sandboxes: dict[str, Sandbox] = {}
        self._forwarder = forwarder or Forwarder()
        self._tasks: set[asyncio.Task[None]] = set()
        self.stopping = asyncio.Event()

    # -- questions --

    def datagram(self, sandbox: Sandbox, data: bytes, address: Any) -> None:
        """One question by UDP; what must be asked elsewhere is answered later."""
        reply = self._local(sandbox, data, tcp=False) if sandbox.pins is None else None
        if reply is None:
            task = asyncio.get_running_loop().create_task(self._pass_on(sandbox, data, address))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._send(sandbox, reply, address)

    def _send(self, sandbox: Sandbox, reply: bytes, address: Any) -> None:
        if reply and sandbox.udp is not None and not sandbox.udp.is_closing():
            sandbox.udp.sendto(reply, address)

    async def _pass_on(self, sandbox: Sandbox, data: bytes, address: Any) -> None:
        work = self._elsewhere if sandbox.pins is None else self._restricted
        self._send(sandbox, await work(sandbox, data, tcp=False) or b"", address)

    def _local(self, sandbox: Sandbox, data: bytes, *, tcp: bool) -> bytes | None:
        """The answer that is known here; None when others must be asked."""
        try:
            query = wire.parse(data)
        except ValueError:
            return wire.malformed(data)
        found = self.names.look_up(sandbox.networks, query)
        if found is not None:
            return _told(sandbox, query, found, tcp=tcp)
        if not sandbox.forward and not self.neighbours.asked_about(sandbox.networks):
            return wire.answer(query, wire.SERVFAIL)
        return None

    async def _elsewhere(self, sandbox: Sandbox, data: bytes, *, tcp: bool, world: bool = True) -> bytes | None:
        """The answer of an overlay's other hosts, else of the world's servers; without that, None."""
        query, reply = wire.parse(data), None
        if sandbox.asked < _ASKED:  # one that asks without end leaves room for the others
            sandbox.asked += 1
            try:
                found = await self.neighbours.ask(sandbox.networks, query)
                if found is not None:
                    return _told(sandbox, query, found, tcp=tcp)
                if world and sandbox.forward:
                    servers = self._forwarder.host_servers() if sandbox.servers is None else sandbox.servers
                    reply = await self._forwarder.ask(data, servers, tcp=tcp)
            finally:
                sandbox.asked -= 1
        if reply is None and world:
            return wire.answer(query, wire.SERVFAIL)
        return reply

    async def _restricted(self, sandbox: Sandbox, data: bytes, *, tcp: bool) -> bytes:
        """Of one that may reach some names alone: it may reach what it is told, before it is told. About others it is told
        nothing, and nobody is asked: a name can carry what must not leave, too."""
        assert sandbox.pins is not None
        try:
            query = wire.parse(data)
        except ValueError:
            return wire.malformed(data)
        reverse = bool(wire.reverse_of(query.name))
        if not reverse and not sandbox.pins.allows(query.name):
            return wire.answer(query, wire.REFUSED)
        if query.kind == wire.AAAA:  # its rules let no IPv6 address through
            return wire.answer(query, wire.NOERROR)
        reply = self._local(sandbox, data, tcp=tcp)
        if reply is None:
            reply = await self._elsewhere(sandbox, data, tcp=tcp, world=not reverse)
        if reply is None:
            return wire.answer(query, wire.REFUSED)
        found = wire.addresses_in(reply)
        if found:
            try:
                await asyncio.to_thread(sandbox.pins.pin, query.name, found)
            except DoliumError as error:
                _log.warning("%s cannot be let through: %s", query.name, error)
                return wire.answer(query, wire.SERVFAIL)
        return reply

    async def _talk(self, sandbox: Sandbox, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(sandbox.talking) >= _OF_ONE:
            writer.close()
            return
        sandbox.talking.add(task)
        try:
            while True:
                async with asyncio.timeout(_IDLE_SECONDS):
                    (length,) = struct.unpack("!H", await reader.readexactly(2))
                    data = await reader.readexactly(length)
                reply = None if sandbox.pins is not None else self._local(sandbox, data, tcp=True)
                if sandbox.pins is not None:
                    reply = await self._restricted(sandbox, data, tcp=True)
                elif reply is None:
                    reply = await self._elsewhere(sandbox, data, tcp=True)
                if not reply:
                    return
                async with asyncio.timeout(_IDLE_SECONDS):
                    writer.write(struct.pack("!H", len(reply)) + reply)
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            return  # the client has gone, or says nothing
        finally:
            sandbox.talking.discard(task)
            writer.close()

    # -- commands --

    async def command(self, wish: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Do one; descriptors are this call's to close or keep. Raises ValueError, KeyError, OSError."""
        op = wish["op"]
        if op == "hello":
            return {"version": VERSION, "pid": os.getpid(), "sandboxes": sorted(self.sandboxes),
                    "across": self.neighbours.networks()}
        if op == "sandbox":
            await self._sandbox(wish, fds)
        elif op == "gone":
            self.names.drop(wish["container"])
            sandbox = self.sandboxes.pop(wish["container"], None)
            if sandbox is not None:
                sandbox.close()
        elif op == "across":
            return {"trouble": self.neighbours.put(wish["network"], Across.from_wish(wish["across"]))}
        elif op == "stop":
            self.stopping.set()
        else:
            raise ValueError(f"unknown command {op!r}")
        return {}

    async def _sandbox(self, wish: dict[str, Any], fds: list[int]) -> None:
        container, servers, networks = wish["container"], wish["servers"], [one["id"] for one in wish["networks"]]
        entries = [(one["id"], one["name"], Entry(container, tuple(one["names"]), one["address"],
                                                       one["address6"]))
                   for one in wish["networks"]]
        there = self.sandboxes.get(container)
        if not fds:
            if there is None:
                raise ValueError(f"no sandbox {container}")
            there.networks, there.servers, there.forward = networks, servers, bool(wish["forward"])
            self._rename(container, entries)
            return
        egress = wish["egress"]
        if len(fds) != 2 + (egress is not None):
            raise ValueError("a sandbox has two sockets, and a namespace where it is restricted")
        sandbox = Sandbox(networks, servers, bool(wish["forward"]))
        if egress is not None:
            sandbox.pins = await asyncio.to_thread(open_pins, os.dup(fds[2]), egress)
        loop = asyncio.get_running_loop()
        udp, tcp = (socket.socket(fileno=os.dup(fd)) for fd in fds[:2])
        for sock in (udp, tcp):
            sock.setblocking(False)
        sandbox.udp, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self, sandbox), sock=udp)
        sandbox.tcp = await asyncio.start_server(lambda reader, writer: self._talk(sandbox, reader, writer), sock=tcp)
        if there is not None:
            there.close()
        self.sandboxes[container] = sandbox
        self._rename(container, entries)

    def _rename(self, container: str, entries: list[tuple[str, str, Entry]]) -> None:
        self.names.drop(container)
        for network, name, entry in entries:
            self.names.put(network, name, entry)

    async def control(self, sock: socket.socket) -> None:
        """One daemon's connection, until it ends."""
        loop = asyncio.get_running_loop()
        while True:
            readable = asyncio.Event()
            loop.add_reader(sock, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(sock)
            fds: list[int] = []
            try:
                data, fds, _, _ = socket.recv_fds(sock, LARGEST, 3)
                if not data:
                    return
                try:
                    answer = {"ok": True, **await self.command(json.loads(data), fds)}
                except (ValueError, KeyError, TypeError, OSError, DoliumError) as error:
                    answer = {"error": f"{type(error).__name__}: {error}"}
            except BlockingIOError:
                continue
            except OSError:
                return
            finally:
                for fd in fds:
                    os.close(fd)
            with contextlib.suppress(OSError):
                sock.send(json.dumps(answer).encode())


def _told(sandbox: Sandbox, query: wire.Query, found: wire.Found, *, tcp: bool) -> bytes:
    """One that may reach some names alone is told no IPv6 address."""
    addresses = [address for address in found.addresses if sandbox.pins is None or ":" not in address]
    return wire.answer(query, wire.NOERROR, addresses, found.names, ttl=TTL, size=0 if tcp else query.size)


async def serve(path: str) -> None:
    """Until it is told to stop. It takes the socket's name, also from one that answers there."""
    server = Server()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stopping.set)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    fresh = f"{path}.{os.getpid()}"
    listener.bind(fresh)
    os.chmod(fresh, 0o600)
    listener.listen(8)
    os.rename(fresh, path)
    connections: set[asyncio.Task[None]] = set()

    async def control(sock: socket.socket) -> None:
        with sock:
            await server.control(sock)

    async def accept() -> None:
        while True:
            sock, _ = await loop.sock_accept(listener)
            sock.setblocking(False)
            task = loop.create_task(control(sock))
            connections.add(task)
            task.add_done_callback(connections.discard)

    accepting = loop.create_task(accept())
    print("ready", flush=True)
    await server.stopping.wait()
    accepting.cancel()
    for task in list(connections):
        task.cancel()
    for sandbox in server.sandboxes.values():
        sandbox.close()
    server.neighbours.close()
    with contextlib.suppress(OSError):
        os.unlink(path)


def main() -> None:
    """The program; the socket's path is its argument."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(_FDS, hard), hard))
    asyncio.run(serve(sys.argv[1]))


if __name__ == "__main__":
    main()
