"""Networks with IPv6, by the docker command line and by dolium's own."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import Daemon, eventually
from test_docker_networks import ask, network, of, up

FORWARD = Path("/proc/sys/net/ipv6/conf/all/forwarding")
P78, P79 = (f"fd00:{number}:{1 + secrets.randbelow(65535):x}" for number in (78, 79))  # other daemons may run beside the tests
pytestmark = [pytest.mark.leaves("links", "nft", "children"), pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
              pytest.mark.skipif(not FORWARD.exists(), reason="this kernel has no IPv6")]


@pytest.fixture
def clean(engine: Daemon) -> Iterator[Daemon]:
    before = FORWARD.read_text()
    yield engine
    names = engine.docker("ps", "-aq").stdout.split()
    if names:
        engine.docker("rm", "-f", *names)
    engine.docker("network", "prune", "-f")
    FORWARD.write_text(before)


def serve(engine: Daemon, name: str) -> None:
    engine.docker("exec", "-d", name, "sh", "-c", "while :; do echo hello | nc -l -p 80; done")


def fetch(url: str) -> bytes:
    return subprocess.run(["curl", "-sg", "--http0.9", "-m5", url], capture_output=True, check=False).stdout


def test_addresses_names_and_inspect(clean: Daemon) -> None:
    network(clean, "six", "--ipv6", "--subnet", "10.78.0.0/24", "--subnet", f"{P78}::/64", "--gateway", f"{P78}::9",
            "--ip-range", f"{P78}::1:0/112", "--aux-address", f"router={P78}::1:0")
    (row,) = json.loads(clean.docker("network", "inspect", "six").stdout)
    assert row["EnableIPv6"] is True and row["EnableIPv4"] is True
    assert row["IPAM"]["Config"] == [
        {"Subnet": "10.78.0.0/24", "Gateway": "10.78.0.1"},
        {"Subnet": f"{P78}::/64", "IPRange": f"{P78}::1:0/112", "Gateway": f"{P78}::9",
         "AuxiliaryAddresses": {"router": f"{P78}::1:0"}}]
    up(clean, "aa", "--network", "six", "--hostname", "host-a")
    up(clean, "bb", "--network", "six", "--ip6", f"{P78}::77", "--network-alias", "web")
    one, two = of(clean, "aa")["six"], of(clean, "bb")["six"]
    assert (one["GlobalIPv6Address"], one["GlobalIPv6PrefixLen"], one["IPv6Gateway"]) == (f"{P78}::1:1", 64, f"{P78}::9")
    assert two["GlobalIPv6Address"] == f"{P78}::77" and two["IPAMConfig"] == {"IPv6Address": f"{P78}::77"}
    (row,) = json.loads(clean.docker("network", "inspect", "six").stdout)
    assert {end["Name"]: end["IPv6Address"] for end in row["Containers"].values()} == {
        "aa": f"{P78}::1:1/64", "bb": f"{P78}::77/64"}
    assert ask(clean, "aa", "web") == {two["IPAddress"], f"{P78}::77"}
    assert "bb.six" in clean.docker("exec", "aa", "nslookup", f"{P78}::77").stdout
    assert f"{P78}::1:1\thost-a\n" in clean.docker("exec", "aa", "cat", "/etc/hosts").stdout
    serve(clean, "bb")
    for target in (f"{P78}::77", "web"):
        eventually(lambda at=target: clean.docker("exec", "aa", "nc", "-w2", at, "80", check=False).stdout == "hello\n", target)
    for wrong in (f"{P78}::77", f"{P78}::9", "10.78.0.4", f"{P79}::1"):
        done = clean.docker("run", "--rm", "--network", "six", "--ip6", wrong, "base:1", "true", check=False)
        assert done.returncode and "ddress" in done.stderr, done


def test_connect_restart_and_dolium_s_own_words(clean: Daemon) -> None:
    clean.dolium("network", "create", "--ipv6", "--subnet", f"{P79}::/64", "--subnet", "10.79.0.0/24", "--gateway", f"{P79}::5",
                 "six")
    clean.dolium("network", "create", "--ipv6", "own")
    up(clean, "box")
    clean.docker("network", "connect", "--ip6", f"{P79}::50", "six", "box")
    clean.dolium("network", "connect", "own", "box")
    mine = of(clean, "box")["own"]["GlobalIPv6Address"]
    assert mine.startswith("fd") and of(clean, "box")["six"]["GlobalIPv6Address"] == f"{P79}::50"
    assert f"{P79}::50\t{clean.inspect('box')['Config']['Hostname']}" in clean.docker("exec", "box", "cat", "/etc/hosts").stdout
    route = lambda: clean.docker("exec", "box", "ip", "-6", "route", "show", "default").stdout  # noqa: E731
    assert route().startswith(f"default via {P79}::5 dev eth1")
    clean.docker("network", "disconnect", "six", "box")
    assert "dev eth2" in route() and P79 not in clean.docker("exec", "box", "ip", "-6", "addr").stdout
    clean.dolium("network", "connect", "--ip6", f"{P79}::51", "six", "box")
    clean.docker("restart", "-t0", "box")
    assert of(clean, "box")["six"]["GlobalIPv6Address"] == f"{P79}::51"
    done = clean.dolium("run", "--rm", "--network", f"name=six,ip6={P79}::60", "base:1", "ip", "-6", "addr", "show", "eth0")
    assert f"{P79}::60/64" in done.stdout and "tentative" not in done.stdout
    done = clean.dolium("run", "--rm", "--userns", "auto", "--network", "six", "--ip6", f"{P79}::62", "base:1", "ip", "-6", "addr")
    assert f"{P79}::62/64" in done.stdout  # in a network namespace that belongs to a user namespace
    network(clean, "four")
    assert "network four has no IPv6" in clean.docker("run", "--rm", "--network", "four", "--ip6", f"{P79}::61", "base:1", "true",
                                                      check=False).stderr


def test_ports(clean: Daemon) -> None:
    network(clean, "six", "--ipv6", "--subnet", f"{P78}::/64")
    up(clean, "box", "--network", "six", "-p", "18281:80", "-p", f"[{P78}::1]:18282:80")
    serve(clean, "box")
    shown = {"80/tcp -> 0.0.0.0:18281", "80/tcp -> [::]:18281", f"80/tcp -> [{P78}::1]:18282"}
    assert set(clean.docker("port", "box").stdout.splitlines()) == shown == set(clean.dolium("port", "box").stdout.splitlines())
    assert "[::]:18281->80/tcp" in clean.docker("ps").stdout and "[::]:18281->80/tcp" in clean.dolium("ps").stdout
    for url in ("http://127.0.0.1:18281", f"http://[{P78}::1]:18281", f"http://[{P78}::1]:18282", "http://localhost:18281", "http://[::1]:18281"):
        eventually(lambda url=url: fetch(url) == b"hello\n", url)
    clean.dolium("port", "add", "box", f"[{P78}::1]:18283:80")
    eventually(lambda: fetch(f"http://[{P78}::1]:18283") == b"hello\n", "a port that was added")
    clean.dolium("port", "rm", "box", f"[{P78}::1]:18283:80")
    assert fetch(f"http://[{P78}::1]:18283") == b""
    clean.dolium("port", "rm", "box", "[::]:18281:80")  # of two families one goes, and stays away
    for _ in range(2):
        assert fetch(f"http://[{P78}::1]:18281") == b"" and set(clean.docker("port", "box").stdout.splitlines()) == {
            "80/tcp -> 0.0.0.0:18281", f"80/tcp -> [{P78}::1]:18282"}
        clean.docker("restart", "-t0", "box")
    up(clean, "local", "--network", "six", "-p", "[::1]:18284:80")
    serve(clean, "local")
    assert clean.docker("port", "local").stdout == "80/tcp -> [::1]:18284\n"
    eventually(lambda: fetch("http://[::1]:18284") == b"hello\n", "by the relay")
    for words, message in ((("--network", "six", "-p", "[::1]:18284:80/udp"), "cannot publish UDP at [::1]"),
                           (("-p", f"[{P78}::1]:18284:80"), "the container has no IPv6 address"),
                           (("--network", "six", "-p", "18281:80"), "port is already allocated"),
                           (("--network", "six", "-p", f"[{P78}::1]:18282:80"), f"[{P78}::1]:18282 failed")):
        done = clean.docker("run", "--rm", *words, "base:1", "true", check=False)
        assert done.returncode and message in done.stderr, done


def test_a_restricted_container_reaches_no_ipv6_address(clean: Daemon) -> None:
    network(clean, "six", "--ipv6", "--subnet", f"{P78}::/64")
    up(clean, "db", "--network", "six", "--ip6", f"{P78}::77")
    serve(clean, "db")
    clean.dolium("run", "-d", "--name", "box", "--network", "six", "-p", "18285:80", "--egress", "allow=db", "base:1", "sleep", "1000")
    four = of(clean, "db")["six"]["IPAddress"]
    eventually(lambda: clean.docker("exec", "box", "nc", "-w2", "db", "80", check=False).stdout == "hello\n", "by its name")
    assert ask(clean, "box", "db") == {four}
    done = clean.docker("exec", "box", "nc", "-w2", f"{P78}::77", "80", check=False)
    assert done.returncode and done.stdout == ""
    serve(clean, "box")  # what comes in is not concerned
    eventually(lambda: fetch(f"http://[{P78}::1]:18285") == b"hello\n", "its port is published")


def test_the_default_network_has_ipv6_by_daemon_json(tmp_path: Path) -> None:
    file = tmp_path / "etc/docker/daemon.json"
    file.parent.mkdir(parents=True)
    before = FORWARD.read_text()
    daemon = Daemon(tmp_path / "own", "--etc-root", str(tmp_path / "etc"))
    daemon.folder.mkdir()
    try:
        file.write_text(json.dumps({"ipv6": True, "fixed-cidr-v6": "fe80::/64"}))
        daemon.start(wait=False)
        assert daemon.wait() == 1
        assert "fe80::/64 is not a subnet for containers" in daemon.tail()
        file.write_text(json.dumps({"ipv6": True, "fixed-cidr-v6": f"{P78}::/64"}))
        daemon.start()
        daemon.import_base()
        up(daemon, "aa", "-p", "18286:80")
        up(daemon, "bb")
        one, two = of(daemon, "aa")["bridge"], of(daemon, "bb")["bridge"]
        assert (one["GlobalIPv6Address"], one["IPv6Gateway"], two["GlobalIPv6Address"]) == (f"{P78}::2", f"{P78}::1", f"{P78}::3")
        (row,) = json.loads(daemon.docker("network", "inspect", "bridge").stdout)
        assert row["EnableIPv6"] is True and row["IPAM"]["Config"][1] == {"Subnet": f"{P78}::/64", "Gateway": f"{P78}::1"}
        daemon.docker("exec", "bb", "ping", "-c1", "-W2", f"{P78}::2")
        assert "default via" in daemon.docker("exec", "bb", "ip", "-6", "route").stdout
        serve(daemon, "aa")
        eventually(lambda: fetch("http://[::1]:18286/") == b"hello\n" and fetch(f"http://[{P78}::2]/") == b"hello\n", "it is published")
        # a change does not count while a container is on it
        file.write_text("{}")
        daemon.kill()
        daemon.start()
        assert f"stays as it was ({P78}::/64)" in daemon.tail()
        daemon.docker("exec", "bb", "ping", "-c1", "-W2", f"{P78}::2")
    finally:
        daemon.close()
        FORWARD.write_text(before)
