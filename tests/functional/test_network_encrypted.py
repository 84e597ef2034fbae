"""Encrypted overlays between two hosts: what is on the wire, who is let in, and who is not."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from packets import inside, make_socket, named_namespaces

HOSTS = ("10.216.1.1", "10.216.1.2")
MARK = b"what nobody on the wire may read"
PORT, VXLAN = 51820, 4789
pytestmark = pytest.mark.leaves("links", "nft", "children")  # name servers end by themselves


class Host:
    """A namespace with one link, to the wire; and an instance's networks in it."""

    def __init__(self, number: int, folder: Path) -> None:
        self.address, self.number, self.folder = HOSTS[number], number, folder
        self.name, self.instance = f"dcrypt{number}", secrets.token_hex(4)
        folder.mkdir()
        self.secret = folder / "key"
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        self.run("ip", "link", "set", "lo", "up")
        self.live: dict[str, Any] = {}
        self.namespaces: dict[str, int] = {}  # by network
        self._process: subprocess.Popen[str]

    def run(self, *words: str) -> str:
        return subprocess.run(["nsenter", f"--net=/run/netns/{self.name}", *words], check=True, capture_output=True, text=True).stdout

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.name}", sys.executable, str(Path(__file__).parent / "overlay_host.py"),
             str(self.folder), self.instance], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.do("start", live=self.live)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def do(self, what: str, **more: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def create(self, name: str, vni: int, **options: str) -> str:
        answer = self.do("create", wish={
            "Name": name, "Driver": "overlay", "Options": {"peers": ",".join(HOSTS), "vni": str(vni), "local": self.address, **options},
            "IPAM": {"Config": [{"Subnet": f"10.{vni}.0.0/16", "IPRange": f"10.{vni}.{self.number + 1}.0/24"}]}})
        return str(answer.get("error", ""))

    def up(self, network: str, *names: str) -> str:
        """A container; its address."""
        container = secrets.token_hex(32)
        answer = self.do("up", container=container, network=network, names=names)
        self.namespaces[network] = os.open(answer["namespace"], os.O_RDONLY)
        self.live[container] = answer["endpoint"]
        return str(answer["endpoint"]["ip"])

    def made(self) -> set[str]:
        """The links that networks are made of; prepared pairs come and go."""
        return {link["ifname"] for link in json.loads(self.run("ip", "-j", "link")) if not link["ifname"].startswith("dp")}

    def close(self) -> None:
        for fd in self.namespaces.values():
            os.close(fd)
        self.do("end", live=self.live)
        left = json.loads(self.run("ip", "-j", "link"))
        self._process.communicate()
        assert [link["ifname"] for link in left if link["ifname"] not in ("lo", "wire", "sit0")] == []

    def fd(self) -> int:
        return os.open(f"/run/netns/{self.name}", os.O_RDONLY)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with contextlib.ExitStack() as undo:
        undo.enter_context(named_namespaces())
        undo.callback(lambda: None)
        one, other = (Host(number, tmp_path / f"host{number}") for number in range(2))
        for host in (one, other):
            undo.callback(subprocess.run, ["ip", "netns", "del", host.name], check=False)
        one.run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", other.name)
        for host in (one, other):
            host.run("ip", "addr", "add", f"{host.address}/24", "dev", "wire")
            host.run("ip", "link", "set", "wire", "up")
            host.start()
            undo.callback(host.close)
            host.secret.write_bytes(b"of this test alone, and long enough\n")
            host.secret.chmod(0o600)
        yield one, other


@pytest.fixture
def encrypted(hosts: tuple[Host, Host]) -> tuple[Host, Host]:
    for host in hosts:
        error = host.create("far", 90, encrypted="", key_file=str(host.secret))
        if "this kernel has no WireGuard" in error:
            pytest.skip(error)
        assert error == ""
    return hosts


def said(sender: Host, receiver: Host, network: str, address: str, text: bytes) -> bytes:
    """What arrives first of what one container says to another's port 7, told again until something does."""
    with make_socket(receiver.namespaces[network], socket.SOCK_DGRAM) as ear, \
            make_socket(sender.namespaces[network], socket.SOCK_DGRAM) as mouth:
        ear.bind((address, 7))
        ear.settimeout(1)
        for _ in range(20):
            mouth.sendto(text, (address, 7))
            with contextlib.suppress(TimeoutError):
                return ear.recv(2000)
    return b""


def resolved(host: Host, network: str, name: str) -> str:
    """What a container is told of a name; "" for nothing."""
    asked = struct.pack("!HHHHHH", 7, 0x100, 1, 0, 0, 0) + bytes([len(name)]) + name.encode() + b"\0" + struct.pack("!HH", 1, 1)
    with make_socket(host.namespaces[network], socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        sock.sendto(asked, ("127.0.0.11", 53))
        reply = sock.recv(2000)
    assert reply[:2] == asked[:2]
    return str(IPv4Address(reply[-4:])) if reply[6:8] == b"\0\1" else ""


@contextlib.contextmanager
def tapped(host: Host) -> Iterator[list[bytes]]:
    """The frames that are on the wire meanwhile."""
    fd, frames = host.fd(), []
    with inside(fd, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))) as tap:
        tap.bind(("wire", 3))
        yield frames
        tap.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                frames.append(tap.recv(65536))
    os.close(fd)


