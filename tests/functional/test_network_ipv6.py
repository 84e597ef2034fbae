"""IPv6 of bridge networks, with sockets made inside the namespaces that are prepared for containers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import pytest
from packets import (
    FORWARD6,
    SECONDS,
    Bench,
    datagram,
    eventually,
    inside,
    links,
    listen,
    make_socket,
    nothing_left,
    on_bench,
    talk,
    the_outside6,
)

from dolium.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unimplemented
from dolium.network import ipv6, netlink
from dolium.network.base import Endpoint, NetworkRequest, Place, PortBinding
from dolium.network.local import new_namespace
from dolium.network.manager import Networks
from dolium.network.netlink import Netlink

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
              pytest.mark.skipif(not FORWARD6.exists(), reason="this kernel has no IPv6")]
P = f"fd00:db8:{1 + secrets.randbelow(65535):x}"  # other daemons may run beside the tests
SUBNET = IPv6Network(f"{P}::/64")


async def network(it: Bench, name: str = "six", *, subnet: str = str(SUBNET), **more: Any) -> str:
    return await it.networks.create({"Name": name, "EnableIPv6": True, "IPAM": {"Config": [{"Subnet": subnet}] if subnet else []},
                                     **more})


async def into(it: Bench, *ports: PortBinding, name: str = "six", container: str = "", **more: Any) -> tuple[str, int, Endpoint]:
    container = container or secrets.token_hex(32)
    prepared = await it.networks.prepare(NetworkRequest(container, name, ports, **more))
    it.prepared[container] = prepared
    return container, prepared.fd, prepared.endpoint


def ip(fd: int, *words: str) -> Any:
    text = subprocess.run(["nsenter", f"--net=/proc/self/fd/{fd}", "ip", "-6", "-j", *words], pass_fds=[fd], check=True,
                          capture_output=True).stdout
    return json.loads(text or b"[]")


def refused(fd: int, address: str, port: int) -> bool:
    """At once, and not by silence."""
    with make_socket(fd, family=socket.AF_INET6) as client:
        try:
            client.connect((address, port))
        except ConnectionRefusedError:
            return True
        return False


def silent(fd: int, address: str, port: int) -> bool:
    with make_socket(fd, family=socket.AF_INET6) as client:
        client.settimeout(0.3)
        try:
            client.connect((address, port))
        except TimeoutError:
            return True
        return False


def test_what_is_in_the_namespace_and_on_the_host(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        before = FORWARD6.read_text()
        await network(it)
        _, fd, endpoint = await into(it)
        _, _, other = await into(it, address6=f"{P}::77")
        assert (endpoint["ip6"], endpoint["prefix6"], endpoint["gateway6"]) == (f"{P}::2", 64, f"{P}::1")
        assert other["ip6"] == f"{P}::77"
        (eth0,) = ip(fd, "addr", "show", "dev", "eth0")
        seen = {one["scope"]: one for one in eth0["addr_info"]}
        assert (seen["global"]["local"], seen["global"]["prefixlen"]) == (f"{P}::2", 64)
        assert not any(one.get("tentative") for one in seen.values())
        assert [(route["gateway"], route["dev"]) for route in ip(fd, "route", "show", "default")] == [(f"{P}::1", "eth0")]
        row = it.networks.find("six")
        assert row["EnableIPv6"] is True
        assert row["IPAM"]["Config"][1] == {"Subnet": f"{P}::/64", "Gateway": f"{P}::1"}
        assert {one["IPv6Address"] for one in row["Containers"].values()} == {f"{P}::2/64", f"{P}::77/64"}
        assert FORWARD6.read_text().strip() == "1"
        assert it.store.rows("networks")[0]["forwarding6_set"] is (before.strip() != "1")
        # a network without IPv6 has none, also in a namespace that was prepared beside this one
        await it.networks.create({"Name": "four"})
        _, plain, none = await into(it, name="four")
        assert "ip6" not in none and ip(plain, "addr", "show", "dev", "eth0") in ([], [{}])
        with pytest.raises(InvalidArgument, match="network four has no IPv6"):
            await into(it, name="four", address6=f"{P}::9")
        with pytest.raises(AlreadyExists, match="already in use"):
            await into(it, address6=f"{P}::2")

    on_bench(body, tmp_path)


def test_containers_reach_each_other_the_gateway_and_the_world(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        await network(it)
        _, a, one = await into(it)
        _, b, two = await into(it)
        with listen(a, 80, "::") as server, the_outside6() as (outside, there, here), listen(outside, 8000, "::") as world:
            assert talk(server, b, one["ip6"], 80) == two["ip6"]
            assert talk(server, -1, one["ip6"], 80) == one["gateway6"]
            assert talk(world, a, there, 8000) == here  # by the host's address
            assert silent(outside, one["ip6"], 80)  # not published

    on_bench(body, tmp_path)


def test_networks_do_not_reach_each_other_and_internal_ones_nobody(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        await network(it)
        await network(it, "two", subnet="")
        await network(it, "inner", subnet="", Internal=True)
        pools = [IPv6Network(it.networks.find(name)["IPAM"]["Config"][1]["Subnet"]) for name in ("two", "inner")]
        assert all(pool.prefixlen == 64 and pool.subnet_of(IPv6Network("fd00::/8")) for pool in pools)
        assert pools[0].supernet(new_prefix=48) == pools[1].supernet(new_prefix=48) and pools[0] != pools[1]
        _, a, one = await into(it)
        _, b, _ = await into(it, name="two")
        _, c, three = await into(it, name="inner")
        _, d, _ = await into(it, name="inner")
        assert three["gateway6"] == ""
        with listen(a, 80, "::"), listen(c, 80, "::") as inner:
            assert silent(b, one["ip6"], 80) and silent(b, three["ip6"], 80)
            talk(inner, d, three["ip6"], 80)
            with make_socket(c, family=socket.AF_INET6) as client, pytest.raises(OSError, match="unreachable"):
                client.connect((one["ip6"], 80))
        with pytest.raises(AlreadyExists, match="Pool overlaps"):
            await network(it, "again", subnet="fd00:db8::/32")

    on_bench(body, tmp_path)


# -- ports --

def _write(path: str, text: str) -> str:
    with open(path) as file:
        old = file.read()
    Path(path).write_text(text)
    return old


@pytest.mark.parametrize("bridge_nf", ["1", "0"])
def test_published_ports_from_everywhere(tmp_path: Path, bridge_nf: str) -> None:
    switch = "/proc/sys/net/bridge/bridge-nf-call-ip6tables"
    if not os.path.exists(switch):
        pytest.skip("the kernel has no br_netfilter")
    old = _write(switch, bridge_nf)

    async def body(it: Bench) -> None:
        await network(it)
        _, a, one = await into(it, PortBinding(80, "tcp", "", 18180))
        _, b, _ = await into(it)
        assert [(port["host_ip"], port["host_port"]) for port in one["ports"]] == [("0.0.0.0", 18180), ("::", 18180)]
        with listen(a, 80, "::") as server, the_outside6() as (outside, there, here):
            gateway = one["gateway6"]
            assert talk(server, -1, here, 18180) == here
            assert talk(server, -1, gateway, 18180) == gateway
            assert talk(server, outside, here, 18180) == there  # the real source
            assert talk(server, b, gateway, 18180)
            assert talk(server, b, here, 18180)
            assert talk(server, a, gateway, 18180)  # hairpin
            assert talk(server, a, here, 18180)
            assert talk(server, -1, "127.0.0.1", 18180) == f"::ffff:{one['gateway']}"
            assert talk(server, -1, "::1", 18180) == gateway  # by the relay
            assert refused(-1, "::1", 18179)

    try:
        on_bench(body, tmp_path)
    finally:
        Path(switch).write_text(old)


def test_ports_at_one_address_ranges_and_conflicts(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        await network(it)
        await it.networks.create({"Name": "four"})
        with the_outside6() as (outside, _, here):
            _, a, one = await into(it, PortBinding(80, "tcp", here, 18181), PortBinding(81, "tcp", "", 0),
                                   PortBinding(82, "udp", "", 18182, 18190))
            ports = [(port["host_ip"], port["host_port"]) for port in one["ports"]]
            assert ports[0] == (here, 18181) and ports[1][1] == ports[2][1] and ports[3:] == [("0.0.0.0", 18182), ("::", 18182)]
            _, b, _ = await into(it, PortBinding(80, "tcp", one["gateway6"], 18181), PortBinding(82, "udp", "", 18182, 18190))
            with listen(a, 80, "::") as server, listen(b, 80, "::") as other:
                talk(server, outside, here, 18181)
                talk(other, -1, one["gateway6"], 18181)
                with make_socket(-1) as client, pytest.raises(ConnectionRefusedError):
                    client.connect(("127.0.0.1", 18181))  # it is at that address alone
            with socket.create_server(("::", 18191), family=socket.AF_INET6), pytest.raises(AlreadyExists, match="18191 failed"):
                await into(it, PortBinding(80, "tcp", "", 18191))
            for name, address, error, text in (
                    ("four", here, FailedPrecondition, "the container has no IPv6 address"),
                    ("six", "fe80::1%lo", InvalidArgument, "link-local"), ("six", "fd00:9::9", FailedPrecondition, "does not have")):
                with pytest.raises(error, match=text):
                    await into(it, PortBinding(80, "tcp", "", 18192), PortBinding(80, "tcp", address, 18193), name=name)
            with pytest.raises(Unimplemented, match="cannot publish UDP at"):
                await into(it, PortBinding(80, "udp", "::1", 18192))
            _, c, _ = await into(it, PortBinding(80, "tcp", "::1", 18192))
            with listen(c, 80, "::") as server:
                talk(server, -1, "::1", 18192)
                assert refused(-1, here, 18192)
            _, _, four = await into(it, PortBinding(80, "tcp", "", 18192), name="four")
            assert [port["host_ip"] for port in four["ports"]] == ["0.0.0.0"]

    on_bench(body, tmp_path)


def test_udp_and_flows_of_a_past_owner(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        await network(it)
        with the_outside6() as (outside, there, here), make_socket(outside, socket.SOCK_DGRAM, family=socket.AF_INET6) as far, \
                make_socket(-1, socket.SOCK_DGRAM, family=socket.AF_INET6) as near:
            for client in (far, near):  # flows that begin before the port is published
                client.sendto(b"early", (here, 18153))
            with listen(-1, 18154, "::") as server:
                talk(server, outside, here, 18154)  # what came before it has arrived
            last = ""
            for _ in range(2):
                container, fd, endpoint = await into(it, PortBinding(53, "udp", "", 18153))
                assert endpoint["ip6"] != last
                last = endpoint["ip6"]
                with make_socket(fd, socket.SOCK_DGRAM, family=socket.AF_INET6) as server:
                    server.bind(("::", 53))
                    assert datagram(server, near, here, 18153) == here
                    assert datagram(server, far, here, 18153) == there
                await it.down(container)

    on_bench(body, tmp_path)


def test_ports_come_and_go_while_it_runs(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        await network(it)
        container, a, first = await into(it)
        first = await it.networks.publish(container, first, (PortBinding(80, "tcp", "", 18194),))
        with listen(a, 80, "::") as server, the_outside6() as (outside, _, here):
            talk(server, outside, here, 18194)
            talk(server, a, here, 18194)
            first = await it.networks.withdraw(container, first, (PortBinding(80, "tcp", "::", 18194),))
            assert refused(outside, here, 18194) and [port["host_ip"] for port in first["ports"]] == ["0.0.0.0"]
            talk(server, -1, "127.0.0.1", 18194)
        it.prepared[container].endpoint = first

    on_bench(body, tmp_path)


# -- several networks, other daemons, addresses used again --

def test_the_default_route_and_ports_go_from_network_to_network(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        await it.networks.create({"Name": "four"})
        await network(it)
        await network(it, "two", subnet="")
        container, fd, first = await into(it, PortBinding(80, "tcp", "", 18195), name="four", others=(Place("six"), Place("two")))
        gateways = {one["network"]: one["gateway6"] for one in first["others"]}

        def default() -> list[str]:
            return [route["gateway"] for route in ip(fd, "route", "show", "default")]

        assert default() == [gateways["six"]] and [port["host_ip"] for port in first["ports"]] == ["0.0.0.0"]
        first = await it.networks.disconnect(container, "six", fd, first)
        assert default() == [gateways["two"]] and first["network"] == "four"
        first = await it.networks.disconnect(container, "four", fd, first)
        assert default() == [gateways["two"]] and first["network"] == "two"
        first = await it.networks.connect(container, Place("six", address6=f"{P}::99"), fd, first)
        assert default() == [gateways["two"]] and first["others"][0]["ip6"] == f"{P}::99"
        first = await it.networks.disconnect(container, "two", fd, first)
        assert default() == [gateways["six"]]
        it.prepared[container].endpoint = first

    on_bench(body, tmp_path)


def test_another_daemon_finds_all_and_leaves_nothing(tmp_path: Path) -> None:
    instance = secrets.token_hex(4)

    async def run() -> None:
        it = Bench(tmp_path, instance)
        await it.networks.start({})
        await network(it)
        container, fd, endpoint = await into(it, PortBinding(80, "tcp", "", 18196))
        name_server = it.networks._dns._child
        while not (tmp_path / "relay.sock").exists():
            await asyncio.sleep(0.01)
        relay = it.networks._bridge._loopback._child
        assert relay is not None
        await it.networks.close()  # with a container that lives, all stays
        it.networks = Networks(instance, it.store, run_dir=str(tmp_path))
        with listen(fd, 80, "::") as server, the_outside6() as (outside, _, here):
            talk(server, outside, here, 18196)
            talk(server, -1, "::1", 18196)  # while no daemon runs
            with socket.create_connection(("::1", 18196)) as before, server.accept()[0] as accepted:
                await it.networks.start({container: endpoint}, lambda _: os.dup(fd))
                talk(server, outside, here, 18196)
                talk(server, -1, "::1", 18196)
                # the last daemon's relay goes on with what it has begun
                before.sendall(b"late")
                assert accepted.recv(9) == b"late"
            relay.wait(SECONDS)
            second = it.networks._bridge._loopback._child
            assert second is not None
            second.kill()
            await asyncio.to_thread(talk, server, -1, "::1", 18196)  # waits for the next one
        row = it.networks.find("six")
        assert row["EnableIPv6"] and row["Containers"][container]["IPv6Address"] == f"{endpoint['ip6']}/64"
        for wrong in ({"address6": endpoint["ip6"]}, {"ports": (PortBinding(80, "tcp", "::", 18196),)}):
            with pytest.raises(AlreadyExists):
                await it.networks.prepare(NetworkRequest("ab" * 32, "six", **wrong))
        await it.down(container)
        await it.networks.close()
        assert name_server is not None
        name_server.wait(SECONDS)  # the earlier daemon, whose child it is, was this process
        assert links(instance) == set()

    with nothing_left(instance):
        asyncio.run(run())


def test_an_address_that_is_used_again_is_announced(tmp_path: Path) -> None:
    """Who has talked to its last owner talks to the new one at once, though that has another MAC address."""
    async def body(it: Bench) -> None:
        await network(it)
        _, b, _ = await into(it)
        for mac in ("02:42:00:00:00:01", "02:42:00:00:00:02"):
            container, fd, _ = await into(it, address6=f"{P}::77", mac=mac)
            with listen(fd, 80, "::") as server:
                talk(server, b, f"{P}::77", 80)
                talk(server, -1, f"{P}::77", 80)
            await it.down(container)
            # the last one's link goes with its namespace, a little later
            eventually(lambda: len([name for name in links(it.instance) if name.startswith("dv")]) == 1)

    on_bench(body, tmp_path)


def test_a_host_that_forwards_keeps_the_routes_that_routers_told_it() -> None:
    fd = new_namespace()
    try:
        with contextlib.closing(inside(fd, Netlink)) as there:
            conf = "/proc/sys/net/ipv6/conf"

            def setting(name: str) -> str:
                return inside(fd, lambda: Path(f"{conf}/{name}").read_text().strip())

            for name in ("told", "other"):
                there.request(netlink.new_veth(name, f"{name}-far", fd, 1500))
                inside(fd, lambda name=name: (Path(f"{conf}/{name}/disable_ipv6").write_text("0"),
                                              Path(f"{conf}/{name}/accept_ra").write_text("1")))
                link = there.link(name=name)
                assert link
                there.request(netlink.set_link(link.index, up=True))
            subprocess.run(["nsenter", f"--net=/proc/self/fd/{fd}", "ip", "-6", "route", "add", "default", "via", "fe80::1", "dev",
                            "told", "proto", "ra"], pass_fds=[fd], check=True)
            assert inside(fd, lambda: ipv6.enable_forwarding(there)) is True
            assert inside(fd, lambda: ipv6.enable_forwarding(there)) is False
            assert (setting("all/forwarding"), setting("told/accept_ra"), setting("other/accept_ra")) == ("1", "2", "1")
            assert [route["gateway"] for route in ip(fd, "route", "show", "default")] == ["fe80::1"]
    finally:
        os.close(fd)


def test_a_foreign_chain_that_drops_ipv6_is_named_with_the_first_network_that_has_it(tmp_path: Path) -> None:
    table = f"dtest{secrets.token_hex(3)}"

    async def body(it: Bench) -> None:
        assert not any(table in warning for warning in it.networks.warnings)
        for name in ("one", "two"):
            await network(it, name, subnet="")
        assert sum(f"ip6 {table} fw " in warning for warning in it.networks.warnings) == 1

    subprocess.run(["nft", f"table ip6 {table} {{ chain fw {{ type filter hook forward priority 5; policy drop; }}; }}"], check=True)
    try:
        on_bench(body, tmp_path)
    finally:
        subprocess.run(["nft", "delete", "table", "ip6", table], check=True)


def test_the_default_network_by_the_daemons_settings(tmp_path: Path) -> None:
    instance = secrets.token_hex(4)

    async def started(default6: str | None, live: dict[str, Any] | None = None) -> Bench:
        bench = Bench(tmp_path, instance)
        bench.networks = Networks(instance, bench.store, run_dir=str(tmp_path), default6=default6)
        await bench.networks.start(live or {})
        return bench

    async def body() -> None:
        it = await started("")
        container, a, one = await it.up()
        _, b, two = await it.up()
        subnet = IPv6Network(it.networks.find("bridge")["IPAM"]["Config"][1]["Subnet"])
        assert subnet.prefixlen == 64 and {IPv6Address(one["ip6"]), IPv6Address(two["ip6"])} <= {subnet[2], subnet[3]}
        with listen(a, 80, "::") as server:
            assert talk(server, b, one["ip6"], 80) == two["ip6"]
        with pytest.raises(AlreadyExists, match="overlaps"):
            await it.networks.create({"Name": "wrong", "EnableIPv6": True, "IPAM": {"Config": [{"Subnet": str(subnet)}]}})
        # as it was, as long as a container has it
        await it.networks.close()
        it = await started(None, {container: one})
        assert it.networks.find("bridge")["IPAM"]["Config"][1]["Subnet"] == str(subnet)
        _, c, three = await it.up()
        with listen(a, 81, "::") as server:
            assert talk(server, c, one["ip6"], 81) == three["ip6"]
        await it.networks.release(container, one)
        await it.down(next(iter(it.prepared)))
        for fd in (a, b):
            os.close(fd)
        await it.networks.close()
        it = await started(None)
        assert it.networks.find("bridge")["EnableIPv6"] is False and len(it.networks.find("bridge")["IPAM"]["Config"]) == 1
        await it.networks.create({"Name": "six", "EnableIPv6": True, "IPAM": {"Config": [{"Subnet": f"{P}::/64"}]}})
        await it.networks.close()
        it = await started(f"{P}::/48")
        with pytest.raises(FailedPrecondition, match=r"overlaps with that of another network"):
            await it.up()
        await it.networks.close()

    with nothing_left(instance):
        asyncio.run(body())
