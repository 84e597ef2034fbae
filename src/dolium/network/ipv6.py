"""IPv6 in the kernel: on one link, through the host, and who is told of an address. Everything here blocks."""

from __future__ import annotations

import logging
import os
import socket
import struct
import time
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network

from dolium.errors import FailedPrecondition, Unimplemented
from dolium.linux.threads import in_thread
from dolium.network import netlink
from dolium.network.local import enter_network
from dolium.network.netlink import Netlink

_log = logging.getLogger(__name__)
_CONF = "/proc/sys/net/ipv6/conf"
_FORWARD = f"{_CONF}/all/forwarding"
LEAST_MTU = 1280
"""Bytes; a link with less has no IPv6 (RFC 8200, section 5)."""
_SECONDS, _POLL_SECONDS = 2.0, 0.0002
_ALL_NODES = IPv6Address("ff02::1")
_ADVERTISEMENT, _OVERRIDE, _TARGET_LINK = 136, 1 << 29, 2


@dataclass(frozen=True, slots=True)
class Six:
    """One address of a subnet. ``gateway``: of a default route, None for none."""

    address: IPv6Address
    subnet: IPv6Network
    gateway: IPv6Address | None = None


def check(name: str, mtu: int) -> None:
    """Can a network have IPv6 here? Raises Unimplemented, FailedPrecondition."""
    if not os.path.isdir(_CONF):
        raise Unimplemented(f"network {name}: this kernel has no IPv6", hint="leave --ipv6 out")
    if mtu < LEAST_MTU:
        raise FailedPrecondition(f"network {name}: an MTU of {mtu} is too small for IPv6", hint=f"at least {LEAST_MTU}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def enable_on(link: str) -> None:
    """On a link of the calling thread's namespace, before it has an address: its link-local one is used at once, and nobody
    on it is believed to be a router (a container may say that it is one). Raises OSError."""
    for key, value in (("accept_ra", "0"), ("accept_dad", "0"), ("disable_ipv6", "0")):
        _write(f"{_CONF}/{link}/{key}", value)


def enable_inside(namespace: int, link: str) -> None:
    """As ``enable_on``, in the namespace of an fd. Raises OSError."""
    def inside() -> None:
        enter_network(namespace)
        enable_on(link)

    in_thread(inside)


def messages(index: int, six: Six) -> list[bytes]:
    """What gives a link an address, and the default route by it."""
    route = [netlink.new_default_route(index, six.gateway)] if six.gateway is not None else []
    return [netlink.new_address6(index, six.address, six.subnet), *route]


def wait_for(control: Netlink, address: IPv6Address) -> None:
    """An address that was added just now is its link's own only when a worker of the kernel has made the route to it: what
    comes for it before is lost. Raises OSError."""
    wanted, until = IPv6Network(address), time.monotonic() + _SECONDS
    while not any(route.network == wanted for route in control.routes6()):
        if time.monotonic() >= until:
            _log.warning("the kernel has no route to its own address %s", address)
            return
        time.sleep(_POLL_SECONDS)


def enable_forwarding(host: Netlink) -> bool:
    """Let the host forward IPv6; whether it did not before. Never turned off, as for IPv4. A host that forwards listens to
    no router by default, and forgets the routes it was told: where it has some, it goes on listening. Raises OSError."""
    with open(_FORWARD) as file:
        if file.read().strip() == "1":
            return False
    told = {route.link for route in host.routes6() if route.advertised}
    for link in host.links():
        path = f"{_CONF}/{link.name}/accept_ra"
        if link.index in told and os.path.exists(path):
            with open(path) as file:
                accepted = file.read().strip()
            if accepted == "1":
                _write(path, "2")
                _log.warning("%s has routes by router advertisements: accept_ra is 2 there, to keep them", link.name)
    _write(_FORWARD, "1")
    return True


def advertisement(mac: str, address: IPv6Address) -> bytes:
    """A packet that tells all nodes of a link at which MAC address an address is now: an unsolicited neighbour
    advertisement, which overrides what they know (RFC 4861, section 7.2.6)."""
    hardware = bytes.fromhex(mac.replace(":", ""))
    body = struct.pack("!BBHI", _ADVERTISEMENT, 0, 0, _OVERRIDE) + address.packed + bytes([_TARGET_LINK, 1]) + hardware
    pseudo = address.packed + _ALL_NODES.packed + struct.pack("!IxxxB", len(body), socket.IPPROTO_ICMPV6)
    total = sum(struct.unpack(f"!{(len(pseudo) + len(body)) // 2}H", pseudo + body))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]
    return struct.pack("!IHBB", 6 << 28, len(body), socket.IPPROTO_ICMPV6, 255) + address.packed + _ALL_NODES.packed + body


def announce(link: int, mac: str, address: IPv6Address) -> None:
    """Send an ``advertisement`` out of a link (its index) of this namespace. Raises OSError."""
    # not a packet socket: when that is closed, RCU is waited for, ten milliseconds and more
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW) as wire:
        wire.sendto(advertisement(mac, address), (str(_ALL_NODES), 0, 0, link))


def announce_inside(namespace: int, link: int, mac: str, address: IPv6Address) -> None:
    """As ``announce``, in the namespace of an fd. Raises OSError."""
    def inside() -> None:
        enter_network(namespace)
        announce(link, mac, address)

    in_thread(inside)
