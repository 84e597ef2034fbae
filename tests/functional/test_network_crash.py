"""A daemon that is killed: whatever it was doing, the next one adopts what lives and removes the rest.

The daemon is this file as a program: it prepares endpoints, sends their records and namespaces to the test, and waits
to be killed; or it goes through a whole life with ``DOLIUM_FAULT`` set.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packets import Bench, datagram, links, listen, make_socket, nothing_left, ping, talk

import dolium
from dolium import faults
from dolium.errors import AlreadyExists, Unimplemented
from dolium.network.base import NetworkRequest, Place, PortBinding

pytestmark = [pytest.mark.crash, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
POINTS = sorted(point for point in faults.POINTS if point.split(".")[0] in ("network", "dns"))
PORTS = (PortBinding(80, "tcp", "", 18090), PortBinding(53, "udp", "127.0.0.1", 18090))


async def _until_killed(bench: Bench, channel: socket.socket) -> None:
    await bench.networks.start({})
    for ports in (PORTS, (), (PortBinding(80, "tcp", "", 18091),)):
        container, fd, endpoint = await bench.up(*ports)
        socket.send_fds(channel, [json.dumps([container, endpoint]).encode()], [fd])
    channel.recv(1)


# Where the virtual machine is needed, which is slow, no more is done than leads there.
SHORT = {"network.parent.made": "alone", "network.tunnel.made": "secret"}


async def _a_life(bench: Bench, kind: str = "") -> None:
    await bench.networks.start({})
    if kind:
        await _other_kinds(bench, kind)
        await bench.networks.close()
        return
    container, _, _ = await bench.up(*PORTS)
    again = bench.prepared[container]
    await bench.down(container)
    await bench.up(*PORTS, container=container)
    await bench.down(container)
    assert again.endpoint
    for name in ("one", "two"):
        await bench.networks.create({"Name": name, "EnableIPv6": os.path.isdir("/proc/sys/net/ipv6")})
    request = NetworkRequest(container, "one", PORTS, names=("box",), others=(Place("two", names=("box",)),))
    prepared = await bench.networks.prepare(request)
    first = await bench.networks.disconnect(container, "one", prepared.fd, prepared.endpoint)
    first = await bench.networks.connect(container, Place("one", names=("box",)), prepared.fd, first)
    os.close(prepared.fd)
    await bench.networks.release(container, first)
    for name in ("one", "two"):
        await bench.networks.remove(name)
    await _other_kinds(bench)
    await bench.networks.close()


async def _other_kinds(bench: Bench, kind: str = "") -> None:
    config = bench.folder / "net.conflist"
    config.write_text(json.dumps({"cniVersion": "1.0.0", "name": f"dolium-{bench.instance}", "plugins": [
        {"type": "ptp", "ipam": {"type": "host-local", "dataDir": str(bench.folder / "leases"),
                                 "ranges": [[{"subnet": "10.219.2.0/24"}]]}}]}))
    key = bench.folder / "key"
    key.write_text("of this test alone, and long enough\n")
    key.chmod(0o600)
    wishes: list[dict[str, Any]] = [
        {"Name": "alone", "Driver": "macvlan", "Internal": True},
        {"Name": "lan", "Driver": "macvlan", "Options": {"parent": f"dol{bench.instance}"}},
        {"Name": "far", "Driver": "overlay", "Options": {"vni": str(int(bench.instance[:5], 16) + 1)},
         "IPAM": {"Config": [{"Subnet": "10.219.0.0/23", "IPRange": "10.219.1.0/24"}]}},
        {"Name": "secret", "Driver": "overlay",
         "Options": {"vni": str(int(bench.instance[:5], 16) + 2), "encrypted": "", "key_file": str(key), "local": "127.0.0.1"},
         "IPAM": {"Config": [{"Subnet": "10.219.4.0/23", "IPRange": "10.219.5.0/24"}]}},
        {"Name": "plugins", "Driver": "cni", "Options": {"config": str(config)}}]
    for wish in wishes:
        if kind not in ("", wish["Name"]):
            continue
        try:
            await bench.networks.create(wish)
        except Unimplemented:
            continue  # a kernel without dummy links, or WireGuard
        prepared = await bench.networks.prepare(NetworkRequest("ab" * 32, wish["Name"], names=("box",)))
        os.close(prepared.fd)
        await bench.networks.release("ab" * 32, prepared.endpoint)
        await bench.networks.remove(wish["Name"])


def _daemon(folder: Path, instance: str, *more: str, fault: str = "", **kwargs: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(dolium.__file__).parents[1]), "DOLIUM_FAULT": fault}
    return subprocess.Popen([sys.executable, __file__, str(folder), instance, *more], env=environment, **kwargs)


def _kill_one(folder: Path, instance: str) -> list[tuple[str, dict[str, Any], int]]:
    """Containers of a daemon that is dead: id, endpoint, and the namespace that a process of it would hold."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(30)
    made = []
    with ours, theirs:
        process = _daemon(folder, instance, str(theirs.fileno()), pass_fds=[theirs.fileno()])
        try:
            for _ in range(3):
                data, fds, _, _ = socket.recv_fds(ours, 65536, 1)
                container, endpoint = json.loads(data)
                made.append((container, endpoint, fds[0]))
        finally:
            process.kill()
            process.wait()
    return made


