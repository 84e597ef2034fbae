"""Storage beside docker's: what the data path to each kind of place costs, and how long people wait for volumes. Written to
docs/benchmarks-storage.md.

Both engines have the same image, which holds fio with its libraries, and one container each with all places: its own layer, a
host folder, a tmpfs and a named volume. fio runs in it by `docker exec`, with the seccomp program and the cgroups of the
container, place for place on one engine and then on the other, each round in another order.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from beside import DOLIUM_CLI, Engine, Env, both, compared, docker, page, waited
from daemon import DOLIUM, base_tar
from spine import DOCKER, Report, interleaved, no_words, timed

N = int(os.environ.get("BENCH_N", "7"))
MIB = 1 << 20
FILE_MIB = 64
SECONDS = 0.25  # of one fio job, which takes fio half a second
SEED_FILES, SEED_BYTES = 1000, 8192  # what the image has where a volume is mounted first
PLACES = {"overlay (the container's own layer)": "/own", "bind (a host folder)": "/bind", "tmpfs": "/memory", "volume": "/volume"}
JOBS = {
    "write": ("--rw=write", "--bs=1M", "--iodepth=4"), "read": ("--rw=read", "--bs=1M", "--iodepth=4"),
    "wait": ("--rw=randread", "--bs=4k", "--iodepth=1"), "durable": ("--rw=randwrite", "--bs=4k", "--iodepth=1", "--fdatasync=1"),
    "reads": ("--rw=randread", "--bs=4k", "--iodepth=16"), "writes": ("--rw=randwrite", "--bs=4k", "--iodepth=16")}
"""Each alone, one after the other."""


# -- the image --

def libraries(listing: str) -> list[str]:
    """The files that ldd's output names, the loader among them. Raises ValueError for one that is not found."""
    found = []
    for line in listing.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        path = (rest if arrow else name).split(" (")[0]
        if path == "not found":
            raise ValueError(f"ldd: {name} is not found")
        if path.startswith("/"):
            found.append(path)
    return found


def image() -> bytes:
    """The tests' base image, with fio and, in /seed, the files that a new volume takes."""
    program = shutil.which("fio")
    if program is None:
        raise FileNotFoundError("fio is not installed: make bench-packages")
    listing = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    out = io.BytesIO(base_tar())
    with tarfile.open(fileobj=out, mode="a", dereference=True) as archive:
        for path in (program, *libraries(listing)):
            archive.add(path, path.lstrip("/"))
        for number in range(SEED_FILES):
            info = tarfile.TarInfo(f"seed/{number % 10}/{number}")
            info.size = SEED_BYTES
            archive.addfile(info, io.BytesIO(bytes(SEED_BYTES)))
    return out.getvalue()


# -- the data path --

def direct(folder: str) -> bool:
    """Whether the file system of a folder takes O_DIRECT."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            return False
    return True


def command(place: str, *, unbuffered: bool) -> list[str]:
    """A new file in a place, then all of fio's jobs on it. New, because how fast a disk gives a file depends on where it lies:
    that must not be one engine's luck for all rounds."""
    words = ["sh", "-c", 'rm -f "$0" && dd if=/dev/zero of="$0" bs=1M count=$1 conv=fsync 2> /dev/null && shift && exec "$@"',
             f"{place}/fio", str(FILE_MIB), "fio", "--output-format=json", f"--filename={place}/fio", f"--size={FILE_MIB}M", "--ioengine=libaio", "--thread",
             f"--direct={int(unbuffered)}", "--time_based", f"--runtime={int(SECONDS * 1000)}ms", "--randrepeat=1"]
    for name, options in JOBS.items():
        words += [f"--name={name}", "--stonewall", *options]
    return words


def figures_of(text: str) -> dict[str, float]:
    """What fio's JSON says of the jobs. Raises ValueError when one failed or is not there."""
    jobs: dict[str, Any] = {job["jobname"]: job for job in json.loads(text[text.index("{"):])["jobs"]}
    for name in JOBS:
        if name not in jobs or jobs[name]["error"]:
            raise ValueError(f"fio's job {name}: {jobs[name]['error'] if name in jobs else 'not there'}")
    return {
        "throughput of writing, MiB/s": jobs["write"]["write"]["bw_bytes"] / MIB,
        "throughput of reading, MiB/s": jobs["read"]["read"]["bw_bytes"] / MIB,
        "latency of reading 4 KiB, median, µs": jobs["wait"]["read"]["clat_ns"]["percentile"]["50.000000"] / 1000,
        "latency of writing 4 KiB and fdatasync, mean, µs": 1e6 / jobs["durable"]["write"]["iops"],
        "IOPS of reading 4 KiB, 16 at once": jobs["reads"]["read"]["iops"],
        "IOPS of writing 4 KiB, 16 at once": jobs["writes"]["write"]["iops"]}


