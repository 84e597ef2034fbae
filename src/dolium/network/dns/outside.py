"""Name server sockets for containers whose packets another stack than the kernel's makes (a sandbox's): what is bound in
their namespace never sees one. They ask at their bridge's own address; a table of the instance leads each one's port 53
there to a port of its own, where nobody else is answered.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Collection
from dataclasses import dataclass

from dolium.network.firewall import Nft

_TRIES = 64
_BACKLOG = 64


@dataclass(slots=True)
class Outside:
    """``source``: the container's address; ``gateway``: its bridge's, where it asks; ``port``: of the sockets there, 0 for
    one that is to be chosen."""

    source: str
    gateway: str
    port: int = 0


def open_sockets(outside: Outside) -> tuple[socket.socket, socket.socket]:
    """(UDP, TCP that listens), both at ``outside.port``, which is chosen first if it is 0. Blocks. Raises OSError."""
    for tries in range(_TRIES):
        with contextlib.ExitStack() as undo:
            udp = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
            tcp = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that was killed has left talks behind
            udp.bind((outside.gateway, outside.port))
            port = udp.getsockname()[1]
            try:
                tcp.bind((outside.gateway, port))
            except OSError:
                if outside.port or tries == _TRIES - 1:
                    raise
                continue
            tcp.listen(_BACKLOG)
            undo.pop_all()
            outside.port = port
            return udp, tcp
    raise OSError("no port is free")


def table_text(table: str, every: Collection[Outside]) -> str:
    """One transaction that replaces the table; with nobody in it, takes it away."""
    removal = f"add table ip {table}\ndelete table ip {table}\n"
    elements = ", ".join(f"{one.source} : {one.gateway} . {one.port}" for one in every)
    places = ", ".join(f"{one.gateway} . {one.port}" for one in every)
    theirs = ", ".join(f"{one.source} . {one.gateway} . {one.port}" for one in every)
    return removal + (f"""table ip {table} {{
    map who {{
        type ipv4_addr : ipv4_addr . inet_service
        elements = {{ {elements} }}
    }}
    set places {{
        type ipv4_addr . inet_service
        elements = {{ {places} }}
    }}
    set theirs {{
        type ipv4_addr . ipv4_addr . inet_service
        elements = {{ {theirs} }}
    }}
    chain prerouting {{
        type nat hook prerouting priority -110; policy accept;
        fib daddr type local udp dport 53 dnat ip to ip saddr map @who
        fib daddr type local tcp dport 53 dnat ip to ip saddr map @who
    }}
    chain input {{
        type filter hook input priority -10; policy accept;
        ip daddr . th dport @places ip saddr . ip daddr . th dport != @theirs drop comment "of others"
    }}
}}
""" if elements else "")


class OutsideTable:
    """The table of one instance. ``marker``: a file that is there while the table is: what an earlier daemon has left."""

    def __init__(self, instance: str, marker: str) -> None:
        self._table, self._marker = f"dolium-{instance}-names", marker

    def write(self, every: Collection[Outside]) -> None:
        """It is for these from now on. Blocks. Raises DoliumError, OSError."""
        if not every and not os.path.exists(self._marker):
            return
        with open(self._marker, "a"):
            nft = Nft()
            try:
                nft.run(table_text(self._table, every))
            finally:
                nft.close()
        if not every:
            os.unlink(self._marker)
