"""``--egress``: what a container may reach, by real connections; a name server of the tests' own answers for the world."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import dns.message
import dns.rrset
import pytest
from daemon import DOCKER, Daemon, eventually

pytestmark = pytest.mark.leaves("links", "nft", "children")  # pools fill, and the name server starts, in the background
SERVER, PORT, OTHER = "127.0.0.153", 18310, 18311


class World:
    """The world: names, and two ports of the host that greet."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.asked: list[str] = []
        self._dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._dns.bind((SERVER, 53))
        self._doors = [socket.create_server(("0.0.0.0", port)) for port in (PORT, OTHER)]
        for work in (self._answer, *(lambda door=door: self._greet(door) for door in self._doors)):
            threading.Thread(target=work, daemon=True).start()

    def _answer(self) -> None:
        while True:
            try:
                data, peer = self._dns.recvfrom(4096)
            except OSError:
                return
            query = dns.message.from_wire(data)
            name = query.question[0].name.to_text(omit_final_dot=True)
            self.asked.append(name)
            reply = dns.message.make_response(query)
            if name in self.names and query.question[0].rdtype == 1:
                reply.answer.append(dns.rrset.from_text(f"{name}.", 7, "IN", "A", self.names[name]))
            self._dns.sendto(reply.to_wire(), peer)

    @staticmethod
    def _greet(door: socket.socket) -> None:
        while True:
            try:
                connection, _ = door.accept()
            except OSError:
                return
            connection.sendall(b"hello\n")
            connection.close()

    def close(self) -> None:
        for sock in (self._dns, *self._doors):
            sock.shutdown(socket.SHUT_RDWR) if sock is not self._dns else None
            sock.close()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    one = World()
    yield one
    one.close()


@pytest.fixture
def clean(engine: Daemon) -> Iterator[Daemon]:
    yield engine
    names = engine.docker("ps", "-aq").stdout.split()
    if names:
        engine.docker("rm", "-fv", *names)
    engine.docker("network", "rm", "net", check=False)


def gateway(engine: Daemon, network: str = "bridge") -> str:
    return str(json.loads(engine.docker("network", "inspect", network).stdout)[0]["IPAM"]["Config"][0]["Gateway"])


def restricted(engine: Daemon, name: str, *flags: str) -> None:
    engine.dolium("run", "-d", "--name", name, "--dns", SERVER, *flags, "base:1", "sleep", "1000")


def hears(engine: Daemon, name: str, target: str, port: int) -> bool:
    """Does the container hear the greeting?"""
    done = engine.docker("exec", name, "sh", "-c", f"nc -w 5 {target} {port} </dev/null", check=False)
    assert "bad address" not in done.stderr or target.endswith(".test")
    return done.stdout == "hello\n"


def test_a_name_is_reached_and_nothing_else(clean: Daemon, world: World) -> None:
    here = gateway(clean)
    world.names = {"allowed.test": here, "other.test": here}
    restricted(clean, "box", "--egress", f"allow=allowed.test:{PORT}", "-p", "127.0.0.1:18312:80")
    # an address that nobody was told of is not reached, whatever it is
    assert not hears(clean, "box", here, PORT)
    assert hears(clean, "box", "allowed.test", PORT)
    assert not hears(clean, "box", "allowed.test", OTHER)
    # others are not asked about: a name can carry what must not leave
    world.asked.clear()
    for name in ("other.test", "secret.allowed.test", "1.2.0.192.in-addr.arpa"):
        assert "REFUSED" in clean.docker("exec", "box", "nslookup", name, check=False).stdout
    assert world.asked == []
    assert clean.docker("exec", "box", "nslookup", "allowed.test", SERVER, check=False).returncode != 0
    # for as long as the answer said
    pid = clean.inspect("box")["State"]["Pid"]
    rules = subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", "nft", "list", "table", "inet", "dolium-egress"], check=True,
                           capture_output=True, text=True).stdout
    assert f"{here} . tcp . {PORT} timeout 17s" in rules
    # what comes in is not concerned
    clean.docker("exec", "-d", "box", "sh", "-c", "echo inside | nc -l -p 80")
    eventually(lambda: subprocess.run(["curl", "-s", "--http0.9", "-m2", "http://127.0.0.1:18312/"], capture_output=True,
                                      check=False).stdout == b"inside\n", "its port is published")


