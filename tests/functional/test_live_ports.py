"""``dolium port add`` and ``rm``: ports of a container that runs, by real packets."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import Daemon, eventually

pytestmark = pytest.mark.leaves("links", "nft")  # the daemon's pool of prepared networks fills in the background

ECHO = """
import socket, threading
def udp():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("", 53))
    while True:
        data, peer = s.recvfrom(512); s.sendto(data + b" " + peer[0].encode(), peer)
threading.Thread(target=udp, daemon=True).start()
s = socket.create_server(("", 80))
print("ready", flush=True)
while True:
    c, peer = s.accept()
    def talk(c=c):
        while data := c.recv(512): c.sendall(data)
    threading.Thread(target=talk, daemon=True).start()
"""


@pytest.fixture
def box(engine: Daemon) -> Iterator[Daemon]:
    engine.dolium("run", "-d", "--name", "box", "--rootfs", "/:O", "python3", "-c", ECHO)
    try:
        eventually(lambda: engine.docker("logs", "box").stdout == "ready\n", "it listens")
        yield engine
    finally:
        engine.docker("rm", "-f", "box", "other", check=False)


def tcp(port: int, address: str = "127.0.0.1") -> str:
    """What comes back; "" when nobody listens."""
    try:
        with socket.create_connection((address, port), timeout=5) as sock:
            sock.sendall(b"hello")
            return sock.recv(512).decode()
    except (ConnectionRefusedError, ConnectionResetError):
        return ""


def test_tcp_ports_come_and_go(box: Daemon) -> None:
    assert tcp(18201) == ""
    box.dolium("port", "add", "box", "127.0.0.1:18201:80", "18202:80")
    assert (tcp(18201), tcp(18202)) == ("hello", "hello")
    shown = "80/tcp -> 0.0.0.0:18202\n80/tcp -> 127.0.0.1:18201\n"
    assert sorted(box.dolium("port", "box").stdout.splitlines(True)) == shown.splitlines(True)
    assert sorted(box.docker("port", "box").stdout.splitlines(True)) == shown.splitlines(True)
    with socket.create_connection(("127.0.0.1", 18201), timeout=5) as before:
        before.sendall(b"one")
        assert before.recv(9) == b"one"
        box.dolium("port", "rm", "box", "18201:80")
        assert (tcp(18201), tcp(18202)) == ("", "hello")
        before.sendall(b"two")
        assert before.recv(9) == b"two", "a connection under way goes on"
    # now the host's own
    with socket.create_server(("127.0.0.1", 18201)):
        done = box.dolium("port", "add", "box", "18203:80", "18201:80", check=False)
        assert "port is already allocated" in done.stderr
        assert tcp(18203) == "", "all or none"
    # what was added is there after a restart, what was removed is not
    box.docker("restart", "-t", "0", "box")
    eventually(lambda: tcp(18202) == "hello", "it listens again")
    assert tcp(18201) == ""
    box.dolium("port", "rm", "box", "80")
    assert tcp(18202) == ""
    assert box.dolium("port", "box").stdout == ""


def test_a_removed_udp_port_has_no_flows_left(box: Daemon) -> None:
    box.dolium("port", "add", "box", "127.0.0.1:18204:53/udp")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect(("127.0.0.1", 18204))
        sock.send(b"hello")
        assert sock.recv(512).startswith(b"hello")
        box.dolium("port", "rm", "box", "53/udp")
        # the same flow: connection tracking would still send it to the container
        sock.settimeout(0.3)
        with pytest.raises((TimeoutError, ConnectionRefusedError)):
            sock.send(b"again")
            sock.recv(512)
            sock.send(b"again")
            sock.recv(512)
        assert box.dolium("port", "box").stdout == ""
        box.dolium("port", "add", "box", "127.0.0.1:18204:53/udp")

        def answered() -> bool:
            try:
                sock.send(b"hello")
                return sock.recv(512).startswith(b"hello")
            except (TimeoutError, ConnectionRefusedError):
                return False
        eventually(answered, "and reaches it when the port is there again")


def test_a_port_the_kernel_chose_and_those_of_publish_all(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "other", "-P", "--expose", "80", "--expose", "81/udp", "base:1", "sleep", "600")
    try:
        engine.dolium("port", "add", "other", "82")
        there = {line.split()[0]: line.rpartition(":")[2] for line in engine.dolium("port", "other").stdout.splitlines()}
        assert sorted(there) == ["80/tcp", "81/udp", "82/tcp"]
        assert engine.dolium("port", "other", "82").stdout == f"0.0.0.0:{there['82/tcp']}\n"
        assert "no public port '99'" in engine.dolium("port", "other", "99", check=False).stderr
        engine.dolium("port", "rm", "other", f"{there['82/tcp']}:82", "81/udp")
        assert engine.dolium("port", "other").stdout == f"80/tcp -> 0.0.0.0:{there['80/tcp']}\n"
        engine.docker("restart", "-t", "0", "other")
        assert [line.split()[0] for line in engine.dolium("port", "other").stdout.splitlines()] == ["80/tcp"]
        # of one that does not run: at its next start
        engine.docker("stop", "-t", "0", "other")
        engine.dolium("port", "add", "other", "127.0.0.1:18205:83")
        assert engine.dolium("port", "other").stdout == ""
        engine.docker("start", "other")
        assert "83/tcp -> 127.0.0.1:18205" in engine.dolium("port", "other").stdout
    finally:
        engine.docker("rm", "-f", "other")


def test_what_cannot_be_published_is_said(engine: Daemon) -> None:
    for name, network in (("hosts", "host"), ("lonely", "none")):
        engine.docker("run", "-d", "--name", name, "--network", network, "base:1", "sleep", "600")
    engine.docker("network", "create", "--internal", "inner")
    engine.docker("run", "-d", "--name", "inside", "--network", "inner", "base:1", "sleep", "600")
    try:
        for words, expected in ((("add", "hosts", "1:1"), "no ports of its own"), (("add", "lonely", "1:1"), "no ports of its own"),
                                (("add", "inside", "18206:1"), "no network whose ports can be published"),
                                (("rm", "inside", "80"), "does not publish 80/tcp"), (("add", "absent", "1:1"), "No such container"),
                                (("add", "inside", "1:nine"), "is not a port"), (("sub", "inside", "1"), "add or rm")):
            done = engine.dolium("port", *words, check=False)
            assert done.returncode != 0
            assert expected in done.stderr, done.stderr
        for bindings in ({"80/tcp": "8080"}, {"80/tcp": [{"HostPort": 8080}]}, {"80/tcp": [{"HostIp": 5}]}, {"80/tcp": [5]}, None, {},
                         {"x": [{}]}, {"80-90/tcp": [{"HostPort": "18207"}]}, {"80/": [{}]}, {"80/sctp": [{}]}):
            assert engine.api("POST", "/dolium/containers/inside/ports", {"PortBindings": bindings})[0] == 400
        assert json.loads(engine.docker("inspect", "-f", "{{json .HostConfig.PortBindings}}", "inside").stdout) == {}
    finally:
        engine.docker("rm", "-f", "hosts", "lonely", "inside", check=False)
        engine.docker("network", "rm", "inner", check=False)


def test_a_port_of_another_address_stays(engine: Daemon) -> None:
    engine.docker("create", "--name", "still", "-p", "18208:80", "-p", "127.0.0.1:18209:80", "base:1")
    try:
        assert "does not publish" in engine.dolium("port", "rm", "still", "127.0.0.1:18208:80", check=False).stderr
        engine.dolium("port", "rm", "still", "127.0.0.1::80")
        kept = json.loads(engine.docker("inspect", "-f", "{{json .HostConfig.PortBindings}}", "still").stdout)
        assert [one["HostPort"] for one in kept["80/tcp"]] == ["18208"]
        engine.dolium("port", "rm", "still", "0.0.0.0:18208:80")
    finally:
        engine.docker("rm", "still")


def test_ports_of_a_container_outlive_the_daemon(tmp_path: Path) -> None:
    own = Daemon(tmp_path)
    own.start()
    try:
        own.dolium("run", "-d", "--name", "box", "-p", "127.0.0.1:18207:80", "--rootfs", "/:O", "python3", "-c", ECHO)
        eventually(lambda: tcp(18207) == "hello", "it listens")
        own.dolium("port", "add", "box", "127.0.0.1:18208:80")
        own.dolium("port", "rm", "box", "18207:80")
        own.kill()
        own.start()
        assert (tcp(18207), tcp(18208)) == ("", "hello")
        own.docker("rm", "-f", "box")
        rules = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
        assert "18208" not in rules
    finally:
        own.close()
