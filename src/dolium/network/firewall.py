"""nftables: one table per instance, ``ip dolium-INSTANCE``, and one of the family ip6 while it has networks with IPv6,
through libnftables in this process: nothing is forked.

Published ports are elements of two maps, so that a packet costs the same with one port and with ten thousand, and
publishing is one small transaction (0.13 ms). Commands are nft's own language and not its JSON: libnftables 1.0.6
(Debian 12) makes a set of a map to ``address . port`` given in JSON, and then crashes on the rule that looks it up.
What goes into a command is made from numbers, addresses and ids in hex; nothing a user wrote comes near it.

A verdict of ours cannot overrule another table's: with a foreign ``policy drop`` on the forward hook (dockerd leaves
one) no packet is forwarded, and all that can be done is to say so (``foreign_drops``).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import logging
import re
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from dolium.errors import DoliumError, Internal, PermissionDenied, Unavailable, Unimplemented
from dolium.network.ports import ANY, ANY6, LOOPBACK6, Published

_log = logging.getLogger(__name__)
_LIBRARY = "libnftables.so.1"
_OUTPUT_JSON = 1 << 4
_ID = re.compile(r"[0-9a-zA-Z_.-]{1,128}")
_LINK = re.compile(r"[0-9a-zA-Z_.-]{1,15}")


@dataclass(frozen=True, slots=True)
class Bridge:
    """A bridge as the rules know it. ``internal``: nothing passes between it and other links; ``masquerade``: its containers
    go out by the host's address; ``subnet6``: None without IPv6; ``tunnel``: the UDP port by which it goes to other hosts, 0
    if it does not; ``gateways``: its own addresses."""

    name: str
    subnet: IPv4Network
    internal: bool = False
    masquerade: bool = True
    subnet6: IPv6Network | None = None
    tunnel: int = 0
    gateways: tuple[IPv4Address | IPv6Address, ...] = ()


@dataclass(frozen=True, slots=True)
class Publication:
    """A container's addresses and what it publishes; without an IPv6 address nothing at the host's IPv6 addresses."""

    address: IPv4Address
    ports: tuple[Published, ...]
    address6: IPv6Address | None = None


# -- the language: pure --

@dataclass(frozen=True, slots=True)
class _Family:
    """What differs between the tables. ``loopback``: which addresses never leave the host."""

    name: str
    kind: str
    loopback: str


_IP, _IP6 = _Family("ip", "ipv4_addr", "127.0.0.0/8"), _Family("ip6", "ipv6_addr", "::1")


def table_text(table: str, bridges: Sequence[Bridge], publications: Mapping[str, Publication], *, drop6: bool = False,
               relay: int = 0) -> str:
    """One transaction that replaces the table, whatever it was, with one for these bridges that has these publications; and
    so for IPv6, when a bridge has it. ``drop6``: there may be a table for IPv6 from before; ``relay``: its port on ::1, 0
    without one.

    A packet costs the same with one bridge and with a hundred: what is asked of each one is a look-up in a set. (Only the
    first packet of a connection goes through the nat chains.)
    """
    elements = "".join(element_text("add", table, container, publication)
                       for container, publication in publications.items())
    six = [one for one in bridges if one.subnet6 is not None]
    text = _table(_IP, table, bridges)
    if six:
        text += _table(_IP6, table, six, relay)
    elif drop6:
        text += f"add table ip6 {table}\ndelete table ip6 {table}\n"
    return text + elements


def _table(family: _Family, table: str, bridges: Sequence[Bridge], relay: int = 0) -> str:
    ip, loopback = family.name, family.loopback
    every = _names(bridges)
    inner, outer = [one for one in bridges if one.internal], [one for one in bridges if not one.internal]
    guard, forward = [], []
    if bridges and family is _IP:  # the kernel itself lets no ::1 in
        guard = [f'iifname {every} ip saddr 127.0.0.0/8 drop comment "route_localnet lets these in"',
                 f"iifname {every} ip daddr 127.0.0.0/8 drop"]
    for one in bridges:
        if one.tunnel:
            guard += _passing(family, one)
    tunnels = sorted({one.tunnel for one in bridges if one.tunnel}) if family is _IP else []
    if tunnels:
        guard.append(f"udp dport {{ {', '.join(map(str, tunnels))} }} notrack")
    if inner:
        own = ", ".join(f'"{one.name}" . "{one.name}"' for one in inner)
        forward += [f'{side} {_names(inner)} iifname . oifname != {{ {own} }} drop comment "internal"'
                    for side in ("iifname", "oifname")]
    if outer:
        own = ", ".join(f'"{one.name}" . "{one.name}"' for one in outer)
        forward += [f"oifname {_names(outer)} ct state established,related accept",
                    f"oifname {_names(outer)} ct status dnat accept",
                    f'oifname {_names(outer)} iifname . oifname != {{ {own} }} drop comment "ports that are not published"']
    postrouting = []
    for one in outer:
        subnet = one.subnet if family is _IP else one.subnet6
        if one.masquerade:
            postrouting.append(f'{ip} saddr {subnet} oifname != "{one.name}" masquerade')
        own = f"{{ 127.0.0.0/8, {subnet} }}" if family is _IP else f"{subnet}"
        postrouting.append(f'{ip} saddr {own} oifname "{one.name}" ct status dnat masquerade comment "loopback, hairpin"')
    rules = {name: "".join(f"        {rule}\n" for rule in lines) for name, lines in (
        ("guard", guard), ("postrouting", postrouting), ("forward", forward))}
    local = _LOCAL if family is _IP6 else ""
    first = ""
    if family is _IP6:
        to_relay = "ip6 daddr ::1 meta l4proto . th dport @loopback meta l4proto tcp redirect to"
        first = f"        {to_relay} :{relay}\n" * bool(relay) + "        ip6 daddr ::1 return\n"
    return f"""add table {ip} {table}