def paths(report: Report, engines: dict[str, Engine], folder: Path, unbuffered: dict[str, bool]) -> None:
    """All places, in pairs."""
    for name, engine in engines.items():
        (folder / f"bind-{name}").mkdir()
        docker(engine, "run", "-d", "--name", "box", "--network", "none", "-v", f"{folder}/bind-{name}:/bind", "-v", "kept:/volume",
               "--tmpfs", "/memory", "base:1", "sleep", "3600")
        docker(engine, "exec", "box", "sh", "-c", "mkdir /own && fio --version")  # fio's files are in memory from now on
    dice, order = random.Random(2), list(engines)
    taken: dict[str, dict[str, dict[str, list[float]]]] = {}
    for turn in range(N):
        for title, place in PLACES.items():
            dice.shuffle(order)
            for name in order:
                words = command(place, unbuffered=unbuffered[place])
                for key, value in figures_of(docker(engines[name], "exec", "box", *words)).items():
                    taken.setdefault(title, {}).setdefault(key, {}).setdefault(name, []).append(value)
        print(f"  round {turn + 1} of {N}", flush=True)
    for title, found in taken.items():
        compared(report, title, found, ("latency",))
    for engine in engines.values():
        docker(engine, "rm", "-f", "box")


# -- what people wait for --

def waits(program: str, env: Env) -> dict[str, Callable[[], float]]:
    """Whole processes, milliseconds. Volumes with files stay to the end: ext4 makes files slowly for seconds after others were
    deleted."""
    numbers = itertools.count()
    run = [program, "run", "--rm", "--network", "none"]

    def create_remove(which: str) -> float:
        made = timed([program, "volume", "create", "brief"], env)
        gone = timed([program, "volume", "rm", "brief"], env)
        return made if which == "create" else gone

    def first_use(target: str) -> float:
        return timed([*run, "-v", f"first-{Path(program).name}-{next(numbers)}:{target}", "base:1", "true"], env)

    return {
        "volume create": lambda: create_remove("create"), "volume rm": lambda: create_remove("rm"),
        "run --rm, no volume": lambda: timed([*run, "base:1", "true"], env),
        "run --rm, a volume that was used before": lambda: timed([*run, "-v", "kept:/volume", "base:1", "true"], env),
        "run --rm, a new volume, empty": lambda: first_use("/empty"),
        f"run --rm, a new volume that takes {SEED_FILES} files of the image": lambda: first_use("/seed"),
        "run --rm, a host folder": lambda: timed([*run, "-v", "/tmp:/bind", "base:1", "true"], env),
        "run --rm, a tmpfs": lambda: timed([*run, "--tmpfs", "/memory", "base:1", "true"], env)}


def measure(report: Report, folder: Path) -> None:
    """Both engines, all figures."""
    disk = subprocess.run(["findmnt", "-n", "-o", "FSTYPE", "-T", str(folder)], check=True, capture_output=True, text=True).stdout.strip()
    unbuffered = {place: direct("/dev/shm" if place == "/memory" else str(folder)) for place in PLACES.values()}
    words = {True: "unbuffered (O_DIRECT)", False: "buffered"}
    report.say(f"\nThe data path: {subprocess.run(['fio', '--version'], check=True, capture_output=True, text=True).stdout.strip()}, "
               f"libaio, a file of {FILE_MIB} MiB that each round writes anew, {SECONDS:g} s for each figure of each round; engines' folders "
               f"and the host folder on {disk}, {words[unbuffered['/own']]}; tmpfs {words[unbuffered['/memory']]}. The ratio is "
               "dolium's median to docker's with the bootstrap interval of 95 %; a path is not slower when the interval holds 1.0 "
               "or is better.")
    with both(folder, image()) as engines:
        paths(report, engines, folder, unbuffered)
        jobs = {DOLIUM_CLI: waits(DOLIUM, engines["dolium"].env), "dolium": waits(DOCKER, engines["dolium"].env),
                "docker": waits(DOCKER, engines["docker"].env)}
        for what in jobs["dolium"]:
            waited(report, what, interleaved({name: jobs[name][what] for name in jobs}, N), setup=what.startswith("volume") or "new volume" in what)


def main() -> int:
    """Run all; write docs/benchmarks-storage.md."""
    no_words(__doc__)
    return page("storage", "Benchmarks of storage", measure)


if __name__ == "__main__":
    sys.exit(main())
