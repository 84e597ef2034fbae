"""dolium-runtime beside runc, crun and runsc, without an engine: bundles, lives, four callers, memory, a thousand neighbours, and
where the time of a run goes beside the bare C program. Alone: `python bench/runtime.py` prints; `make bench` writes it too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "functional"), str(ROOT / "bench"), str(ROOT / "packaging")]
from daemon import base_tar, eventually  # noqa: E402
from hierarchies import hugetlb  # noqa: E402
from spine import LIMIT, Figure, N, Report, interleaved, rate, timed  # noqa: E402

RUNTIME = str(ROOT / ".venv" / "bin" / "dolium-runtime")
FLOOR = "a bare C program, the same calls"
NEIGHBOURS = int(os.environ.get("BENCH_NEIGHBOURS", "1000"))
SHOWN = 18  # rows of the table of operations
Env = dict[str, str]
_names = iter(range(10**9))


def name() -> str:
    """A container id that no other has."""
    return f"bench{next(_names)}"


def bundle(folder: Path, *command: str) -> Path:
    """A bundle of the base image, as podman and docker have theirs set up."""
    (folder / "rootfs").mkdir(parents=True)
    subprocess.run(["tar", "-xf", "-", "-C", str(folder / "rootfs")], input=base_tar(), check=True)
    subprocess.run(["runc", "spec"], cwd=folder, check=True)
    config = json.loads((folder / "config.json").read_text())
    config["process"]["terminal"] = False
    config["process"]["args"] = list(command)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def floor(folder: Path, rootfs: Path) -> list[str]:
    """The bare C program (``bench/floor``), compiled as dolium's own are, on the bundle's root: its command line."""
    program, state = folder / "floor", folder / "floor-state"
    from build_native import FLAGS, compiler

    subprocess.run([*compiler(), *FLAGS, "-Wno-shadow", "-o", str(program), str(ROOT / "bench/floor/floor.c")], check=True)
    hierarchies = [str(path) for path in sorted(Path("/sys/fs/cgroup").iterdir()) if path.is_dir() and not path.is_symlink()]
    for one in hierarchies:
        os.makedirs(f"{one}/dolium", exist_ok=True)
    return [str(program), str(rootfs), str(state), *hierarchies]


def life(program: list[str], path: Path, identity: str, env: Env) -> float:
    """create, start, kill, delete of a container that would run on; milliseconds of the four together."""
    spent = timed([*program, "create", "--bundle", str(path), identity], env)
    try:
        pid = state(program, identity, env)
        spent += timed([*program, "start", identity], env) + timed([*program, "kill", identity, "KILL"], env)
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:  # init is nobody's child here: look for its end
            while file.read().rpartition(")")[2].split()[0] not in ("Z", "X"):
                file.seek(0)
        return spent + timed([*program, "delete", identity], env)
    except RuntimeError:
        subprocess.run([*program, "delete", "--force", identity], env=env, check=False, capture_output=True)
        raise


def state(program: list[str], identity: str, env: Env) -> int:
    """Init's pid."""
    done = subprocess.run([*program, "state", identity], capture_output=True, check=True, env=env)
    return int(json.loads(done.stdout)["pid"])


# -- memory --

def processes(identity: str) -> dict[int, str]:
    """A container's own, and what its runtime keeps for it: who is in its groups or has its id on the command line. With the
    command line of each."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file, open(f"/proc/{pid}/cgroup") as groups:
            line = file.read().replace(b"\0", b" ").decode(errors="replace")
            if identity in line or f"/{identity}\n" in groups.read():
                found[int(pid)] = line
    return found


def pss(pids: set[int]) -> int:
    """Kilobytes of these processes."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, StopIteration), open(f"/proc/{pid}/smaps_rollup") as file:
            total += int(next(text for text in file if text.startswith("Pss:")).split()[1])
    return total


def memory(program: list[str], path: Path, env: Env) -> tuple[float, float]:
    """Kilobytes of all that a created container keeps in memory, and of what stays beside the container's own program once it
    runs."""
    identity = f"memory-{name()}"
    timed([*program, "create", "--bundle", str(path), identity], env)
    try:
        waiting = pss(set(processes(identity)))
        timed([*program, "start", identity], env)
        init = state(program, identity, env)  # runsc's is a sandbox, in which the program cannot be seen
        eventually(lambda: processes(identity).get(init, "").startswith(("sleep", "runsc")), "the program runs")
        return waiting, pss({pid for pid, line in processes(identity).items() if not line.startswith("sleep")})
    finally:
        subprocess.run([*program, "delete", "--force", identity], env=env, check=False, capture_output=True)


# -- operations --

def operations(command: list[str], env: Env, line: re.Pattern[str]) -> Counter[str]:
    """Microseconds by operation of one run that tells them on standard error."""
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=LIMIT, stdin=subprocess.DEVNULL)
    found: Counter[str] = Counter()
    for spent, operation in line.findall(done.stderr):
        found[operation] += int(spent)
    return found


