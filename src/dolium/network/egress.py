"""What a container may reach when it may not reach everything: ``allow=pypi.org:443``, ``allow=10.0.0.0/8``, ``none``.

The rules are a table of the container's own network namespace, on what it sends: they hold on every network it is in, and
when the daemon is dead. The container cannot change them without CAP_NET_ADMIN nor pass them by without CAP_NET_RAW, and has
neither. A name stands for the addresses that our name server answered for it, for as long as it said; nothing else resolves,
so a name is no way out of its own. What is refused is told to a netlink socket in the namespace (nfnetlink_log).
"""

from __future__ import annotations

import errno
import re
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address

from dolium.errors import InvalidArgument
from dolium.linux.threads import in_thread
from dolium.network.base import Refused
from dolium.network.firewall import Nft
from dolium.network.local import enter_network
from dolium.network.netlink import attribute

TABLE = "dolium-egress"
NONE = "none"
GRACE = 10
"""Seconds for which an address is allowed beyond its time to live: who was told of it last still has to connect."""
LONGEST = 86400
MOST = 65536
"""Addresses at once: a name's owner fills the kernel's memory no further."""
_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*\Z")
_GROUP, _SNAP = 1, 64
_NETLINK_NETFILTER = 12
_ULOG = 4 << 8
_MSG_PACKET, _MSG_CONFIG = _ULOG, _ULOG | 1
_CFG_CMD, _CFG_MODE, _PAYLOAD = 1, 2, 9
_BIND, _COPY_PACKET = 1, 2
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}


@dataclass(frozen=True, slots=True)
class Allow:
    """One thing that may be reached. ``name`` (``*.`` stands for all below) or ``network``; ``port`` 0 is all, of all
    protocols."""

    name: str = ""
    network: IPv4Network | None = None
    port: int = 0
    protocol: str = ""

    def covers(self, name: str) -> bool:
        """Is that a name it speaks of? ``name``: in lower case, without the last dot."""
        if self.name.startswith("*."):
            return name.endswith(self.name[1:])
        return bool(self.name) and name == self.name


def parse(texts: Iterable[str]) -> tuple[Allow, ...]:
    """All that --egress says; nothing for ``none``. Raises InvalidArgument."""
    found = []
    for text in texts:
        if text == NONE:
            continue
        key, _, what = text.partition("=")
        if key != "allow" or not what:
            raise InvalidArgument(f"invalid --egress {text!r}",
                                  hint="allow=NAME[:PORT[/udp]], allow=ADDRESS[/BITS][:PORT[/udp]], or none")
        found.append(_allow(text, what))
    return tuple(dict.fromkeys(found))


def _allow(text: str, what: str) -> Allow:
    where, colon, port = what.partition(":")
    number, protocol = 0, ""
    if colon:
        digits, slash, protocol = port.partition("/")
        protocol = protocol if slash else "tcp"
        if not (digits.isascii() and digits.isdigit() and 0 < int(digits) < 65536) or protocol not in ("tcp", "udp"):
            raise InvalidArgument(f"invalid --egress {text!r}: {port!r} is not a port", hint="PORT, PORT/tcp or PORT/udp")
        number = int(digits)
    if re.fullmatch(r"[0-9./]+", where):
        try:
            return Allow(network=IPv4Network(where), port=number, protocol=protocol)
        except ValueError as error:
            raise InvalidArgument(f"invalid --egress {text!r}: {error}") from error
    name = where.lower().rstrip(".")
    if not _NAME.match(name) or len(name) > 253:
        raise InvalidArgument(f"invalid --egress {text!r}: {where!r} is neither a name nor an IPv4 address")
    return Allow(name, port=number, protocol=protocol)


