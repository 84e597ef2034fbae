"""``--ingress``: who may reach a container, by real connections, and by packets with an address that is another's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import DOCKER, Daemon, eventually

pytestmark = pytest.mark.leaves("links", "nft", "children")  # pools fill, and the name server starts, in the background
SERVE = ("sh", "-c", "while :; do echo hello | nc -l -p 80; done & while :; do echo hello | nc -l -p 81; done")



@pytest.fixture
def clean(engine: Daemon) -> Iterator[Daemon]:
    engine.docker("network", "create", "net")
    yield engine
    engine.docker("rm", "-fv", *engine.docker("ps", "-aq").stdout.split())
    engine.docker("network", "rm", "net", "other", check=False)
    assert guards() == []


def guards() -> list[str]:
    listed = json.loads(subprocess.run(["nft", "-j", "list", "tables"], capture_output=True, check=True, text=True).stdout)
    return [table["table"]["name"] for table in listed["nftables"] if table.get("table", {}).get("family") == "bridge"]


def serving(engine: Daemon, name: str, *flags: str) -> str:
    """A container that greets on ports 80 and 81; its address."""
    engine.dolium("run", "-d", "--name", name, "--network", "net", *flags, "base:1", *SERVE)
    return address(engine, name)


def address(engine: Daemon, name: str, network: str = "net") -> str:
    return str(engine.inspect(name)["NetworkSettings"]["Networks"][network]["IPAddress"])


def asking(engine: Daemon, name: str, *flags: str) -> str:
    engine.docker("run", "-d", "--name", name, "--network", "net", *flags, "base:1", "sleep", "1000")
    return address(engine, name)


def hears(engine: Daemon, name: str, target: str, port: int = 80) -> bool:
    return engine.docker("exec", name, "sh", "-c", f"nc -w 5 {target} {port} </dev/null", check=False).stdout == "hello\n"


def test_names_and_labels_are_let_in_as_they_come_and_go(clean: Daemon) -> None:
    asking(clean, "early")
    target = serving(clean, "db", "--ingress", "allow=early:80", "--ingress", "allow=label:tier=front:81")
    eventually(lambda: hears(clean, "early", "db"), "it listens")
    assert not hears(clean, "early", target, 81)
    first = asking(clean, "late", "--label", "tier=front")
    assert hears(clean, "late", "db", 81) and not hears(clean, "late", "db", 80)
    # what it asks itself is answered; the host is nobody special
    serving(clean, "open")
    eventually(lambda: hears(clean, "db", "open"), "answers come in")
    refused = subprocess.run(["curl", "-s", "--http0.9", "-m2", f"http://{target}:80/"], capture_output=True, check=False)
    assert refused.stdout == b""
    # an address is nobody's when its container is gone, and another one's then
    clean.docker("rm", "-f", "late")
    assert first == asking(clean, "heir", "--ip", first)
    assert not hears(clean, "heir", "db", 81)
    # a name is its owner's
    clean.docker("rename", "early", "earlier")
    assert not hears(clean, "earlier", "db")
    clean.docker("rename", "heir", "early")
    assert hears(clean, "early", "db")


def test_networks_and_addresses(clean: Daemon) -> None:
    clean.docker("network", "create", "other")
    target = serving(clean, "db", "--ingress", "allow=network:other:80", "-p", "127.0.0.1:18320:80")
    asking(clean, "box")
    clean.docker("network", "connect", "other", "db")
    assert not hears(clean, "box", target)
    clean.docker("network", "connect", "other", "box")
    eventually(lambda: hears(clean, "box", address(clean, "db", "other")), "by the network that is named")
    assert not hears(clean, "box", target)
    clean.docker("network", "disconnect", "other", "box")
    assert not hears(clean, "box", target)
    assert subprocess.run(["curl", "-s", "--http0.9", "-m2", "http://127.0.0.1:18320/"], capture_output=True, check=False).stdout == b""
    # by a label, for clients that have no such flag; published ports are opened by addresses
    clean.docker("rm", "-f", "db")
    clean.docker("run", "-d", "--name", "db", "--network", "net", "-p", "127.0.0.1:18320:80", "--label",
                 "dolium.ingress=allow=0.0.0.0/0:80", "base:1", *SERVE)
    eventually(lambda: subprocess.run(["curl", "-s", "--http0.9", "-m2", "http://127.0.0.1:18320/"], capture_output=True,
                                      check=False).stdout == b"hello\n", "its port is published")
    assert not hears(clean, "box", "db", 81)


def test_nobody_has_another_ones_address(clean: Daemon) -> None:
    """A container may send what it wants (CAP_NET_RAW), and may even take an address (CAP_NET_ADMIN)."""
    friend = asking(clean, "friend")
    target = serving(clean, "db", "--ingress", "allow=friend")
    serving(clean, "open")
    asking(clean, "thief", "--cap-add", "NET_ADMIN")
    eventually(lambda: hears(clean, "friend", "db"), "it listens")
    clean.docker("exec", "thief", "sh", "-c", f"ip addr add {friend}/32 dev eth0 && ip addr del {address(clean, 'thief')}/16 dev eth0; "
                 f"ip route add {target}/32 dev eth0 src {friend}; ip route add {address(clean, 'open')}/32 dev eth0 src {friend}")
    clean.docker("pause", "friend")
    eventually(lambda: hears(clean, "thief", address(clean, "open")), "one that has no rules takes it for the other")
    assert not hears(clean, "thief", target)
    clean.docker("unpause", "friend")


def test_the_same_by_ipv6(clean: Daemon) -> None:
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("this kernel has no IPv6")
    clean.docker("network", "create", "--ipv6", "--subnet", "fd00:db8:77::/64", "other")

    def up(name: str, *flags: str) -> str:
        clean.dolium("run", "-d", "--name", name, "--network", "other", *flags, "base:1", *SERVE)
        return str(clean.inspect(name)["NetworkSettings"]["Networks"]["other"]["GlobalIPv6Address"])
    target, friend, foe = up("db", "--ingress", "allow=friend:80"), up("friend"), up("foe")
    eventually(lambda: hears(clean, "friend", target), "it listens")
    assert not hears(clean, "friend", target, 81)
    assert not hears(clean, "foe", target) and hears(clean, "db", foe)
    # it takes the address of one that is let in, and does not answer any more: another one that has no rules believes it
    other = up("open")

    def ip(name: str, *words: str) -> None:
        pid = str(clean.inspect(name)["State"]["Pid"])
        subprocess.run(["nsenter", "-t", pid, "-n", "ip", "-6", *words], check=True)
    ip("friend", "link", "set", "eth0", "down")
    ip("foe", "addr", "add", f"{friend}/128", "dev", "eth0", "nodad")
    ip("foe", "addr", "del", f"{foe}/64", "dev", "eth0")
    for name, there in (("db", target), ("open", other)):
        ip("foe", "route", "add", f"{there}/128", "dev", "eth0", "src", friend)
        ip(name, "neigh", "flush", "dev", "eth0")
    eventually(lambda: hears(clean, "foe", other), "it is taken for the other")
    assert not hears(clean, "foe", target)


def test_the_rules_outlive_the_daemon_and_refusals_are_events(tmp_path: Path) -> None:
    own = Daemon(tmp_path)
    own.start()
    try:
        own.import_base()
        own.docker("network", "create", "net")
        target = serving(own, "db", "--ingress", "allow=friend")
        asking(own, "friend")
        source = asking(own, "foe")
        eventually(lambda: hears(own, "friend", target), "it listens")
        assert len(guards()) == 1
        own.kill()
        own.start()
        assert len(guards()) == 1
        assert hears(own, "friend", target)
        with subprocess.Popen([DOCKER, "events", "--format", "{{json .}}", "--filter", "event=ingress-refused", "--since", "1"],
                              stdout=subprocess.PIPE, text=True, env=own.env) as events:
            assert events.stdout is not None
            try:
                assert not hears(own, "foe", target)
                told = json.loads(events.stdout.readline())["Actor"]["Attributes"]
            finally:
                events.kill()
        assert (told["name"], told["address"], told["protocol"], told["port"]) == ("db", source, "tcp", "80")
        # who comes and goes after the restart is seen, too
        own.docker("rm", "-f", "friend")
        asking(own, "friend")
        assert hears(own, "friend", target)
        # a daemon that was dead when they ended leaves nothing
        pids = [int(own.inspect(name)["State"]["Pid"]) for name in ("db", "friend", "foe")]
        own.kill()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        own.start()
        eventually(lambda: guards() == [], "there is nobody to guard")
    finally:
        own.close()


def test_what_would_make_the_rules_void_is_refused(clean: Daemon) -> None:
    def refused(expected: str, *words: str) -> None:
        done = clean.dolium("run", "--rm", *words, "base:1", "true", check=False)
        assert done.returncode == 125
        assert expected in done.stderr, done.stderr
    for words in (("--privileged",), ("--cap-add", "NET_ADMIN"), ("--cap-add", "all"), ("--network", "host"), ("--network", "none")):
        refused("--ingress does not go with", "--ingress", "none", *words)
    refused("invalid --ingress", "--ingress", "web")
    clean.dolium("run", "-d", "--name", "box", "--ingress", "none", "base:1", "sleep", "1000")
    assert "could take them away" in clean.docker("exec", "--privileged", "box", "true", check=False).stderr
    refused("--ingress does not go with --cap-add CAP_NET_ADMIN", "--network", "container:box", "--cap-add", "NET_ADMIN")