def test_addresses_and_networks(clean: Daemon, world: World) -> None:
    here = gateway(clean)
    restricted(clean, "some", "--egress", f"allow={here}:{PORT}", "--egress", "allow=192.0.2.0/24")
    assert hears(clean, "some", here, PORT)
    assert not hears(clean, "some", here, OTHER)
    restricted(clean, "all", "--egress", f"allow={here}")
    assert hears(clean, "all", here, PORT) and hears(clean, "all", here, OTHER)
    restricted(clean, "none", "--egress", "none")
    assert not hears(clean, "none", here, PORT)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((here, 53))
        sock.settimeout(10)
        for name in ("none", "some", "all"):  # what is allowed of "some" is TCP
            clean.docker("exec", *(["-d"] if name == "all" else []), name, "nslookup", f"{name}.test", here, check=False)
        assert dns.message.from_wire(sock.recvfrom(512)[0]).question[0].name.to_text() == "all.test."
    # by a label, for clients that have no such flag
    clean.docker("run", "-d", "--name", "label", "--label", f"dolium.egress=allow={here}:{PORT}", "base:1", "sleep", "1000")
    assert hears(clean, "label", here, PORT) and not hears(clean, "label", here, OTHER)
    clean.docker("restart", "-t0", "label")
    assert hears(clean, "label", here, PORT) and not hears(clean, "label", here, OTHER)


def test_containers_of_a_network_are_reached_by_name_when_allowed(clean: Daemon) -> None:
    clean.docker("network", "create", "net")
    for name in ("db", "web"):
        clean.docker("run", "-d", "--name", name, "--network", "net", "base:1", "sh", "-c",
                     "while :; do echo hello | nc -l -p 80; done")
    restricted(clean, "box", "--network", "net", "--egress", "allow=db:80")
    address = clean.inspect("web")["NetworkSettings"]["Networks"]["net"]["IPAddress"]
    eventually(lambda: hears(clean, "box", "db", 80), "db listens")
    assert not hears(clean, "box", address, 80)
    # the rules are the namespace's: another network changes nothing
    clean.docker("network", "connect", "bridge", "box")
    assert not hears(clean, "box", gateway(clean), PORT)
    clean.docker("network", "disconnect", "net", "box")
    assert not hears(clean, "box", gateway(clean), PORT)
    clean.docker("network", "connect", "net", "box")
    eventually(lambda: hears(clean, "box", "db", 80), "and by name again")


def test_refused_connections_are_events_also_for_the_next_daemon(tmp_path: Path, world: World) -> None:
    own = Daemon(tmp_path)
    own.start()
    try:
        own.import_base()
        here = gateway(own)
        world.names = {"allowed.test": here}
        restricted(own, "box", "--egress", f"allow=allowed.test:{PORT}")

        def told() -> list[tuple[str, str, str]]:
            with subprocess.Popen([DOCKER, "events", "--format", "{{json .}}", "--filter", "event=egress-refused"],
                                  stdout=subprocess.PIPE, text=True, env=own.env) as events:
                assert events.stdout is not None
                # until the client listens nobody is told: it is tried until it is
                found: list[str] = []
                reader = threading.Thread(target=lambda: found.append(events.stdout.readline()))  # type: ignore[union-attr]
                reader.start()

                def heard() -> bool:
                    hears(own, "box", here, OTHER)
                    return bool(found)
                try:
                    eventually(heard, "an event")
                finally:
                    events.kill()
                    reader.join()
                event = json.loads(found[0])
                assert event["Actor"]["Attributes"]["name"] == "box"
                return [(event["Actor"]["Attributes"][key]) for key in ("address", "protocol", "port")]
        assert told() == [here, "tcp", str(OTHER)]
        own.kill()
        # the rules hold, and names are answered
        pid = subprocess.run(["pgrep", "-f", "sleep 1000"], capture_output=True, text=True, check=True).stdout.split()[-1]
        inside = ["nsenter", "-t", pid, "-m", "-n", "/bin/busybox" if os.path.exists(f"/proc/{pid}/root/bin/busybox") else "busybox"]
        for target, port, expected in ((here, OTHER, ""), ("allowed.test", PORT, "hello\n")):
            done = subprocess.run([*inside, "nc", "-w", "5", target, str(port)], stdin=subprocess.DEVNULL, capture_output=True,
                                  text=True, check=False)
            assert done.stdout == expected, done.stderr
        own.start()
        assert told() == [here, "tcp", str(OTHER)]
        assert hears(own, "box", "allowed.test", PORT)
        assert not hears(own, "box", here, OTHER)
    finally:
        own.close()


