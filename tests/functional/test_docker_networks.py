"""Networks of users' own, by the docker command line: made, joined and left, names in them, after kills too."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon import Daemon, eventually

pytestmark = [pytest.mark.leaves("links", "nft"), pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@pytest.fixture
def clean(engine: Daemon) -> Iterator[Daemon]:
    """What a test makes goes with it."""
    yield engine
    for kind, words in (("rm", ("ps", "-aq")), ("network", ("network", "ls", "-q", "--filter", "type=custom"))):
        found = engine.docker(*words).stdout.split()
        if found:
            engine.docker(*(("rm", "-f") if kind == "rm" else ("network", "rm")), *found)


def network(engine: Daemon, name: str, *flags: str) -> str:
    return engine.docker("network", "create", *flags, name).stdout.strip()


def up(engine: Daemon, name: str, *flags: str) -> str:
    return engine.docker("run", "-d", "--name", name, *flags, "base:1", "sleep", "1000").stdout.strip()


def of(engine: Daemon, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(engine.docker("inspect", name, "-f", "{{json .NetworkSettings.Networks}}").stdout)
    return found


def ask(engine: Daemon, container: str, name: str) -> set[str]:
    """Addresses of a name, as the container's libc asks; none when there is no such name."""
    done = engine.docker("exec", container, "nslookup", name, check=False)
    lines = done.stdout.split("Name:", 1)[1].splitlines() if "Name:" in done.stdout else []
    return {line.split()[1] for line in lines if line.startswith("Address:")}


def reaches(engine: Daemon, container: str, target: str) -> bool:
    return engine.docker("exec", container, "ping", "-c1", "-W2", target, check=False).returncode == 0


