"""The bridge network, with sockets made inside the namespaces it prepares: no container is needed for it."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from packets import (
    FORWARD,
    Bench,
    datagram,
    inside,
    links,
    links_inside,
    listen,
    make_socket,
    nothing_left,
    on_bench,
    ping,
    talk,
    the_outside,
)

from dolium.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable, Unimplemented
from dolium.network import firewall, netlink
from dolium.network.base import NetworkRequest, Place, PortBinding
from dolium.network.manager import Networks
from dolium.network.switch import remove_link

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


# -- traffic --

def test_containers_reach_each_other_and_the_gateway(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        _, a, one = await it.up()
        _, b, two = await it.up()
        assert one["ip"] != two["ip"] and one["gateway"] == two["gateway"] and one["link"] == "eth0"
        with listen(a, 80) as server:
            assert talk(server, b, one["ip"], 80) == two["ip"]
            assert talk(server, -1, one["ip"], 80) == one["gateway"]
        for fd, other in ((a, two), (b, one)):
            ping(fd, other["ip"])
            ping(fd, one["gateway"])
        ping(-1, one["ip"])
        with listen(a, 81) as server:
            assert talk(server, a, "127.0.0.1", 81) == "127.0.0.1"

    on_bench(body, tmp_path)


def test_what_is_in_the_namespace_and_on_the_host(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        container, fd, endpoint = await it.up()
        address = IPv4Address(endpoint["ip"])
        assert endpoint["mac"] == "02:42:" + ":".join(f"{byte:02x}" for byte in address.packed)
        seen = json.loads(subprocess.run(["nsenter", f"--net=/proc/self/fd/{fd}", "ip", "-j", "addr"], pass_fds=[fd],
                                         check=True, capture_output=True).stdout)
        by_name = {link["ifname"]: link for link in seen}
        assert by_name["eth0"]["address"] == endpoint["mac"] and by_name["eth0"]["operstate"] == "UP"
        assert [(a["local"], a["prefixlen"]) for a in by_name["eth0"]["addr_info"]] == [(endpoint["ip"], endpoint["prefix"])]
        assert by_name["lo"]["operstate"] == "UNKNOWN" and "UP" in by_name["lo"]["flags"]
        host = json.loads(subprocess.run(["ip", "-j", "-d", "link", "show", f"dv{container[:10]}"], check=True,
                                         capture_output=True).stdout)[0]
        assert host["ifalias"] == f"dolium:{it.instance}:{container}"
        assert host["master"] == f"dol{it.instance}" and host["mtu"] == by_name["eth0"]["mtu"]
        network = next(n for n in it.networks.describe() if n["Name"] == "bridge")
        assert network["Containers"][container]["IPv4Address"] == f"{endpoint['ip']}/{endpoint['prefix']}"
        assert network["IPAM"]["Config"][0]["Gateway"] == endpoint["gateway"]
        assert network["Options"]["com.docker.network.bridge.name"] == f"dol{it.instance}"
        assert FORWARD.read_text().strip() == "1"

    on_bench(body, tmp_path)


@pytest.fixture(params=["1", "0"], ids=["bridge-nf", "no-bridge-nf"])
def bridge_nf(request: pytest.FixtureRequest) -> Iterator[str]:
    """With bridge-nf-call-iptables a frame between two ports of a bridge goes through the IP rules; both are common."""
    path = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not path.exists():
        pytest.skip("the kernel has no br_netfilter")
    old = path.read_text()
    path.write_text(request.param)
    yield request.param
    path.write_text(old)


@pytest.mark.usefixtures("bridge_nf")
def test_published_ports_from_everywhere(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        _, a, one = await it.up(PortBinding(80, "tcp", "", 18080))
        _, b, two = await it.up()
        with listen(a, 80) as server, the_outside() as (outside, _, here):
            gateway = one["gateway"]
            assert talk(server, -1, "127.0.0.1", 18080) == gateway
            assert talk(server, -1, "127.0.0.77", 18080) == gateway
            assert talk(server, -1, here, 18080)
            assert talk(server, outside, here, 18080) == "10.213.77.2"  # the real source
            assert talk(server, b, gateway, 18080)
            assert talk(server, b, here, 18080)
            # hairpin: from the container itself, by the host's addresses
            assert talk(server, a, gateway, 18080)
            assert talk(server, a, here, 18080)
        assert one["ports"] == [{"container_port": 80, "protocol": "tcp", "host_ip": "0.0.0.0", "host_port": 18080}]
        assert two["ports"] == []

    on_bench(body, tmp_path)


def test_a_port_on_one_address_is_on_that_address_alone(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        _, a, _ = await it.up(PortBinding(80, "tcp", "127.0.0.1", 18081))
        with listen(a, 80) as server, the_outside() as (outside, _, here):
            talk(server, -1, "127.0.0.1", 18081)
            with make_socket(outside) as client, pytest.raises(OSError):
                client.connect((here, 18081))
            # the same port on another address is another container's
            _, b, _ = await it.up(PortBinding(81, "tcp", here, 18081))
            with listen(b, 81) as other:
                talk(other, outside, here, 18081)
                talk(server, -1, "127.0.0.1", 18081)
        with pytest.raises(FailedPrecondition, match="the host does not have this address"):
            await it.up(PortBinding(80, "tcp", "203.0.113.9", 18081))

    on_bench(body, tmp_path)


def test_udp_and_flows_of_a_past_owner(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        with make_socket(-1, socket.SOCK_DGRAM) as client, the_outside() as (outside, _, here), \
                make_socket(outside, socket.SOCK_DGRAM) as far:
            client.bind(("127.0.0.1", 0))
            # a flow that begins before the port is published
            client.sendto(b"early", ("127.0.0.1", 18053))
            far.sendto(b"early", (here, 18053))
            ping(outside, here)  # what came before it has arrived
            last = ""
            for _ in range(2):
                container, fd, endpoint = await it.up(PortBinding(53, "udp", "", 18053))
                assert endpoint["ip"] != last
                last = endpoint["ip"]
                with make_socket(fd, socket.SOCK_DGRAM) as server:
                    server.bind(("0.0.0.0", 53))
                    assert datagram(server, client, "127.0.0.1", 18053) == endpoint["gateway"]
                    assert datagram(server, far, here, 18053) == "10.213.77.2"
                await it.down(container)

    on_bench(body, tmp_path)


def test_the_outside_sees_the_host_and_only_published_ports(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        _, a, one = await it.up(PortBinding(80, "tcp", "", 0))
        with the_outside() as (outside, there, here), listen(outside, 8000) as server, listen(a, 81):
            assert talk(server, a, there, 8000) == here
            ping(a, there)
            with make_socket(outside) as client:
                client.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    client.connect((one["ip"], 81))

    on_bench(body, tmp_path)


def test_the_host_s_loopback_is_closed_to_containers(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        _, a, one = await it.up()
        # the bridge has route_localnet for published ports; a container with CAP_NET_ADMIN could route 127/8 to it
        subprocess.run(["nsenter", f"--net=/proc/self/fd/{a}", "sh", "-c",
                        f"ip addr del 127.0.0.1/8 dev lo && ip route add 127.0.0.9 via {one['gateway']} && "
                        "echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet"], pass_fds=[a], check=True)
        with socket.socket() as server, make_socket(a) as client:
            server.bind(("127.0.0.9", 0))
            server.listen()
            client.bind((one["ip"], 0))
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.connect(("127.0.0.9", server.getsockname()[1]))

    on_bench(body, tmp_path)


# -- ports and addresses --

def test_port_conflicts(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        first, _, _ = await it.up(PortBinding(80, "tcp", "", 18082))
        for ip in ("", "127.0.0.1"):
            with pytest.raises(AlreadyExists, match="failed: port is already allocated"):
                await it.up(PortBinding(1, "tcp", "", 18083), PortBinding(80, "tcp", ip, 18082))
        await it.up(PortBinding(1, "tcp", "", 18083))  # was given back
        await it.up(PortBinding(1, "udp", "", 18082))
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use"):
                other.bind(("0.0.0.0", 18082))
                other.listen()
        with socket.create_server(("127.0.0.1", 0)) as other, \
                pytest.raises(AlreadyExists, match=r"^Bind for 0\.0\.0\.0:\d+ failed: port is already allocated$"):
            await it.up(PortBinding(80, "tcp", "", other.getsockname()[1]))
        await it.down(first)
        await it.up(PortBinding(80, "tcp", "", 18082))
        for port in (PortBinding(80, "sctp"), PortBinding(0, "tcp"), PortBinding(80, "tcp", "fe80::1%lo"),
                     PortBinding(80, "tcp", "x"), PortBinding(80, "tcp", "", 70000)):
            with pytest.raises(InvalidArgument):
                await it.up(port)
        assert len(next(n for n in it.networks.describe() if n["Name"] == "bridge")["Containers"]) == 3

    on_bench(body, tmp_path)


def test_random_ports(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        made = await asyncio.gather(*(it.up(PortBinding(80, "tcp"), PortBinding(81, "udp")) for _ in range(10)))
        ports = [endpoint["ports"] for _, _, endpoint in made]
        assert len({tcp["host_port"] for tcp, _ in ports}) == 10
        assert all(low <= port["host_port"] <= high for pair in ports for port in pair)
        for _, fd, endpoint in made:
            with listen(fd, 80) as server:
                talk(server, -1, "127.0.0.1", endpoint["ports"][0]["host_port"])

    on_bench(body, tmp_path)


def test_fifty_at_once(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        made = await asyncio.gather(*(it.up() for _ in range(50)))
        assert len({endpoint["ip"] for _, _, endpoint in made}) == 50
        assert len({endpoint["mac"] for _, _, endpoint in made}) == 50
        assert len([name for name in links(it.instance) if name.startswith("dv")]) == 50
        figures = it.networks.pool_figures()
        assert figures["taken"] + figures["missed"] == 50 and figures["ready"] <= 4
        with listen(made[0][1], 80) as server:
            for _, fd, endpoint in made[1:]:
                assert talk(server, fd, made[0][2]["ip"], 80) == endpoint["ip"]
        await asyncio.gather(*(it.down(container) for container, _, _ in made))
        # at once again, under the same ids: their old links are still on the way out
        again = await asyncio.gather(*(it.up(container=container) for container, _, _ in made))
        assert not {endpoint["ip"] for _, _, endpoint in again} & {endpoint["ip"] for _, _, endpoint in made}
        with listen(again[0][1], 80) as server:
            talk(server, again[-1][1], again[0][2]["ip"], 80)

    on_bench(body, tmp_path)


def test_addresses_and_macs_by_wish(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        container, _, first = await it.up()
        wanted = str(IPv4Address(first["gateway"]) + 99)
        _, _, endpoint = await it.up(address=wanted, mac="02:00:00:AA:bb:01")
        assert (endpoint["ip"], endpoint["mac"]) == (wanted, "02:00:00:aa:bb:01")
        ping(-1, wanted)
        for bad in ({"address": "10.1.2.3"}, {"address": first["gateway"]}, {"mac": "01:00:00:00:00:01"}, {"mac": "no"}):
            with pytest.raises(InvalidArgument):
                await it.up(**bad)
        with pytest.raises(AlreadyExists):
            await it.up(address=wanted)
        # idempotent, and what another has by now is not taken from it
        await it.down(container)
        await it.networks.release(container, first)
        await it.up(address=first["ip"])
        await it.networks.release(container, first)
        with pytest.raises(AlreadyExists):
            await it.up(address=first["ip"])

    on_bench(body, tmp_path)


def test_none_has_a_loopback_and_nothing_else(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        container = secrets.token_hex(32)
        prepared = await it.networks.prepare(NetworkRequest(container, "none", (PortBinding(80, "tcp", "", 18080),)))
        try:
            assert [link.name for link in links_inside(prepared.fd) if link.up] == ["lo"]
            assert prepared.endpoint["network"] == "none" and prepared.endpoint["ports"] == []
            await it.networks.release(container, prepared.endpoint)
        finally:
            os.close(prepared.fd)
        with pytest.raises(NotFound, match="network nosuch not found"):
            await it.networks.prepare(NetworkRequest(container, "nosuch"))

    on_bench(body, tmp_path)


# -- when things go wrong --

def test_a_cancelled_prepare_leaves_nothing(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        for _ in range(5):
            task = asyncio.ensure_future(it.up(PortBinding(80, "tcp", "", 18085)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while it.networks._tasks:
                await asyncio.wait(it.networks._tasks)
            assert next(n for n in it.networks.describe() if n["Name"] == "bridge")["Containers"] == {}
        await it.up(PortBinding(80, "tcp", "", 18085))

    on_bench(body, tmp_path)


def test_rules_and_a_bridge_that_someone_removed_come_back(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        _, a, one = await it.up(PortBinding(80, "tcp", "", 18086))
        subprocess.run(["nft", "delete", "table", "ip", f"dolium-{it.instance}"], check=True)
        container, b, _ = await it.up(PortBinding(80, "tcp", "", 18087))
        with listen(a, 80) as server:
            talk(server, -1, "127.0.0.1", 18086)
        subprocess.run(["ip", "link", "del", f"dol{it.instance}"], check=True)
        _, c, _ = await it.up()
        with listen(a, 80) as server:
            talk(server, c, one["ip"], 80)
            talk(server, b, one["ip"], 80)
            talk(server, -1, "127.0.0.1", 18086)
        subprocess.run(["nft", "delete", "table", "ip", f"dolium-{it.instance}"], check=True)
        await it.down(container)
        with listen(a, 80) as server:
            talk(server, -1, "127.0.0.1", 18086)

    on_bench(body, tmp_path)


def test_a_namespace_that_someone_holds_loses_its_link(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        container, fd, _ = await it.up()
        held = os.dup(fd)
        try:
            await it.down(container)
            until = time.monotonic() + 10
            while f"dv{container[:10]}" in links(it.instance):
                assert time.monotonic() < until
                await asyncio.sleep(0.05)
            assert [link.name for link in links_inside(held) if link.name == "eth0"] == []
        finally:
            os.close(held)

    on_bench(body, tmp_path)


def test_a_network_that_cannot_be_resumed_keeps_its_containers_links(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        await it.networks.create({"Name": "one"})
        other, _, endpoint = await it.up()
        container = secrets.token_hex(32)
        prepared = await it.networks.prepare(NetworkRequest(container, "one", names=("box",)))
        it.prepared[container] = prepared
        switch = it.networks._bridge._networks["one"].switch
        mine = {switch.link_name(container), switch.name}
        switch.host.request(netlink.set_link(switch.index, alias="somebody else's"))
        later = Networks(it.instance, it.store, run_dir=str(tmp_path / "later"), pool_size=0)
        (tmp_path / "later").mkdir()
        await later.start({container: prepared.endpoint, other: endpoint})
        assert mine <= {name for _, name in socket.if_nameindex()} and later.find("one")["Containers"] == {}
        with pytest.raises(AlreadyExists, match="not of this network"):
            await later.prepare(NetworkRequest(secrets.token_hex(32), "one"))
        await asyncio.wait(later._tasks)  # the name server is made ready
        await later._dns.close()
        await later._bridge._clear_quietly(keep=True)
        for driver in {*later._drivers.values()} - {later._bridge}:
            await driver.close()
        switch.host.request(netlink.set_link(switch.index, alias=switch.alias))

    on_bench(body, tmp_path)


def test_a_start_that_fails_takes_its_names_along(tmp_path: Path) -> None:
    """The name server is told of a container while its link is made."""
    async def body(it: Bench) -> None:
        await it.networks.create({"Name": "one"})
        bridge, dns = it.networks._bridge, it.networks._dns
        while len(bridge._named) < bridge._named.size or not dns.pid:
            await asyncio.sleep(0.01)
        container = secrets.token_hex(32)
        name = bridge._networks["one"].switch.link_name(container)
        subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)  # somebody else's
        wish = NetworkRequest(container, "one", names=("box",))
        told: list[str] = []
        attach = dns.attach

        async def attached(container: str, known: Any) -> None:
            await attach(container, known)
            told.append(container)

        dns.attach = attached  # type: ignore[method-assign]
        with pytest.raises(FailedPrecondition, match=f"the link {name} exists"):
            await it.networks.prepare(wish)
        assert told == [container] and bridge._named.taken == 1
        assert dns._known == {} and bridge._claimed == {} and bridge._sockets == {}
        assert (await dns._ask({"op": "hello"}))["sandboxes"] == []
        subprocess.run(["ip", "link", "del", name], check=True)
        it.prepared[container] = await it.networks.prepare(wish)
        assert (await dns._ask({"op": "hello"}))["sandboxes"] == [container]
        # one that ends, and starts again before the name server has heard of the end
        prepared = it.prepared.pop(container)
        os.close(prepared.fd)
        await it.networks.release(container, prepared.endpoint)
        it.prepared[container] = await it.networks.prepare(wish)
        while it.networks._tasks:
            await asyncio.wait(it.networks._tasks)
        assert (await dns._ask({"op": "hello"}))["sandboxes"] == [container]

    on_bench(body, tmp_path)


def test_a_link_that_is_removed_is_gone_when_that_is_said(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        for name in ("one", "two"):
            await it.networks.create({"Name": name})
        container = secrets.token_hex(32)
        it.prepared[container] = prepared = await it.networks.prepare(NetworkRequest(container, "one"))
        for _ in range(5):
            both = await it.networks.connect(container, Place("two"), prepared.fd, prepared.endpoint)
            switch = it.networks._bridge._networks["two"].switch
            await it.networks.disconnect(container, "two", prepared.fd, both)
            assert switch.link_name(container) not in {name for _, name in socket.if_nameindex()}
            assert "eth1" not in {link.name for link in links_inside(prepared.fd)}
            assert not [line for line in inside(prepared.fd, lambda: Path("/proc/thread-self/net/route").read_text()).splitlines()
                        if line.startswith("eth1")]
            await it.networks.remove("two")
            assert switch.name not in {name for _, name in socket.if_nameindex()}
            await it.networks.create({"Name": "two"})
        remove_link(0x7FFFFFFF)  # not there
        with pytest.raises(OSError, match=r"\[Errno 95\]"):  # the kernel's refusal is the caller's
            remove_link(1)

    on_bench(body, tmp_path)


def test_two_instances_have_two_subnets(tmp_path: Path) -> None:
    other = secrets.token_hex(4)

    async def body(it: Bench) -> None:
        (tmp_path / "other").mkdir()
        second = Bench(tmp_path / "other", other)
        await second.networks.start({})
        try:
            _, a, one = await it.up()
            _, b, two = await second.up()
            assert one["gateway"] != two["gateway"]
            # networks are apart: what is not published cannot be reached from the other
            with listen(a, 80), make_socket(b) as client:
                client.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    client.connect((one["ip"], 80))
            # and what is published can
            _, c, _ = await second.up(PortBinding(80, "tcp", "", 18095))
            with listen(c, 80) as server:
                talk(server, a, one["gateway"], 18095)
                talk(server, b, one["gateway"], 18095)
        finally:
            for container in list(second.prepared):
                await second.down(container)
            await second.networks.close()

    with nothing_left(other):
        on_bench(body, tmp_path)


def test_a_foreign_chain_that_drops_is_named(tmp_path: Path) -> None:
    table = f"dtest{secrets.token_hex(3)}"

    async def body(it: Bench) -> None:
        assert any(f"ip {table} fw " in warning for warning in it.networks.warnings)

    subprocess.run(["nft", f"table ip {table} {{ chain fw {{ type filter hook forward priority 5; policy drop; }}; }}"],
                   check=True)
    try:
        on_bench(body, tmp_path)
    finally:
        subprocess.run(["nft", "delete", "table", "ip", table], check=True)


@pytest.mark.parametrize("broken", ["library", "rules"])
def test_a_host_without_nftables_has_the_other_networks(broken: str, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    instance = secrets.token_hex(4)

    def refuse(*_: object) -> None:
        raise Unimplemented("nft: no", hint="the kernel lacks a part of nftables")

    async def body() -> None:
        it = Bench(tmp_path, instance)
        await it.networks.start({})
        assert it.networks.warnings
        with pytest.raises((Unavailable, Unimplemented), match=r"libnftables1|the kernel lacks"):
            await it.up()
        prepared = await it.networks.prepare(NetworkRequest("c" * 64, "none"))
        os.close(prepared.fd)
        assert links(instance) == set()
        await it.networks.close()

    if broken == "library":
        monkeypatch.setattr(firewall, "_LIBRARY", "libnosuch.so.1")
    else:
        monkeypatch.setattr(firewall.Firewall, "replace", refuse)
    with nothing_left(instance):
        asyncio.run(body())


@pytest.mark.slow
def test_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a verdict: prints what prepare() takes, from the pool, without it, and with a published port."""
    async def measure(it: Bench, *ports: PortBinding, rounds: int = 60, wait: bool = True) -> str:
        times = []
        for _ in range(rounds):
            while wait and it.networks.pool_figures()["ready"] < 4:
                await asyncio.sleep(0.002)
            begun = time.perf_counter()
            container, _, _ = await it.up(*ports)
            times.append((time.perf_counter() - begun) * 1000)
            await it.down(container)
        return f"n={rounds} min {min(times):.2f} median {statistics.median(times):.2f} max {max(times):.2f} ms"

    async def body(it: Bench) -> None:
        with capsys.disabled():
            print(f"\npool      {await measure(it)}")
            print(f"pool+port {await measure(it, PortBinding(80, 'tcp'))}")
            print(f"busy      {await measure(it, wait=False)}")
            it.networks._bridge._pool.size = 0
            it.networks._bridge._pool._slots, slots = [], it.networks._bridge._pool._slots
            for slot in slots:
                slot.close()
            print(f"no pool   {await measure(it, wait=False)}")

    on_bench(body, tmp_path)
