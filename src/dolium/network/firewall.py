"""nftables: one table per instance, ``ip dolium-INSTANCE``, through libnftables in this process: nothing is forked.

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
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from dolium.errors import DoliumError, Internal, PermissionDenied, Unavailable, Unimplemented
from dolium.network.ports import ANY, Published

_log = logging.getLogger(__name__)
_LIBRARY = "libnftables.so.1"
_OUTPUT_JSON = 1 << 4
_ID = re.compile(r"[0-9a-zA-Z_.-]{1,128}")
_LINK = re.compile(r"[0-9a-zA-Z_.-]{1,15}")


@dataclass(frozen=True, slots=True)
class Bridge:
    """A bridge as the rules know it. ``internal``: nothing passes between it and other links; ``masquerade``: its containers
    go out by the host's address."""

    name: str
    subnet: IPv4Network
    internal: bool = False
    masquerade: bool = True


@dataclass(frozen=True, slots=True)
class Publication:
    """A container's address and what it publishes."""

    address: IPv4Address
    ports: tuple[Published, ...]


# -- the language: pure --

def table_text(table: str, bridges: Sequence[Bridge], publications: Mapping[str, Publication]) -> str:
    """One transaction that replaces the table, whatever it was, with one for these bridges that has these publications.

    A packet costs the same with one bridge and with a hundred: what is asked of each one is a look-up in a set. (Only the
    first packet of a connection goes through the nat chains.)
    """
    elements = "".join(element_text("add", table, container, publication)
                       for container, publication in publications.items())
    every = _names(bridges)
    inner, outer = [one for one in bridges if one.internal], [one for one in bridges if not one.internal]
    guard, forward = [], []
    if bridges:
        guard = [f'iifname {every} ip saddr 127.0.0.0/8 drop comment "route_localnet lets these in"',
                 f"iifname {every} ip daddr 127.0.0.0/8 drop"]
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
        if one.masquerade:
            postrouting.append(f'ip saddr {one.subnet} oifname != "{one.name}" masquerade')
        postrouting.append(f'ip saddr {{ 127.0.0.0/8, {one.subnet} }} oifname "{one.name}" ct status dnat masquerade '
                           'comment "loopback, hairpin"')
    rules = {name: "".join(f"        {rule}\n" for rule in lines) for name, lines in (
        ("guard", guard), ("postrouting", postrouting), ("forward", forward))}
    return f"""add table ip {table}
delete table ip {table}
table ip {table} {{
    map any {{
        type inet_proto . inet_service : ipv4_addr . inet_service
    }}
    map one {{
        type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
    }}
    chain publish {{
        dnat ip to ip daddr . meta l4proto . th dport map @one
        dnat ip to meta l4proto . th dport map @any
    }}
    chain guard {{
        type filter hook prerouting priority raw; policy accept;
{rules["guard"]}    }}
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        ip daddr 127.0.0.0/8 return comment "not from a wire: the host's own go through output"
        fib daddr type local goto publish
    }}
    chain output {{
        type nat hook output priority -100; policy accept;
        fib daddr type local goto publish
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
{rules["postrouting"]}    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
{rules["forward"]}    }}
}}
{elements}"""


def _names(bridges: Sequence[Bridge]) -> str:
    for one in bridges:
        if not _LINK.fullmatch(one.name):
            raise ValueError(one.name)
    return "{ " + ", ".join(f'"{one.name}"' for one in bridges) + " }"


def element_text(verb: str, table: str, container: str, publication: Publication) -> str:
    """``add`` or ``delete`` a container's ports; one transaction when run as one text."""
    if not _ID.fullmatch(container):
        raise ValueError(container)
    lines: dict[str, list[str]] = {"any": [], "one": []}
    for port in publication.ports:
        key = f"{port.protocol} . {port.host_port}"
        name = "any" if port.host_ip == ANY else "one"
        if name == "one":
            key = f"{port.host_ip} . {key}"
        value = f' comment "{container}" : {publication.address} . {port.container_port}' if verb == "add" else ""
        lines[name].append(key + value)
    return "".join(f"{verb} element ip {table} {name} {{ {', '.join(keys)} }}\n" for name, keys in lines.items() if keys)


def drops_in(listing: str, own: str) -> list[str]:
    """The chains of other tables that drop what they do not know on the forward hook, as ``family table chain``;
    ``listing`` is the JSON of ``list chains``."""
    found = []
    for entry in json.loads(listing).get("nftables", []):
        chain = entry.get("chain")
        if (chain and chain.get("hook") == "forward" and chain.get("policy") == "drop"
                and chain["family"] in ("ip", "inet") and chain["table"] != own):
            found.append(f"{chain['family']} {chain['table']} {chain['name']}")
    return found


# -- the library --

class Nft:
    """A libnftables context of this process's network namespace. May be used from any thread, one at a time."""

    def __init__(self) -> None:
        """Raises Unavailable when the library is not installed."""
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
        library.nft_ctx_output_set_flags(self._context, _OUTPUT_JSON)

    def run(self, text: str) -> str:
        """Run commands as one transaction; what they print, as JSON.

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
        self._publications: dict[str, Publication] = {}
        self._lock = threading.Lock()

    def replace(self, bridges: Sequence[Bridge], publications: Mapping[str, Publication] | None = None) -> None:
        """Make the table anew for these bridges; ``publications`` None keeps what is published. No packet sees a moment
        without. Connections under way keep their NAT."""
        with self._lock:
            kept = self._publications if publications is None else dict(publications)
            self._nft.run(table_text(self.table, bridges, kept))
            self._bridges, self._publications = tuple(bridges), kept

    def add(self, container: str, publication: Publication) -> tuple[Published, ...]:
        """Publish; what was not published before. When it does not work (someone flushed all rules), the whole table is made
        anew."""
        with self._lock:
            before = self._publications.get(container)
            new = tuple(port for port in publication.ports if before is None or port not in before.ports)
            if new:
                self._change(element_text("add", self.table, container, Publication(publication.address, new)),
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
                left[container] = Publication(publication.address, kept)
            if gone:
                self._change(element_text("delete", self.table, container, Publication(publication.address, gone)), left)

    def _change(self, text: str, after: dict[str, Publication]) -> None:
        try:
            self._nft.run(text)
        except DoliumError as error:
            if self._bridges is None:
                raise
            _log.warning("the firewall table %s is made anew: %s", self.table, error)
            self._nft.run(table_text(self.table, self._bridges, after))
        self._publications = after

    def delete(self) -> None:
        """Remove the table; idempotent."""
        with self._lock:
            self._nft.run(f"add table ip {self.table}\ndelete table ip {self.table}\n")
            self._bridges, self._publications = None, {}

    def foreign_drops(self) -> list[str]:
        """Chains of others that drop forwarded packets by policy, ours too."""
        return drops_in(self._nft.run("list chains\n"), self.table)

    def close(self) -> None:
        """The table stays."""
        self._nft.close()


def udp_ports(ports: Iterable[Published]) -> Sequence[Published]:
    """Those whose flows connection tracking remembers after they end."""
    return [port for port in ports if port.protocol == "udp"]