def test_what_lives_is_adopted_and_the_rest_removed(tmp_path: Path) -> None:
    instance = secrets.token_hex(4)
    with nothing_left(instance):
        made = _kill_one(tmp_path, instance)
        (one, first, a), (two, second, b), (three, third, _) = made

        async def next_daemon() -> None:
            it = Bench(tmp_path, instance)
            with listen(a, 80) as server, make_socket(-1) as old:
                # no daemon runs, the network does
                old.connect(("127.0.0.1", 18090))
                connection, _ = server.accept()
                talk(server, -1, "127.0.0.1", 18090)
                talk(server, b, first["ip"], 80)
                await it.networks.start({one: first, two: second, "0" * 64: {"network": "host"}})
                assert {name for name in links(instance) if name.startswith("dv")} == {f"dv{one[:10]}", f"dv{two[:10]}"}
                talk(server, -1, "127.0.0.1", 18090)
                talk(server, b, first["ip"], 80)
                talk(server, b, first["gateway"], 18090)
                with connection:
                    old.sendall(b"still here")
                    assert connection.recv(100) == b"still here"
            with make_socket(a, socket.SOCK_DGRAM) as server, make_socket(-1, socket.SOCK_DGRAM) as client:
                server.bind(("0.0.0.0", 53))
                datagram(server, client, "127.0.0.1", 18090)
            with pytest.raises(AlreadyExists, match="port is already allocated"):
                await it.up(PortBinding(80, "tcp", "", 18090))
            with pytest.raises(AlreadyExists):
                await it.up(address=second["ip"])
            # what the third had is free
            _, d, fourth = await it.up(PortBinding(80, "tcp", "", 18091), address=third["ip"])
            assert fourth["gateway"] == first["gateway"]
            with listen(d, 80) as server:
                talk(server, -1, "127.0.0.1", 18091)
                talk(server, a, fourth["ip"], 80)
            await it.networks.release(three, third)  # its end is noticed late: another has its address now
            ping(-1, fourth["ip"])
            for container in list(it.prepared):
                await it.down(container)
            for container, endpoint, fd in made:
                os.close(fd)
                await it.networks.release(container, endpoint)
            await it.networks.close()
            assert links(instance) == set()

        asyncio.run(next_daemon())


def test_a_daemon_that_ends_leaves_live_containers_their_network(tmp_path: Path) -> None:
    instance = secrets.token_hex(4)
    with nothing_left(instance):
        made = _kill_one(tmp_path, instance)
        live = {container: endpoint for container, endpoint, _ in made}

        async def lives() -> None:
            for _ in range(2):
                it = Bench(tmp_path, instance)
                await it.networks.start(live)
                await it.networks.close()
                assert not [name for name in links(instance) if name.startswith("dp")]
                with listen(made[0][2], 80) as server:
                    talk(server, -1, "127.0.0.1", 18090)
                    talk(server, made[1][2], made[0][1]["ip"], 80)
            for _, _, fd in made:
                os.close(fd)
            it = Bench(tmp_path, instance)
            await it.networks.start({})
            await it.networks.close()

        asyncio.run(lives())


def test_a_live_container_s_port_that_a_program_took_meanwhile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    instance = secrets.token_hex(4)
    with nothing_left(instance):
        made = _kill_one(tmp_path, instance)

        async def next_daemon() -> None:
            it = Bench(tmp_path, instance)
            with socket.create_server(("127.0.0.1", 18091)):
                await it.networks.start({container: endpoint for container, endpoint, _ in made})
            assert "was bound by another program" in caplog.text
            # the program ended, the container has the port still
            with pytest.raises(AlreadyExists):
                await it.up(PortBinding(80, "tcp", "", 18091))
            for container, endpoint, fd in made:
                os.close(fd)
                await it.networks.release(container, endpoint)
            await it.up(PortBinding(80, "tcp", "", 18091))
            for container in list(it.prepared):
                await it.down(container)
            await it.networks.close()

        asyncio.run(next_daemon())


def test_the_points_are_all_known() -> None:
    assert len(POINTS) >= 11


@pytest.mark.parametrize("point", POINTS)
def test_killed_at(point: str, tmp_path: Path) -> None:
    if point == "network.parent.made" and not _has("dummy"):
        pytest.skip("this kernel has no dummy links, and no VLANs")
    if point == "network.tunnel.made" and not _has("wireguard"):
        pytest.skip("this kernel has no WireGuard")
    instance = secrets.token_hex(4)
    with nothing_left(instance):
        process = _daemon(tmp_path, instance, fault=point)
        assert process.wait(timeout=30) == -signal.SIGKILL, f"no life passes {point}"

        async def next_daemon() -> None:
            it = Bench(tmp_path, instance)
            await it.networks.start({})
            container, fd, _ = await it.up(*PORTS)
            with listen(fd, 80) as server:
                talk(server, -1, "127.0.0.1", 18090)
            await it.down(container)
            for network in it.networks.describe():  # made whole, or not at all
                if network["Name"] not in ("bridge", "host", "none"):
                    inner = await it.networks.prepare(NetworkRequest(container, network["Name"], names=("box",)))
                    os.close(inner.fd)
                    await it.networks.release(container, inner.endpoint)
                    await it.networks.remove(network["Name"])
            await it.networks.close()
            assert links(instance) == set()
            leases = tmp_path / "leases" / f"dolium-{instance}"
            assert not leases.exists() or not [one for one in os.listdir(leases) if one[0].isdigit() and ".219.2." in one]

        asyncio.run(next_daemon())


def _has(kind: str) -> bool:
    done = subprocess.run(["ip", "link", "add", "dtprobe", "type", kind], capture_output=True, check=False)
    subprocess.run(["ip", "link", "del", "dtprobe"], capture_output=True, check=False)
    return done.returncode == 0


if __name__ == "__main__":
    it = Bench(Path(sys.argv[1]), sys.argv[2])
    if len(sys.argv) > 3:
        asyncio.run(_until_killed(it, socket.socket(fileno=int(sys.argv[3]))))
    else:
        asyncio.run(_a_life(it, SHORT.get(os.environ.get("DOLIUM_FAULT", ""), "")))