def forged(vni: int, source: str, target: str) -> bytes:
    """A VXLAN packet (RFC 7348) with a datagram to a container's port 7."""
    udp = struct.pack("!HHHH", 7, 7, 8 + 6, 0) + b"forged"
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + IPv4Address(source).packed + IPv4Address(target).packed
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack("!H", ~total & 0xFFFF) + head[12:]
    return struct.pack("!II", 1 << 27, vni << 8) + b"\xff" * 6 + b"\x02\0\0\0\0\x09\x08\0" + head + udp


def first_heard(receiver: Host, network: str, address: str, sender: Host, packet: bytes) -> bytes:
    """What a container hears first: what a host sends that has no key, or what comes the right way after it."""
    fd = sender.fd()
    with make_socket(receiver.namespaces[network], socket.SOCK_DGRAM) as ear, \
            make_socket(sender.namespaces[network], socket.SOCK_DGRAM) as mouth, make_socket(fd, socket.SOCK_DGRAM) as foreign:
        os.close(fd)
        ear.bind((address, 7))
        foreign.sendto(packet, (receiver.address, VXLAN))
        mouth.sendto(b"true", (address, 7))
        return ear.recv(2000)


def test_nothing_can_be_read_on_the_wire_and_nobody_without_the_key_comes_in(encrypted: tuple[Host, Host]) -> None:
    one, other = encrypted
    for host in encrypted:
        assert host.create("plain", 91) == ""
    here, there = {}, {}
    for network in ("far", "plain"):
        here[network], there[network] = one.up(network, f"{network}0"), other.up(network, f"{network}1")
    with tapped(one) as frames:
        assert said(one, other, "far", there["far"], MARK) == MARK
    assert frames and not any(MARK in frame for frame in frames)
    datagrams = [frame[34:38] for frame in frames if frame[12:14] == b"\x08\0" and frame[23] == 17]
    assert datagrams and {struct.unpack("!HH", ports) for ports in datagrams} == {(PORT, PORT)}
    with tapped(one) as frames:  # the tap would have seen it
        assert said(one, other, "plain", there["plain"], MARK) == MARK
    assert any(MARK in frame for frame in frames)
    # a whole packet of the largest size, both ways
    for sender, receiver, address in ((one, other, there["far"]), (other, one, here["far"])):
        large = b"x" * (1370 - 28)
        assert said(sender, receiver, "far", address, large) == large
    # who knows the number and the address, but has no key
    assert first_heard(other, "plain", there["plain"], one, forged(91, here["plain"], there["plain"])) == b"forged"
    assert first_heard(other, "far", there["far"], one, forged(90, here["far"], there["far"])) == b"true"
    # names of the other host's containers, by the tunnel and by the wire
    for network in ("far", "plain"):
        assert resolved(one, network, f"{network}1") == there[network] and resolved(other, network, f"{network}0") == here[network]
        assert resolved(one, network, "plain1" if network == "far" else "far1") == ""
    with tapped(one) as frames:
        assert resolved(one, "far", "far1") == there["far"]
    assert frames and not any(b"far1" in frame for frame in frames)
    # a daemon that dies and comes back
    one.kill()
    assert said(one, other, "far", there["far"], b"dead") == b"dead"
    one.start()
    assert said(one, other, "far", there["far"], b"alive") == b"alive"


def test_another_secret_is_another_network(encrypted: tuple[Host, Host]) -> None:
    one, other = encrypted
    other.secret.write_bytes(b"not the one that the other host has\n")
    for host in encrypted:
        assert host.create("apart", 92, encrypted="true", key_file=str(host.secret), port="51821") == ""
        host.up("apart")
    address = next(one["ip"] for one in other.live.values() if one["network"] == "apart")
    with make_socket(other.namespaces["apart"], socket.SOCK_DGRAM) as ear, make_socket(one.namespaces["apart"], socket.SOCK_DGRAM) as mouth:
        ear.bind((address, 7))
        ear.settimeout(2)
        mouth.sendto(b"?", (address, 7))
        with pytest.raises(TimeoutError):
            ear.recv(10)
    # one port is one network's
    before = one.made()
    assert "UDP port 51821 of the host is in use" in one.create("again", 93, encrypted="", key_file=str(one.secret), port="51821")
    one.secret.chmod(0o644)
    assert "can be read by others" in one.create("again", 93, encrypted="", key_file=str(one.secret), port="51822")
    assert one.made() == before


def test_a_kernel_without_it_says_so_and_nothing_is_left(hosts: tuple[Host, Host]) -> None:
    one, _ = hosts
    before = one.made()
    error = one.create("far", 90, encrypted="", key_file=str(one.secret))
    if not error:
        pytest.skip("needs a kernel without WireGuard (the VM of make test-vm has one)")
    assert "this kernel has no WireGuard" in error
    assert one.made() == before
    assert one.create("far", 90) == "", "its name is free"