delete table {ip} {table}
table {ip} {table} {{
    map any {{
        type inet_proto . inet_service : {family.kind} . inet_service
    }}
    map one {{
        type {family.kind} . inet_proto . inet_service : {family.kind} . inet_service
    }}
    chain publish {{
        dnat {ip} to {ip} daddr . meta l4proto . th dport map @one
        dnat {ip} to meta l4proto . th dport map @any
    }}
    chain guard {{
        type filter hook prerouting priority raw; policy accept;
{rules["guard"]}    }}
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        {ip} daddr {loopback} return comment "not from a wire: the host's own go through output"
        fib daddr type local goto publish
    }}
    chain output {{
        type nat hook output priority -100; policy accept;
{first}        fib daddr type local goto publish
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
{rules["postrouting"]}    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
{rules["forward"]}    }}
{local}{_sent(tunnels)}}}
"""


def _passing(family: _Family, bridge: Bridge) -> list[str]:
    """What an overlay carries between containers is not tracked: it is none of this host's, and nothing is translated. A
    kernel that shows bridged packets to these chains (br_netfilter) would track it on both hosts."""
    ip, subnet = family.name, bridge.subnet if family is _IP else bridge.subnet6
    own = ", ".join(str(one) for one in bridge.gateways if one.version == (4 if family is _IP else 6))
    inner = f'iifname "{bridge.name}" {ip} saddr {subnet} {ip} daddr {subnet}'
    return [f"{inner} {ip} daddr != {{ {own} }} notrack"] if own else []


def _sent(tunnels: Sequence[int]) -> str:
    """Packets between hosts: each flow inside has a source port of its own, and answers come to another one."""
    return f"""    chain tunnels {{
        type filter hook output priority raw; policy accept;
        udp dport {{ {', '.join(map(str, tunnels))} }} notrack
    }}
""" if tunnels else ""


_LOCAL = """    set loopback {
        type inet_proto . inet_service
    }
    map targets {
        type inet_proto . inet_service : ipv6_addr . inet_service
    }
    chain local {
        type filter hook output priority filter; policy accept;
        ip6 daddr ::1 meta l4proto . th dport @loopback goto refuse
    }
    chain refuse {
        meta l4proto tcp reject with tcp reset
        reject
    }
