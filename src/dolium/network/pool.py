"""Prepared namespaces: each with its loopback up and one end of a veth pair in it, used once.

A pair is not on the bridge (which has 1024 ports) and has no address before it is used. Making one takes 2 ms, mostly
the kernel's; using one 0.5 ms.
"""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from dolium import faults
from dolium.linux.threads import in_thread
from dolium.network import netlink
from dolium.network.local import enter_network, unshare_network
from dolium.network.netlink import Netlink

faults.register("network.namespace.made", "network.veth.made")
SIZE = 4
LINK = "eth0"
_IPV6 = "/proc/sys/net/ipv6/conf"
_numbers = itertools.count(secrets.randbits(16))


@dataclass(slots=True)
class Slot:
    """``fd``: the namespace; ``control``: a netlink socket in it; ``host`` and ``inside``: the ends' indices; ``sockets``:
    for a name server, where it is prepared for one."""

    fd: int
    control: Netlink
    name: str
    host: int
    inside: int
    sockets: tuple[socket.socket, ...] = ()

    def close(self) -> None:
        """The namespace goes, unless a process or another fd has it, and its link with it."""
        self.control.close()
        os.close(self.fd)
        for sock in self.sockets:
            sock.close()


def prefix(instance: str) -> str:
    """How the names of an instance's unused host ends begin: at most 15 characters with what follows."""
    return f"dp{instance}"


def spare_name(instance: str) -> str:
    """For a link that has no other name yet."""
    return f"{prefix(instance)}{next(_numbers) & 0xFFFF:04x}x"


def open_namespace(namespace: int = -1) -> tuple[int, Netlink]:
    """(an fd, a netlink socket in it) of a new network namespace, or of the one that is given, with its loopback up, and no
    IPv6 on what is made in it from now on. Raises OSError."""
    def inside() -> tuple[int, Netlink]:
        if namespace < 0:
            unshare_network()
        else:
            enter_network(namespace)
        control = Netlink()
        try:
            control.request(netlink.set_link(1, up=True))
            if os.path.isdir(_IPV6):
                # eth0; the loopback keeps ::1
                write(f"{_IPV6}/default/disable_ipv6", "1")
            fd = namespace if namespace >= 0 else os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            return fd, control
        except BaseException:
            control.close()
            raise

    made = in_thread(inside)
    faults.point("network.namespace.made")
    return made


def make(host: Netlink, instance: str, mtu: int, namespace: int = -1, link: str = LINK) -> Slot:
    """A slot, from nothing; or in a namespace that has no link of that name yet, whose fd it takes. Raises OSError; then
    nothing is left."""
    try:
        fd, control = open_namespace(namespace)
    except BaseException:
        if namespace >= 0:
            os.close(namespace)
        raise
    try:
        name = spare_name(instance)
        host.request(netlink.new_veth(name, link, fd, mtu))
        faults.point("network.veth.made")
        outer, inner = host.link(name=name), control.link(name=link)
        if outer is None or inner is None:
            raise OSError(f"the veth pair {name} is gone")
        if os.path.isdir(f"{_IPV6}/{name}"):
            write(f"{_IPV6}/{name}/disable_ipv6", "1")
        return Slot(fd, control, name, outer.index, inner.index)
    except BaseException:
        control.close()
        os.close(fd)
        raise


def write(path: str, text: str) -> None:
    """Set a sysctl. Raises OSError."""
    with open(path, "w") as file:
        file.write(text)


class Pool:
    """At most ``size`` slots. ``taken`` and ``missed`` count the uses that found one and those that did not."""

    def __init__(self, maker: Callable[[], Slot], size: int = SIZE) -> None:
        self._maker, self.size = maker, size
        self._slots: list[Slot] = []
        self._lock = threading.Lock()
        self._closed = False
        self.taken = self.missed = 0

    def __len__(self) -> int:
        return len(self._slots)

    def take(self) -> Slot:
        """One of the pool, or a new one when it is empty. Raises OSError."""
        slot = self.take_ready()
        if slot is not None:
            return slot
        with self._lock:
            self.missed += 1
        return self._maker()

    def take_ready(self) -> Slot | None:
        """One of the pool; None when it is empty."""
        with self._lock:
            if not self._slots:
                return None
            self.taken += 1
            return self._slots.pop(0)

    def fill(self) -> bool:
        """Add one; False when it is full or closed. Raises OSError."""
        with self._lock:
            if self._closed or len(self._slots) >= self.size:
                return False
        slot = self._maker()
        with self._lock:
            if not self._closed and len(self._slots) < self.size:
                self._slots.append(slot)
                return True
        slot.close()
        return False

    def close(self) -> list[int]:
        """As ``drain``, and nothing is added any more."""
        self._closed = True
        return self.drain()

    def drain(self) -> list[int]:
        """Drop all; the indices of the host ends, which the kernel removes a little later."""
        with self._lock:
            slots, self._slots = self._slots, []
        for slot in slots:
            slot.close()
        return [slot.host for slot in slots]
