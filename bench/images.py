"""Pull and unpack of a Debian image with python3, cold, beside docker, containerd, podman and skopeo + umoci; push; our own floor.

Every pull goes into folders that were never used: ext4 makes files slowly for seconds after others were deleted, so nothing is
deleted before all is measured. Between pulls what was written is put on the disk, so that nobody pays for the one before.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "functional"), str(ROOT / "src")]
from daemon import Daemon  # noqa: E402
from registry import ImageFiles, Registry, image  # noqa: E402
from spine import DOCKER, Dockerd, Figure, Report, no_words, pss, timed  # noqa: E402

from dolium import native  # noqa: E402
from dolium.images import decompress  # noqa: E402
from dolium.images.content import syncfs  # noqa: E402

N = int(os.environ.get("BENCH_N", "5"))
CACHE = Path(os.environ.get("DOLIUM_BENCH_CACHE", Path.home() / ".cache" / "dolium-bench"))
SUITE, INCLUDE = "bookworm", "python3,perl,git"
LAYERS = (("usr/share",), ("usr/lib", "usr/include"), ("",))
"""Which files go into which layer, the top one first: the first prefix that fits."""


def root_tar() -> Path:
    """A Debian root file system, made once and kept."""
    path = CACHE / f"{SUITE}-{INCLUDE.replace(',', '-')}.tar"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".new.tar")
        subprocess.run(["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={INCLUDE}", "--quiet", SUITE, str(beside)],
                       check=True)
        beside.rename(path)
    return path


def layers_of(path: Path) -> list[bytes]:
    """The tar cut into layers, bottom first. A hard link goes where its target is."""
    outs = [io.BytesIO() for _ in LAYERS]
    archives = [tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) for out in outs]
    where: dict[str, int] = {}
    with tarfile.open(path) as source:
        for info in source:
            name = info.name.removeprefix("./")
            chosen = next(number for number, prefixes in enumerate(LAYERS) if any(name.startswith(one) for one in prefixes))
            if info.islnk():
                chosen = where[info.linkname.removeprefix("./")]
            where[name] = chosen
            archives[chosen].addfile(info, source.extractfile(info) if info.isreg() else None)
    for archive in archives:
        archive.close()
    return [out.getvalue() for out in reversed(outs)]


def peak(pattern: re.Pattern[str], work: Callable[[], float]) -> tuple[float, int]:
    """What the work gives, and the largest PSS of the processes meanwhile, kilobytes."""
    most, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.05):
            most = max(most, pss(pattern))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        value = work()
    finally:
        ended.set()
        watcher.join()
    return value, most


def quiet() -> None:
    """Everything written is on the disk."""
    os.sync()
    time.sleep(1)


DURABLY = "writing files and blobs durably"
SYNC = "putting those on the disk"
"""Told, and no part of the floor alone: what there is to put there comes from the part before."""


class Floor:
    """The parts of a pull, each alone, all layers at once on as many threads as there are processors. Seconds."""

    def __init__(self, made: ImageFiles, plain: list[bytes], address: str, folder: Path) -> None:
        manifest = json.loads(made.manifest)
        self.blobs = [made.blobs[entry["digest"]] for entry in manifest["layers"]]
        self.digests = [str(entry["digest"]) for entry in manifest["layers"]]
        self.plain, self.address, self.folder = plain, address, folder

    def _timed(self, jobs: list[Callable[[], object]]) -> float:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            begun = time.perf_counter()
            for done in [pool.submit(job) for job in jobs]:
                done.result()
            return time.perf_counter() - begun

    def _read(self, digest: str) -> None:
        connection = http.client.HTTPConnection(self.address)
        connection.request("GET", f"/v2/bench/blobs/{digest}")
        response = connection.getresponse()
        room = bytearray(1 << 20)
        while response.readinto(room):
            continue
        connection.close()

    def _decompress(self, blob: bytes) -> None:
        for _ in decompress.chunks(io.BytesIO(blob)):
            continue

    def _write(self, path: Path) -> None:
        target = Path(tempfile.mkdtemp(dir=self.folder))
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
        with open(path, "rb") as source:
            subprocess.run([native.program("dolium-untar"), str(fd)], stdin=source, pass_fds=(fd,), check=True,
                           stdout=subprocess.DEVNULL)
        os.close(fd)

    def _write_durably(self, paths: list[Path]) -> float:
        """The files, and the compressed blobs that are kept beside them, until a power cut takes none of it away. Two ways,
        the faster one counts: all at once at the end, and beginning when the first layer is there.
        """
        def flush() -> None:
            syncfs(self.folder)

        def write(job: Callable[[], object], early: bool) -> Callable[[], object]:
            def work() -> None:
                job()
                if early and not begun.is_set():
                    begun.set()
                    flushing.append(threading.Thread(target=flush))
                    flushing[0].start()
            return work

        spent = []
        for early in (False, True):
            begun, flushing = threading.Event(), list[threading.Thread]()
            target = Path(tempfile.mkdtemp(dir=self.folder))
            jobs: list[Callable[[], object]] = [
                lambda data=data, place=target / digest: place.write_bytes(data)
                for digest, data in zip(self.digests, self.blobs, strict=True)]
            jobs += [write(lambda one=one: self._write(one), early) for one in paths]
            quiet()
            at = time.perf_counter()
            self._timed(jobs)
            for thread in flushing:
                thread.join()
            flush()
            spent.append(time.perf_counter() - at)
        return min(spent)

    def measure(self) -> dict[str, float]:
        """By part."""
        paths = []
        for number, data in enumerate(self.plain):
            paths.append(self.folder / f"{number}.tar")
            paths[-1].write_bytes(data)
        quiet()
        figures = {
            "reading the blobs from the registry": self._timed([lambda one=one: self._read(one) for one in self.digests]),
            "hashing them, compressed and not": self._timed([
                lambda one=one: hashlib.sha256(one).digest() for one in [*self.blobs, *self.plain]]),
            "decompressing them": self._timed([lambda one=one: self._decompress(one) for one in self.blobs]),
            "writing the files": self._timed([lambda one=one: self._write(one) for one in paths])}
        begun = time.perf_counter()
        syncfs(self.folder)
        figures[SYNC] = time.perf_counter() - begun
        figures[DURABLY] = self._write_durably(paths)
        return figures


class Peers:
    """One cold pull of each engine, seconds; what it needs to run is made before and not counted."""

    def __init__(self, folder: Path, reference: str) -> None:
        self.folder, self.reference, self.count = folder, reference, 0
        self.peak = 0
        self.again: list[float] = []
        self.pushed: dict[str, Figure] = {}

    def new(self) -> Path:
        """A folder that nobody has used."""
        self.count += 1
        path = self.folder / str(self.count)
        path.mkdir()
        return path

    def push(self, name: str, words: Callable[[str], list[list[str]]], env: dict[str, str]) -> None:
        """What was pulled to a registry that has nothing: the last of the commands is timed, seconds."""
        with Registry(self.new()) as registry:
            *before, last = words(registry.reference("pushed:1"))
            for command in before:
                subprocess.run(command, env=env, check=True, capture_output=True)
            quiet()
            self.pushed.setdefault(name, Figure([])).values.append(timed(last, env) / 1000)

    def dolium(self) -> float:
        """Into a new daemon's store; then once more, with all there."""
        one = Daemon(self.new())
        one.start()
        try:
            quiet()
            pattern = re.compile(rf"dolium-untar|dolium-shim --spawner|dolium\.daemon.*{re.escape(str(one.folder))}")
            spent, most = peak(pattern, lambda: timed([DOCKER, "pull", "-q", self.reference], one.env))
            self.peak = max(self.peak, most)
            self.again.append(timed([DOCKER, "pull", "-q", self.reference], one.env))
            self.push("dolium (docker push)", lambda to: [[DOCKER, "tag", self.reference, to], [DOCKER, "push", "-q", to]], one.env)
            return spent / 1000
        finally:
            one.close()

    def docker(self) -> float:
        """dockerd with the host's loopback: the registry is there."""
        folder = self.new()
        engine = Dockerd(folder, private_network=False)
        try:
            engine.wait()
            quiet()
            spent = timed([DOCKER, "pull", "-q", self.reference], engine.env) / 1000
            self.push("docker push", lambda to: [[DOCKER, "tag", self.reference, to], [DOCKER, "push", "-q", to]], engine.env)
            return spent
        finally:
            engine.close()

    def containerd(self) -> float:
        """ctr: fetch and unpack."""
        folder = self.new()
        socket = folder / "c.sock"
        config = folder / "config.toml"
        config.write_text(f'version = 2\nroot = "{folder}/root"\nstate = "{folder}/state"\n[grpc]\naddress = "{socket}"\n'
                          'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(["containerd", "--config", str(config)], stdout=log, stderr=log)
        try:
            end = time.monotonic() + 30
            while subprocess.run(["ctr", "-a", str(socket), "version"], capture_output=True, check=False).returncode:
                if time.monotonic() > end:
                    raise RuntimeError((folder / "log").read_text()[-400:])
                time.sleep(0.1)
            quiet()
            ctr = ["ctr", "-a", str(socket), "image"]
            spent = timed([*ctr, "pull", "--plain-http", self.reference], dict(os.environ)) / 1000
            self.push("ctr image push", lambda to: [[*ctr, "tag", self.reference, to], [*ctr, "push", "--plain-http", to]],
                      dict(os.environ))
            return spent
        finally:
            process.terminate()
            process.wait(30)

    def podman(self) -> float:
        """podman pull into a store of its own."""
        folder = self.new()
        try:
            quiet()
            podman = ["podman", "--root", f"{folder}/root", "--runroot", f"{folder}/run"]
            spent = timed([*podman, "pull", "-q", "--tls-verify=false", self.reference], dict(os.environ)) / 1000
            self.push("podman push", lambda to: [[*podman, "push", "-q", "--tls-verify=false", self.reference, to]],
                      dict(os.environ))
            return spent
        finally:
            subprocess.run(["umount", "-l", f"{folder}/root/overlay"], check=False, capture_output=True)

    def skopeo(self) -> float:
        """skopeo to an OCI layout, then umoci unpack."""
        folder = self.new()
        quiet()
        spent = timed(["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{self.reference}", f"oci:{folder}/oci:x"],
                      dict(os.environ))
        self.push("skopeo copy", lambda to: [["skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{folder}/oci:x",
                                              f"docker://{to}"]], dict(os.environ))
        return (spent + timed(["umoci", "unpack", "--image", f"{folder}/oci:x", f"{folder}/bundle"], dict(os.environ))) / 1000


def measure(report: Report, folder: Path, registry: Registry) -> None:
    """All figures."""
    plain = layers_of(root_tar())
    made = image(plain, compress=lambda data: gzip.compress(data, 6, mtime=0))  # gzip's default level: what registries hold
    registry.push("bench", "1", made)
    entries = sum(len(tarfile.open(fileobj=io.BytesIO(data)).getmembers()) for data in plain)
    sizes = [len(blob) for blob in made.blobs.values()]
    report.say(f"\nThe image: {len(plain)} layers, {entries} files, {sum(map(len, plain)) >> 20} MiB, {sum(sizes) >> 20} MiB "
               "compressed, from `docker-registry` on loopback.")
    reference = registry.reference("bench:1")
    peers = Peers(folder, reference)
    jobs: dict[str, Callable[[], float]] = {
        "dolium (docker pull)": peers.dolium, "docker pull": peers.docker, "ctr image pull": peers.containerd,
        "podman pull": peers.podman, "skopeo copy + umoci unpack": peers.skopeo}
    figures: dict[str, Figure] = {}
    floor: dict[str, Figure] = {}
    order, dice = list(jobs), random.Random(1)
    for turn in range(N):
        dice.shuffle(order)
        for name in order:
            try:
                figures.setdefault(name, Figure([])).values.append(jobs[name]())
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                print(f"  {name} is left out: {error}")
                figures.pop(name, None)
        for part, seconds in Floor(made, plain, registry.address, peers.new()).measure().items():
            floor.setdefault(part, Figure([])).values.append(seconds)
        print(f"  round {turn + 1} of {N}", flush=True)
    table(report, "Pull and unpack, cold store, seconds", {name: figures[name] for name in jobs if name in figures})
    table(report, "The floor: the parts alone, all layers at once, seconds", floor)
    ours = figures["dolium (docker pull)"]
    others = {name: figure for name, figure in figures.items() if name in jobs and not name.startswith("dolium")}
    fastest = min(others, key=lambda name: others[name].median)
    verdict(report, f"dolium against the fastest, {fastest}", ours.median / others[fastest].median, 0.45)
    part = max((name for name in floor if name not in (DURABLY, SYNC)), key=lambda name: floor[name].median)
    verdict(report, f"dolium against the floor, {part}, which a power cut may take away", ours.median / floor[part].median, 1.5)
    verdict(report, f"dolium against the floor of a store that loses nothing, {DURABLY}",
            ours.median / floor[DURABLY].median, 1.5)
    report.say(f"- largest PSS of all dolium's processes meanwhile: {peers.peak / 1000:.0f} MB, budget 150 MB: "
               f"**{'met' if peers.peak < 150_000 else 'missed'}**")
    table(report, "Push to an empty registry, seconds", peers.pushed)
    theirs = {name: figure for name, figure in peers.pushed.items() if not name.startswith("dolium")}
    first = min(theirs, key=lambda name: theirs[name].median)
    verdict(report, f"dolium's push against the fastest, {first}",
            peers.pushed["dolium (docker push)"].median / theirs[first].median, 1.0)
    again = Figure(peers.again)
    report.say(f"- a pull of a present image, whole docker process: {again} ms, budget 100 ms: "
               f"**{'met' if again.median < 100 else 'missed'}**")


def table(report: Report, title: str, figures: dict[str, Figure]) -> None:
    """Seconds with two digits."""
    report.say(f"\n## {title}\n")
    report.say("| what | median (min to max, n) |")
    report.say("|---|---|")
    for name, figure in figures.items():
        report.say(f"| {name} | {figure.median:.2f} ({min(figure.values):.2f} to {max(figure.values):.2f}, n={len(figure.values)}) |")
    report.say("")


def verdict(report: Report, text: str, ratio: float, limit: float) -> None:
    """One line."""
    report.say(f"- {text}: {ratio:.2f}, budget {limit:.2f}: **{'met' if ratio <= limit else 'missed'}**")


def main() -> int:
    """Run all; write docs/benchmarks-images.md."""
    no_words(__doc__)
    report = Report()
    report.say("# Benchmarks of images\n")
    report.say(f"Written by `make bench-images`; whole processes, engines in turn in one run. Linux {os.uname().release}, "
               f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the start, {time.strftime('%Y-%m-%d')}.")
    folder = Path(tempfile.mkdtemp(prefix="dolium-bench-images-"))
    forward = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    try:
        (folder / "registry").mkdir()
        with Registry(folder / "registry") as registry:
            measure(report, folder, registry)
    finally:
        Path("/proc/sys/net/ipv4/ip_forward").write_text(forward)
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
    (ROOT / "docs" / "benchmarks-images.md").write_text("\n".join(report.lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
