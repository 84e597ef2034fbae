"""The data path of networks beside docker's: what lies between two containers, or between the host and a published port.

The same programs run in the namespaces of both engines' containers (iperf3, and pairs of sockets): what differs is what the
engines have put between. The other host of an overlay is a network namespace with engines of its own, at the end of a veth
pair; docker's overlays need its swarm mode.
"""

from __future__ import annotations

import json
import random
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from beside import Engine, both, compared, docker
from daemon import base_tar
from spine import Report

from dolium.network.local import enter_network, in_thread

SECONDS = 1  # of one iperf3 run
TRIPS = 3000
PORT = 18300
WIRE = "wire"
LAN = "10.218.0.{}"


class Spot(NamedTuple):
    """Where one engine's ends are: pids of the server's and the client's namespaces, and where the client finds the server."""

    server: int
    client: int
    target: str
    port: int


# -- the data path --

def inside(pid: int, *words: str) -> list[str]:
    """A command in the network namespace of a process."""
    return ["nsenter", "-t", str(pid), "-n", *words]


def throughput(server: int, client: int, target: str, port: int) -> tuple[float, float]:
    """(gigabits a second, CPU-seconds of both ends for each gigabit) of one iperf3 run; ``port`` is the client's."""
    listener = subprocess.Popen(inside(server, "iperf3", "-s", "-1", "--forceflush", "-p", "5201"), stdout=subprocess.PIPE, text=True)
    try:
        assert listener.stdout is not None
        while "listening" not in listener.stdout.readline():
            continue
        done = subprocess.run(inside(client, "iperf3", "-c", target, "-p", str(port), "-t", str(SECONDS), "-J"), check=True,
                              capture_output=True, text=True, timeout=60)
    finally:
        listener.kill()
        listener.wait()
    found = json.loads(done.stdout)["end"]
    rate = found["sum_received"]["bits_per_second"] / 1e9
    used = found["cpu_utilization_percent"]
    return rate, (used["host_total"] + used["remote_total"]) / 100 / rate


def socket_in(pid: int) -> socket.socket:
    """A TCP socket of the namespace of a process."""
    def make() -> socket.socket:
        with open(f"/proc/{pid}/ns/net") as namespace:
            enter_network(namespace.fileno())
        return socket.socket()

    made = in_thread(make)
    made.settimeout(30)
    return made


def round_trip(server: int, client: int, target: str, port: int) -> float:
    """Microseconds of a request of one byte and its answer, the median of TRIPS on one connection."""
    with socket_in(server) as listener, socket_in(client) as caller:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("0.0.0.0", 5201))
        listener.listen()

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while data := peer.recv(1):
                    peer.send(data)

        thread = threading.Thread(target=answer)
        thread.start()
        caller.connect((target, port))
        caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        spent = []
        for _ in range(TRIPS):
            begun = time.perf_counter()
            caller.send(b"x")
            caller.recv(1)
            spent.append((time.perf_counter() - begun) * 1e6)
        caller.shutdown(socket.SHUT_WR)
        thread.join(30)
    return statistics.median(spent)


def connections(server: int, client: int, target: str, port: int, count: int = 2000) -> float:
    """Connections a second: connect, one byte each way, close."""
    with socket_in(server) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("0.0.0.0", 5201))
        listener.listen(128)

        def answer() -> None:
            for _ in range(count):
                peer, _ = listener.accept()
                with peer:
                    peer.send(peer.recv(1))

        def ask() -> float:
            with open(f"/proc/{client}/ns/net") as namespace:
                enter_network(namespace.fileno())
            begun = time.perf_counter()
            for _ in range(count):
                with socket.create_connection((target, port), 30) as caller:
                    caller.send(b"x")
                    caller.recv(1)
            return count / (time.perf_counter() - begun)

        thread = threading.Thread(target=answer)
        thread.start()
        found = in_thread(ask)
        thread.join(30)
        return found


def init(engine: Engine, name: str) -> int:
    """A container's init."""
    return int(docker(engine, "inspect", name, "-f", "{{.State.Pid}}"))


def address(engine: Engine, name: str, network: str) -> str:
    """A container's address in a network."""
    return docker(engine, "inspect", name, "-f", f"{{{{(index .NetworkSettings.Networks \"{network}\").IPAddress}}}}")


