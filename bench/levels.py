"""What each level of isolation costs: dolium's own runtime, runc, crun and runsc (gVisor) under dolium, beside docker with runc, and
beside runsc alone: starts, memory, system calls, programs started, files, network, and two applications.

What happens inside a container is timed inside, by its own clock (/proc/uptime, hundredths of a second), so that neither the client nor
the start counts; each piece of work takes about a second on the process level.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "functional"), str(ROOT / "src")]
from daemon import DOLIUM, WARM, Daemon  # noqa: E402
from hierarchies import hugetlb  # noqa: E402
from spine import DOCKER, Dockerd, Figure, Report, interleaved, no_words, timed  # noqa: E402
from test_levels_programs import root_tar  # noqa: E402

N = int(os.environ.get("BENCH_N", "7"))
LEVELS = {"process (dolium)": "dolium", "process (runc)": "runc", "process (crun)": "crun", "gvisor (runsc)": "runsc"}
PEER, ALONE = "docker with runc", "runsc alone, no network"
BIG = 512 << 20
WORK = {
    "200,000 reads and 200,000 writes of one byte": "dd if=/dev/zero of=/dev/null bs=1 count=200000 2> /dev/null",
    "400 programs started (fork, exec, wait)": "i=0; while [ $i -lt 400 ]; do /bin/true; i=$((i+1)); done",
    "2,000 small files made, listed, read, removed": "mkdir /w; cd /w; i=0; while [ $i -lt 2000 ]; do echo $i > $i; i=$((i+1)); done; "
                                                     "ls -l | wc -l; cat * | wc -c; cd /; rm -r /w",
    "150 MB hashed (compute)": "dd if=/dev/zero bs=1M count=150 2> /dev/null | md5sum",
}
APPLICATIONS = {
    "python3 imports 60 modules, five times": "for i in 1 2 3 4 5; do python3 -c 'import asyncio, http.server, email.mime.text, xml.dom.minidom, "
                                              "sqlite3, unittest, multiprocessing, ctypes, decimal, urllib.request, logging.handlers, tarfile'; done",
    "git: 300 files added, committed, cloned, checked": "rm -rf /g /h; git init -q /g; cd /g; for i in $(seq 300); do echo $i > $i; done; git add .; "
                                                        "git -c user.name=n -c user.email=e commit -qm m; git clone -q /g /h; cd /h; git fsck; cd /",
    "a C program of 800 functions compiled": "(for i in $(seq 800); do echo \"int f$i(int x) { return x * $i + f$((i-1))(x); }\"; done | "
                                             "sed '1i int f0(int x) { return x; }' > /a.c); gcc -O1 -c /a.c -o /a.o",
}


class Where:
    """A container of one level that stays, for work in it."""

    def __init__(self, runtime: str, env: dict[str, str], image: str, name: str, command: str = "exec sleep 100000") -> None:
        self.env, self.name = env, name
        chosen = ["--runtime", runtime] if runtime else []
        self.id = subprocess.run([DOCKER, "run", "-d", "--name", name, *chosen, image, "sh", "-c", command], env=env, check=True,
                                 capture_output=True, text=True).stdout.strip()

    def spent(self, script: str) -> float:
        """Milliseconds of a script by the container's own clock."""
        clock = "cut -d ' ' -f 1 /proc/uptime"
        done = subprocess.run([DOCKER, "exec", self.name, "sh", "-c", f"a=$({clock}); ({script}) > /dev/null 2>&1; c=$?; echo $a $({clock}) $c"],
                              env=self.env, capture_output=True, text=True, timeout=300, check=False)
        words = done.stdout.split()
        if len(words) != 3 or words[2] != "0":
            raise RuntimeError(f"{self.name}: {script[:60]}: {done.stdout[-200:]} {done.stderr[-300:]}")
        return (float(words[1]) - float(words[0])) * 1000

    def inspect(self, template: str) -> str:
        """docker inspect -f."""
        return subprocess.run([DOCKER, "inspect", "-f", template, self.name], env=self.env, check=True, capture_output=True,
                              text=True).stdout.strip()

    def memory(self) -> float:
        """Kilobytes of PSS of all processes that are there for it: its own, the sandbox's, the shim."""
        init = int(self.inspect("{{.State.Pid}}"))
        total = 0
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                groups = Path(f"/proc/{pid}/cgroup").read_text()
                if self.id in words or self.id in groups or int(pid) == _parent(init):
                    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                    total += int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1])
            except (OSError, StopIteration):
                continue
        return float(total)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class _Big(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(BIG))
        self.end_headers()
        block = bytes(1 << 20)
        with contextlib.suppress(ConnectionError):
            for _ in range(BIG >> 20):
                self.wfile.write(block)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def serving() -> Iterator[int]:
    """The port of a server on all addresses that sends BIG bytes."""
    server = ThreadingHTTPServer(("0.0.0.0", 0), _Big)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def round_trip(address: str) -> float:
    """Microseconds of a small request of HTTP, answered and closed, the median of 200."""
    spent = []
    for _ in range(200):
        begun = time.perf_counter()
        with socket.create_connection((address, 80), 30) as sock:
            sock.sendall(b"GET /index.html HTTP/1.0\r\n\r\n")
            while sock.recv(4096):
                continue
        spent.append((time.perf_counter() - begun) * 1e6)
    return statistics.median(spent)


def beside_process(report: Report, figures: dict[str, Figure]) -> None:
    """Each one's ratio to the first."""
    first = next(iter(LEVELS))
    if first in figures:
        report.say("\n" + "; ".join(f"{name} {figure.median / figures[first].median:.2f}" for name, figure in figures.items()
                                    if name != first and figures[first].median) + f" of {first}\n")


