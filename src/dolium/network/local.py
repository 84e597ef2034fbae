"""Network namespaces without a link to anything: ``none``; and how a namespace is made at all."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from ipaddress import IPv4Address, ip_address

from dolium.linux.threads import in_thread
from dolium.network import netlink

CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_ETH_P_ARP = 0x806
_LIBC = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int) -> None:
    if getattr(_LIBC, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def unshare_network() -> None:
    """Move the calling thread, which must end soon, into a new network namespace. Raises OSError."""
    _call("unshare", CLONE_NEWNET)


def enter_network(namespace: int) -> None:
    """Move the calling thread, which must end soon, into the network namespace of an fd. Raises OSError."""
    _call("setns", namespace, CLONE_NEWNET)


def new_namespace(namespace: int = -1) -> int:
    """An fd of a new network namespace, or of the one that is given, with its loopback up. Made in a thread that ends: no
    other thread moves."""
    def make() -> int:
        if namespace < 0:
            unshare_network()
        else:
            enter_network(namespace)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return in_thread(make)


def default_route(namespace: int, link: str, gateway: str) -> None:
    """Give a namespace that has none of that family a default route by a gateway on a link. Raises OSError."""
    def inside() -> None:
        enter_network(namespace)
        control = netlink.Netlink()
        try:
            control.request(netlink.new_default_route(socket.if_nametoindex(link), ip_address(gateway)))
        finally:
            control.close()

    in_thread(inside)


def announce(namespace: int, link: str, mac: str, address: str) -> None:
    """Tell all on the link's network that an address is at this MAC now (RFC 5227): another one may have had it. Raises
    OSError."""
    hardware, ip = bytes.fromhex(mac.replace(":", "")), IPv4Address(address).packed
    frame = (b"\xff" * 6 + hardware + struct.pack("!HHHBBH", _ETH_P_ARP, 1, 0x800, 6, 4, 1)
             + hardware + ip + bytes(6) + ip)

    def inside() -> None:
        enter_network(namespace)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
            wire.sendto(frame, (link, _ETH_P_ARP))

    in_thread(inside)
