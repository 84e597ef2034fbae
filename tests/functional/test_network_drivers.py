"""One suite for every kind of network: what the manager asks of a driver holds for all of them, shown by packets.

A kind that this kernel lacks is skipped by the kernel's own answer; the other kernel (host or VM) runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shlex
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

import pytest
from packets import SECONDS, Bench, inside, links, links_inside, listen, make_socket, nothing_left, ping, talk

from dolium.errors import (
    AlreadyExists,
    DoliumError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unimplemented,
)
from dolium.network import netlink
from dolium.network.base import Endpoint, NetworkRequest, Place, PortBinding
from dolium.network.local import new_namespace
from dolium.network.netlink import Netlink

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
LAN = IPv4Network("10.214.80.0/24")
LAN6 = IPv6Network("fd00:214:80::/64")
ROUTER = str(LAN[1])


@dataclass(frozen=True)
class Kind:
    """``lan``: its containers are on the network of the host's link; ``routed``: the kernel routes, none announces itself."""

    name: str
    driver: str
    options: dict[str, str]
    lan: bool = False
    routed: bool = False


KINDS = [
    Kind("bridge", "bridge", {}),
    Kind("cni", "cni", {}),
    Kind("macvlan", "macvlan", {}, lan=True),
    Kind("macvlan-private", "macvlan", {"macvlan_mode": "private"}, lan=True),
    Kind("macvlan-vepa", "macvlan", {"macvlan_mode": "vepa"}, lan=True),
    Kind("macvlan-vlan", "macvlan", {"vlan": "20"}, lan=True),
    Kind("ipvlan-l2", "ipvlan", {"ipvlan_mode": "l2"}, lan=True),
    Kind("ipvlan-vlan", "ipvlan", {"vlan": "20"}, lan=True),
    Kind("ipvlan-l3", "ipvlan", {"ipvlan_mode": "l3"}, lan=True, routed=True),
    Kind("ipvlan-l3s", "ipvlan", {"ipvlan_mode": "l3s"}, lan=True, routed=True),
]
TALKING = [kind for kind in KINDS if kind.name not in ("macvlan-private", "macvlan-vepa")]


