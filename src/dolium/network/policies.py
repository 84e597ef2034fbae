"""Who may reach what: the rules of containers that have some, kept true while others come and go, and what they refuse."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dolium.errors import DoliumError, Unavailable, Unimplemented
from dolium.network import antispoof, egress, ingress, refusals
from dolium.network.antispoof import Guarded, Sources
from dolium.network.base import Endpoint, Peer, Refused, endpoints
from dolium.network.firewall import Nft
from dolium.network.switch import as_error

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Wall:
    """A container's rules on who may reach it. ``namespace``: an fd; ``text``: what is in it, "" when that is not known."""

    namespace: int
    allowed: tuple[ingress.Allow, ...]
    text: str = ""


class Policies:
    """Of all containers of an instance. All methods are called on one event loop."""

    def __init__(self, instance: str, sources: Callable[[str], Sources | None], peer_of: Callable[[str], Peer],
                 on_refused: Callable[[str, Refused], None]) -> None:
        """``sources``: of a network, by its name, as ``Driver.sources``; the others as in NetworkManager."""
        self._table, self._sources, self._peer_of, self._on_refused = f"dolium-{instance}", sources, peer_of, on_refused
        self._places: dict[str, dict[str, list[str]]] = {}  # by container and network: its addresses
        self._walls: dict[str, _Wall] = {}
        self._guard: str | None = ""  # the table's text; None when it is not known what is there
        self._applying = asyncio.Lock()
        self._watched: dict[str, socket.socket] = {}

    async def start(self, live: dict[str, Endpoint], namespace_of: Callable[[str], int] | None) -> None:
        """After a restart: those that run keep their rules; ``namespace_of`` opens the namespace of one."""
        for container, first in live.items():
            self._place(container, endpoints(first))
            if namespace_of is not None and restricted(first):
                try:
                    namespace = namespace_of(container)
                except OSError as error:
                    _log.warning("container %s keeps the rules it has: %s", container[:12], error)
                    continue
                try:
                    await self.resume(container, first, namespace)
                finally:
                    os.close(namespace)
        self._guard = None
        await self._apply_quietly()

    # -- a container's own --

    async def enter(self, container: str, first: Endpoint, namespace: int) -> None:
        """A new one that is restricted, before anything runs in it: its rules. Raises DoliumError; then ``leave``."""
        try:
            if "egress" in first:
                await asyncio.to_thread(refusals.run_inside, namespace, egress.table_text(egress.parse(first["egress"])))
            if "ingress" in first:
                self._walls[container] = _Wall(os.dup(namespace), ingress.parse(first["ingress"]))
                await self._apply(container)
            self._watch(container, await asyncio.to_thread(refusals.watch, namespace))
        except OSError as error:
            raise as_error(error, f"cannot restrict what container {container[:12]} reaches, or is reached by") from error

    async def resume(self, container: str, first: Endpoint, namespace: int) -> None:
        """A restricted one that runs: its rules are there. Without events it goes on."""
        try:
            if "ingress" in first and container not in self._walls:
                self._walls[container] = _Wall(os.dup(namespace), ingress.parse(first["ingress"]))
            if container not in self._watched:
                self._watch(container, await asyncio.to_thread(refusals.watch, namespace))
        except (OSError, DoliumError) as error:
            _log.warning("what container %s is refused is not told: %s", container[:12], error)

    def _watch(self, container: str, sock: socket.socket) -> None:
        self._watched[container] = sock
        asyncio.get_running_loop().add_reader(sock, self._refused, container, sock)

    def _refused(self, container: str, sock: socket.socket) -> None:
        try:
            for one in refusals.refused(sock):
                self._on_refused(container, one)
        except BlockingIOError:
            return
        except OSError as error:
            _log.warning("some of what container %s was refused is not told: %s", container[:12], error.strerror)

    # -- the others' --

    async def placed(self, container: str, found: Iterable[Endpoint]) -> None:
        """A container has these addresses, from now on; before it can send. Raises DoliumError."""
        self._place(container, found)
        await self._apply()

    def _place(self, container: str, found: Iterable[Endpoint]) -> None:
        places = {str(one["network"]): [str(one[key]) for key in ("ip", "ip6") if one.get(key)]
                  for one in found if one.get("network") and one.get("ip")}
        if places:
            self._places[container] = places
        else:
            self._places.pop(container, None)

    async def renamed(self) -> None:
        """A container that runs has another name."""
        await self._apply()

    def _unwatch(self, container: str) -> None:
        sock = self._watched.pop(container, None)
        if sock is not None:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()

    async def leave(self, container: str) -> None:
        """It is gone, or on its way; before its addresses are given to another one. Idempotent. What fails is logged."""
        self._unwatch(container)
        wall = self._walls.pop(container, None)
        if wall is not None:
            async with self._applying:  # nobody is about to use it
                os.close(wall.namespace)
        if self._places.pop(container, None) is not None or wall is not None:
            await self._apply_quietly()

    async def _apply_quietly(self) -> None:
        """Where something else must go on all the same."""
        try:
            await self._apply()
        except DoliumError as error:
            _log.error("the rules on who may reach containers are as they were: %s", error)

    async def _apply(self, new: str = "") -> None:
        """Make all rules what they should be. A failure for another container than ``new`` is logged: it may be on its way
        out, and is tried again at the next change."""
        if not self._walls and self._guard == "":
            return
        async with self._applying:
            await self._guard_now()
            peers = {container: (self._peer_of(container), places) for container, places in self._places.items()}
            for container, wall in list(self._walls.items()):
                text = ingress.table_text(wall.allowed, [peer for other, peer in peers.items() if other != container])
                if text == wall.text:
                    continue
                try:
                    await asyncio.to_thread(refusals.run_inside, wall.namespace, text)
                    wall.text = text
                except (OSError, DoliumError) as error:
                    if container == new:
                        raise
                    _log.error("who may reach container %s is as it was: %s", container[:12], error)

    def _guarded(self) -> Guarded:
        found = Guarded()
        for network in {network for container in self._walls for network in self._places.get(container, ())}:
            sources = self._sources(network)
            if sources is None:
                continue
            found.uplinks.update(sources.uplinks)
            for container, link in sources.links.items():
                if container in self._walls:
                    found.links.add(link)
                found.pairs.update((link, address) for address in self._places.get(container, {}).get(network, ()))
        return found

    async def _guard_now(self) -> None:
        """The host's table: nobody has another one's address. Raises DoliumError when it is needed and cannot be."""
        guarded = self._guarded()
        text = antispoof.table_text(self._table, guarded)
        if text == self._guard:
            return

        def run() -> None:
            nft = Nft()
            try:
                nft.run(text)
            finally:
                nft.close()
        try:
            await asyncio.to_thread(run)
        except (Unimplemented, Unavailable) as error:
            if guarded.links:
                raise type(error)(f"--ingress on a bridge: {error}",
                                  hint="without nftables' family bridge others could forge an address") from error
            _log.debug("no table of addresses on the bridges, and none is needed: %s", error)
        self._guard = text if guarded.links else ""

    async def close(self) -> None:
        """The rules of those that run stay."""
        for container in list(self._watched):
            self._unwatch(container)
        for wall in self._walls.values():
            os.close(wall.namespace)
        self._walls.clear()


def restricted(first: Endpoint) -> bool:
    """Has it rules on what it may reach, or what may reach it?"""
    return "egress" in first or "ingress" in first
