"""Host ports: who has which. A published port is held by a socket of the daemon's own, as long as it is published.

The socket makes the kernel the judge: another program's port is refused here, and ours there. It never receives
anything, since the firewall sends what comes to a container; a filter drops what would come past the firewall.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Protocol

from dolium.errors import AlreadyExists, FailedPrecondition, InvalidArgument, PermissionDenied, ResourceExhausted
from dolium.network.base import PortBinding

_log = logging.getLogger(__name__)
ANY, ANY6, LOOPBACK6 = "0.0.0.0", "::", "::1"
_SO_ATTACH_FILTER = 26
_ATTEMPTS = 16
"""For a port that is free in both families."""
_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


@dataclass(frozen=True, slots=True)
class Published:
    """One port of a container, published: all of it known."""

    container_port: int
    protocol: str
    host_ip: str
    host_port: int

    def as_dict(self) -> dict[str, Any]:
        """As it stands in an endpoint."""
        return {"container_port": self.container_port, "protocol": self.protocol, "host_ip": self.host_ip,
                "host_port": self.host_port}

    @classmethod
    def from_dict(cls, doc: dict[str, Any]) -> Published:
        """From an endpoint. Raises KeyError, ValueError."""
        return cls(int(doc["container_port"]), str(doc["protocol"]), str(ip_address(doc["host_ip"])), int(doc["host_port"]))

    @property
    def six(self) -> bool:
        """Is it at an IPv6 address of the host?"""
        return ":" in self.host_ip


def host_address(text: str) -> IPv4Address | IPv6Address:
    """Where on the host a port is published. Raises InvalidArgument."""
    try:
        address = ip_address(text)
    except ValueError as error:
        raise InvalidArgument(f"cannot publish on {text!r}", hint="an address of the host is needed") from error
    if isinstance(address, IPv6Address) and (address.scope_id or address.is_link_local):
        raise InvalidArgument(f"cannot publish on {text}: a link-local address is one link's, and leads to no other")
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        raise InvalidArgument(f"cannot publish on {text}", hint=f"write it as {address.ipv4_mapped}")
    return address


class Hold(Protocol):
    """What keeps a port for us."""

    port: int

    def close(self) -> None:
        """Let go."""


class SocketHold:
    """A socket that is bound and, for TCP, listens, and that receives nothing."""

    def __init__(self, protocol: str, address: str, port: int) -> None:
        """``port`` 0: the kernel picks one of ip_local_port_range. Raises OSError."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, _KINDS[protocol] | socket.SOCK_CLOEXEC)
        try:
            if family == socket.AF_INET6:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            program = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER,
                                    struct.pack("@HP", 1, ctypes.addressof(program)))
            if protocol == "tcp":
                # connections of a past owner in TIME_WAIT do not matter; a listening one is refused all the same
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((address, port))
            if protocol == "tcp":
                self._socket.listen(1)
            self.port = int(self._socket.getsockname()[1])
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()