def name_server(engine: Daemon) -> int:
    """The pid of the instance's name server."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"dolium.network.dns.server" in line and str(engine.folder).encode() in line:
                return int(pid)
    return 0


def test_create_list_inspect_remove(clean: Daemon) -> None:
    identity = network(clean, "lab", "--subnet", "10.77.0.0/24", "--ip-range", "10.77.0.128/25", "--gateway", "10.77.0.9",
                       "--aux-address", "router=10.77.0.128", "--label", "team=a", "-o", "com.docker.network.driver.mtu=1400")
    (row,) = json.loads(clean.docker("network", "inspect", identity[:12]).stdout)
    assert row["Name"] == "lab" and row["Id"] == identity and row["Labels"] == {"team": "a"} and row["Driver"] == "bridge"
    assert row["IPAM"]["Config"] == [{"Subnet": "10.77.0.0/24", "IPRange": "10.77.0.128/25", "Gateway": "10.77.0.9",
                                      "AuxiliaryAddresses": {"router": "10.77.0.128"}}]
    listed = lambda *flags: set(clean.docker("network", "ls", "--format", "{{.Name}}", *flags).stdout.split())  # noqa: E731
    assert listed() == {"bridge", "host", "none", "lab"} and listed("--filter", "type=custom") == {"lab"}
    assert listed("--filter", "label=team=b") == set() and listed("--filter", "dangling=true") == {"lab"}
    up(clean, "box", "--network", "lab")
    assert of(clean, "box")["lab"]["IPAddress"] == "10.77.0.129"  # the first of the range is reserved
    assert "mtu 1400" in clean.docker("exec", "box", "ip", "link", "show", "eth0").stdout
    assert clean.docker("exec", "box", "ip", "route").stdout.startswith("default via 10.77.0.9 dev eth0")
    assert clean.docker("ps", "-q", "--filter", "network=lab").stdout and not clean.docker("ps", "-q", "--filter", "network=x").stdout
    (row,) = json.loads(clean.docker("network", "inspect", "lab").stdout)
    assert [(one["Name"], one["IPv4Address"]) for one in row["Containers"].values()] == [("box", "10.77.0.129/24")]
    assert "has active endpoints" in clean.docker("network", "rm", "lab", check=False).stderr
    clean.docker("stop", "-t0", "box")
    clean.docker("network", "prune", "-f")
    assert "lab" in listed()  # a container that does not run has it
    clean.docker("network", "rm", "lab")
    assert "network lab not found" in clean.docker("start", "box", check=False).stderr
    clean.docker("rm", "box")


@pytest.mark.parametrize(("words", "message"), [
    (("host",), "not permitted on predefined host network"),
    (("b ad",), "invalid network name"),
    (("-d", "nosuch", "x"), "plugin nosuch"),
    (("--ipv6", "-d", "cni", "x"), "--ipv6 is not supported by the driver cni"),
    (("--ipv4=false", "--ipv6", "x"), "without IPv4 is not supported"),
    (("--subnet", "fd00:1::/64", "x"), "add --ipv6"),
    (("--ipv6", "--subnet", "fd00:1::/127", "x"), "two hosts"),
    (("--ipv6", "--subnet", "fe80::/64", "x"), "not a subnet for containers"),
    (("--ipv6", "--subnet", "fd00:1::/64", "--gateway", "fd00:2::1", "x"), "gateway"),
    (("--ipv6", "-o", "com.docker.network.driver.mtu=1200", "x"), "too small for IPv6"),
    (("--subnet", "10.0.0.0/33", "x"), "10.0.0.0/33"),
    (("--subnet", "10.9.0.1/16", "x"), "has host bits set"),
    (("--subnet", "10.9.0.0/31", "x"), "two hosts"),
    (("--subnet", "10.9.0.0/24", "--gateway", "10.8.0.1", "x"), "gateway"),
    (("--subnet", "10.9.0.0/24", "--ip-range", "10.8.0.0/24", "x"), "range"),
    (("-o", "com.docker.network.bridge.name=averyveryverylongname", "x"), "name for a link"),
    (("-o", "com.docker.network.bridge.name=lo", "x"), "link lo that is not of this network"),
    (("-o", "com.docker.network.driver.mtu=12", "x"), "MTU"),
    (("-o", "com.docker.network.bridge.nosuch=1", "x"), "not supported"),
])
def test_what_is_refused_changes_nothing(clean: Daemon, words: tuple[str, ...], message: str) -> None:
    before = clean.docker("network", "ls", "-q").stdout
    done = clean.docker("network", "create", *words, check=False)
    assert done.returncode and message in done.stderr, done
    assert clean.docker("network", "ls", "-q").stdout == before


def test_subnets_do_not_overlap_and_names_are_taken(clean: Daemon) -> None:
    network(clean, "one", "--subnet", "10.77.0.0/16")
    assert "Pool overlaps" in clean.docker("network", "create", "--subnet", "10.77.3.0/24", "two", check=False).stderr
    assert "already exists" in clean.docker("network", "create", "one", check=False).stderr
    pools = set()
    for number in range(3):
        network(clean, f"auto{number}")
        (row,) = json.loads(clean.docker("network", "inspect", f"auto{number}").stdout)
        pools.add(row["IPAM"]["Config"][0]["Subnet"])
    assert len(pools) == 3
    assert "pre-defined" in clean.docker("network", "rm", "bridge", check=False).stderr
    assert "network nosuch not found" in clean.docker("network", "rm", "nosuch", check=False).stderr


def test_names_of_containers(clean: Daemon) -> None:
    network(clean, "one")
    network(clean, "two")
    up(clean, "aa", "--network", "one", "--network-alias", "web", "--hostname", "outer")
    up(clean, "bb", "--network", "one", "--network-alias", "web")
    up(clean, "cc", "--network", "two")
    first, second = (of(clean, name)["one"]["IPAddress"] for name in ("aa", "bb"))
    assert clean.docker("exec", "bb", "cat", "/etc/resolv.conf").stdout.startswith("nameserver 127.0.0.11\n")
    for name in ("aa", "AA", "aa.one", "outer", clean.docker("ps", "-q", "--filter", "name=aa").stdout.strip()):
        assert ask(clean, "bb", name) == {first}, name
    assert ask(clean, "bb", "web") == {first, second} and ask(clean, "bb", "cc") == set() == ask(clean, "cc", "aa")
    assert "name = aa.one" in clean.docker("exec", "bb", "nslookup", first).stdout
    assert reaches(clean, "bb", "aa") and not reaches(clean, "cc", first)
    clean.docker("rename", "aa", "zz")
    assert ask(clean, "bb", "zz") == {first} and ask(clean, "bb", "aa") == set()
    clean.docker("restart", "-t0", "zz")
    assert ask(clean, "bb", "zz") == {of(clean, "zz")["one"]["IPAddress"]}
    clean.docker("rm", "-f", "zz")
    assert ask(clean, "bb", "zz") == set() and ask(clean, "bb", "web") == {second}


def test_connect_and_disconnect_a_running_container(clean: Daemon) -> None:
    network(clean, "one")
    network(clean, "two", "--subnet", "10.77.0.0/24")
    network(clean, "inner", "--internal")
    up(clean, "box", "-p", "127.0.0.1:18095:80", "--network", "one")
    up(clean, "peer", "--network", "two", "--network", "inner")
    route = lambda: clean.docker("exec", "box", "ip", "route").stdout  # noqa: E731
    clean.docker("network", "connect", "--ip", "10.77.0.50", "--alias", "guest", "two", "box")
    assert of(clean, "box")["two"]["IPAddress"] == "10.77.0.50" and ask(clean, "peer", "guest") == {"10.77.0.50"}
    assert "dev eth0" in route().splitlines()[0] and reaches(clean, "peer", "box") and reaches(clean, "box", "peer")
    assert "10.77.0.50\t" in clean.docker("exec", "box", "cat", "/etc/hosts").stdout
    assert "already exists in network two" in clean.docker("network", "connect", "two", "box", check=False).stderr
    clean.docker("network", "disconnect", "one", "box")
    assert route().startswith("default via 10.77.0.1 dev eth1") and set(of(clean, "box")) == {"two"}
    assert clean.docker("port", "box").stdout == "80/tcp -> 127.0.0.1:18095\n"  # the ports went along
    clean.docker("exec", "-d", "box", "sh", "-c", "echo hello | nc -l -p 80")
    eventually(lambda: subprocess.run(["curl", "-s", "--http0.9", "-m2", "http://127.0.0.1:18095/"], capture_output=True,
                                      check=False).stdout == b"hello\n", "the port is published")
    clean.docker("network", "disconnect", "two", "box")
    assert of(clean, "box") == {} and route() == "" and "not connected" in clean.docker(
        "network", "disconnect", "two", "box", check=False).stderr
    clean.docker("network", "connect", "inner", "box")
    assert "default" not in route() and reaches(clean, "box", "peer")
    before = of(clean, "box")["inner"]["IPAddress"]
    clean.docker("restart", "-t0", "box")
    assert set(of(clean, "box")) == {"inner"} and before
    for words in (("network", "connect", "host", "box"), ("network", "connect", "none", "box"),
                  ("run", "--rm", "--network", "none", "--network", "one", "base:1", "true"),
                  ("run", "--rm", "--ip", "172.18.0.9", "base:1", "true")):
        assert clean.docker(*words, check=False).returncode != 0, words


def test_an_internal_network_has_no_way_out(clean: Daemon) -> None:
    network(clean, "inner", "--internal")
    up(clean, "box", "--network", "inner", "-p", "18096:80")
    assert "default" not in clean.docker("exec", "box", "ip", "route").stdout and clean.docker("port", "box").stdout == ""
    clean.docker("exec", "--privileged", "box", "ip", "route", "add", "default", "via",
                 of(clean, "box")["inner"]["IPAddress"].rsplit(".", 1)[0] + ".1")
    up(clean, "other")
    assert not reaches(clean, "box", of(clean, "other")["bridge"]["IPAddress"])
    assert not reaches(clean, "other", of(clean, "box")["inner"]["IPAddress"])
    assert "SERVFAIL" in clean.docker("exec", "box", "nslookup", "example.org", check=False).stdout


def test_containers_that_may_not_talk(clean: Daemon) -> None:
    network(clean, "quiet", "-o", "com.docker.network.bridge.enable_icc=false")
    up(clean, "aa", "--network", "quiet")
    up(clean, "bb", "--network", "quiet")
    address = of(clean, "aa")["quiet"]["IPAddress"]
    assert not reaches(clean, "bb", address) and reaches(clean, "bb", address.rsplit(".", 1)[0] + ".1")


@pytest.mark.leaves("links", "nft", "children")
def test_the_name_server_and_the_daemon_may_die(clean: Daemon) -> None:
    network(clean, "one")
    up(clean, "aa", "--network", "one")
    up(clean, "bb", "--network", "one", "--dns", "192.0.2.1")
    address = {of(clean, "aa")["one"]["IPAddress"]}
    old = name_server(clean)
    os.kill(old, signal.SIGKILL)
    eventually(lambda: name_server(clean) not in (0, old) and ask(clean, "bb", "aa") == address, "another answers")
    init = clean.docker("inspect", "aa", "bb", "-f", "{{.State.Pid}}").stdout.split()
    clean.kill()
    query = ("import socket,struct;s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM);s.settimeout(5);"
             "s.sendto(b'\\0\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\2aa\\0\\0\\1\\0\\1',('127.0.0.11',53));"
             "print('.'.join(map(str,s.recv(512)[-4:])))")
    answers = {subprocess.run(["nsenter", "-t", pid, "-n", "python3", "-c", query], capture_output=True, text=True,
                              check=True).stdout.strip() for pid in init}
    assert answers == address  # while no daemon runs
    survivor = name_server(clean)
    clean.start()
    assert name_server(clean) == survivor and ask(clean, "bb", "aa") == address
    clean.kill()
    os.kill(survivor, signal.SIGKILL)
    clean.start()
    eventually(lambda: ask(clean, "bb", "aa") == address, "a new one was told all")


def test_twenty_at_once_have_twenty_addresses(clean: Daemon) -> None:
    network(clean, "one")
    started = [subprocess.Popen(["docker", "run", "-d", "--network", "one", "base:1", "sleep", "1000"], env=clean.env,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(20)]
    for one in started:
        assert one.wait(60) == 0, one.stderr and one.stderr.read()
        assert one.stderr is not None
        one.stderr.close()
    (row,) = json.loads(clean.docker("network", "inspect", "one").stdout)
    assert len({one["IPv4Address"] for one in row["Containers"].values()}) == 20


def test_a_container_in_a_user_namespace_is_in_a_network(clean: Daemon) -> None:
    network(clean, "one")
    up(clean, "aa", "--network", "one")
    clean.dolium("run", "-d", "--name", "bb", "--userns", "auto", "--network", "one", "base:1", "sleep", "1000")
    assert clean.dolium("exec", "bb", "cat", "/proc/self/uid_map").stdout.split()[1] != "0"
    assert ask(clean, "bb", "aa") == {of(clean, "aa")["one"]["IPAddress"]} and reaches(clean, "aa", "bb")


def test_the_same_by_dolium(clean: Daemon) -> None:
    identity = clean.dolium("network", "create", "--subnet", "10.77.0.0/24", "--gateway", "10.77.0.7", "--label", "a=b",
                            "lab").stdout.strip()
    clean.dolium("network", "create", "other")
    listed = clean.dolium("network", "ls", "--filter", "type=custom").stdout.splitlines()
    assert [line.split()[:4] for line in listed[1:]] == [[identity[:12], "lab", "bridge", "10.77.0.0/24"],
                                                         [listed[2][:12], "other", "bridge", listed[2].split()[3]]]
    assert clean.dolium("network", "inspect", "-f", "{{.Name}}", identity[:8]).stdout == "lab\n"
    clean.dolium("run", "-d", "--name", "aa", "--network", "lab", "--ip", "10.77.0.33", "--network-alias", "web", "base:1",
                 "sleep", "1000")
    clean.dolium("run", "-d", "--name", "bb", "--network", "name=other,alias=second", "--network", "lab", "base:1", "sleep", "1000")
    assert ask(clean, "bb", "web") == {"10.77.0.33"} and ask(clean, "aa", "second") == set()
    clean.dolium("network", "connect", "--alias", "late", "other", "aa")
    assert ask(clean, "bb", "late") == {of(clean, "aa")["other"]["IPAddress"]}
    clean.dolium("network", "disconnect", "other", "aa")
    assert ask(clean, "bb", "late") == set()
    assert "active endpoints" in clean.dolium("network", "rm", "lab", check=False).stderr
    assert "multiple times" in clean.dolium("create", "--network", "lab", "--network", "lab", "base:1", check=False).stderr
    clean.dolium("rm", "-f", "aa", "bb")
    assert clean.dolium("network", "prune", "-f").stdout.split() == ["lab", "other"]
    assert clean.dolium("network", "rm", "-f", "lab").stdout == "" and clean.dolium("network", "rm", "lab", check=False).returncode


def test_events_of_networks(clean: Daemon) -> None:
    since = clean.docker("info", "-f", "{{.SystemTime}}").stdout.strip()
    network(clean, "one")
    up(clean, "aa", "--network", "one")
    clean.docker("rm", "-f", "aa")
    clean.docker("network", "rm", "one")
    until = clean.docker("info", "-f", "{{.SystemTime}}").stdout.strip()
    told = clean.docker("events", "--since", since, "--until", until, "--filter", "type=network", "--format",
                        "{{.Action}} {{index .Actor.Attributes \"name\"}}").stdout.splitlines()
    assert told == ["create one", "connect one", "disconnect one", "destroy one"]


def test_a_macvlan_by_the_docker_command_line(clean: Daemon) -> None:
    subprocess.run(["ip", "link", "add", "dtmac", "type", "veth", "peer", "name", "dtpeer"], check=True)
    try:
        for end in ("dtmac", "dtpeer"):  # without a carrier nothing is sent
            subprocess.run(["ip", "link", "set", end, "up"], check=True)
        network(clean, "lan", "-d", "macvlan", "-o", "parent=dtmac", "--subnet", "10.215.3.0/24", "--gateway", "10.215.3.1")
        up(clean, "box", "--network", "lan", "--ip", "10.215.3.9")
        up(clean, "peer", "--network", "lan", "--network-alias", "friend")
        assert of(clean, "box")["lan"]["IPAddress"] == "10.215.3.9"
        assert clean.docker("exec", "box", "ip", "route").stdout.startswith("default via 10.215.3.1 dev eth0")
        assert ask(clean, "box", "friend") == {of(clean, "peer")["lan"]["IPAddress"]}
        assert reaches(clean, "box", "peer")
        clean.docker("restart", "-t0", "box")
        assert reaches(clean, "peer", "box")
        done = clean.docker("network", "create", "-d", "overlay9", "no", check=False)
        assert "the drivers are bridge, cni, ipvlan, macvlan, overlay" in done.stderr
        done = clean.dolium("port", "add", "box", "18210:80", check=False)
        assert "no network whose ports can be published" in done.stderr
    finally:
        clean.docker("rm", "-f", "box", "peer", check=False)
        clean.docker("network", "rm", "lan", check=False)
        subprocess.run(["ip", "link", "del", "dtmac"], check=True)


def test_bandwidth_is_limited_on_every_network(clean: Daemon) -> None:
    network(clean, "one")
    clean.dolium("run", "-d", "--name", "slow", "--bandwidth", "up=8mbit,down=16mbit", "base:1", "sleep", "1000")
    up(clean, "peer", "--network", "one")
    clean.docker("network", "connect", "one", "slow")
    pid = clean.inspect("slow")["State"]["Pid"]

    def limits(*inside: str) -> list[str]:
        text = subprocess.run([*inside, "tc", "-s", "qdisc"], check=True, capture_output=True, text=True).stdout
        return [line for line in text.split("qdisc ") if line.startswith("tbf")]
    own = limits("nsenter", f"--net=/proc/{pid}/ns/net")
    assert len(own) == 2 and all("rate 8Mbit burst 64Kb" in line for line in own)
    host = [line for line in limits() if "rate 16Mbit" in line]
    assert len(host) == 2
    # it counts: what is sent at once is held back
    clean.docker("exec", "-d", "peer", "sh", "-c", "sleep 60 | nc -l -p 90 > /tmp/got")
    eventually(lambda: clean.docker("exec", "slow", "sh", "-c", "head -c 300000 /dev/zero | nc peer 90", check=False).returncode == 0,
               "it listens")
    eventually(lambda: clean.docker("exec", "peer", "stat", "-c", "%s", "/tmp/got").stdout == "300000\n", "all comes through")
    assert any(int(line.split("overlimits ")[1].split()[0]) > 0 for line in limits("nsenter", f"--net=/proc/{pid}/ns/net"))
    clean.docker("restart", "-t0", "slow")
    pid = clean.inspect("slow")["State"]["Pid"]
    assert len(limits("nsenter", f"--net=/proc/{pid}/ns/net")) == 2
    for words, expected in ((("--bandwidth", "fast"), "invalid --bandwidth"), (("--bandwidth", "up=1mbit,up=2mbit"), "invalid"),
                            (("--bandwidth", "1kbit"), "at least 8kbit"),
                            (("--bandwidth", "1mbit", "--network", "host"), "does not go with --network host")):
        assert expected in clean.dolium("run", "--rm", *words, "base:1", "true", check=False).stderr
