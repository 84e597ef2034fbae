"""Names of containers on the other hosts of an overlay: the name servers of its hosts ask each other.

A question goes by UDP from one host's server to another's, in DNS's form with one EDNS option: the overlay's number and
eight bytes of chance, which the answer repeats. A host is asked about its own containers of that overlay alone, and asks
nobody else on behalf of another. Whoever is not one of the overlay's hosts is not answered at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from ipaddress import ip_address, ip_network
from typing import Any

from dolium.network.dns import wire
from dolium.network.dns.names import Names
from dolium.network.dns.wire import Found, Query

_log = logging.getLogger(__name__)
SECONDS = 0.5
"""How long the other hosts are waited for: they are asked before the world is, by a resolver that gives up after five."""
AGAIN_SECONDS = 0.15
"""After which a question is sent once more: a datagram may be lost."""
PROBE_SECONDS = 1.0
"""Between questions to a host that does not answer; it is not waited for until it does."""
_LISTEN_SECONDS = 2.0  # between attempts to listen at an address that is not there yet, or in use
_AT_ONCE = 1024
_BATCH = 64  # datagrams read before others have their turn
_LARGEST = 4096
_TAG = struct.Struct("!I8s")


@dataclass(frozen=True, slots=True)
class Across:
    """How an overlay's hosts are asked. ``own``: where this one listens; ``link``: the index of the link that these
    addresses are of, where they are link-local, else 0; ``subnets``: of its containers; ``name``: the network's."""

    name: str
    vni: int
    port: int
    own: tuple[str, ...]
    peers: tuple[str, ...]
    subnets: tuple[str, ...]
    link: int = 0

    def wish(self) -> dict[str, Any]:
        """As a command says it."""
        return asdict(self)

    @classmethod
    def from_wish(cls, doc: Mapping[str, Any] | None) -> Across | None:
        """Raises TypeError, KeyError, ValueError."""
        if doc is None:
            return None
        lists = {key: tuple(map(str, doc[key])) for key in ("own", "peers", "subnets")}
        for address in (*lists["own"], *lists["peers"]):
            ip_address(address)
        for subnet in lists["subnets"]:
            ip_network(subnet)
        return cls(**{**doc, **lists})

    def has(self, address: str) -> bool:
        """Is it of its subnets?"""
        found = ip_address(address)
        return any(found in ip_network(subnet) for subnet in self.subnets)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a host listens."""

    address: str
    port: int
    link: int

    def open(self) -> socket.socket:
        """A socket of this host there; of a port of the kernel's choice for 0. Raises OSError."""
        six = ":" in self.address
        made = socket.socket(socket.AF_INET6 if six else socket.AF_INET,
                             socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            made.bind(self.target)
        except BaseException:
            made.close()
            raise
        return made

    @property
    def target(self) -> tuple[Any, ...]:
        return (self.address, self.port, 0, self.link) if ":" in self.address else (self.address, self.port)


class Neighbours:
    """All overlays: what their other hosts are asked, and told. On one event loop."""

    def __init__(self, names: Names, ttl: int) -> None:
        """``ttl``: of answers, in seconds."""
        self._names, self._ttl = names, ttl
        self._across: dict[str, Across] = {}
        self._listening: dict[_Place, socket.socket] = {}
        self._silent: dict[tuple[str, str], float] = {}  # network and host: when it was last asked
        self._again: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # -- what the daemon says --

    def networks(self) -> list[str]:
        """Whose hosts are known."""
        return sorted(self._across)

    def put(self, network: str, across: Across | None) -> str:
        """An overlay, or that it has no other hosts any more. Returns what keeps this host from listening, which is tried
        again; ""."""
        if across is None or not across.peers:
            self._across.pop(network, None)
        else:
            self._across[network] = across
        self._silent = {key: when for key, when in self._silent.items() if key[0] != network}
        return self._listen()

    def close(self) -> None:
        """Nobody is answered any more. Idempotent."""
        self._across.clear()
        self._listen()
        for task in list(self._tasks):
            task.cancel()

    def _listen(self) -> str:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        loop, trouble = asyncio.get_running_loop(), ""
        wanted = {_Place(own, one.port, one.link) for one in self._across.values() for own in one.own}
        for place in self._listening.keys() - wanted:
            sock = self._listening.pop(place)
            loop.remove_reader(sock)
            sock.close()
        for place in wanted - self._listening.keys():
            try:
                self._listening[place] = sock = place.open()
            except OSError as error:
                trouble = f"UDP port {place.port} of {place.address}: {error.strerror}"
            else:
                loop.add_reader(sock, functools.partial(self._readable, place, sock))
        if trouble:
            self._again = loop.call_later(_LISTEN_SECONDS, self._listen)
        return trouble

    # -- being asked --

    def _readable(self, place: _Place, sock: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                data, source = sock.recvfrom(_LARGEST)
            except OSError:  # no more of them, or an error that an earlier answer has come back with
                return
            reply = self.answer(place, data, source[0].partition("%")[0])
            if reply:
                with contextlib.suppress(OSError):  # who asked will ask again, or does not need it
                    sock.sendto(reply, source)

    def answer(self, place: _Place, data: bytes, source: str) -> bytes:
        """What a datagram from an address is told; b"" for nothing."""
        try:
            query = wire.parse(data)
            number, _ = _TAG.unpack(query.tag)
        except (ValueError, struct.error):
            return b""
        for network, across in self._across.items():
            if (across.vni == number and source in across.peers
                    and (across.port, across.link) == (place.port, place.link) and place.address in across.own):
                found = self._names.look_up([network], query)
                if found is None:
                    return wire.answer(query, wire.NXDOMAIN)
                return wire.answer(query, wire.NOERROR, found.addresses, found.names, ttl=self._ttl, size=wire.LARGE_SIZE)
        return b""

    # -- asking --

    def asked_about(self, networks: Sequence[str]) -> bool:
        """Has one of these networks other hosts?"""
        return any(network in self._across for network in networks)

    async def ask(self, networks: Sequence[str], query: Query) -> Found | None:
        """The first that another host knows, by the order of these networks; None when nobody does. Takes ``SECONDS`` at
        most, and that only while a host does not answer that has answered before."""
        address = wire.reverse_of(query.name)
        asked = [network for network in networks
                 if network in self._across and not (address and not self._across[network].has(address))]
        found = await asyncio.gather(*(self._ask(network, self._across[network], query) for network in asked))
        return next((one for one in found if one is not None), None)

    async def _ask(self, network: str, across: Across, query: Query) -> Found | None:
        now = time.monotonic()
        due = {peer for peer in across.peers if now - self._silent.get((network, peer), -PROBE_SECONDS) >= PROBE_SECONDS}
        if not due or len(self._tasks) >= _AT_ONCE:
            return None
        waited = {peer for peer in due if (network, peer) not in self._silent}
        self._silent |= {(network, peer): now for peer in due - waited}
        told: asyncio.Future[Found | None] = asyncio.get_running_loop().create_future()
        if not waited:
            told.set_result(None)
        task = asyncio.get_running_loop().create_task(self._collect(network, across, query, due, waited, told))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await told

    async def _collect(self, network: str, across: Across, query: Query, due: set[str], waited: set[str],
                       told: asyncio.Future[Found | None]) -> None:
        """Ask, and hear who answers; ``told`` is set as soon as it is certain. Each question has a port, an id and a tag of
        its own (RFC 5452)."""
        loop, heard = asyncio.get_running_loop(), set[str]()
        asked = wire.question(query, int.from_bytes(os.urandom(2), "big"), _TAG.pack(across.vni, os.urandom(8)))
        # where it is not certain by which address the others know this host, the kernel chooses
        own = across.own[0] if len(across.own) == 1 else "0.0.0.0"
        try:
            with _Place(own, 0, across.link).open() as sock:
                self._send(sock, across, due, asked)
                again = loop.call_later(AGAIN_SECONDS, lambda: self._send(sock, across, due - heard, asked))
                try:
                    async with asyncio.timeout(SECONDS):
                        while due - heard:
                            peer, found = _heard(across, asked, *await loop.sock_recvfrom(sock, _LARGEST))
                            if peer not in due:
                                continue
                            heard.add(peer)
                            self._silent.pop((network, peer), None)
                            if found is not None:
                                if not told.done():
                                    told.set_result(found)
                                return
                            if waited <= heard and not told.done():
                                told.set_result(None)
                finally:
                    again.cancel()
        except TimeoutError:
            if waited - heard and self._across.get(network) is across:
                _log.warning("network %s: no name server answers at %s: it is not waited for until it does", across.name,
                             ", ".join(sorted(waited - heard)))
                self._silent |= {(network, peer): time.monotonic() for peer in waited - heard}
        except OSError as error:
            _log.warning("network %s: its other hosts cannot be asked for names: %s", across.name, error)
        finally:
            if not told.done():
                told.set_result(None)

    def _send(self, sock: socket.socket, across: Across, peers: set[str], asked: bytes) -> None:
        for peer in peers:
            with contextlib.suppress(OSError):  # no way to it now: it does not answer
                sock.sendto(asked, _Place(peer, across.port, across.link).target)


def _heard(across: Across, asked: bytes, data: bytes, source: tuple[Any, ...]) -> tuple[str, Found | None]:
    """Who has answered, and what it knows; "" when it is no answer. An address or a name that is not of the network is not
    known."""
    try:
        found = wire.told(data, asked)
    except ValueError:
        return "", None
    if source[1] != across.port:
        return "", None
    if found is not None and not (all(map(across.has, found.addresses))
                                  and all(name.endswith(f".{across.name.lower()}") for name in found.names)):
        found = None
    return source[0].partition("%")[0], found
