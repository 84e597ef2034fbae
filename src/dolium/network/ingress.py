"""What may reach a container when not everything may: ``allow=web:80``, ``allow=label:tier=front``, ``allow=10.0.0.0/8``.

The rules are a table of the container's own network namespace, on what it is sent: they hold on every network it is in, and
when the daemon is dead. Another container is known by its addresses, which are put in when it starts and taken out before it
gives them back (policies.py); that nobody sends with another one's address is antispoof.py's. Answers to what the container
asked are let in, and so is what it says to itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from itertools import chain

from dolium.errors import InvalidArgument
from dolium.network.base import Peer
from dolium.network.egress import allowed
from dolium.network.refusals import REFUSE_INCOMING

TABLE = "dolium-ingress"
_CONTAINER = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+\Z")
_PORT = re.compile(r"(.*):([0-9]{1,5})(?:/(tcp|udp))?\Z", re.DOTALL)
_HINT = "allow=CONTAINER[:PORT[/udp]], allow=label:KEY[=VALUE], allow=network:NAME, allow=ADDRESS[/BITS], or none"
Places = Mapping[str, Sequence[str]]
"""A container's addresses by the names of its networks."""


@dataclass(frozen=True, slots=True)
class Allow:
    """Who may reach the container. One of ``container`` (a name), ``label`` (with "" for any ``value``), ``place`` (all in
    that network, by its name) and ``network``; ``port`` 0 is all, of all protocols."""

    container: str = ""
    label: str = ""
    value: str | None = None
    place: str = ""
    network: IPv4Network | IPv6Network | None = None
    port: int = 0
    protocol: str = ""

    def addresses(self, peer: Peer, places: Places) -> Iterable[str]:
        """Those of another container that are meant."""
        if self.place:
            return places.get(self.place, ())
        if self.label:
            value = peer.labels.get(self.label)
            meant = value is not None and self.value in (None, value)
        else:
            meant = bool(self.container) and self.container == peer.name
        return chain.from_iterable(places.values()) if meant else ()


def parse(texts: Iterable[str]) -> tuple[Allow, ...]:
    """All that --ingress says; nothing for ``none``. Raises InvalidArgument."""
    return tuple(dict.fromkeys(_allow(text, what) for text, what in allowed("--ingress", texts, _HINT)))


def _allow(text: str, what: str) -> Allow:
    match = _PORT.match(what)
    where, port, protocol = (match[1], int(match[2]), match[3] or "tcp") if match else (what, 0, "")
    if match and not 0 < port < 65536:
        raise InvalidArgument(f"invalid --ingress {text!r}: {port} is not a port", hint="PORT, PORT/tcp or PORT/udp")
    kind, colon, name = where.partition(":")
    if colon and kind == "label" and name.partition("=")[0]:
        key, equals, value = name.partition("=")
        return Allow(label=key, value=value if equals else None, port=port, protocol=protocol)
    if colon and kind == "network" and _CONTAINER.match(name):
        return Allow(place=name, port=port, protocol=protocol)
    bracketed = re.fullmatch(r"\[([0-9a-fA-F:./]+)\]", where)
    if bracketed or re.fullmatch(r"[0-9./]+", where):
        try:
            return Allow(network=ip_network(bracketed[1] if bracketed else where), port=port, protocol=protocol)
        except ValueError as error:
            raise InvalidArgument(f"invalid --ingress {text!r}: {error}") from error
    if not _CONTAINER.match(where):
        raise InvalidArgument(f"invalid --ingress {text!r}: {where!r} is neither a name nor an address",
                              hint=f"{_HINT}; an IPv6 address in brackets")
    return Allow(where, port=port, protocol=protocol)


def table_text(rules: Sequence[Allow], peers: Sequence[tuple[Peer, Places]]) -> str:
    """nft's text for a namespace that has no such table, or one to be replaced. ``peers``: all other containers, with their
    addresses by network. No packet sees a moment without rules."""
    lines = []
    for one in rules:
        found = {ip_address(address) for peer, places in peers for address in one.addresses(peer, places)}
        sources = [(one.network.version, str(one.network))] if one.network is not None else [
            (version, "{ " + ", ".join(sorted(str(address) for address in found if address.version == version)) + " }")
            for version in sorted({address.version for address in found})]
        port = f" {one.protocol} dport {one.port}" if one.port else ""
        for version, text in sources:
            lines.append(f"        {'ip' if version == 4 else 'ip6'} saddr {text}{port} accept\n")
    return f"""add table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname "lo" accept
        ct state established,related accept
        ip6 hoplimit 255 icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert }} accept
{"".join(lines)}{REFUSE_INCOMING}    }}
}}
"""