"""
"""No answer from a link gets to ::1 (IPv4 has route_localnet for this): a relay takes TCP connections to it, and finds in
``targets`` where they lead. The rest is refused at once: who tries ::1 first takes 127.0.0.1."""


def _names(bridges: Sequence[Bridge]) -> str:
    for one in bridges:
        if not _LINK.fullmatch(one.name):
            raise ValueError(one.name)
    return "{ " + ", ".join(f'"{one.name}"' for one in bridges) + " }"


def element_text(verb: str, table: str, container: str, publication: Publication) -> str:
    """``add`` or ``delete`` a container's ports; one transaction when run as one text."""
    if not _ID.fullmatch(container):
        raise ValueError(container)
    lines: dict[str, list[str]] = {}
    for port in publication.ports:
        key = f"{port.protocol} . {port.host_port}"
        six = ":" in port.host_ip
        target = publication.address6 if six else publication.address
        if port.host_ip in (ANY6, LOOPBACK6):
            lines.setdefault(f"ip6 {table} loopback", []).append(key)
            lines.setdefault(f"ip6 {table} targets", []).append(
                key + (f" : {target} . {port.container_port}" if verb == "add" else ""))
        if port.host_ip == LOOPBACK6:
            continue
        name = "any" if port.host_ip in (ANY, ANY6) else "one"
        if name == "one":
            key = f"{port.host_ip} . {key}"
        value = f' comment "{container}" : {target} . {port.container_port}' if verb == "add" else ""
        lines.setdefault(f"{'ip6' if six else 'ip'} {table} {name}", []).append(key + value)
    return "".join(f"{verb} element {name} {{ {', '.join(keys)} }}\n" for name, keys in lines.items())


def drops_in(listing: str, own: str, *, six: bool = False) -> list[str]:
    """The chains of other tables that drop what they do not know on the forward hook, as ``family table chain``; ``six``: of
    IPv6 too; ``listing`` is the JSON of ``list chains``."""
    found, families = [], ("ip", "inet", "ip6") if six else ("ip", "inet")
    for entry in json.loads(listing).get("nftables", []):
        chain = entry.get("chain")
        if (chain and chain.get("hook") == "forward" and chain.get("policy") == "drop"
                and chain["family"] in families and chain["table"] != own):
            found.append(f"{chain['family']} {chain['table']} {chain['name']}")
    return found


# -- the library --

class Nft:
    """A libnftables context of this process's network namespace. May be used from any thread, one at a time."""

    def __init__(self, *, json: bool = True) -> None:
        """``json``: how it prints; else in nft's own language. Raises Unavailable when the library is not installed."""
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise Unavailable(f"cannot load {_LIBRARY}: {error}", hint="install libnftables1") from error
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error", "nft_ctx_free"):
            getattr(library, name).argtypes = [ctypes.c_void_p]
        for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(library, name).argtypes = [ctypes.c_void_p]
            getattr(library, name).restype = ctypes.c_char_p
        library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
        library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        self._library = library
        self._lock = threading.Lock()
        self._context: int | None = library.nft_ctx_new(0)
        if not self._context or library.nft_ctx_buffer_output(self._context) \
                or library.nft_ctx_buffer_error(self._context):
            raise Unavailable("libnftables gives no context")
        if json:
            library.nft_ctx_output_set_flags(self._context, _OUTPUT_JSON)

    def run(self, text: str) -> str:
        """Run commands as one transaction; what they print.

        Raises PermissionDenied, Unimplemented (the kernel lacks a part of nftables), Internal.
        """
        with self._lock:
            if self._context is None:
                raise Internal("nft: used after close")
            failed = self._library.nft_run_cmd_from_buffer(self._context, text.encode())
            output = bytes(self._library.nft_ctx_get_output_buffer(self._context) or b"").decode(errors="replace")
            errors = bytes(self._library.nft_ctx_get_error_buffer(self._context) or b"").decode(errors="replace")
        if not failed:
            return output
        first = errors.strip().partition("\n")[0] or "no reason given"
        if "not permitted" in errors:
            raise PermissionDenied(f"nft: {first}")
        if "not supported" in errors:
            raise Unimplemented(f"nft: {first}", hint="the kernel lacks a part of nftables")
        raise Internal(f"nft: {first}")

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._context is not None:
                self._library.nft_ctx_free(self._context)
                self._context = None