def medians(runs: list[Counter[str]]) -> dict[str, float]:
    """The middle of each operation's times."""
    return {key: sorted(run[key] for run in runs)[len(runs) // 2] for key in {key for run in runs for key in run}}


def show_operations(report: Report, path: Path, bare: list[str], env: Env) -> None:
    """Where a run's time goes, and how far that is from the bare program's."""
    ours, theirs = [], []
    for _ in range(N):
        ours.append(operations([RUNTIME, "--debug", "run", "--bundle", str(path), name()], env, re.compile(r"(\d+) us (\w+): ")))
        theirs.append(operations([bare[0], "-t", *bare[1:]], env, re.compile(r"^(\d+) (\w+)$", re.MULTILINE)))
    mine, least = medians(ours), medians(theirs)
    mine.pop("hold", None)
    rows = sorted(mine, key=lambda key: -mine[key])
    report.say(f"\n## Where a `run` goes: microseconds by operation, medians of {N}\n")
    report.say("| operation | dolium-runtime | bare C program |")
    report.say("|---|---|---|")
    for key in rows[:SHOWN]:
        report.say(f"| {key} | {mine[key]:.0f} | {f'{least[key]:.0f}' if key in least else 'with another'} |")
    rest = rows[SHOWN:]
    report.say(f"| {len(rest)} others | {sum(mine[key] for key in rest):.0f} | {sum(least.get(key, 0) for key in rest):.0f} |")
    report.say(f"| sum | {sum(mine.values()):.0f} | {sum(least.values()):.0f} |")
    report.say("\nWhat is in no operation: starting the process twice (the sealed copy), asking the compiler, exec, the program itself, "
               "and what the kernel does between two processes.\n")


# -- neighbours --

def neighbours(report: Report, path: Path, sleeper: Path, env: Env) -> None:
    """`run` with many live containers of dolium-runtime, and with none before and after; crun beside it, among the same ones."""
    programs = {"dolium-runtime": RUNTIME, "crun": "crun"}
    figures = {f"{key}, {crowd}": Figure([]) for key in programs for crowd in ("with none", f"with {NEIGHBOURS}")}

    def runs(crowd: str) -> None:
        time.sleep(5)  # the kernel takes the namespaces and groups of what was before apart behind its end
        for key, figure in interleaved({key: lambda program=program: timed([program, "run", "--bundle", str(path), name()], env)
                                        for key, program in programs.items()}).items():
            figures[f"{key}, {crowd}"].values.extend(figure.values)

    runs("with none")
    made = []
    try:
        for _ in range(NEIGHBOURS):
            made.append(name())
            timed([RUNTIME, "run", "--detach", "--bundle", str(sleeper), made[-1]], env)
        runs(f"with {NEIGHBOURS}")
    finally:
        for identity in made:
            subprocess.run([RUNTIME, "delete", "--force", identity], env=env, check=False, capture_output=True)
    runs("with none")
    report.table(f"`run` of a bundle, whole, with {NEIGHBOURS} live containers", figures)
    for key in programs:
        report.budget(figures, f"{key}, with {NEIGHBOURS}", f"{key}, with none", 1.2, f"{key} with {NEIGHBOURS} against none")
    report.say("\nWhat grows is the kernel's, for every runtime: a memory cgroup that goes is taken out of each mounted file system's lists "
               "(`memcg_reparent_list_lrus`) while `cgroup_mutex` is held, and the "
               "next container's groups wait for it.\n")


def measure(report: Report, env: Env, cold: Env, folder: Path) -> None:
    """All of the runtime's figures."""
    path, sleeper = bundle(folder / "bundle", "true"), bundle(folder / "sleeper", "sleep", "1000")
    bare = floor(folder, path / "rootfs")
    runtimes = {"dolium-runtime": ([RUNTIME], env), "dolium-runtime, cold": ([RUNTIME], cold), "crun": (["crun"], env),
                "runc": (["runc"], env), "runsc (no network)": (["runsc", "--network=none"], env)}
    jobs: dict[str, Callable[[], float]] = {
        key: lambda program=program, where=where: timed([*program, "run", "--bundle", str(path), name()], where)
        for key, (program, where) in runtimes.items()}
    jobs[FLOOR] = lambda: timed(bare, env)
    bundles = interleaved(jobs)
    report.table("`run` of a bundle, whole", bundles)
    report.budget(bundles, "dolium-runtime", "crun", 0.6, "dolium-runtime against crun")
    report.budget(bundles, "dolium-runtime, cold", "crun", 3.0, "dolium-runtime, cold, against crun")
    report.budget(bundles, "dolium-runtime", FLOOR, 2.0, "dolium-runtime against the bare program")
    show_operations(report, path, bare, env)

    lives = interleaved({key: lambda program=program, where=where: life(program, sleeper, name(), where)
                         for key, (program, where) in runtimes.items()})
    report.table("create, start, kill, delete, whole processes, summed", lives)
    report.budget(lives, "dolium-runtime", "crun", 0.6, "dolium-runtime against crun")

    rates: dict[str, Figure] = {}
    for key, (program, where) in runtimes.items():
        if key in bundles and key != "dolium-runtime, cold":
            rates[key] = Figure([rate(lambda program=program: [*program, "run", "--bundle", str(path), name()], where, 4, 4.0)
                                 for _ in range(3)])
    report.table("bundles run per second, 4 callers at once", rates)

    waiting: dict[str, Figure] = {}
    beside: dict[str, Figure] = {}
    for key, (program, where) in runtimes.items():
        if key in lives and key != "dolium-runtime, cold":
            taken = [memory(program, sleeper, where) for _ in range(3)]
            waiting[key], beside[key] = Figure([one for one, _ in taken]), Figure([other for _, other in taken])
    report.table("PSS of a created container's waiting processes, kilobytes", waiting)
    report.table("PSS of what stays beside the program of a running one, kilobytes", beside)
    neighbours(report, path, sleeper, env)


def main() -> int:
    """The runtime's part alone, printed."""
    folder = Path(tempfile.mkdtemp(prefix="dolium-bench-"))
    env = {**os.environ, "DOLIUM_WARM": str(folder / "warm")}
    try:
        with hugetlb():
            subprocess.run([RUNTIME, "--version"], env=env, check=True, capture_output=True)
            eventually(lambda: os.listdir(env["DOLIUM_WARM"]), "the warm compiler listens")
            measure(Report(), env, {**env, "DOLIUM_WARM": "off"}, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
