"""Nobody sends to a container that has rules on who may reach it (ingress.py) with another one's address.

Docker's default capabilities let a container send packets with any source address. So what the bridges of this instance
carry to such a container's link is looked at on the host, where each container has a link of its own: the link a frame came
in by, and the address it says it is from, IPv4's, IPv6's or ARP's, must belong together; link-local addresses mean nobody in
the rules. The table is there only while there are such containers: without it no frame passes through a hook more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address

_LINK = re.compile(r"[0-9a-zA-Z_.-]{1,15}\Z")


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a network's frames come from. ``links``: the host's link of each container; ``uplinks``: of the network's own,
    from other hosts: behind those nobody looks."""

    links: dict[str, str]
    uplinks: tuple[str, ...] = ()


@dataclass(slots=True)
class Guarded:
    """``links``: of containers that are sent nothing false; ``pairs``: link and address of all who may send to those."""

    links: set[str] = field(default_factory=set)
    uplinks: set[str] = field(default_factory=set)
    pairs: set[tuple[str, str]] = field(default_factory=set)


def _elements(values: Iterable[str]) -> str:
    listed = ", ".join(sorted(values))
    return f" elements = {{ {listed} }};" if listed else ""


def _quoted(link: str) -> str:
    if not _LINK.match(link):
        raise ValueError(link)
    return f'"{link}"'


def table_text(table: str, guarded: Guarded) -> str:
    """nft's text that puts the table in place of what it was, or takes it away when there is nobody to guard."""
    away = f"add table bridge {table}\ndelete table bridge {table}\n"
    if not guarded.links:
        return away
    pairs, pairs6 = (_elements(f"{_quoted(link)} . {ip_address(address)}" for link, address in guarded.pairs
                               if ip_address(address).version == version) for version in (4, 6))
    return f"""{away}table bridge {table} {{
    set guarded {{ type ifname;{_elements(map(_quoted, guarded.links))} }}
    set uplinks {{ type ifname;{_elements(map(_quoted, guarded.uplinks))} }}
    set pairs {{ type ifname . ipv4_addr;{pairs} }}
    set pairs6 {{ type ifname . ipv6_addr;{pairs6} }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        oifname != @guarded accept
        iifname @uplinks accept
        ether type ip iifname . ip saddr @pairs accept
        ether type arp iifname . arp saddr ip @pairs accept
        ether type ip6 ip6 saddr {{ ::, fe80::/10 }} accept
        ether type ip6 iifname . ip6 saddr @pairs6 accept
        ether type {{ ip, ip6, arp }} drop
    }}
}}
"""
