"""Real packets between network namespaces, and an instance's networks without containers."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import secrets
import socket
import struct
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, TypeVar

from dolium.engine.store import Store, open_database
from dolium.linux.threads import in_thread
from dolium.network import ipv6, netlink
from dolium.network.base import NetworkRequest, PortBinding, Prepared
from dolium.network.local import new_namespace
from dolium.network.manager import Networks
from dolium.network.netlink import Netlink

T = TypeVar("T")
_LIBC = ctypes.CDLL(None, use_errno=True)
SECONDS = 5.0
OUTSIDE, OUTSIDE6 = IPv4Network("10.213.77.0/30"), IPv6Network(f"fd00:213:{1 + secrets.randbelow(65535):x}::/64")
FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
FORWARD6 = Path("/proc/sys/net/ipv6/conf/all/forwarding")


def inside(fd: int, work: Callable[[], T]) -> T:
    """Run in a namespace; a socket that is made there stays there."""
    def run() -> T:
        assert _LIBC.setns(fd, 0x40000000) == 0
        return work()
    return in_thread(run)


def make_socket(fd: int, kind: int = socket.SOCK_STREAM, proto: int = 0, family: int = socket.AF_INET) -> socket.socket:
    made = socket.socket(family, kind, proto) if fd < 0 else inside(fd, lambda: socket.socket(family, kind, proto))
    made.settimeout(SECONDS)
    return made


def family_of(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def listen(fd: int, port: int, address: str = "0.0.0.0") -> socket.socket:
    server = make_socket(fd, family=family_of(address))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, port))
    server.listen(8)
    return server


def talk(server: socket.socket, fd: int, address: str, port: int) -> str:
    """One connection from the namespace (-1: the host's) both ways; the address the server saw."""
    with make_socket(fd, family=family_of(address)) as client:
        client.connect((address, port))
        connection, peer = server.accept()
        with connection:
            connection.settimeout(SECONDS)
            client.sendall(b"question")
            assert connection.recv(100) == b"question"
            connection.sendall(b"answer" * 1000)
            connection.shutdown(socket.SHUT_WR)
            received = b""
            while piece := client.recv(65536):
                received += piece
            assert received == b"answer" * 1000
        return str(peer[0])


def datagram(server: socket.socket, client: socket.socket, address: str, port: int) -> str:
    client.sendto(b"question", (address, port))
    data, peer = server.recvfrom(100)
    assert data == b"question"
    server.sendto(b"answer", peer)
    data, answered = client.recvfrom(100)
    assert (data, answered[:2]) == (b"answer", (address, port))
    return str(peer[0])


def ping(fd: int, address: str) -> None:
    with make_socket(fd, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        body = struct.pack("!BBHHH", 8, 0, 0, 77, 1)
        total = sum(struct.unpack("!4H", body))
        raw.sendto(struct.pack("!BBHHH", 8, 0, ~(total + (total >> 16)) & 0xFFFF, 77, 1), (address, 0))
        while True:
            answer, peer = raw.recvfrom(1500)
            if answer[20] == 0 and peer[0] == address:
                return


def links(own: str = "") -> set[str]:
    """Names of an instance's links, or of all that are no instance's: other daemons may run beside the tests."""
    found = json.loads(subprocess.run(["ip", "-j", "link"], check=True, capture_output=True).stdout)
    return {link["ifname"] for link in found
            if (own in link["ifname"] or own in link.get("ifalias", "") if own else
                not re.match("dolium:", link.get("ifalias", "")) and not re.match("dol|dp|dv", link["ifname"]))}


def links_inside(fd: int) -> list[netlink.Link]:
    with contextlib.closing(inside(fd, Netlink)) as there:
        return there.links()


def ruleset() -> str:
    """All tables but those of other instances: other daemons may run beside the tests."""
    text = subprocess.run(["nft", "-s", "list", "ruleset"], check=True, capture_output=True, text=True).stdout
    return "".join(table for table in re.split(r"(?m)^(?=table )", text) if not re.match("table (ip6?|bridge) dolium-", table))


def tables() -> str:
    return subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True).stdout


def eventually(check: Callable[[], bool]) -> None:
    """The kernel ends a namespace some time after its last user."""
    until = time.monotonic() + 10
    while not check():
        assert time.monotonic() < until, links()
        time.sleep(0.01)


@contextlib.contextmanager
def nothing_left(instance: str) -> Iterator[None]:
    before = links(), ruleset()
    forward = {path: path.read_text() for path in (FORWARD, FORWARD6) if path.exists()}
    try:
        yield
    finally:
        for path, text in forward.items():
            path.write_text(text)
    eventually(lambda: not links(instance))
    eventually(lambda: links() <= before[0])
    assert f"dolium-{instance}" not in tables()
    assert ruleset() == before[1]


class Bench:
    """An instance with its own database, and what was prepared in it."""

    def __init__(self, folder: Path, instance: str) -> None:
        self.folder, self.instance = folder, instance
        self.store = Store(open_database(str(folder / "dolium.db")))
        self.networks = Networks(instance, self.store, run_dir=str(folder))
        self.prepared: dict[str, Prepared] = {}

    async def up(self, *ports: PortBinding, container: str = "", **more: Any) -> tuple[str, int, dict[str, Any]]:
        container = container or secrets.token_hex(32)
        prepared = await self.networks.prepare(NetworkRequest(container, "bridge", ports, **more))
        self.prepared[container] = prepared
        return container, prepared.fd, prepared.endpoint

    async def down(self, container: str) -> None:
        prepared = self.prepared.pop(container)
        os.close(prepared.fd)
        await self.networks.release(container, prepared.endpoint)


def on_bench(body: Callable[[Bench], Awaitable[None]], folder: Path) -> None:
    instance = secrets.token_hex(4)

    async def run() -> None:
        bench = Bench(folder, instance)
        await bench.networks.start({})
        try:
            await body(bench)
        finally:
            for container in list(bench.prepared):
                await bench.down(container)
            await bench.networks.close()
            # no waiting here: close() itself leaves nothing
            assert links(instance) == set()

    with nothing_left(instance):
        asyncio.run(run())


@contextlib.contextmanager
def named_namespaces() -> Iterator[None]:
    """ip(8) mounts the folder of its named namespaces on itself at the first one: what was not there before goes again."""
    place = "/run/netns"
    before = any(line.split()[4] == place for line in Path("/proc/self/mountinfo").read_text().splitlines())
    try:
        yield
    finally:
        if not before:
            subprocess.run(["umount", place], check=True)


@contextlib.contextmanager
def the_outside() -> Iterator[tuple[int, str, str]]:
    """A namespace that plays another host: its fd, its address, and the host's address on the way to it."""
    with _outside() as (fd, _, _):
        yield fd, str(OUTSIDE[2]), str(OUTSIDE[1])


@contextlib.contextmanager
def the_outside6() -> Iterator[tuple[int, str, str]]:
    """As ``the_outside``, with IPv6 addresses."""
    with _outside() as (fd, name, outer):
        ipv6.enable_on(name)
        ipv6.enable_inside(fd, "eth0")
        with contextlib.closing(Netlink()) as host, contextlib.closing(inside(fd, Netlink)) as there:
            inner = there.link(name="eth0")
            assert inner
            host.request(netlink.new_address6(outer, OUTSIDE6[1], OUTSIDE6))
            there.request(netlink.new_address6(inner.index, OUTSIDE6[2], OUTSIDE6),
                          netlink.new_default_route(inner.index, OUTSIDE6[1]))
            ipv6.wait_for(host, OUTSIDE6[1])
            ipv6.wait_for(there, OUTSIDE6[2])
        yield fd, str(OUTSIDE6[2]), str(OUTSIDE6[1])


@contextlib.contextmanager
def _outside() -> Iterator[tuple[int, str, int]]:
    """(the namespace, the host's link to it, and its index)."""
    fd, name = new_namespace(), f"dt{secrets.token_hex(3)}"
    host, there = Netlink(), inside(fd, Netlink)
    try:
        host.request(netlink.new_veth(name, "eth0", fd, 1400))
        outer, inner = host.link(name=name), there.link(name="eth0")
        assert outer and inner
        host.request(netlink.set_link(outer.index, up=True), netlink.new_address(outer.index, OUTSIDE[1], OUTSIDE))
        there.request(netlink.set_link(inner.index, up=True), netlink.new_address(inner.index, OUTSIDE[2], OUTSIDE),
                      netlink.new_default_route(inner.index, OUTSIDE[1]))
        yield fd, name, outer.index
    finally:
        link = host.link(name=name)
        if link is not None:
            host.request(netlink.delete_link(link.index))
        host.close()
        there.close()
        os.close(fd)