class Firewall:
    """The instance's table. All methods block: they are called in threads, and one at a time by their own lock."""

    def __init__(self, instance: str, nft: Nft) -> None:
        self.table = f"dolium-{instance}"
        self._nft = nft
        self._bridges: tuple[Bridge, ...] | None = None
        self._six = False  # is there a table for IPv6, or may there be?
        self.relay = 0
        """The port on ::1 of the relay, in tables that are made from now on; 0 without one."""
        self._publications: dict[str, Publication] = {}
        self._lock = threading.Lock()

    def replace(self, bridges: Sequence[Bridge], publications: Mapping[str, Publication] | None = None) -> None:
        """Make the table anew for these bridges; ``publications`` None keeps what is published. No packet sees a moment
        without. Connections under way keep their NAT."""
        with self._lock:
            kept = self._publications if publications is None else dict(publications)
            if self._bridges is None:  # a killed daemon may have left one; a kernel without IPv6 knows no such table at all
                self._six = self._left6()
            self._nft.run(table_text(self.table, bridges, kept, drop6=self._six, relay=self.relay))
            self._bridges, self._publications = tuple(bridges), kept
            self._six = any(one.subnet6 is not None for one in bridges)

    def _left6(self) -> bool:
        tables = (entry.get("table") or {} for entry in json.loads(self._nft.run("list tables\n"))["nftables"])
        return any((one.get("family"), one.get("name")) == ("ip6", self.table) for one in tables)

    def add(self, container: str, publication: Publication) -> tuple[Published, ...]:
        """Publish; what was not published before. When it does not work (someone flushed all rules), the whole table is made
        anew."""
        with self._lock:
            before = self._publications.get(container)
            new = tuple(port for port in publication.ports if before is None or port not in before.ports)
            if new:
                self._change(element_text("add", self.table, container, replace(publication, ports=new)),
                             {**self._publications, container: publication})
            return new

    def remove(self, container: str, ports: Collection[Published] | None = None) -> None:
        """No longer publish these ports, or any. Idempotent."""
        with self._lock:
            publication = self._publications.get(container)
            if publication is None:
                return
            gone = tuple(port for port in publication.ports if ports is None or port in ports)
            kept = tuple(port for port in publication.ports if port not in gone)
            left = {key: value for key, value in self._publications.items() if key != container}
            if kept:
                left[container] = replace(publication, ports=kept)
            if gone:
                self._change(element_text("delete", self.table, container, replace(publication, ports=gone)), left)

    def _change(self, text: str, after: dict[str, Publication]) -> None:
        try:
            self._nft.run(text)
        except DoliumError as error:
            if self._bridges is None:
                raise
            _log.warning("the firewall table %s is made anew: %s", self.table, error)
            self._nft.run(table_text(self.table, self._bridges, after, drop6=self._six, relay=self.relay))
        self._publications = after

    def delete(self) -> None:
        """Remove the table; idempotent."""
        with self._lock:
            self._nft.run("".join(f"add table {family} {self.table}\ndelete table {family} {self.table}\n"
                                  for family in (("ip", "ip6") if self._six else ("ip",))))
            self._bridges, self._publications, self._six = None, {}, False

    def foreign_drops(self) -> list[str]:
        """Chains of others that drop forwarded packets by policy, ours too."""
        return drops_in(self._nft.run("list chains\n"), self.table, six=self._six)

    def close(self) -> None:
        """The table stays."""
        self._nft.close()


def udp_ports(ports: Iterable[Published]) -> Sequence[Published]:
    """Those whose flows connection tracking remembers after they end."""
    return [port for port in ports if port.protocol == "udp"]
