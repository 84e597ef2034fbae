"""Who has which host port, with a kernel that is a set; and the real socket, on loopback."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from dolium.errors import AlreadyExists, FailedPrecondition, InvalidArgument, PermissionDenied, ResourceExhausted
from dolium.network.base import PortBinding
from dolium.network.ports import Ports, Published, SocketHold


class Kernel:
    """Ports that are bound, and errors to come."""

    def __init__(self) -> None:
        self.bound: set[tuple[str, str, int]] = set()
        self.errors: list[int] = []
        self.random = iter(range(40000, 50000))

    def hold(self, protocol: str, address: str, port: int) -> Hold:
        if self.errors:
            number = self.errors.pop()
            raise OSError(number, os.strerror(number))
        return Hold(self, (protocol, address, port or next(self.random)))


class Hold:
    def __init__(self, kernel: Kernel, key: tuple[str, str, int]) -> None:
        if key in kernel.bound:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        kernel.bound.add(key)
        self.kernel, self.key, self.port = kernel, key, key[2]

    def close(self) -> None:
        self.kernel.bound.remove(self.key)


def tcp(host: int, ip: str = "", inside: int = 80) -> PortBinding:
    return PortBinding(inside, "tcp", ip, host)


def test_all_or_none() -> None:
    kernel = Kernel()
    ports = Ports(kernel.hold)
    assert ports.reserve("a", [tcp(8080), PortBinding(53, "udp", "", 8080)]) == (
        Published(80, "tcp", "0.0.0.0", 8080), Published(53, "udp", "0.0.0.0", 8080))
    with pytest.raises(AlreadyExists, match=r"^Bind for 0\.0\.0\.0:8080 failed: port is already allocated$"):
        ports.reserve("b", [tcp(8081), tcp(8080)])
    assert len(kernel.bound) == 2
    ports.reserve("b", [tcp(8081)])
    ports.release("a")
    ports.release("a")
    ports.reserve("b", [tcp(8080)])
    ports.release("b")
    assert kernel.bound == set()


def test_every_address_and_one_address() -> None:
    ports = Ports(Kernel().hold)
    ports.reserve("a", [tcp(1000, "127.0.0.1"), tcp(2000)])
    ports.reserve("b", [tcp(1000, "127.0.0.2")])
    for binding in (tcp(1000), tcp(1000, "127.0.0.1"), tcp(2000, "127.0.0.3"), tcp(2000)):
        with pytest.raises(AlreadyExists):
            ports.reserve("c", [binding])
    ports.release("a")
    ports.reserve("c", [tcp(2000, "127.0.0.3")])
    with pytest.raises(AlreadyExists):
        ports.reserve("d", [tcp(1000)])


def test_both_families_have_the_same_number_or_none() -> None:
    kernel = Kernel()
    ports = Ports(kernel.hold)
    assert ports.reserve("a", [tcp(1000), tcp(0, "127.0.0.1")], six=True) == (
        Published(80, "tcp", "0.0.0.0", 1000), Published(80, "tcp", "::", 1000), Published(80, "tcp", "127.0.0.1", 40000))
    kernel.bound.add(("tcp", "::", 40001))
    assert [one.host_port for one in ports.reserve("b", [tcp(0)], six=True)] == [40002, 40002]
    kernel.bound.add(("tcp", "::", 2000))
    with pytest.raises(AlreadyExists, match=r"^Bind for \[::\]:2000 failed"):
        ports.reserve("c", [tcp(2000)], six=True)
    ports.reserve("c", [tcp(2000)])  # what was taken of it was given back, and the families are apart
    ports.reserve("c", [tcp(3000, "fd00::1")])
    ports.reserve("d", [tcp(3000), tcp(3000, "fd00::2")])
    with pytest.raises(AlreadyExists):
        ports.reserve("e", [tcp(3000, "::")])
    first = [PortBinding(80, "tcp", "", 2000, 2002)]
    kernel.bound.add(("tcp", "0.0.0.0", 2001))
    assert [one.host_port for one in ports.reserve("e", first, six=True)] == [2002, 2002]


def test_one_request_may_not_name_a_port_twice() -> None:
    kernel = Kernel()
    with pytest.raises(AlreadyExists):
        Ports(kernel.hold).reserve("a", [tcp(1000), tcp(1000, "127.0.0.1")])
    assert kernel.bound == set()


def test_random_ports_are_the_kernel_s() -> None:
    ports = Ports(Kernel().hold)
    assert [port.host_port for port in ports.reserve("a", [tcp(0), tcp(0)])] == [40000, 40001]


def test_adopted_without_a_socket() -> None:
    kernel = Kernel()
    kernel.bound.add(("tcp", "0.0.0.0", 8080))
    ports = Ports(kernel.hold)
    ports.adopt("a", [Published(80, "tcp", "0.0.0.0", 8080), Published(81, "tcp", "0.0.0.0", 40000)])
    kernel.bound.discard(("tcp", "0.0.0.0", 8080))
    with pytest.raises(AlreadyExists):
        ports.reserve("b", [tcp(8080)])
    ports.release("a")
    ports.reserve("b", [tcp(8080)])
    ports.close()
    assert kernel.bound == set()


@pytest.mark.parametrize(("number", "kind"), [
    (errno.EADDRINUSE, AlreadyExists), (errno.EADDRNOTAVAIL, FailedPrecondition), (errno.EMFILE, ResourceExhausted),
    (errno.EACCES, PermissionDenied), (errno.EINVAL, InvalidArgument)])
def test_the_kernel_s_refusals(number: int, kind: type[Exception]) -> None:
    kernel = Kernel()
    kernel.errors = [number]
    with pytest.raises(kind, match="8080"):
        Ports(kernel.hold).reserve("a", [tcp(8080)])


def test_no_random_port_is_left() -> None:
    kernel = Kernel()
    kernel.errors = [errno.EADDRINUSE]
    with pytest.raises(ResourceExhausted):
        Ports(kernel.hold).reserve("a", [tcp(0)])


@pytest.mark.parametrize("binding", [
    PortBinding(80, "sctp"), PortBinding(0, "tcp"), PortBinding(65536, "tcp"), PortBinding(80, "tcp", "", -1),
    PortBinding(80, "tcp", "", 65536), PortBinding(80, "tcp", "fe80::1"), PortBinding(80, "tcp", "::ffff:1.2.3.4"),
    PortBinding(80, "tcp", "localhost")])
def test_what_cannot_be_published(binding: PortBinding) -> None:
    with pytest.raises(InvalidArgument):
        Ports(Kernel().hold).reserve("a", [binding])


def test_endpoints_keep_them() -> None:
    port = Published(80, "tcp", "127.0.0.1", 8080)
    assert Published.from_dict(port.as_dict()) == port
    with pytest.raises(ValueError):
        Published.from_dict({**port.as_dict(), "host_ip": "x; flush ruleset"})


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_the_socket_keeps_others_out_and_receives_nothing(protocol: str) -> None:
    hold = SocketHold(protocol, "127.0.0.1", 0)
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with pytest.raises(OSError, match="in use"):
        SocketHold(protocol, "127.0.0.1", hold.port)
    with pytest.raises(OSError, match="in use"):
        SocketHold(protocol, "0.0.0.0", hold.port)
    with socket.socket(socket.AF_INET, kind) as client:
        client.settimeout(0.1)
        if protocol == "tcp":
            with pytest.raises(TimeoutError):
                client.connect(("127.0.0.1", hold.port))
        else:
            client.sendto(b"x" * 1000, ("127.0.0.1", hold.port))
            hold._socket.setblocking(False)
            with pytest.raises(BlockingIOError):
                hold._socket.recv(1)
    hold.close()
    SocketHold(protocol, "127.0.0.1", hold.port).close()