def show(report: Report, title: str, jobs: dict[str, Callable[[], float]], n: int = N) -> None:
    """One table."""
    figures = interleaved(jobs, n)
    report.table(title, figures)
    beside_process(report, figures)


def bundle(folder: Path, rootfs: Path) -> Path:
    """For runsc alone."""
    folder.mkdir()
    subprocess.run(["runsc", "spec", "--", "true"], cwd=folder, check=True)
    spec = json.loads((folder / "config.json").read_text())
    spec["root"] = {"path": str(rootfs)}
    spec["process"]["terminal"] = False
    (folder / "config.json").write_text(json.dumps(spec))
    return folder


def measure(report: Report, engine: Daemon, peer: Dockerd, folder: Path) -> None:
    """All of it."""
    rootfs = folder / "rootfs"
    rootfs.mkdir()
    subprocess.run(["tar", "-xf", str(engine.folder / "base.tar"), "-C", str(rootfs)], check=True)
    alone, count = bundle(folder / "bundle", rootfs), iter(range(10**6))

    def start(runtime: str, *flags: str) -> Callable[[], float]:
        return lambda: timed([DOLIUM, "run", "--rm", "--runtime", runtime, *flags, "base:1", "true"], engine.env)

    jobs = {name: start(runtime, "--network", "none") for name, runtime in LEVELS.items()}
    jobs[PEER] = lambda: timed([DOCKER, "run", "--rm", "--network", "none", "base:1", "true"], peer.env)
    jobs[ALONE] = lambda: timed(["runsc", "--root", str(folder / "runsc"), "--network=none", "run", "--bundle", str(alone),
                                 f"alone{next(count)}"], dict(os.environ))
    show(report, "`run --rm --network none IMAGE true`, whole process, milliseconds", jobs)
    show(report, "`run --rm IMAGE true` on the default bridge, whole process, milliseconds",
         {name: start(runtime) for name, runtime in LEVELS.items()})
    stays = {name: Where(runtime, engine.env, "base:1", f"stays-{runtime}") for name, runtime in LEVELS.items()}
    show(report, "`exec true`, whole process, milliseconds",
         {name: lambda where=where: timed([DOLIUM, "exec", where.name, "true"], engine.env) for name, where in stays.items()})
    time.sleep(3)
    show(report, "PSS of all processes of an idle container, its shim among them, kilobytes",
         {name: where.memory for name, where in stays.items()}, 3)
    stays[PEER] = Where("", peer.env, "base:1", "stays")
    for title, script in WORK.items():
        show(report, f"{title}, milliseconds", {name: lambda where=where, script=script: where.spent(script)
                                                for name, where in stays.items()})
    del stays[PEER]  # it is in a network namespace of its own
    with serving() as port:
        show(report, f"{BIG >> 20} MB over the bridge from the host, milliseconds",
             {name: lambda where=where: where.spent(f"wget -qO /dev/null http://{where.inspect('{{.NetworkSettings.Gateway}}')}:{port}/")
              for name, where in stays.items()})
    serve = "echo hello > /tmp/index.html; exec httpd -f -p 80 -h /tmp"
    servers = {name: Where(runtime, engine.env, "base:1", f"serves-{runtime}", serve) for name, runtime in LEVELS.items()}
    time.sleep(2)
    show(report, "a small HTTP request of the host to busybox's httpd over the bridge, microseconds",
         {name: lambda where=where: round_trip(where.inspect("{{.NetworkSettings.IPAddress}}")) for name, where in servers.items()})
    subprocess.run([DOCKER, "import", str(root_tar()), "debian:1"], env=engine.env, check=True, capture_output=True)
    large = {name: Where(runtime, engine.env, "debian:1", f"large-{runtime}") for name, runtime in LEVELS.items()}
    for title, script in APPLICATIONS.items():
        show(report, f"{title}, milliseconds", {name: lambda where=where, script=script: where.spent(script)
                                                for name, where in large.items()})


def main() -> int:
    """Measure and write the page."""
    no_words(__doc__ or "")
    folder = Path(tempfile.mkdtemp(prefix="dolium-bench-levels-"))
    report = Report()
    report.say("# Benchmarks of the levels of isolation\n")
    with open("/proc/loadavg") as file:
        load = file.read().split()[0]
    version = subprocess.run(["runsc", "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    report.say(f"Written by `make bench-levels`. Linux {os.uname().release}, {os.cpu_count()} CPUs, load {load} at the start, "
               f"{time.strftime('%Y-%m-%d')}; runsc {version}, platform ptrace, `--file-access=shared`. {os.environ.get('BENCH_NOTE', '')}\n")
    try:
        with hugetlb():
            (folder / "dolium").mkdir()
            (folder / "docker").mkdir()
            engine, peer = Daemon(folder / "dolium"), Dockerd(folder / "docker")
            try:
                engine.start()
                engine.import_base("base:1", 'CMD ["sh"]')
                peer.wait()
                subprocess.run([DOCKER, "import", str(engine.folder / "base.tar"), "base:1"], env=peer.env, check=True, capture_output=True)
                measure(report, engine, peer, folder)
            finally:
                for env in (engine.env, peer.env):
                    names = subprocess.run([DOCKER, "ps", "-aq"], env=env, capture_output=True, text=True, check=False).stdout.split()
                    if names:
                        subprocess.run([DOCKER, "rm", "-f", *names], env=env, capture_output=True, check=False)
                peer.close()
                engine.close()
                shutil.rmtree(WARM, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    (ROOT / "docs" / "benchmarks-levels.md").write_text("\n".join(report.lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
