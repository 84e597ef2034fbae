"""The spine's figures: whole `run --rm`, `exec`, the one native request, starts per second, memory per container; then the
runtime's alone (runtime.py).

Every figure is taken from whole processes, the engines in turn, each round in another order (what the one before leaves to be
done, a network to be prepared again, a cgroup to go, is not always the same one's burden), after a warm-up; n, median, minimum,
maximum.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "functional"))
from daemon import DOLIUM, WARM, Daemon, base_tar, eventually  # noqa: E402
from hierarchies import hugetlb  # noqa: E402

DOCKER = "/usr/local/bin/docker" if os.path.exists("/usr/local/bin/docker") else "docker"
N = int(os.environ.get("BENCH_N", "15"))
LIMIT = 120.0


@dataclass
class Figure:
    """Milliseconds (or what the table says) of one engine."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.1f} ({min(self.values):.1f} to {max(self.values):.1f}, n={len(self.values)})"


def timed(command: list[str], env: dict[str, str]) -> float:
    """Wall time of a whole process, milliseconds. Raises when it fails: a failure is no figure."""
    with tempfile.TemporaryFile() as errors:  # not a pipe: what a created init keeps open would be waited for
        begun = time.perf_counter()
        done = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=env)
        end = os.pidfd_open(done.pid)  # wait() with a time limit looks every now and then only
        ended = select.select([end], [], [], LIMIT)[0]
        spent = (time.perf_counter() - begun) * 1000
        os.close(end)
        if not ended:
            done.kill()
        if done.wait():
            errors.seek(0)
            raise RuntimeError(f"{command}: {done.returncode}: {errors.read().decode(errors='replace')[-400:]}")
    return spent


def interleaved(jobs: dict[str, Callable[[], float]], n: int = N) -> dict[str, Figure]:
    """Each job n times, every round in another order, after one that does not count. One that cannot run is named and
    left out."""
    figures: dict[str, Figure] = {}
    for name, job in jobs.items():
        try:
            job()
            figures[name] = Figure([])
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            print(f"  {name} is left out: {error}")
    order, dice = list(figures), random.Random(1)
    for _ in range(n):
        dice.shuffle(order)
        for name in order:
            figures[name].values.append(jobs[name]())
    return figures


class Dockerd:
    """Debian's dockerd with its own folders, in its own network namespace; or in the host's, without networks."""

    def __init__(self, folder: Path, *, private_network: bool = True) -> None:
        self.folder = folder
        self.env = {**os.environ, "DOCKER_HOST": f"unix://{folder}/docker.sock", "DOCKER_CONFIG": str(folder / "config")}
        inside = ["unshare", "-n", "sh", "-c", "ip link set lo up; exec dockerd \"$@\"", "dockerd"]
        outside = ["dockerd", "--iptables=false", "--ip-forward=false", "--bridge=none"]
        self.process = subprocess.Popen(
            [*(inside if private_network else outside), "--data-root", str(folder / "data"), "--exec-root",
             str(folder / "exec"), "--pidfile", str(folder / "pid"), "-H", f"unix://{folder}/docker.sock"],
            stdout=open(folder / "log", "wb"), stderr=subprocess.STDOUT, start_new_session=True)

    def wait(self) -> None:
        """Until it answers. Raises RuntimeError."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            if subprocess.run([DOCKER, "version"], env=self.env, capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.2)
        raise RuntimeError(f"dockerd does not answer: {(self.folder / 'log').read_text(errors='replace')[-600:]}")

    def close(self) -> None:
        """End it and what it started."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def native_request(path: str) -> Callable[[], float]:
    """The one request of `dolium run --rm base:1 true`, straight to the socket, to the exit frame."""
    body = json.dumps({"container": {"Image": "base:1", "Cmd": ["true"], "HostConfig": {"AutoRemove": True}}}).encode()
    head = (f"POST /dolium/run HTTP/1.1\r\nHost: d\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: {len(body)}\r\n"
            "\r\n").encode()

    def run() -> float:
        begun = time.perf_counter()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(LIMIT)
            sock.connect(path)
            sock.sendall(head + body)
            data = b""
            while chunk := sock.recv(65536):
                data += chunk
        if b"\x04\x00\x00\x00\x00\x00\x00\x010" not in data:
            raise RuntimeError(f"no exit frame: {data[-200:]!r}")
        return (time.perf_counter() - begun) * 1000

    return run


def rate(command: list[str] | Callable[[], list[str]], env: dict[str, str], callers: int, seconds: float) -> float:
    """Runs a second with several callers; a command may be made anew for each."""
    counts = [0] * callers
    end = time.monotonic() + seconds

    def call(number: int) -> None:
        while time.monotonic() < end:
            timed(command() if callable(command) else command, env)
            counts[number] += 1

    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - begun)


