"""Links, addresses, routes and connection tracking by netlink: a message is bytes, a socket sends them and reads answers.

The wire format is written here and not taken from pyroute2: importing its rtnl messages costs the daemon 12 MB and
170 ms, and encoding the four messages of an endpoint 0.4 ms of a start; its own part would be this file's length. The
unit tests decode every message with pyroute2. A socket stays in the namespace it was made in, whoever uses it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TypeAlias

NETLINK_ROUTE, NETLINK_NETFILTER, NETLINK_GENERIC = 0, 12, 16
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 270, 10, 11, 12
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _ACK, _DUMP, _EXCL, _CREATE = 0x1, 0x4, 0x300, 0x200, 0x400
_ACK_TLVS, _NESTED, _TYPE_MASK = 0x200, 0x8000, 0x3FFF
_ERROR_TEXT = 1
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_NEWROUTE, RTM_GETROUTE = 20, 24, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
_APPEND, _NUD_PERMANENT, _NTF_SELF, _NDA_DST, _NDA_LLADDR = 0x800, 0x80, 0x02, 1, 2
_NDA_IFINDEX = 8
RTM_NEWQDISC, _REPLACE, _ROOT = 36, 0x100, 0xFFFFFFFF
_TCA_KIND, _TCA_OPTIONS, _TBF_PARMS, _TBF_RATE64, _TBF_BURST = 1, 2, 1, 4, 6
_LARGEST_PACKET = 1 << 16
_AF_BRIDGE = 7
IFF_UP = 1
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_PROTINFO, _IFLA_LINKINFO = 1, 3, 4, 10, 12, 18
_IFLA_IFALIAS, _IFLA_NET_NS_FD, _IFLA_NUM_TX_QUEUES, _IFLA_NUM_RX_QUEUES = 20, 28, 31, 32
_IFLA_LINK = 5
UNKNOWN_KIND = "Unknown device type"
"""What the kernel says of a kind of link that it lacks."""
MACVLAN_MODES = {"private": 1, "vepa": 2, "bridge": 4, "passthru": 8}
IPVLAN_MODES = {"l2": 0, "l3": 1, "l3s": 2}
IPVLAN_FLAGS = {"bridge": 0, "private": 1, "vepa": 2}
_INFO_KIND, _INFO_DATA, _VETH_PEER, _BR_FORWARD_DELAY, _BRPORT_HAIRPIN, _BRPORT_ISOLATED = 1, 2, 1, 1, 4, 33
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_F_NODAD = 1, 2, 4, 0x02
_RTA_DST, _RTA_OIF, _RTA_GATEWAY = 1, 4, 5
_RTPROT_RA = 9
_RT_TABLE_MAIN, _RTPROT_STATIC, _RTN_UNICAST, _RT_SCOPE_LINK = 254, 4, 1, 253
_CT_DELETE = (1 << 8) | 2
_GENL_CTRL, _CTRL_GETFAMILY, _CTRL_FAMILY_ID, _CTRL_FAMILY_NAME = 16, 3, 1, 2
_CTA_ORIGINAL, _CTA_REPLY, _CTA_FILTER = 1, 2, 25
_FILTER_SRC, _FILTER_DST, _FILTER_PROTO, _FILTER_DPORT = 1 << 0, 1 << 1, 1 << 3, 1 << 5
_RECEIVE = 1 << 18
_SECONDS = 20
"""An answer is immediate; but the kernel's rtnl lock can be held for long by others' removals."""
Host: TypeAlias = IPv4Address | IPv6Address


# -- messages --

def attribute(kind: int, value: bytes) -> bytes:
    """A netlink attribute, padded to four bytes."""
    return struct.pack("=HH", len(value) + 4, kind) + value + b"\0" * (-len(value) % 4)


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def _nest(kind: int, *members: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(members))


def _message(kind: int, flags: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack("=IHHII", len(body) + 16, kind, flags | _REQUEST, 0, 0) + body


def generic(family: int, command: int, body: bytes, *, ack: bool = True) -> bytes:
    """A command of a family of generic netlink (``Netlink.family``), of its first version."""
    return _message(family, _ACK if ack else 0, struct.pack("=BBH", command, 1, 0), body)


def _ifinfo(index: int = 0, flags: int = 0, change: int = 0, family: int = socket.AF_UNSPEC) -> bytes:
    return struct.pack("=BxHiII", family, 0, index, flags, change)


def new_bridge(name: str, mtu: int, mac: str) -> bytes:
    """A bridge whose ports forward at once; its MAC address stays when ports come and go, because it was set."""
    kind = _nest(_IFLA_LINKINFO, _text(_INFO_KIND, "bridge"), _nest(_INFO_DATA, _number(_BR_FORWARD_DELAY, 0)))
    return _message(RTM_NEWLINK, _ACK | _CREATE | _EXCL, _ifinfo(), _text(_IFLA_IFNAME, name), _number(_IFLA_MTU, mtu),
                    attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", ""))), kind)


def new_veth(name: str, peer: str, namespace: int, mtu: int) -> bytes:
    """A pair, one queue each way; the peer is made in the namespace of that fd."""
    common = _number(_IFLA_MTU, mtu) + _number(_IFLA_NUM_TX_QUEUES, 1) + _number(_IFLA_NUM_RX_QUEUES, 1)
    inside = _nest(_VETH_PEER, _ifinfo(), _text(_IFLA_IFNAME, peer), common, _number(_IFLA_NET_NS_FD, namespace))
    return _message(RTM_NEWLINK, _ACK | _CREATE | _EXCL, _ifinfo(), _text(_IFLA_IFNAME, name), common,
                    _nest(_IFLA_LINKINFO, _text(_INFO_KIND, "veth"), _nest(_INFO_DATA, inside)))


def new_child(name: str, parent: int, kind: str, *, data: bytes = b"", namespace: int = -1, mac: str = "",
              mtu: int = 0) -> bytes:
    """A link above another one (vlan, macvlan, ipvlan), or above none (dummy); ``namespace``: an fd, of the one it is made
    in; ``data``: the kind's own attributes."""
    parts = [_text(_IFLA_IFNAME, name)]
    if parent:
        parts.append(_number(_IFLA_LINK, parent))
    if mac:
        parts.append(attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", ""))))
    if mtu:
        parts.append(_number(_IFLA_MTU, mtu))
    if namespace >= 0:
        parts.append(_number(_IFLA_NET_NS_FD, namespace))
    return _message(RTM_NEWLINK, _ACK | _CREATE | _EXCL, _ifinfo(), *parts,
                    _nest(_IFLA_LINKINFO, _text(_INFO_KIND, kind), *([_nest(_INFO_DATA, data)] if data else [])))


def macvlan_data(mode: str) -> bytes:
    """Of a macvlan: private, vepa, bridge or passthru."""
    return _number(1, MACVLAN_MODES[mode])


def ipvlan_data(mode: str, flag: str) -> bytes:
    """Of an ipvlan: l2, l3 or l3s; bridge, private or vepa."""
    return attribute(1, struct.pack("=H", IPVLAN_MODES[mode])) + attribute(2, struct.pack("=H", IPVLAN_FLAGS[flag]))


def vlan_data(number: int) -> bytes:
    """Of a VLAN link: its number."""
    return attribute(1, struct.pack("=H", number))


def vxlan_data(number: int, port: int, local: Host | None, link: int = 0) -> bytes:
    """Of a VXLAN link (RFC 7348): its network's number, the UDP port, the host's own address, None for the route's.
    ``link``: it goes by that one alone, which sees to it that what comes is whole: no checksums by IPv6."""
    own = attribute(4 if local.version == 4 else 17, local.packed) if local is not None else b""
    below = _number(3, link) + attribute(19, b"\x01") + attribute(20, b"\x01") if link else b""
    return _number(1, number) + below + own + attribute(15, struct.pack("!H", port))


def flood_to(index: int, peer: Host, *, link: int = 0, remove: bool = False) -> bytes:
    """What a VXLAN link has no better place for (broadcasts, MAC addresses it does not know) goes to this host, too; or no
    longer does. ``link``: by which a link-local address is reached."""
    header = struct.pack("=BxxxiHBB", _AF_BRIDGE, index, _NUD_PERMANENT, _NTF_SELF, 0)
    return _message(RTM_DELNEIGH if remove else RTM_NEWNEIGH, _ACK | (0 if remove else _CREATE | _APPEND), header,
                    attribute(_NDA_LLADDR, bytes(6)), attribute(_NDA_DST, peer.packed),
                    *([_number(_NDA_IFINDEX, link)] if link else []))


def set_link(index: int, *, name: str = "", alias: str = "", mac: str = "", mtu: int = 0, master: int = 0,
             up: bool = False, down: bool = False) -> bytes:
    """Change what is given, in one message; a link is renamed before it is brought up."""
    parts = [_ifinfo(index, IFF_UP if up else 0, IFF_UP if up or down else 0)]
    if mac:
        parts.append(attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", ""))))
    if mtu:
        parts.append(_number(_IFLA_MTU, mtu))
    if name:
        parts.append(_text(_IFLA_IFNAME, name))
    if alias:
        parts.append(attribute(_IFLA_IFALIAS, alias.encode()))
    if master:
        parts.append(_number(_IFLA_MASTER, master))
    return _message(RTM_NEWLINK, _ACK, *parts)


def limit_rate(index: int, rate: int) -> bytes:
    """What a link sends is held to ``rate`` bytes a second, by a token bucket (tbf): a burst of a hundredth of a second, at
    least of one large packet, and a queue of 50 ms; what does not fit is dropped."""
    burst = max(_LARGEST_PACKET, rate // 100)
    # cell_log, linklayer (1: Ethernet, so that the kernel counts itself), overhead, cell_align, mpu, rate
    spec = struct.pack("=BBHhHI", 0, 1, 0, 0, 0, min(rate, 0xFFFFFFFF))
    parms = spec + bytes(12) + struct.pack("=III", min(rate // 20 + burst, 0xFFFFFFFF), 0, 0)
    wide = attribute(_TBF_RATE64, struct.pack("=Q", rate)) if rate > 0xFFFFFFFF else b""
    return _message(RTM_NEWQDISC, _ACK | _CREATE | _REPLACE, struct.pack("=BxxxiIII", 0, index, 0, _ROOT, 0),
                    _text(_TCA_KIND, "tbf"),
                    _nest(_TCA_OPTIONS, attribute(_TBF_PARMS, parms), _number(_TBF_BURST, min(burst, 0xFFFFFFFF)), wide))


def set_hairpin(index: int) -> bytes:
    """Let a bridge port send a frame back where it came from: with bridge-nf-call-iptables a container that reaches its
    own published port is answered by the bridge, not by the routing behind it."""
    return _message(RTM_SETLINK, _ACK, _ifinfo(index, family=_AF_BRIDGE),
                    _nest(_IFLA_PROTINFO, attribute(_BRPORT_HAIRPIN, b"\x01")))


def set_isolated(index: int) -> bytes:
    """Frames of a bridge port reach no other port that is isolated too."""
    return _message(RTM_SETLINK, _ACK, _ifinfo(index, family=_AF_BRIDGE),
                    _nest(_IFLA_PROTINFO, attribute(_BRPORT_ISOLATED, b"\x01")))


def delete_link(index: int) -> bytes:
    """Remove a link, and a veth's peer with it."""
    return _message(RTM_DELLINK, _ACK, _ifinfo(index))


def new_address(index: int, address: IPv4Address, network: IPv4Network) -> bytes:
    """An address with its network's prefix and broadcast."""
    return _message(RTM_NEWADDR, _ACK | _CREATE | _EXCL,
                    struct.pack("=BBBBI", socket.AF_INET, network.prefixlen, 0, 0, index),
                    attribute(_IFA_LOCAL, address.packed), attribute(_IFA_ADDRESS, address.packed),
                    attribute(_IFA_BROADCAST, network.broadcast_address.packed))


def new_address6(index: int, address: IPv6Address, network: IPv6Network) -> bytes:
    """An address that is used at once: nobody is asked whether it has it too (duplicate address detection, a second)."""
    return _message(RTM_NEWADDR, _ACK | _CREATE | _EXCL,
                    struct.pack("=BBBBI", socket.AF_INET6, network.prefixlen, _IFA_F_NODAD, 0, index),
                    attribute(_IFA_LOCAL, address.packed), attribute(_IFA_ADDRESS, address.packed))


def forget_neighbour(index: int, address: IPv6Address) -> bytes:
    """Whoever had an address on a link, before it is another's. Answered by ENOENT when nobody had it."""
    return _message(RTM_DELNEIGH, _ACK, struct.pack("=BxxxiHBB", socket.AF_INET6, index, 0, 0, 0),
                    attribute(_NDA_DST, address.packed))


def new_default_route(index: int, gateway: IPv4Address | IPv6Address) -> bytes:
    """The default route of a family, by a gateway on a link; 0.0.0.0: whoever is asked for is on the link itself."""
    direct = not int(gateway)
    family = socket.AF_INET if gateway.version == 4 else socket.AF_INET6
    header = struct.pack("=BBBBBBBBI", family, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC,
                         _RT_SCOPE_LINK if direct else 0, _RTN_UNICAST, 0)
    return _message(RTM_NEWROUTE, _ACK | _CREATE | _EXCL, header,
                    *([] if direct else [attribute(_RTA_GATEWAY, gateway.packed)]), _number(_RTA_OIF, index))


def _flush(family: int, side: int, tuple_parts: list[bytes], flags: int) -> bytes:
    flag_kind = 1 if side == _CTA_ORIGINAL else 2
    header = struct.pack("=BBH", socket.AF_INET if family == 4 else socket.AF_INET6, 0, 0)
    return _message(_CT_DELETE, _ACK, header, _nest(side, *tuple_parts),
                    _nest(_CTA_FILTER, _number(flag_kind, flags)))


def flush_udp_to(address: IPv4Address | IPv6Address) -> bytes:
    """Forget the UDP flows that a container at this address answers (Linux 5.8)."""
    source = 1 if address.version == 4 else 3
    return _flush(address.version, _CTA_REPLY, [_nest(1, attribute(source, address.packed)),
                                                _nest(2, attribute(1, bytes([socket.IPPROTO_UDP])))],
                  _FILTER_SRC | _FILTER_PROTO)


def flush_udp_port(port: int, address: IPv4Address | IPv6Address) -> bytes:
    """Forget the UDP flows to a port of this host: those begun before it was published would never reach it. ``address``:
    0.0.0.0 or :: for all."""
    parts = [_nest(2, attribute(1, bytes([socket.IPPROTO_UDP])), attribute(3, struct.pack("!H", port)))]
    flags = _FILTER_PROTO | _FILTER_DPORT
    if int(address):
        parts.insert(0, _nest(1, attribute(2 if address.version == 4 else 4, address.packed)))
        flags |= _FILTER_DST
    return _flush(address.version, _CTA_ORIGINAL, parts, flags)


# -- answers --

@dataclass(frozen=True, slots=True)
class Link:
    """One link. ``master``: index of the bridge it is a port of, 0 for none; ``alias``: "" when it has none."""

    index: int
    name: str
    alias: str
    master: int
    mtu: int
    up: bool
    mac: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """One IPv4 route of any table; the default route has prefix length 0. ``link``: 0 when it has none."""

    network: IPv4Network
    link: int


@dataclass(frozen=True, slots=True)
class Route6:
    """One IPv6 route of any table. ``advertised``: a router said so (RFC 4861)."""

    network: IPv6Network
    link: int
    advertised: bool = False


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kinds and values, one after the other; stops at what is not an attribute."""
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4 or offset + length > len(data):
            return
        yield kind & _TYPE_MASK, data[offset + 4:offset + length]
        offset += (length + 3) & ~3


def _link(body: bytes) -> Link:
    _, _, index, flags, _ = struct.unpack_from("=BxHiII", body)
    found = dict(attributes(body[16:]))

    def number(kind: int) -> int:
        return int(struct.unpack("=I", found[kind])[0]) if kind in found else 0

    def text(kind: int) -> str:
        return found.get(kind, b"").rstrip(b"\0").decode(errors="replace")

    return Link(index, text(_IFLA_IFNAME), text(_IFLA_IFALIAS), number(_IFLA_MASTER), number(_IFLA_MTU),
                bool(flags & IFF_UP), found.get(_IFLA_ADDRESS, b"").hex(":"))


def _route(body: bytes) -> Route:
    length = body[1]
    found = dict(attributes(body[12:]))
    link = struct.unpack("=I", found[_RTA_OIF])[0] if _RTA_OIF in found else 0
    return Route(IPv4Network((found.get(_RTA_DST, bytes(4)), length)), int(link))


def _route6(body: bytes) -> Route6:
    length, protocol = body[1], body[5]
    found = dict(attributes(body[12:]))
    link = struct.unpack("=I", found[_RTA_OIF])[0] if _RTA_OIF in found else 0
    return Route6(IPv6Network((found.get(_RTA_DST, bytes(16)), length), strict=False), int(link), protocol == _RTPROT_RA)


class Netlink:
    """A netlink socket of the caller's network namespace; may be used from any thread. Raises OSError with the kernel's
    errno and, where it gave one, its text."""

    def __init__(self, family: int = NETLINK_ROUTE) -> None:
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        self._socket.settimeout(_SECONDS)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        if family == NETLINK_ROUTE:
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        self._socket.bind((0, 0))

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def request(self, *messages: bytes) -> None:
        """Send in one go; the kernel does one after the other. It goes on after a failure, which is raised then: the
        first one, when all have been answered."""
        failure: OSError | None = None
        with self._lock:
            self._socket.send(b"".join(messages))
            answered = 0
            while answered < len(messages):
                for kind, flags, body in self._receive():
                    if kind == _NLMSG_ERROR:
                        answered += 1
                        failure = failure or _failure(flags, body)
        if failure is not None:
            raise failure

    def _receive(self) -> Iterator[tuple[int, int, bytes]]:
        data = self._socket.recv(_RECEIVE)
        offset = 0
        while offset + 16 <= len(data):
            length, kind, flags, _, _ = struct.unpack_from("=IHHII", data, offset)
            if length < 16:
                return
            yield kind, flags, data[offset + 16:offset + length]
            offset += (length + 3) & ~3

    def _get(self, message: bytes, wanted: int, dump: bool) -> list[bytes]:
        bodies: list[bytes] = []
        with self._lock:
            self._socket.send(message)
            while True:
                for kind, flags, body in self._receive():
                    if kind == wanted:
                        bodies.append(body)
                    elif kind == _NLMSG_DONE:
                        return bodies
                    elif kind == _NLMSG_ERROR:
                        failure = _failure(flags, body)
                        if failure is not None:
                            raise failure
                if not dump and bodies:
                    return bodies

    def links(self) -> list[Link]:
        """All links of the namespace."""
        return [_link(body) for body in self._get(_message(RTM_GETLINK, _DUMP, _ifinfo()), RTM_NEWLINK, True)]

    def link(self, *, name: str = "", index: int = 0) -> Link | None:
        """One link by name or by index; None when there is none."""
        parts = [_ifinfo(index)] + ([_text(_IFLA_IFNAME, name)] if name else [])
        try:
            return _link(self._get(_message(RTM_GETLINK, 0, *parts), RTM_NEWLINK, False)[0])
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return None

    def family(self, name: str) -> int:
        """The number of a family of generic netlink. Raises OSError (ENOENT: the kernel has none of that name)."""
        question = generic(_GENL_CTRL, _CTRL_GETFAMILY, _text(_CTRL_FAMILY_NAME, name), ack=False)
        for body in self._get(question, _GENL_CTRL, False):
            for kind, value in attributes(body[4:]):
                if kind == _CTRL_FAMILY_ID:
                    return int(struct.unpack("=H", value)[0])
        raise OSError(errno.ENOENT, f"generic netlink has no family {name}")

    def flooded(self, index: int) -> set[Host]:
        """The hosts of ``flood_to``."""
        header = struct.pack("=BxxxiHBB", _AF_BRIDGE, index, 0, 0, 0)
        found: set[Host] = set()
        for body in self._get(_message(RTM_GETNEIGH, _DUMP, header), RTM_NEWNEIGH, True):
            entry = dict(attributes(body[12:]))
            if struct.unpack_from("=i", body, 4)[0] == index and entry.get(_NDA_LLADDR) == bytes(6) and _NDA_DST in entry:
                found.add(ip_address(entry[_NDA_DST]))
        return found

    def routes(self) -> list[Route]:
        """All IPv4 routes of all tables."""
        header = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)
        return [_route(body) for body in self._get(_message(RTM_GETROUTE, _DUMP, header), RTM_NEWROUTE, True)]

    def routes6(self) -> list[Route6]:
        """All IPv6 routes of all tables; none of a kernel without IPv6."""
        header = struct.pack("=BBBBBBBBI", socket.AF_INET6, 0, 0, 0, 0, 0, 0, 0, 0)
        return [_route6(body) for body in self._get(_message(RTM_GETROUTE, _DUMP, header), RTM_NEWROUTE, True)
                if body[0] == socket.AF_INET6]


def _failure(flags: int, body: bytes) -> OSError | None:
    number = -struct.unpack_from("=i", body)[0]
    if number == 0:
        return None
    text = os.strerror(number)
    if flags & _ACK_TLVS:
        for kind, value in attributes(body[20:]):
            if kind == _ERROR_TEXT:
                text = f"{text}: {value.rstrip(bytes(1)).decode(errors='replace')}"
    return OSError(number, text)
