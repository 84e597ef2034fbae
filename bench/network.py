"""Networks beside docker's: how long people wait for them, and what the data path costs. Written to docs/benchmarks-network.md.

Everything is done by the same docker command line, on doliumd and on dockerd in turn, each round in another order, and by
dolium's own command line. The data path is measured from namespace to namespace by the same programs (iperf3, and a request-response pair of sockets): what
differs is what the engines have put between. dockerd is in a network namespace of its own, with the firewall it makes itself;
so is doliumd, for both to have the same neighbours.
"""

from __future__ import annotations

import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from beside import DOLIUM_CLI, Engine, Env, both, compared, docker, page, waited
from daemon import DOLIUM, base_tar
from spine import DOCKER, Report, interleaved, timed

from dolium.network.local import enter_network, in_thread

N = int(os.environ.get("BENCH_N", "15"))
SECONDS = 2  # of one iperf3 run
TRIPS = 3000
PORT = 18300
BRIDGE_BUDGET = 3.0


def init(engine: Engine, name: str) -> int:
    """A container's init."""
    return int(docker(engine, "inspect", name, "-f", "{{.State.Pid}}"))


def address(engine: Engine, name: str, network: str) -> str:
    """A container's address in a network."""
    return docker(engine, "inspect", name, "-f", f"{{{{(index .NetworkSettings.Networks \"{network}\").IPAddress}}}}")


# -- what people wait for --

def waits(program: str, env: Env) -> dict[str, Callable[[], float]]:
    """Whole processes, milliseconds; each leaves things as they were."""

    def create_remove(which: str) -> float:
        made = timed([program, "network", "create", "brief"], env)
        gone = timed([program, "network", "rm", "brief"], env)
        return made if which == "create" else gone

    def connect(which: str) -> float:
        came = timed([program, "network", "connect", "other", "still"], env)
        left = timed([program, "network", "disconnect", "other", "still"], env)
        return came if which == "connect" else left

    def publish() -> float:
        return timed([program, "run", "--rm", "--network", "lab", "-p", f"{PORT + 1}:80", "base:1", "true"], env)

    return {
        "network create": lambda: create_remove("create"), "network rm": lambda: create_remove("rm"),
        "network connect": lambda: connect("connect"), "network disconnect": lambda: connect("disconnect"),
        "run --rm --network none": lambda: timed([program, "run", "--rm", "--network", "none", "base:1", "true"], env),
        "run --rm, default bridge": lambda: timed([program, "run", "--rm", "base:1", "true"], env),
        "run --rm, a network with names": lambda: timed([program, "run", "--rm", "--network", "lab", "base:1", "true"], env),
        "run --rm, with names and a published port": publish}


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


def paths(report: Report, engines: dict[str, Engine]) -> None:
    """Container to container in one network, and from outside by a published port."""
    spots: dict[str, dict[str, tuple[int, int, str, int]]] = {}
    for name, engine in engines.items():
        docker(engine, "run", "-d", "--name", "server", "--network", "lab", "-p", f"{PORT}:5201", "base:1", "sleep", "3600")
        docker(engine, "run", "-d", "--name", "client", "--network", "lab", "base:1", "sleep", "3600")
        server, client = init(engine, "server"), init(engine, "client")
        gateway = docker(engine, "network", "inspect", "lab", "-f", "{{(index .IPAM.Config 0).Gateway}}")
        outside = next(int(pid) for pid in subprocess.run(["pgrep", "-P", str(engine.process.pid)], capture_output=True, text=True,
                                                          check=False).stdout.split() or [str(engine.process.pid)])
        spots.setdefault("container to container, one network", {})[name] = (server, client, address(engine, "server", "lab"), 5201)
        spots.setdefault("host to a published port", {})[name] = (server, outside, gateway, PORT)
    measures: dict[str, Callable[[tuple[int, int, str, int]], float]] = {
        "latency, µs": lambda spot: round_trip(*spot), "connections a second": lambda spot: connections(*spot)}
    dice = random.Random(2)
    for title, by in spots.items():
        figures: dict[str, dict[str, list[float]]] = {}
        order = list(by)
        for turn in range(N + 1):
            dice.shuffle(order)
            for name in order:
                rate, spent = throughput(*by[name])
                taken = {"throughput, Gbit/s": rate, "CPU, s for each Gbit": spent,
                         **{key: measure(by[name]) for key, measure in measures.items()}}
                for key, value in taken.items():
                    if turn:
                        figures.setdefault(key, {}).setdefault(name, []).append(value)
        compared(report, title, figures, ("latency", "CPU"))


def measure(report: Report, folder: Path) -> None:
    """Both engines, all figures."""
    with both(folder, base_tar()) as engines:
        for engine in engines.values():
            for network in ("lab", "other"):
                docker(engine, "network", "create", network)
            docker(engine, "run", "-d", "--name", "still", "--network", "lab", "base:1", "sleep", "3600")
        jobs = {DOLIUM_CLI: waits(DOLIUM, engines["dolium"].env), "dolium": waits(DOCKER, engines["dolium"].env),
                "docker": waits(DOCKER, engines["docker"].env)}
        shown = {}
        for what in jobs["dolium"]:
            figures = interleaved({name: jobs[name][what] for name in jobs}, N)
            waited(report, what, figures, setup=what.startswith("network"))
            shown[what] = figures["dolium"].median
        extra = shown["run --rm, default bridge"] - shown["run --rm --network none"]
        report.say(f"\n- a bridge adds {extra:.1f} ms to a start on dolium, budget {BRIDGE_BUDGET:.0f} ms: "
                   f"**{'met' if extra <= BRIDGE_BUDGET else 'missed'}**")
        more = shown["run --rm, a network with names"] - shown["run --rm --network none"]
        report.say(f"- a network with names adds {more:.1f} ms, budget {BRIDGE_BUDGET:.0f} ms: "
                   f"**{'met' if more <= BRIDGE_BUDGET else 'missed'}**")
        paths(report, engines)


def main() -> int:
    """Run all; write docs/benchmarks-network.md."""
    return page("network", "Benchmarks of networks", measure)


if __name__ == "__main__":
    sys.exit(main())
