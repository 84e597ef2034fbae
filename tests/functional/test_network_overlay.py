"""Overlays between hosts, which are network namespaces of the tests, each with a daemon of its own; the wire can be cut."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import Daemon, eventually
from packets import named_namespaces

HOSTS = ("10.216.0.1", "10.216.0.2")
NAMES = tuple(f"dhost{number}x{os.getpid()}" for number in range(2))  # other tests may run beside these
pytestmark = pytest.mark.leaves("links", "nft")


class Host:
    """A namespace with one link, to the wire; and its daemon."""

    def __init__(self, number: int, folder: Path) -> None:
        self.address, self.number = HOSTS[number], number
        self.name = NAMES[number]
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        self.run("ip", "link", "set", "lo", "up")
        folder.mkdir()
        self.daemon = Daemon(folder, inside=("nsenter", f"--net=/run/netns/{self.name}"))

    def run(self, *words: str) -> str:
        return subprocess.run(["nsenter", f"--net=/run/netns/{self.name}", *words], check=True, capture_output=True, text=True).stdout

    def wire(self, *, up: bool) -> None:
        self.run("ip", "link", "set", "wire", "up" if up else "down")

    def network(self, *options: str) -> None:
        words = [word for option in options for word in ("-o", option)]
        self.daemon.docker("network", "create", "-d", "overlay", "--subnet", "10.217.0.0/16", "--ip-range",
                           f"10.217.{self.number}.0/24", "--ipv6", "--subnet", "fd00:217::/64", "--ip-range",
                           f"fd00:217::{self.number + 1}:0/112", *words, "far")

    def box(self, name: str = "box") -> str:
        self.daemon.docker("run", "-d", "--name", name, "--network", "far", "base:1", "sleep", "1000")
        found: str = self.daemon.inspect(name)["NetworkSettings"]["Networks"]["far"]["IPAddress"]
        return found

    def told(self, pid: int, name: str) -> set[str]:
        """What our name server tells a container of a name or an address: addresses, names."""
        done = subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", "busybox", "nslookup", name, "127.0.0.11"], capture_output=True,
                              text=True, check=False)
        lines = [line for line in done.stdout.splitlines()[2:] if line.startswith("Address") or "name = " in line]
        return {line.split()[-1] for line in lines}

    def name_server(self) -> int:
        """Its pid."""
        own = str(self.daemon.folder).encode()
        return next(int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()
                    and own in (line := (folder / "cmdline").read_bytes()) and b"dolium.network.dns.server" in line)

    def reaches(self, address: str, name: str = "box") -> bool:
        return self.daemon.docker("exec", name, "ping", "-c1", "-W1", address, check=False).returncode == 0


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with contextlib.ExitStack() as undo:
        undo.enter_context(named_namespaces())
        two = []
        for number in range(2):
            undo.callback(subprocess.run, ["ip", "netns", "del", NAMES[number]], check=False)
            two.append(Host(number, tmp_path / f"host{number}"))
        one, other = two
        one.run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", other.name)
        for host in two:
            host.run("ip", "addr", "add", f"{host.address}/24", "dev", "wire")
            host.wire(up=True)
            host.daemon.start()
            undo.callback(host.daemon.close)
            host.daemon.import_base()
        yield one, other


def test_containers_of_two_hosts_and_a_cut_wire(hosts: tuple[Host, Host]) -> None:
    one, other = hosts
    for host in hosts:
        host.network(f"peers={','.join(HOSTS)}")  # the same words on every host: its own address is passed over
    here, there = one.box(), other.box()
    assert (here, there) == ("10.217.0.2", "10.217.1.1") or (here[:9], there[:9]) == ("10.217.0.", "10.217.1.")
    assert one.reaches(there)
    assert other.reaches(here)
    six = other.daemon.inspect("box")["NetworkSettings"]["Networks"]["far"]
    assert (six["GlobalIPv6Address"], six["IPv6Gateway"]) == ("fd00:217::2:1", "fd00:217::2:0")
    assert one.reaches(six["GlobalIPv6Address"])
    # a large answer: what VXLAN takes of a packet is in the MTU
    assert "mtu 1450" in one.daemon.docker("exec", "box", "ip", "link", "show", "eth0").stdout
    other.daemon.docker("exec", "-d", "box", "sh", "-c", "sleep 60 | nc -l -p 90 > /tmp/got")
    eventually(lambda: one.daemon.docker("exec", "box", "sh", "-c", f"head -c 300000 /dev/zero | nc {there} 90",
                                         check=False).returncode == 0, "it listens")
    eventually(lambda: other.daemon.docker("exec", "box", "stat", "-c", "%s", "/tmp/got").stdout == "300000\n", "all comes through")
    # neither host keeps track of it
    for host in hosts:
        flows = host.run("cat", "/proc/net/nf_conntrack").splitlines()
        assert [line for line in flows if {f"src={here}", f"dst={there}"} <= {*line.split()}] == []
    # the other host vanishes, and comes back
    other.wire(up=False)
    assert not one.reaches(there)
    assert one.reaches("10.217.0.1"), "its own gateway is not concerned"
    other.wire(up=True)
    eventually(lambda: one.reaches(there), "it is reached again")
    # a daemon that dies and comes back leaves the path as it was
    before = one.run("ip", "-o", "link", "show", "type", "vxlan").split(":")[0]
    one.daemon.kill()
    assert other.reaches(here)
    one.daemon.start()
    assert one.run("ip", "-o", "link", "show", "type", "vxlan").split(":")[0] == before
    assert one.reaches(there)
    # a container that takes an address anew, elsewhere, is found
    other.daemon.docker("rm", "-f", "box")
    assert not one.reaches(there)
    other.daemon.docker("run", "-d", "--name", "box", "--network", "far", "--ip", there, "base:1", "sleep", "1000")
    assert one.reaches(there)


def test_names_of_containers_on_another_host(hosts: tuple[Host, Host]) -> None:
    one, other = hosts
    for host in hosts:
        host.network(f"peers={','.join(HOSTS)}")
    own = one.box()
    for words in (("--name", "db", "--network-alias", "store", "--network", "far"), ("--name", "aside")):
        other.daemon.docker("run", "-d", *words, "base:1", "sleep", "1000")
    box, db = (host.daemon.inspect(name)["State"]["Pid"] for host, name in ((one, "box"), (other, "db")))
    found = other.daemon.inspect("db")["NetworkSettings"]["Networks"]["far"]
    both = {found["IPAddress"], found["GlobalIPv6Address"]}
    for name in ("db", "DB.far", "store"):
        assert one.told(box, name) == both
    for address in both:
        assert one.told(box, address) == {"db.far"}
    assert one.told(box, "aside") == set()
    assert one.reaches("db")
    assert own in other.told(db, "box")
    # the name servers go on when the daemons are dead; one that is started anew is told who the hosts are
    for host in hosts:
        host.daemon.kill()
    assert one.told(box, "db") == both
    for host in hosts:
        host.daemon.start()
    assert one.told(box, "db") == both
    for host in hosts:
        os.kill(host.name_server(), signal.SIGKILL)
    eventually(lambda: one.told(box, "db") == both, "both name servers are there again")
    # the other host vanishes, and comes back
    other.wire(up=False)
    assert one.told(box, "db") == set()
    assert own in one.told(box, "box")
    other.wire(up=True)
    eventually(lambda: one.told(box, "db") == both, "it is asked again")
    other.daemon.docker("rm", "-f", "db")
    assert one.told(box, "db") == set()


def test_hosts_learned_from_a_file(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    one, other = hosts
    file = tmp_path / "hosts"
    file.write_text("# nobody yet\n")
    for host in hosts:
        host.network(f"peers_file={file}", "vni=77")
    assert "vxlan id 77" in one.run("ip", "-d", "link", "show", "type", "vxlan")
    one.box()
    there = other.box("there")
    box = one.daemon.inspect("box")["State"]["Pid"]
    assert not one.reaches(there)
    assert one.told(box, "there") == set()
    file.write_text("".join(f"{address}  # a host\n" for address in HOSTS))
    eventually(lambda: one.reaches(there), "both know each other now")
    eventually(lambda: there in one.told(box, "there"), "by name, too")
    # what cannot be read changes nothing
    file.write_text("10.216.0.1\nnot an address\n")
    eventually(lambda: "line 2" in one.daemon.tail(), "it is said")
    file.unlink()
    eventually(lambda: "No such file" in one.daemon.tail(), "that, too")
    assert one.reaches(there)
    file.write_text("10.216.0.1\n")
    eventually(lambda: "its other hosts are none" in one.daemon.tail(), "the other one is taken out")
    eventually(lambda: one.told(box, "there") == set(), "nobody is asked any more")


def test_options_that_are_wrong(hosts: tuple[Host, Host]) -> None:
    one, _ = hosts

    def refused(expected: str, *words: str) -> None:
        done = one.daemon.docker("network", "create", "-d", "overlay", *words, "wrong", check=False)
        assert done.returncode == 1
        assert expected in done.stderr, done.stderr

    ranged = ("--subnet", "10.218.0.0/16", "--ip-range", "10.218.1.0/24")
    refused("range of its own", "-o", "peers=10.0.0.1")
    refused("range of its own", "--subnet", "10.218.0.0/16")
    for option, expected in (("peers=10.0.0.1,nobody", "a host of an overlay"), ("peers=10.0.0.0/8", "not the address of one host"),
                             ("vni=0", "is not 1 to 16777215"), ("port=70000", "is not 1 to 65535"), ("names_port=65536", "is not 0 to 65535"),
                             ("peers_file=hosts", "not an absolute path"), ("peer=10.0.0.1", "no option of the driver overlay"),
                             ("encrypted", "needs the absolute path"), ("key_file=/x", "that of an encrypted overlay")):
        refused(expected, *ranged, "-o", option)
    one.network("vni=5")
    refused("has a VXLAN 5 on port 4789 already", *ranged, "-o", "vni=5")
    assert one.daemon.docker("network", "ls", "-q", "--filter", "type=custom").stdout.count("\n") == 1
    assert one.run("ip", "-o", "link", "show", "type", "vxlan").count("\n") == 1
    found = json.loads(one.daemon.docker("network", "inspect", "far").stdout)[0]
    assert found["IPAM"]["Config"][0]["Gateway"] == "10.217.0.1"
    one.daemon.docker("network", "rm", "far")
    assert one.run("ip", "-o", "link", "show", "type", "vxlan") == ""
