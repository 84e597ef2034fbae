"""What a container may reach when it may not reach everything: ``allow=pypi.org:443``, ``allow=10.0.0.0/8``, ``none``.

The rules are a table of the container's own network namespace, on what it sends: they hold on every network it is in, and
when the daemon is dead. The container cannot change them without CAP_NET_ADMIN nor pass them by without CAP_NET_RAW, and has
neither. A name stands for the addresses that our name server answered for it, for as long as it said; nothing else resolves,
so a name is no way out of its own. What is refused is told as an event (refusals.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from dolium.errors import InvalidArgument
from dolium.network.refusals import REFUSE

TABLE = "dolium-egress"
NONE = "none"
GRACE = 10
"""Seconds for which an address is allowed beyond its time to live: who was told of it last still has to connect."""
LONGEST = 86400
MOST = 65536
"""Addresses at once: a name's owner fills the kernel's memory no further."""
_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*\Z")


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
    hint = "allow=NAME[:PORT[/udp]], allow=ADDRESS[/BITS][:PORT[/udp]], or none"
    return tuple(dict.fromkeys(_allow(text, what) for text, what in allowed("--egress", texts, hint)))


def allowed(flag: str, texts: Iterable[str], hint: str) -> Iterator[tuple[str, str]]:
    """(text, WHAT) of each ``allow=WHAT`` that a flag says; nothing for ``none``. Raises InvalidArgument."""
    for text in texts:
        key, _, what = text.partition("=")
        if text != NONE and (key != "allow" or not what):
            raise InvalidArgument(f"invalid {flag} {text!r}", hint=hint)
        if text != NONE:
            yield text, what


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
{REFUSE}    }}
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