def pss(names: re.Pattern[str]) -> int:
    """Kilobytes of all processes whose command line matches."""
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                line = file.read().replace(b"\0", b" ").decode(errors="replace")
            if names.search(line):
                with open(f"/proc/{pid}/smaps_rollup") as file:
                    total += int(next(text for text in file if text.startswith("Pss:")).split()[1])
        except (OSError, StopIteration):
            continue
    return total


def memory_slope(start: Callable[[int], None], remove: Callable[[], None], names: re.Pattern[str], count: int) -> float:
    """PSS of all the engine's processes per idle container, kilobytes: the slope from 1 to count."""
    start(0)
    time.sleep(2)  # shims give their start-up memory back after a quiet second
    first = pss(names)
    for number in range(1, count):
        start(number)
    time.sleep(2)
    last = pss(names)
    remove()
    return (last - first) / (count - 1)


class Report:
    """Lines for the page and for the terminal."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)

    def table(self, title: str, figures: dict[str, Figure]) -> None:
        self.say(f"\n## {title}\n")
        self.say("| what | median (min to max, n) |")
        self.say("|---|---|")
        for name, figure in figures.items():
            self.say(f"| {name} | {figure} |")
        self.say("")

    def budget(self, figures: dict[str, Figure], ours: str, theirs: str, limit: float, text: str) -> None:
        if ours not in figures or theirs not in figures:
            self.say(f"- {text}: not measured")
            return
        ratio = figures[ours].median / figures[theirs].median
        self.say(f"- {text}: {ratio:.3f}, budget {limit:.3f}: **{'met' if ratio <= limit else 'missed'}**")


def no_words(text: str | None) -> None:
    """A bench takes none: it would run for minutes where somebody asked for help. Ends the program then."""
    argparse.ArgumentParser(description=text, epilog="BENCH_N in the environment: how many rounds.",
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()


def main() -> int:
    """Run all; write docs/benchmarks.md."""
    no_words(__doc__)
    report = Report()
    folder = Path(tempfile.mkdtemp(prefix="dolium-bench-"))
    ours = Daemon(folder / "dolium")
    ours.folder.mkdir()
    docker_folder = folder / "docker"
    docker_folder.mkdir()
    forward = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    report.say("# Benchmarks\n")
    report.say("Written by `make bench`; whole processes, milliseconds, engines in turn in one run. "
               f"Linux {os.uname().release}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the start, "
               f"{time.strftime('%Y-%m-%d')}.")
    (folder / "base.tar").write_bytes(base_tar())
    podman = ["podman", "--root", str(folder / "podman"), "--runroot", str(folder / "podman-run"), "--cgroup-manager",
              "cgroupfs"]
    limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
    env = {**os.environ, "DOLIUM_WARM": WARM}
    dockerd = Dockerd(docker_folder)
    try:
        with hugetlb():
            ours.start()
            subprocess.run([DOLIUM, "--help"], env=ours.env, check=True, capture_output=True)
            eventually(lambda: os.listdir(WARM), "the warm compiler listens")
            ours.import_base()
            with contextlib.suppress(RuntimeError, subprocess.SubprocessError):
                dockerd.wait()
                subprocess.run([DOCKER, "import", str(folder / "base.tar"), "base:1"], env=dockerd.env, check=True,
                               capture_output=True)
            subprocess.run([*podman, "import", str(folder / "base.tar"), "base:1"], check=False, capture_output=True)
            measure(report, ours, dockerd, podman, limits, env, folder)
            import runtime

            runtime.measure(report, env, {**ours.env, "DOLIUM_WARM": "off"}, folder)
    finally:
        ours.close()
        shutil.rmtree(WARM, ignore_errors=True)  # the warm compiler ends with its socket
        dockerd.close()
        subprocess.run([*podman, "rm", "-fa"], check=False, capture_output=True)
        subprocess.run(["umount", "-l", str(folder / "podman" / "overlay")], check=False, capture_output=True)
        Path("/proc/sys/net/ipv4/ip_forward").write_text(forward)
        shutil.rmtree(folder, ignore_errors=True)
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(report.lines) + "\n")
    return 0


def measure(report: Report, ours: Daemon, dockerd: Dockerd, podman: list[str], limits: list[str], env: dict[str, str],
            folder: Path) -> None:
    """All figures."""
    cold = {**ours.env, "DOLIUM_WARM": "off"}
    runs = interleaved({
        "dolium run --rm": lambda: timed([DOLIUM, "run", "--rm", "base:1", "true"], ours.env),
        "dolium run --rm, cold": lambda: timed([DOLIUM, "run", "--rm", "base:1", "true"], cold),
        "the one native request": native_request(ours.socket),
        "docker command line on doliumd": lambda: timed([DOCKER, "run", "--rm", "base:1", "true"], ours.env),
        "docker run --rm": lambda: timed([DOCKER, "run", "--rm", "base:1", "true"], dockerd.env),
        "podman run --rm": lambda: timed([*podman, "run", "--rm", "--network", "none", *limits, "base:1", "true"], env),
    })
    report.table("`run --rm IMAGE true`, whole (default network; podman: none)", runs)
    report.budget(runs, "dolium run --rm, cold", "docker run --rm", 1 / 5, "dolium run, cold, against docker run")
    report.budget(runs, "the one native request", "docker run --rm", 1 / 25, "the native request against docker run")
    report.budget(runs, "dolium run --rm", "docker run --rm", 1 / 30, "dolium run against docker run")

    subprocess.run([DOLIUM, "run", "-d", "--name", "box", "base:1", "sleep", "3600"], env=ours.env, check=True,
                   capture_output=True)
    for command, where in (([DOCKER], dockerd.env), (podman, env)):
        more = [] if command == [DOCKER] else ["--network", "none", *limits]
        subprocess.run([*command, "run", "-d", "--name", "box", *more, "base:1", "sleep", "3600"], env=where, check=False,
                       capture_output=True)
    execs = interleaved({
        "dolium exec": lambda: timed([DOLIUM, "exec", "box", "true"], ours.env),
        "dolium exec, cold": lambda: timed([DOLIUM, "exec", "box", "true"], cold),
        "docker exec": lambda: timed([DOCKER, "exec", "box", "true"], dockerd.env),
        "podman exec": lambda: timed([*podman, "exec", "box", "true"], env),
    })
    report.table("`exec`, whole", execs)
    report.budget(execs, "dolium exec", "docker exec", 1 / 12, "dolium exec against docker exec")
    for command, where in (([DOLIUM], ours.env), ([DOCKER], dockerd.env), (podman, env)):
        subprocess.run([*command, "rm", "-f", "box"], env=where, check=False, capture_output=True)

    rates: dict[str, Figure] = {}
    for name, command, where in (("dolium", [DOLIUM], ours.env), ("docker", [DOCKER], dockerd.env)):
        with contextlib.suppress(RuntimeError):
            rates[name] = Figure([rate([*command, "run", "--rm", "base:1", "true"], where, 4, 6.0) for _ in range(3)])
    report.table("starts per second, 4 callers (whole `run --rm`)", rates)
    if len(rates) == 2:
        ratio = rates["dolium"].median / rates["docker"].median
        report.say(f"- dolium against docker: {ratio:.1f} x, budget of the design 40 x: **{'met' if ratio >= 40 else 'missed'}**")

    def starter(command: list[str], where: dict[str, str]) -> Callable[[int], None]:
        return lambda number: subprocess.run([*command, "run", "-d", "--name", f"m{number}", "base:1", "sleep", "3600"],
                                             env=where, check=True, capture_output=True) and None

    def remover(command: list[str], where: dict[str, str], count: int) -> Callable[[], None]:
        return lambda: subprocess.run([*command, "rm", "-f", *(f"m{number}" for number in range(count))], env=where,
                                      check=True, capture_output=True) and None

    idle = {"doliumd, warm compiler, spawner": Figure([pss(re.compile(
        rf"dolium-shim --spawner|dolium\.daemon.*{re.escape(str(folder))}|dolium\.warm.*{re.escape(WARM)}"))]),
        "dockerd, containerd": Figure([pss(re.compile(rf"(dockerd|containerd) .*{re.escape(str(folder))}"))])}
    report.table("PSS of the idle engine, kilobytes", idle)
    report.budget(idle, "doliumd, warm compiler, spawner", "dockerd, containerd", 1 / 3, "dolium against docker")
    slopes: dict[str, Figure] = {}
    for name, command, where, pattern in (
            ("dolium", [DOLIUM], ours.env, rf"dolium-shim|dolium\.daemon.*{re.escape(str(folder))}"),
            ("docker", [DOCKER], dockerd.env, r"dockerd|containerd|docker-proxy")):
        with contextlib.suppress(subprocess.SubprocessError):
            slopes[name] = Figure([memory_slope(starter(command, where), remover(command, where, 8), re.compile(pattern), 8)])
    report.table("PSS per idle container, kilobytes: slope of all the engine's processes over 8 containers", slopes)
    report.budget(slopes, "dolium", "docker", 1 / 50, "dolium against docker")


if __name__ == "__main__":
    sys.exit(main())
