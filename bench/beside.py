"""dolium and docker side by side, for the benches of networks and of storage: the two engines, the ratio of what they take and
its interval."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "functional"), str(ROOT / "bench")]
from daemon import WARM, eventually  # noqa: E402
from spine import DOCKER, Dockerd, Figure, Report  # noqa: E402

DOLIUM_CLI = "dolium, by its own command line"
SETUP_BUDGET = 0.2
Env = dict[str, str]


class Doliumd:
    """doliumd in a network namespace of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "DOCKER_HOST": f"unix://{folder}/d.sock", "DOCKER_CONFIG": str(folder / "config"),
                    "DOLIUM_HOST": f"unix://{folder}/d.sock", "DOLIUM_WARM": WARM}
        self.process = subprocess.Popen(
            ["unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "doliumd", sys.executable, "-I", "-m", "dolium.daemon",
             "-H", f"unix://{folder}/d.sock", "--data-root", str(folder / "data"), "--run-root", str(folder / "run"),
             "--etc-root", str(folder / "etc")],
            stdin=subprocess.DEVNULL, stdout=open(folder / "log", "wb"), stderr=subprocess.STDOUT, start_new_session=True)

    def wait(self) -> None:
        """Until it answers."""
        eventually(lambda: subprocess.run([DOCKER, "version"], env=self.env, capture_output=True, check=False).returncode == 0,
                   "doliumd answers")

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(30)


Engine = Doliumd | Dockerd


def docker(engine: Engine, *words: str) -> str:
    """Standard output of docker. Raises CalledProcessError."""
    done = subprocess.run([DOCKER, *words], env=engine.env, check=True, capture_output=True, text=True, timeout=120)
    return done.stdout.strip()


@contextlib.contextmanager
def both(folder: Path, base: bytes) -> Iterator[dict[str, Engine]]:
    """dolium and docker, each with the image base:1; what was made with them is removed at the end."""
    engines: dict[str, Engine] = {}
    try:
        for name, kind in (("dolium", Doliumd), ("docker", Dockerd)):
            (folder / name).mkdir()
            engines[name] = kind(folder / name)
        (folder / "base.tar").write_bytes(base)
        for engine in engines.values():
            engine.wait()
            docker(engine, "import", str(folder / "base.tar"), "base:1")
        yield engines
    finally:
        for engine in engines.values():
            with contextlib.suppress(subprocess.SubprocessError):
                found = docker(engine, "ps", "-aq").split()
                if found:
                    docker(engine, "rm", "-f", *found)
                docker(engine, "network", "prune", "-f")
                docker(engine, "volume", "prune", "-af")
            engine.close()
        shutil.rmtree(WARM, ignore_errors=True)  # the warm compiler ends with its socket


def interval(ours: list[float], theirs: list[float], *, rounds: int = 4000) -> tuple[float, float, float]:
    """The ratio of the medians, and its bootstrap interval of 95 %. What was taken in one round is drawn together: a machine
    that is slow for a while is slow for both."""
    dice = random.Random(1)
    pairs = list(zip(ours, theirs, strict=True))
    drawn = (dice.choices(pairs, k=len(pairs)) for _ in range(rounds))
    ratios = sorted(statistics.median(our for our, _ in some) / statistics.median(their for _, their in some) for some in drawn)
    return statistics.median(ours) / statistics.median(theirs), ratios[rounds // 40], ratios[-rounds // 40]


def not_slower(ratio: tuple[float, float, float], *, less_is_better: bool) -> bool:
    """Whether an interval holds 1.0 or lies on the better side of it."""
    _, low, high = ratio
    return low <= 1 if less_is_better else high >= 1


def compared(report: Report, title: str, figures: dict[str, dict[str, list[float]]], less_is_better: tuple[str, ...]) -> None:
    """A table of what both engines gave; ``less_is_better``: how the names of latencies and the like begin."""
    report.say(f"\n## {title}\n")
    report.say("| what | dolium | docker | ratio (95 %) | |")
    report.say("|---|---|---|---|---|")
    for key, found in figures.items():
        ours, theirs = found["dolium"], found["docker"]
        ratio = interval(ours, theirs)
        cells = " | ".join(f"{statistics.median(one):.3g} ({min(one):.3g} to {max(one):.3g}, n={len(one)})" for one in (ours, theirs))
        met = not_slower(ratio, less_is_better=key.startswith(less_is_better))
        report.say(f"| {key} | {cells} | {ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f}) | not slower: **{'met' if met else 'missed'}** |")


def waited(report: Report, what: str, figures: dict[str, Figure], *, setup: bool) -> None:
    """How long people wait; ``setup``: it has the budget of what is set up."""
    report.table(f"`{what}`, whole process, milliseconds", figures)
    for ours in (DOLIUM_CLI, "dolium") if setup else ():
        report.budget(figures, ours, "docker", SETUP_BUDGET, f"{what}: {ours} against docker")


def page(name: str, heading: str, measure: Callable[[Report, Path], None]) -> int:
    """Measure in a folder of its own and write docs/benchmarks-NAME.md, which begins with how it was made and what BENCH_NOTE says
    of the machine; 0."""
    report = Report()
    report.say(f"# {heading}\n")
    report.say(f"Written by `make bench-{name}`; `dolium` and `docker` are the docker command line on each engine, in turn in one "
               f"run, each engine in a network namespace of its own. Linux {os.uname().release}, {os.cpu_count()} CPUs, load "
               f"{os.getloadavg()[0]:.1f} at the start, {time.strftime('%Y-%m-%d')}. {os.environ.get('BENCH_NOTE', '')}".strip())
    folder = Path(tempfile.mkdtemp(prefix=f"dolium-bench-{name}-"))
    try:
        measure(report, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    (ROOT / "docs" / f"benchmarks-{name}.md").write_text("\n".join(report.lines) + "\n")
    return 0