def test_what_would_make_the_rules_void_is_refused(clean: Daemon) -> None:
    def refused(expected: str, *words: str) -> None:
        done = clean.dolium("run", "--rm", *words, "base:1", "true", check=False)
        assert done.returncode == 125
        assert expected in done.stderr, done.stderr
    one = ("--egress", "allow=a.test:1")
    for words in (("--privileged",), ("--cap-add", "NET_ADMIN"), ("--cap-add", "CAP_NET_RAW"), ("--cap-add", "all"),
                  ("--security-opt", "seccomp=unconfined"), ("--network", "host"), ("--network", "none")):
        refused("--egress does not go with", *one, *words)
    refused("invalid --egress", "--egress", "a.test")
    restricted(clean, "box", *one)
    bounding = clean.docker("exec", "box", "sh", "-c", "grep CapBnd /proc/self/status").stdout.split()[1]
    assert not int(bounding, 16) & (1 << 13 | 1 << 12), "neither CAP_NET_RAW nor CAP_NET_ADMIN"
    assert "could take them away" in clean.docker("exec", "--privileged", "box", "true", check=False).stderr
    # who joins its namespace is bound by the same
    refused("--egress does not go with --cap-add CAP_NET_ADMIN", "--network", "container:box", "--cap-add", "NET_ADMIN")
    joined = clean.docker("run", "--rm", "--network", "container:box", "base:1", "grep", "CapBnd", "/proc/self/status").stdout.split()[1]
    assert not int(joined, 16) & 1 << 13


def test_sockets_that_pass_by_the_packet_filter_are_not_to_be_had(clean: Daemon) -> None:
    places = {sys.base_prefix: sys.base_prefix, "/usr/lib": "/lib", "/usr/lib64": "/lib64"}
    binds = [word for here, there in places.items() if os.path.exists(here) for word in ("-v", f"{here}:{there}:ro")]
    code = """
import ctypes, errno, socket
def made(family, kind=socket.SOCK_DGRAM):
    try:
        socket.socket(family, kind).close()
        return "made"
    except OSError as error:
        return errno.errorcode[error.errno]
libc = ctypes.CDLL(None, use_errno=True)
print(*(made(family) for family in (1, 2, 16)), *(made(family) for family in (40, 38, 30)),
      made(40, socket.SOCK_STREAM), libc.syscall(425, 1, None), errno.errorcode[ctypes.get_errno()])
"""
    program = os.path.join(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
    done = clean.dolium("run", "--rm", "--egress", "none", *binds, "base:1", program, "-c", code)
    told = [word.replace("ENOSYS", "EPERM") for word in done.stdout.split()]  # a profile's default is either
    assert told == ["made"] * 3 + ["EPERM"] * 4 + ["-1", "EPERM"]


def test_a_container_that_had_no_network_for_a_while_is_restricted_as_before(clean: Daemon, world: World) -> None:
    here = world.names["again.test"] = gateway(clean)
    restricted(clean, "box", "--egress", f"allow=again.test:{PORT}")
    clean.docker("network", "disconnect", "bridge", "box")
    clean.docker("network", "connect", "bridge", "box")
    assert hears(clean, "box", "again.test", PORT)
    assert not hears(clean, "box", here, OTHER)