def table_text(allowed: Sequence[Allow]) -> str:
    """nft's text for a namespace that has no such table, or one to be replaced."""
    rules = []
    for one in allowed:
        if one.network is not None:
            port = f" {one.protocol} dport {one.port}" if one.port else ""
            rules.append(f"ip daddr {one.network}{port} accept")
    lines = "".join(f"        {rule}\n" for rule in rules)
    return f"""add table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
    set ports {{
        type ipv4_addr . inet_proto . inet_service
        flags timeout
        size {MOST}
    }}
    set whole {{
        type ipv4_addr
        flags timeout
        size {MOST}
    }}
    chain output {{
        type filter hook output priority filter; policy drop;
        oifname "lo" accept
        ct state established,related accept
        icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept comment "the kernel's own"
        icmpv6 type {{ mld-listener-report, mld-listener-done, mld2-listener-report, nd-router-solicit }} drop
{lines}        ip daddr . meta l4proto . th dport @ports accept
        ip daddr @whole accept
        limit rate 20/second burst 50 packets log group {_GROUP} snaplen {_SNAP}
        meta l4proto tcp reject with tcp reset
        reject with icmpx admin-prohibited
    }}
}}
"""


def pinned(allowed: Sequence[Allow], name: str, addresses: Sequence[tuple[str, int]]) -> dict[tuple[str, str], int]:
    """For how many seconds a name's addresses, each with its time to live, may be reached at the ports that are allowed for
    the name; by set and element."""
    found = {}
    for one in allowed:
        if one.covers(name):
            for address, ttl in addresses:
                key = f"{IPv4Address(address)}" + (f" . {one.protocol} . {one.port}" if one.port else "")
                found["ports" if one.port else "whole", key] = min(max(ttl, 0), LONGEST) + GRACE
    return found


def pin_text(elements: Mapping[tuple[str, str], int]) -> str:
    """nft's text of them; "" for none. An element that is there gets the new time (``add`` alone would leave its own)."""
    text = ""
    for name_of_set in ("ports", "whole"):
        keys = {key: seconds for (where, key), seconds in elements.items() if where == name_of_set}
        if keys:
            plain = ", ".join(keys)
            timed = ", ".join(f"{key} timeout {seconds}s" for key, seconds in keys.items())
            where = f"inet {TABLE} {name_of_set}"
            text += (f"add element {where} {{ {plain} }}\ndelete element {where} {{ {plain} }}\n"
                     f"add element {where} {{ {timed} }}\n")
    return text


def restrict(namespace: int, allowed: Sequence[Allow], *, rules: bool = True) -> socket.socket:
    """Put the rules into a namespace (an fd); with ``rules`` False they are there. A socket from which ``refused`` reads.
    Blocks. Raises OSError, DoliumError."""
    def inside() -> socket.socket:
        enter_network(namespace)
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        try:
            sock.bind((0, 0))
            sock.settimeout(5)
            _configure(sock, attribute(_CFG_CMD, struct.pack("=B", _BIND)))
            _configure(sock, attribute(_CFG_MODE, struct.pack("!IBx", _SNAP, _COPY_PACKET)))
            sock.setblocking(False)
            if rules:
                nft = Nft()
                try:
                    nft.run(table_text(allowed))
                finally:
                    nft.close()
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
            packet = _payload(data[at + 20:at + length])
            if len(packet) >= 20 and packet[0] >> 4 == 4:
                found.append(_told(packet))
            elif len(packet) >= 40 and packet[0] >> 4 == 6:
                found.append(_told6(packet))
        at += (length + 3) & ~3
    return found


def _payload(data: bytes) -> bytes:
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            break
        if kind & 0x3FFF == _PAYLOAD:
            return data[at + 4:at + length]
        at += (length + 3) & ~3
    return b""


def _told(packet: bytes) -> Refused:
    header, protocol = (packet[0] & 15) * 4, packet[9]
    port = 0
    if protocol in (6, 17, 132) and len(packet) >= header + 4:
        (port,) = struct.unpack_from("!H", packet, header + 2)
    return Refused(str(IPv4Address(packet[16:20])), _PROTOCOLS.get(protocol, str(protocol)), port)


def _told6(packet: bytes) -> Refused:
    protocol, port = packet[6], 0  # of one with extension headers the first of these
    if protocol in (6, 17, 132) and len(packet) >= 44:
        (port,) = struct.unpack_from("!H", packet, 42)
    return Refused(str(IPv6Address(packet[24:40])), _PROTOCOLS.get(protocol, str(protocol)), port)
