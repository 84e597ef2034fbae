"""The server's sockets in a container's namespace: 127.0.0.11, a port of the kernel's choice, and port 53 led to it.

Port 53 itself stays free for a name server that runs in the container. What leads there is a table of the namespace's own.
"""

from __future__ import annotations

import socket

from dolium.linux.threads import in_thread
from dolium.network.firewall import Nft
from dolium.network.local import enter_network

ADDRESS = "127.0.0.11"
TABLE = "dolium-dns"
_BACKLOG = 64


def rules(udp: int, tcp: int, *, fresh: bool) -> str:
    """nft's text: the table for these ports; in the place of an earlier one, unless the namespace is ``fresh``: after
    a transaction that deletes, the kernel is waited for."""
    removal = "" if fresh else f"add table ip {TABLE}\ndelete table ip {TABLE}\n"
    return f"""{removal}table ip {TABLE} {{
    chain output {{
        type nat hook output priority -100; policy accept;
        ip daddr {ADDRESS} udp dport 53 dnat to {ADDRESS}:{udp}
        ip daddr {ADDRESS} tcp dport 53 dnat to {ADDRESS}:{tcp}
    }}
}}
"""


def open_sockets(namespace: int, *, fresh: bool) -> tuple[socket.socket, socket.socket]:
    """(UDP, TCP that listens) of a namespace, and the way to them. ``fresh``: nothing of ours was ever in it. Blocks. Raises
    OSError, DoliumError."""
    def inside() -> tuple[socket.socket, socket.socket]:
        enter_network(namespace)
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            udp.bind((ADDRESS, 0))
            tcp.bind((ADDRESS, 0))
            tcp.listen(_BACKLOG)
            nft = Nft()
            try:
                nft.run(rules(udp.getsockname()[1], tcp.getsockname()[1], fresh=fresh))
            finally:
                nft.close()
        except BaseException:
            udp.close()
            tcp.close()
            raise
        return udp, tcp

    return in_thread(inside)