class Outside(Bench):
    """An instance, and beside it a router: ``host_link`` of the host leads to it. ``router``: its namespace."""

    host_link: str
    router: int
    name_server: subprocess.Popen[bytes] | None = None

    async def network(self, kind: Kind, name: str = "net", **more: Any) -> str:
        options = dict(kind.options)
        if kind.driver == "cni":
            return await self.networks.create({"Name": name, "Driver": "cni", "Options": {"config": self.conflist()}})
        vlan = options.pop("vlan", "")
        if kind.lan:
            options["parent"] = f"{self.host_link}.{vlan}" if vlan else self.host_link
            more.setdefault("IPAM", {"Config": [{"Subnet": str(LAN), "Gateway": ROUTER}]})
        return await self.networks.create({"Name": name, "Driver": kind.driver, "Options": options, **more})

    def conflist(self, name: str = "cni.conflist", **more: Any) -> str:
        """A bridge with addresses of its own, and published ports, by Debian's plugins."""
        path = self.folder / name
        path.write_text(json.dumps({"cniVersion": "1.0.0", "name": f"dolium-{self.instance}", "plugins": [
            {"type": "bridge", "bridge": f"dn{self.instance}", "isGateway": True, "capabilities": {"mac": True},
             "ipam": {"type": "host-local", "dataDir": str(self.folder / "leases"), "ranges": [[{"subnet": "10.219.0.0/24"}]],
                      "routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "portmap", "capabilities": {"portMappings": True}}], **more}))
        return str(path)

    def known_to_router(self, kind: Kind, endpoint: Endpoint) -> None:
        """On layer 3 nobody answers ARP for a container: the router has a route, and so has the host to it."""
        if kind.routed:
            subprocess.run(["ip", "route", "replace", str(LAN), "dev", self.host_link], check=True)
            ip(self.router, "neigh", "replace", endpoint["ip"], "lladdr", endpoint["mac"], "dev", "wire")

    async def into(self, name: str, container: str = "", **more: Any) -> tuple[str, int, Endpoint]:
        container = container or secrets.token_hex(32)
        prepared = await self.networks.prepare(NetworkRequest(container, name, **more))
        self.prepared[container] = prepared
        return container, prepared.fd, prepared.endpoint


def ip(fd: int, *words: str) -> str:
    """ip(8) in a namespace; what it prints."""
    return subprocess.run(["nsenter", f"--net=/proc/self/fd/{fd}", "ip", *words], pass_fds=[fd], capture_output=True, text=True,
                          check=True).stdout


def _lacks(kind: Kind) -> str:
    """Why this kernel cannot have it; ""."""
    host = Netlink()
    try:
        for what, data in ((kind.driver, b""), *([("vlan", netlink.vlan_data(20))] if "vlan" in kind.options else [])):
            if what in ("bridge", "cni"):
                continue
            name = f"dq{secrets.token_hex(4)}"
            try:
                host.request(netlink.new_child(name, 1, what, data=data))  # lo takes none: the answer tells whether it knows them
            except OSError as error:
                if netlink.UNKNOWN_KIND in (error.strerror or ""):
                    return f"this kernel has no {what} links: {error.strerror}"
                continue
            found = host.link(name=name)
            if found is not None:
                host.request(netlink.delete_link(found.index))
        return ""
    finally:
        host.close()


@contextlib.contextmanager
def _router(kind: Kind) -> Iterator[tuple[str, int]]:
    """(the host's link, the router's namespace)."""
    fd, name = new_namespace(), f"dt{secrets.token_hex(3)}"
    host, there = Netlink(), inside(fd, Netlink)
    try:
        host.request(netlink.new_veth(name, "wire", fd, 1500))
        outer, inner = host.link(name=name), there.link(name="wire")
        assert outer and inner
        host.request(netlink.set_link(outer.index, up=True))
        there.request(netlink.set_link(inner.index, up=True))
        if "vlan" in kind.options:
            there.request(netlink.new_child("tagged", inner.index, "vlan", data=netlink.vlan_data(int(kind.options["vlan"]))))
            tagged = there.link(name="tagged")
            assert tagged
            there.request(netlink.set_link(tagged.index, up=True))
            inner = tagged
        there.request(netlink.new_address(inner.index, LAN[1], LAN))
        if "vepa" in kind.options.values():  # the switch on the wire sends back where a frame came from
            inside(fd, _reflect)
        yield name, fd
    finally:
        link = host.link(name=name)
        if link is not None:
            host.request(netlink.delete_link(link.index))
        host.close()
        there.close()
        os.close(fd)


def _reflect() -> None:
    Path("/proc/sys/net/ipv4/conf/all/send_redirects").write_text("0")


def on(kind: Kind, body: Callable[[Outside], Awaitable[None]], folder: Path) -> None:
    lacks = _lacks(kind)
    if lacks:
        pytest.skip(lacks)
    instance = secrets.token_hex(4)

    async def run(link: str, router: int) -> None:
        it = Outside(folder, instance)
        it.host_link, it.router = link, router
        await it.networks.start({})
        try:
            await body(it)
        finally:
            for container in list(it.prepared):
                await it.down(container)
            await it.networks.close()
            subprocess.run(["ip", "link", "del", f"dn{instance}"], check=False, capture_output=True)  # the plugin leaves it
            if it.name_server is not None:
                it.name_server.wait(SECONDS)  # the earlier daemon, whose child it is, was this process
            assert links(instance) == set()

    with nothing_left(instance), _router(kind) as (link, router):
        asyncio.run(run(link, router))


addressed_kind = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.driver != "cni"], ids=lambda kind: kind.name)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
talking_kind = pytest.mark.parametrize("kind", TALKING, ids=lambda kind: kind.name)


@talking_kind
def test_containers_of_a_network_reach_each_other(kind: Kind, tmp_path: Path) -> None:
    async def body(it: Outside) -> None:
        await it.network(kind)
        _, a, one = await it.into("net")
        _, b, two = await it.into("net")
        assert one["ip"] != two["ip"]
        with listen(a, 80) as server:
            assert talk(server, b, one["ip"], 80) == two["ip"]
        ping(a, two["ip"])

    on(kind, body, tmp_path)


@every_kind
def test_the_way_out(kind: Kind, tmp_path: Path) -> None:
    """The gateway answers, from either side; the default route leads there."""
    async def body(it: Outside) -> None:
        await it.network(kind)
        _, fd, endpoint = await it.into("net")
        assert endpoint["link"] == "eth0"
        it.known_to_router(kind, endpoint)
        ping(fd, ROUTER if kind.lan else endpoint["gateway"])
        if kind.lan and not kind.routed:
            with listen(fd, 80) as server:
                assert talk(server, it.router, endpoint["ip"], 80) == ROUTER
        routes = ip(fd, "route")
        assert routes.startswith("default dev eth0" if kind.routed else f"default via {endpoint['gateway']} dev eth0")

    on(kind, body, tmp_path)


@addressed_kind
def test_what_is_in_the_namespace(kind: Kind, tmp_path: Path) -> None:
    async def body(it: Outside) -> None:
        await it.network(kind, Options={**kind.options, "com.docker.network.driver.mtu": "1400",
                                        "com.docker.network.container_iface_prefix": "net"} if not kind.lan else {
            **{key: text for key, text in kind.options.items() if key != "vlan"},
            "parent": it.host_link + (f".{kind.options['vlan']}" if "vlan" in kind.options else ""),
            "com.docker.network.driver.mtu": "1400", "com.docker.network.container_iface_prefix": "net"})
        _, fd, endpoint = await it.into("net")
        there = {link.name: link for link in links_inside(fd)}
        assert set(there) >= {"lo", "net0"}
        assert (there["net0"].mtu, there["net0"].up, there["net0"].mac) == (1400, True, endpoint["mac"])
        assert there["lo"].up

    on(kind, body, tmp_path)


@addressed_kind
def test_addresses_are_given_once_and_come_back(kind: Kind, tmp_path: Path) -> None:
    async def body(it: Outside) -> None:
        await it.network(kind, IPAM={"Config": [{"Subnet": str(LAN), "Gateway": ROUTER, "IPRange": "10.214.80.16/30",
                                                 "AuxiliaryAddresses": {"printer": "10.214.80.18"}}]})
        first, _, one = await it.into("net", address="10.214.80.77")
        assert one["ip"] == "10.214.80.77"
        for wrong, error in (("10.214.80.77", AlreadyExists), ("10.9.9.9", InvalidArgument), ("10.214.80.18", InvalidArgument),
                             (ROUTER, InvalidArgument)):
            with pytest.raises(error):
                await it.into("net", address=wrong)
        given = [(await it.into("net"))[2]["ip"] for _ in range(3)]
        assert sorted(given) == ["10.214.80.16", "10.214.80.17", "10.214.80.19"]
        with pytest.raises(DoliumError, match="no available IPv4 addresses"):
            await it.into("net")
        await it.down(first)
        assert (await it.into("net", address="10.214.80.77"))[2]["ip"] == "10.214.80.77"

    on(kind, body, tmp_path)


@talking_kind
def test_into_a_namespace_that_lives_and_out_again(kind: Kind, tmp_path: Path) -> None:
    async def body(it: Outside) -> None:
        await it.network(kind)
        await it.networks.create({"Name": "other"})
        _, _, far = await it.into("net")
        container, fd, first = await it.into("other")
        namespace = os.dup(fd)
        try:
            both = await it.networks.connect(container, Place("net"), namespace, first)
            assert [both["network"], *(one["network"] for one in both["others"])] == ["other", "net"]
            ping(fd, far["ip"])
            with pytest.raises(PermissionDenied, match="already"):
                await it.networks.connect(container, Place("net"), namespace, both)
            # the default route goes to who is left
            alone = await it.networks.disconnect(container, "other", namespace, both)
            it.prepared[container].endpoint = alone
            assert alone["network"] == "net" and "others" not in alone
            routes = ip(fd, "route")
            assert routes.startswith("default ") and "dev eth1" in routes.splitlines()[0]
            ping(fd, far["ip"])
            assert await it.networks.disconnect(container, "net", namespace, alone) == {}
            it.prepared[container].endpoint = {}
            assert {link.name for link in links_inside(fd)} & {"eth0", "eth1"} == set()
            with pytest.raises(NotFound):
                await it.networks.disconnect(container, "net", namespace, {})
        finally:
            os.close(namespace)

    on(kind, body, tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in TALKING if kind.lan], ids=lambda kind: kind.name)
def test_ipv6_of_containers_on_a_shared_link(kind: Kind, tmp_path: Path) -> None:
    async def body(it: Outside) -> None:
        wire = "tagged" if "vlan" in kind.options else "wire"
        ip(it.router, "-6", "address", "add", f"{LAN6[1]}/64", "dev", wire, "nodad")
        await it.network(kind, EnableIPv6=True, IPAM={"Config": [{"Subnet": str(LAN), "Gateway": ROUTER}, {"Subnet": str(LAN6)}]})
        first, a, one = await it.into("net")
        _, b, two = await it.into("net", address6=str(LAN6[0x50]))
        assert (one["ip6"], two["ip6"], one["prefix6"]) == (str(LAN6[2]), str(LAN6[0x50]), 64)
        assert it.networks.find("net")["Containers"][first]["IPv6Address"] == f"{LAN6[2]}/64"
        with listen(a, 80, "::") as server:
            assert talk(server, b, one["ip6"], 80) == two["ip6"]
            if not kind.routed:
                assert talk(server, it.router, one["ip6"], 80) == str(LAN6[1])
        assert ip(a, "-6", "route", "show", "default").startswith(
            "default dev eth0" if kind.routed else f"default via {LAN6[1]} dev eth0")
        with pytest.raises(AlreadyExists):
            await it.into("net", address6=one["ip6"])
        with pytest.raises(AlreadyExists, match="overlaps"):
            await it.networks.create({"Name": "wrong", "EnableIPv6": True, "IPAM": {"Config": [{"Subnet": str(LAN6)}]}})
        # the address is another's: who knew where it was is told
        await it.down(first)
        again, c, three = await it.into("net", address6=str(LAN6[2]))
        assert three["ip6"] == one["ip6"]
        if not kind.routed:
            with listen(c, 80, "::") as server:
                assert talk(server, it.router, three["ip6"], 80) == str(LAN6[1])
        # another daemon knows who has it
        it.name_server = it.networks._dns._child
        await it.networks.close()
        it.networks = type(it.networks)(it.instance, it.store, run_dir=str(it.folder))
        await it.networks.start({again: three})
        with pytest.raises(AlreadyExists):
            await it.into("net", address6=three["ip6"])

    on(kind, body, tmp_path)


@every_kind
def test_a_network_with_containers_stays_and_an_empty_one_goes(kind: Kind, tmp_path: Path) -> None:
    async def body(it: Outside) -> None:
        identity = await it.network(kind)
        container, _, endpoint = await it.into("net")
        described = it.networks.find(identity[:12])
        assert (described["Driver"], described["Id"]) == (kind.driver, identity)
        assert described["Containers"][container]["IPv4Address"] == f"{endpoint['ip']}/{endpoint['prefix']}"
        with pytest.raises(PermissionDenied, match="active endpoints"):
            await it.networks.remove("net")
        await it.down(container)
        assert await it.networks.remove("net") == "net"
        with pytest.raises(NotFound):
            await it.into("net")
        await it.network(kind)  # its name, its subnet and its parent are free again

    on(kind, body, tmp_path)


@every_kind
def test_a_daemon_that_comes_back_knows_it_all(kind: Kind, tmp_path: Path) -> None:
    async def body(it: Outside) -> None:
        await it.network(kind)
        container, fd, endpoint = await it.into("net", address=str(LAN[50]) if kind.lan else "")
        gone, gone_fd, _ = await it.into("net")
        os.close(gone_fd)  # it ends while no daemon runs
        del it.prepared[gone]
        it.name_server = it.networks._dns._child
        await it.networks.close()
        it.networks = type(it.networks)(it.instance, it.store, run_dir=str(it.folder))
        await it.networks.start({container: endpoint}, lambda _: os.dup(fd))
        described = it.networks.find("net")
        assert list(described["Containers"]) == [container]
        with pytest.raises(AlreadyExists if kind.driver != "cni" else InvalidArgument):
            await it.into("net", address=endpoint["ip"])
        it.known_to_router(kind, endpoint)
        ping(fd, ROUTER if kind.lan else endpoint["gateway"])
        if kind in TALKING:
            _, other, _ = await it.into("net")
            ping(other, endpoint["ip"])

    on(kind, body, tmp_path)


@every_kind
def test_a_failure_leaves_nothing(kind: Kind, tmp_path: Path) -> None:
    async def body(it: Outside) -> None:
        await it.network(kind)
        container, fd, first = await it.into("net")
        namespace = os.dup(fd)
        os.close(fd)
        # a link of that name is there already: what was begun is undone, and the address is free
        await it.networks.create({"Name": "other"})
        try:
            ip(namespace, "link", "add", "eth1", "type", "veth", "peer", "name", "mine")
            with pytest.raises(DoliumError):
                await it.networks.connect(container, Place("other", address=""), namespace, first)
            assert it.networks.find("other")["Containers"] == {}
            with pytest.raises(InvalidArgument):
                await it.networks.prepare(NetworkRequest("ab" * 32, "net", address="not one"))
            assert list(it.networks.find("net")["Containers"]) == [container]
        finally:
            it.prepared[container].fd = namespace

    on(kind, body, tmp_path)


# -- what is of one kind alone --

def test_cni_publishes_and_gives_its_leases_back(tmp_path: Path) -> None:
    async def body(it: Outside) -> None:
        with no_chains_left():
            await chain(it)

    async def chain(it: Outside) -> None:
        await it.network(of("cni"))
        container, fd, endpoint = await it.into("net", mac="02:00:00:00:cc:01", ports=(PortBinding(80, "tcp", "", 18321),))
        assert endpoint["mac"] == "02:00:00:00:cc:01" and endpoint["gateway"] == "10.219.0.1"
        with listen(fd, 80) as server:
            assert talk(server, -1, "10.219.0.1", 18321)
        leases = tmp_path / "leases" / f"dolium-{it.instance}"
        assert (leases / endpoint["ip"]).read_text().startswith(container)
        with pytest.raises(FailedPrecondition, match="no network whose ports"):
            await it.networks.publish(container, endpoint, (PortBinding(81, "tcp", "", 18322),))
        await it.down(container)
        assert not (leases / endpoint["ip"]).exists()
        # a daemon that died in the middle of a chain: the next one runs it backwards
        lost = "ab" * 32
        prepared = await it.networks.prepare(NetworkRequest(lost, "net", (PortBinding(80, "tcp", "", 18321),)))
        os.close(prepared.fd)
        it.name_server = it.networks._dns._child
        await it.networks.close()
        it.networks = type(it.networks)(it.instance, it.store, run_dir=str(it.folder))
        await it.networks.start({})
        assert not (leases / prepared.endpoint["ip"]).exists()
        assert "18321" not in subprocess.run(["iptables", "-t", "nat", "-S"], capture_output=True, text=True, check=True).stdout

    on(of("cni"), body, tmp_path)


def test_cni_says_what_is_wrong(tmp_path: Path) -> None:
    async def body(it: Outside) -> None:
        async def refused(error: type[DoliumError], match: str, **options: str) -> None:
            with pytest.raises(error, match=match):
                await it.networks.create({"Name": "wrong", "Driver": "cni", "Options": options})
        await refused(InvalidArgument, "needs a configuration")
        await refused(NotFound, "No such file", config=str(tmp_path / "absent"))
        (tmp_path / "bad").write_text("{")
        await refused(InvalidArgument, "Expecting", config=str(tmp_path / "bad"))
        await refused(InvalidArgument, "plugins is a list", config=it.conflist("none.conflist", plugins=[]))
        await refused(InvalidArgument, "cniVersion '0.1.0'", config=it.conflist("old.conflist", cniVersion="0.1.0"))
        await refused(NotFound, "no CNI plugin absent in", config=it.conflist("absent.conflist", plugins=[{"type": "absent"}]))
        await refused(InvalidArgument, "not a program's name", config=it.conflist("p.conflist", plugins=[{"type": "../x"}]))
        full = it.conflist("full.conflist", plugins=[
            {"type": "bridge", "bridge": f"dn{it.instance}", "ipam": {"type": "host-local", "dataDir": str(tmp_path / "leases"),
                                                                     "ranges": [[{"subnet": "10.219.1.0/30"}]]}}])
        await it.networks.create({"Name": "full", "Driver": "cni", "Options": {"config": full}})
        await it.into("full")
        with pytest.raises(FailedPrecondition, match=r"CNI plugin bridge ADD: .*no IP addresses available"):
            await it.into("full")
        with pytest.raises(InvalidArgument, match="no plugin publishes ports"):
            await it.into("full", ports=(PortBinding(80, "tcp", "", 18321),))
        with pytest.raises(InvalidArgument, match="takes a bandwidth"):
            await it.into("full", bandwidth=(1000, 0))
        assert len(it.networks.find("full")["Containers"]) == 1
        assert len(os.listdir(tmp_path / "cni")) == 1

    on(of("cni"), body, tmp_path)


@contextlib.contextmanager
def no_chains_left() -> Iterator[None]:
    """The plugin portmap leaves its empty chains in the host's own tables, whoever uses it."""
    tables = [(family, program) for family, program in (("ip", "iptables"), ("ip6", "ip6tables"))]

    def listed(program: str) -> list[list[str]]:
        text = subprocess.run([program, "-t", "nat", "-S"], capture_output=True, text=True, check=True).stdout
        return [shlex.split(line) for line in text.splitlines() if "CNI-" in line]

    def there(family: str) -> bool:
        return subprocess.run(["nft", "list", "table", family, "nat"], capture_output=True, check=False).returncode == 0
    before = {family: there(family) for family, _ in tables}
    try:
        yield
    finally:
        for family, program in tables:
            if not before[family] and there(family):
                subprocess.run(["nft", "delete", "table", family, "nat"], check=True)
            elif before[family]:
                own = listed(program)
                for line in [line for line in own if line[0] == "-A"]:
                    subprocess.run([program, "-t", "nat", "-D", *line[1:]], check=True)
                for line in [line for line in own if line[0] == "-N"]:
                    subprocess.run([program, "-t", "nat", "-X", line[1]], check=True)


def of(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


def test_a_macvlan_keeps_containers_apart_and_is_seen_by_its_mac_address(tmp_path: Path) -> None:
    async def body(it: Outside) -> None:
        await it.network(of("macvlan-private"))
        _, a, one = await it.into("net", mac="02:00:00:00:aa:01")
        _, b, _ = await it.into("net")
        assert one["mac"] == "02:00:00:00:aa:01"
        with listen(a, 80) as server:
            talk(server, it.router, one["ip"], 80)
        seen = ip(it.router, "neigh")
        assert f"{one['ip']} dev wire lladdr 02:00:00:00:aa:01" in seen
        with make_socket(b) as client, pytest.raises(OSError):
            client.settimeout(0.5)
            client.connect((one["ip"], 80))

    on(of("macvlan-private"), body, tmp_path)


def test_an_address_that_is_used_again_is_announced(tmp_path: Path) -> None:
    async def body(it: Outside) -> None:
        await it.network(of("macvlan"))
        address = str(LAN[60])
        for mac in ("02:00:00:00:bb:01", "02:00:00:00:bb:02"):
            container, fd, _ = await it.into("net", address=address, mac=mac)
            # the router does not ask: it was told
            seen = ip(it.router, "neigh")
            if mac.endswith("02"):
                assert f"{address} dev wire lladdr {mac}" in seen
            with listen(fd, 80) as server:
                talk(server, it.router, address, 80)
            await it.down(container)

    on(of("macvlan"), body, tmp_path)


def test_passthru_gives_the_link_to_one(tmp_path: Path) -> None:
    kind = Kind("passthru", "macvlan", {"macvlan_mode": "passthru"}, lan=True)

    async def body(it: Outside) -> None:
        await it.network(kind)
        _, fd, one = await it.into("net")
        host = Netlink()
        parent = host.link(name=it.host_link)
        host.close()
        assert parent is not None and one["mac"] == parent.mac
        ping(fd, ROUTER)
        with pytest.raises(FailedPrecondition, match="one container has the link"):
            await it.into("net")

    on(kind, body, tmp_path)


@pytest.mark.parametrize("kind", [of("macvlan"), of("ipvlan-l2")], ids=lambda kind: kind.name)
def test_parents_and_modes_that_are_wrong(kind: Kind, tmp_path: Path) -> None:
    async def body(it: Outside) -> None:
        async def refused(error: type[DoliumError], match: str, options: dict[str, str], **more: Any) -> None:
            with pytest.raises(error, match=match):
                await it.networks.create({"Name": "wrong", "Driver": kind.driver, "Options": options,
                                          "IPAM": {"Config": [{"Subnet": "10.214.90.0/24"}]}, **more})
        await it.network(kind)
        await refused(AlreadyExists, "already using parent", {"parent": it.host_link})
        await refused(NotFound, "no link nothing0", {"parent": "nothing0"})
        await refused(NotFound, "no link nothing0.5", {"parent": "nothing0.5"})
        await refused(InvalidArgument, "1 to 4094", {"parent": f"{it.host_link}.4095"})
        await refused(InvalidArgument, "not a link", {"parent": "lo"})
        await refused(InvalidArgument, "is none of", {f"{kind.driver}_mode": "sideways"})
        await refused(InvalidArgument, "no option of the driver", {"com.docker.network.bridge.name": "br0"})
        await refused(InvalidArgument, "there is no parent", {"parent": it.host_link}, Internal=True)
        with pytest.raises(AlreadyExists, match="overlaps"):
            await it.networks.create({"Name": "wrong", "IPAM": {"Config": [{"Subnet": str(LAN)}]}})
        assert [one["Name"] for one in it.networks.describe()] == ["bridge", "host", "none", "net"]

    on(kind, body, tmp_path)


@pytest.mark.parametrize("kind", [Kind("macvlan", "macvlan", {}), Kind("ipvlan", "ipvlan", {})], ids=lambda kind: kind.name)
def test_a_network_without_a_parent_leads_nowhere(kind: Kind, tmp_path: Path) -> None:
    async def body(it: Outside) -> None:
        try:
            await it.networks.create({"Name": "net", "Driver": kind.driver, "Internal": True})
        except Unimplemented as error:
            pytest.skip(str(error))
        _, _, one = await it.into("net")
        _, b, two = await it.into("net")
        assert one["gateway"] == ""
        ping(b, one["ip"])
        assert IPv4Address(two["ip"]) in IPv4Network(it.networks.find("net")["IPAM"]["Config"][0]["Subnet"])
        with pytest.raises(FailedPrecondition, match="no network whose ports"):
            await it.networks.publish(next(iter(it.prepared)), one, (PortBinding(80, "tcp"),))

    on(kind, body, tmp_path)
