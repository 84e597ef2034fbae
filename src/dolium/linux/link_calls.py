"""Moving links into a container's network namespace: a program of its own, run by a plan's operation as ``python -I -S -E``.

The request is JSON on standard input: ``pid`` of the container's first process, ``devices``: name here to name inside. On
failure: exit code 1 and one line on standard error, which the runtime shows; what was moved already is moved back.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys

from dolium.linux import links

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
ROOM = 65536


class Failed(Exception):
    """The text is what a person reads."""


def _join(namespace: int) -> None:
    if _LIBC.setns(namespace, _CLONE_NEWNET):
        raise Failed(f"join a network namespace: {os.strerror(ctypes.get_errno())}")


class Route:
    """A routing socket of the network namespace in which it is made; it stays one of that namespace."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)

    def list(self, request: int) -> bytes:
        """All that the kernel lists for RTM_GETLINK or RTM_GETADDR."""
        self._socket.send(links.listing(request))
        parts = [self._socket.recv(ROOM)]
        while not links.ended(parts[-1]):
            parts.append(self._socket.recv(ROOM))
        return b"".join(parts)

    def tell(self, message: bytes, what: str) -> None:
        """Send what is acknowledged."""
        self._socket.send(message)
        number = links.outcome(self._socket.recv(ROOM))
        if number:
            raise Failed(f"{what}: {os.strerror(number)}")


def _move(here: Route, there: Route, theirs: int, devices: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Each device that is inside now, as (name here, name there)."""
    indexes, told = links.indexes(here.list(links.RTM_GETLINK)), here.list(links.RTM_GETADDR)
    for name in devices:
        if name not in indexes:
            raise Failed(f"{name}: there is no such link in the runtime's network namespace")
    # asked first: the kernel would find out about a new name when the link is inside already, by its old one
    taken = set(devices.values()) & links.indexes(there.list(links.RTM_GETLINK)).keys()
    if taken:
        raise Failed(f"the container's network namespace has a link {', '.join(sorted(taken))} already")
    for name, inside in devices.items():
        here.tell(links.move(indexes[name], inside, theirs), f"move {name} to the container as {inside}")
        yield name, inside
        index = links.indexes(there.list(links.RTM_GETLINK))[inside]  # the one it had may be taken there
        for address in links.addresses(told, indexes[name]):
            there.tell(links.address(address, index), f"give {inside} its address")
        there.tell(links.up(index), f"bring {inside} up")


def main() -> int:
    """The program; returns its exit code."""
    with open(0) as file:
        request = json.load(file)
    moved: list[tuple[str, str]] = []
    try:
        ours = os.open("/proc/self/ns/net", os.O_RDONLY)
        theirs = os.open(f"/proc/{request['pid']}/ns/net", os.O_RDONLY)
        if os.path.samestat(os.fstat(ours), os.fstat(theirs)):
            raise Failed("linux.namespaces: the container's network namespace is the runtime's own: nothing is to move")
        here = Route()
        _join(theirs)
        there = Route()
        try:
            for pair in _move(here, there, theirs, request["devices"]):
                moved.append(pair)
        except Failed:
            for name, inside in moved:
                there.tell(links.move(links.indexes(there.list(links.RTM_GETLINK))[inside], name, ours), f"move {name} back")
            raise
    except (Failed, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0
