"""What containers' rules refuse: nft's text for it, and a netlink socket in the namespace that is told (nfnetlink_log)."""

from __future__ import annotations

import errno
import socket
import struct
from ipaddress import IPv4Address, IPv6Address

from dolium.linux.threads import in_thread
from dolium.network.base import Refused
from dolium.network.firewall import Nft
from dolium.network.local import enter_network
from dolium.network.netlink import attribute

_GROUP, _SNAP = 1, 64
_INCOMING = "in"
_NETLINK_NETFILTER = 12
_ULOG = 4 << 8
_MSG_PACKET, _MSG_CONFIG = _ULOG, _ULOG | 1
_CFG_CMD, _CFG_MODE, _PAYLOAD, _PREFIX = 1, 2, 9, 10
_BIND, _COPY_PACKET = 1, 2
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}
_LOG = f"limit rate 20/second burst 50 packets log {{}}group {_GROUP} snaplen {_SNAP}"
_REJECT = """
        meta l4proto tcp reject with tcp reset
        reject with icmpx admin-prohibited
"""
REFUSE = f"        {_LOG.format('')}{_REJECT}"
"""The last rules of a chain on what a container sends."""
REFUSE_INCOMING = f"        {_LOG.format(f'prefix {chr(34)}{_INCOMING}{chr(34)} ')}{_REJECT}"
"""The last rules of a chain on what a container is sent."""


def run_inside(namespace: int, text: str) -> None:
    """nft's text, in a namespace (an fd). Blocks. Raises OSError, DoliumError."""
    def inside() -> None:
        enter_network(namespace)
        nft = Nft()
        try:
            nft.run(text)
        finally:
            nft.close()

    in_thread(inside)


def watch(namespace: int) -> socket.socket:
    """A socket from which ``refused`` reads what the rules of a namespace (an fd) refuse. Blocks. Raises OSError."""
    def inside() -> socket.socket:
        enter_network(namespace)
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        try:
            sock.bind((0, 0))
            sock.settimeout(5)
            _configure(sock, attribute(_CFG_CMD, struct.pack("=B", _BIND)))
            _configure(sock, attribute(_CFG_MODE, struct.pack("!IBx", _SNAP, _COPY_PACKET)))
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return sock

    return in_thread(inside)


def _configure(sock: socket.socket, part: bytes) -> None:
    body = struct.pack("!BBH", 0, 0, _GROUP) + part
    sock.send(struct.pack("=IHHII", 16 + len(body), _MSG_CONFIG, 0x5, 0, 0) + body)
    answer = sock.recv(4096)
    number = -struct.unpack_from("=i", answer, 16)[0]
    if number:
        raise OSError(number, f"nfnetlink_log: {errno.errorcode.get(number, number)}")


def refused(sock: socket.socket) -> list[Refused]:
    """What was refused since the last look. Raises BlockingIOError when nothing was, OSError (ENOBUFS: some are lost)."""
    data, found, at = sock.recv(1 << 16), [], 0
    while at + 20 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        if length < 20:
            break
        if kind == _MSG_PACKET:
            parts = _parts(data[at + 20:at + length])
            packet = parts.get(_PAYLOAD, b"")
            incoming = parts.get(_PREFIX, b"").rstrip(b"\0") == _INCOMING.encode()
            if len(packet) >= 20 and packet[0] >> 4 == 4:
                found.append(_told(packet, incoming=incoming))
            elif len(packet) >= 40 and packet[0] >> 4 == 6:
                found.append(_told6(packet, incoming=incoming))
        at += (length + 3) & ~3
    return found


def _parts(data: bytes) -> dict[int, bytes]:
    """Attributes by kind."""
    found, at = {}, 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[at + 4:at + length]
        at += (length + 3) & ~3
    return found


def _told(packet: bytes, *, incoming: bool) -> Refused:
    header, protocol = (packet[0] & 15) * 4, packet[9]
    port = 0
    if protocol in (6, 17, 132) and len(packet) >= header + 4:
        (port,) = struct.unpack_from("!H", packet, header + 2)
    address = packet[12:16] if incoming else packet[16:20]
    return Refused(str(IPv4Address(address)), _PROTOCOLS.get(protocol, str(protocol)), port, incoming)


def _told6(packet: bytes, *, incoming: bool) -> Refused:
    protocol, port = packet[6], 0  # of one with extension headers the first of these
    if protocol in (6, 17, 132) and len(packet) >= 44:
        (port,) = struct.unpack_from("!H", packet, 42)
    address = packet[8:24] if incoming else packet[24:40]
    return Refused(str(IPv6Address(address)), _PROTOCOLS.get(protocol, str(protocol)), port, incoming)