def _pair(engine: Engine, network: str, *flags: str, far: Engine | None = None) -> Spot:
    """A server and a client in a network; the client on another host, if there is one."""
    docker(engine, "run", "-d", "--name", f"server-{network}", "--network", network, *flags, "base:1", "sleep", "3600")
    docker(far or engine, "run", "-d", "--name", f"client-{network}", "--network", network, "base:1", "sleep", "3600")
    target = "127.0.0.1" if network == "host" else address(engine, f"server-{network}", network)
    return Spot(init(engine, f"server-{network}"), init(far or engine, f"client-{network}"), target, 5201)


def _wired(one: Engine, other: Engine) -> None:
    """A veth pair between the namespaces of two engines; each end has an address."""
    pids = one.process.pid, other.process.pid
    subprocess.run(inside(pids[0], "ip", "link", "add", WIRE, "type", "veth", "peer", "name", WIRE, "netns", str(pids[1])), check=True)
    for number, pid in enumerate(pids, 1):
        subprocess.run(inside(pid, "ip", "addr", "add", f"{LAN.format(number)}/24", "dev", WIRE), check=True)
        subprocess.run(inside(pid, "ip", "link", "set", WIRE, "up"), check=True)


def _overlay(name: str, one: Engine, other: Engine) -> None:
    """A network ``far`` that both hosts have."""
    if name == "docker":
        docker(one, "swarm", "init", "--advertise-addr", LAN.format(1))
        docker(other, "swarm", "join", "--token", docker(one, "swarm", "join-token", "-q", "worker"), "--advertise-addr",
               LAN.format(2), LAN.format(1))
        docker(one, "network", "create", "-d", "overlay", "--attachable", "--subnet", "10.217.0.0/16", "far")
        return
    for number, engine in enumerate((one, other), 1):
        docker(engine, "network", "create", "-d", "overlay", "--subnet", "10.217.0.0/16", "--ip-range", f"10.217.{number}.0/24",
               "-o", f"peers={LAN.format(3 - number)}", "far")


def paths(report: Report, engines: dict[str, Engine], folder: Path, rounds: int) -> None:
    """All of them, in turn on both engines."""
    (folder / "far").mkdir()
    with both(folder / "far", base_tar()) as others:
        spots: dict[str, dict[str, Spot]] = {}
        for name, engine in engines.items():
            _wired(engine, others[name])
            _overlay(name, engine, others[name])
            docker(engine, "network", "create", "-d", "macvlan", "--subnet", "10.219.0.0/24", "-o", f"parent={WIRE}", "mac")
            lab = _pair(engine, "lab", "-p", f"{PORT}:5201")
            gateway = docker(engine, "network", "inspect", "lab", "-f", "{{(index .IPAM.Config 0).Gateway}}")
            for title, spot in (
                    ("host", _pair(engine, "host")), ("bridge, container to container", lab),
                    ("bridge, host to a published port", Spot(lab.server, engine.process.pid, gateway, PORT)),
                    ("macvlan, container to container", _pair(engine, "mac")),
                    ("overlay, container to container on another host", _pair(engine, "far", far=others[name]))):
                spots.setdefault(title, {})[name] = spot
        for title, by in spots.items():
            compared(report, title, _measured(by, rounds), ("latency", "CPU"))
        for engine in (*others.values(), *engines.values()):  # the networks they are in go afterwards
            docker(engine, "rm", "-f", *docker(engine, "ps", "-aq").split())
        for host in (others["docker"], engines["docker"]):
            docker(host, "swarm", "leave", "--force")


def _measured(by: dict[str, Spot], rounds: int) -> dict[str, dict[str, list[float]]]:
    """All figures of one path, by what they are and engine."""
    measures: dict[str, Callable[[Spot], float]] = {
        "latency, µs": lambda spot: round_trip(*spot), "connections a second": lambda spot: connections(*spot)}
    dice = random.Random(2)
    figures: dict[str, dict[str, list[float]]] = {}
    order = list(by)
    for turn in range(rounds + 1):  # the first one is to warm up
        dice.shuffle(order)
        for name in order:
            rate, spent = throughput(*by[name])
            taken = {"throughput, Gbit/s": rate, "CPU, s for each Gbit": spent,
                     **{key: measure(by[name]) for key, measure in measures.items()}}
            for key, value in taken.items():
                if turn:
                    figures.setdefault(key, {}).setdefault(name, []).append(value)
    return figures