class Ports:
    """All published ports of an instance. Called on the event loop: each call is some microseconds."""

    def __init__(self, hold: Callable[[str, str, int], Hold] = SocketHold) -> None:
        self._hold = hold
        self._held: dict[str, list[tuple[Published, Hold | None]]] = {}
        self._addresses: dict[tuple[str, int], dict[str, str]] = {}

    def reserve(self, container: str, bindings: Sequence[PortBinding], *, six: bool = False) -> tuple[Published, ...]:
        """All, or none and an exception: AlreadyExists when a port has an owner, InvalidArgument for what cannot be
        bound, ResourceExhausted when no random port is free, FailedPrecondition for an address that is not here.
        ``six``: a port that is published everywhere is so at IPv6 addresses too, with the same number."""
        done: list[tuple[Published, Hold | None]] = []
        try:
            for binding in bindings:
                done += self._reserve(container, binding, six and not binding.host_ip)
        except BaseException:
            self._drop(done)
            raise
        if done:
            self._held.setdefault(container, []).extend(done)
        return tuple(published for published, _ in done)

    def _reserve(self, container: str, binding: PortBinding, both: bool) -> list[tuple[Published, Hold | None]]:
        if binding.host_last > binding.host_port > 0:
            for port in range(binding.host_port, binding.host_last):
                with contextlib.suppress(AlreadyExists):
                    return self._reserve(container, replace(binding, host_port=port, host_last=0), both)
            binding = replace(binding, host_port=binding.host_last, host_last=0)  # the last one's error is told
        if binding.protocol not in _KINDS:
            raise InvalidArgument(f"cannot publish {binding.container_port}/{binding.protocol}: only tcp and udp")
        if not 0 < binding.container_port < 65536 or not 0 <= binding.host_port < 65536:
            raise InvalidArgument(f"invalid port: {binding.host_port or binding.container_port}")
        address = str(host_address(binding.host_ip or ANY))
        for attempt in range(_ATTEMPTS):
            first = self._take(container, binding, address, binding.host_port)
            if not both:
                return [first]
            try:
                return [first, self._take(container, binding, ANY6, first[0].host_port)]
            except AlreadyExists:
                self._drop([first])
                if binding.host_port or attempt == _ATTEMPTS - 1:
                    raise
            except BaseException:
                self._drop([first])
                raise
        raise AssertionError

    def _take(self, container: str, binding: PortBinding, address: str, port: int) -> tuple[Published, Hold | None]:
        if port and self._owner(binding.protocol, address, port):
            raise _allocated(address, port)
        try:
            hold = self._hold(binding.protocol, address, port)
        except OSError as error:
            raise _refused(error, address, port) from error
        if self._owner(binding.protocol, address, hold.port):
            # a container we adopted has this port without a socket, and the kernel picked it as a random one
            hold.close()
            raise _allocated(address, hold.port)
        published = Published(binding.container_port, binding.protocol, address, hold.port)
        self._note(container, published)
        return published, hold

    def adopt(self, container: str, ports: Iterable[Published]) -> None:
        """Ports of a container that lives since before this daemon: they are its, even when a program took one since."""
        held = self._held.setdefault(container, [])
        for published in ports:
            hold: Hold | None = None
            try:
                hold = self._hold(published.protocol, published.host_ip, published.host_port)
            except OSError as error:
                _log.warning("port %s:%d/%s of container %s was bound by another program: %s", published.host_ip,
                             published.host_port, published.protocol, container[:12], error.strerror)
            self._note(container, published)
            held.append((published, hold))

    def withdraw(self, container: str, ports: Iterable[Published]) -> None:
        """Some of a container's. Idempotent."""
        gone, held = set(ports), self._held.get(container, [])
        self._drop([one for one in held if one[0] in gone])
        held[:] = [one for one in held if one[0] not in gone]

    def release(self, container: str) -> None:
        """Idempotent."""
        self._drop(self._held.pop(container, []))

    def close(self) -> None:
        """Let go of all."""
        for container in list(self._held):
            self.release(container)

    def _owner(self, protocol: str, address: str, port: int) -> str:
        six = ":" in address
        there = {one: owner for one, owner in self._addresses.get((protocol, port), {}).items() if (":" in one) == six}
        if address in (ANY, ANY6) and there:
            return next(iter(there.values()))
        return there.get(address) or there.get(ANY6 if six else ANY) or ""

    def _note(self, container: str, published: Published) -> None:
        self._addresses.setdefault((published.protocol, published.host_port), {})[published.host_ip] = container

    def _drop(self, held: list[tuple[Published, Hold | None]]) -> None:
        for published, hold in held:
            if hold is not None:
                hold.close()
            key = (published.protocol, published.host_port)
            there = self._addresses.get(key, {})
            there.pop(published.host_ip, None)
            if not there:
                self._addresses.pop(key, None)
        held.clear()


def at(address: str, port: int) -> str:
    """As people write an address with a port."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _allocated(address: str, port: int) -> AlreadyExists:
    return AlreadyExists(f"Bind for {at(address, port)} failed: port is already allocated")


def _refused(error: OSError, address: str, port: int) -> Exception:
    text = f"Bind for {at(address, port)} failed: {error.strerror}"
    if error.errno == errno.EADDRINUSE:
        if port == 0:
            return ResourceExhausted(f"Bind for {address} failed: all ports of ip_local_port_range are in use")
        return _allocated(address, port)
    if error.errno == errno.EADDRNOTAVAIL:
        return FailedPrecondition(text, hint="the host does not have this address", errno=error.errno)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ResourceExhausted(text, errno=error.errno)
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDenied(text, errno=error.errno)
    return InvalidArgument(text, errno=error.errno)
