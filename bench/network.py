"""Networks beside docker's: how long people wait for them, and what the data path costs. Written to docs/benchmarks-network.md.

Everything is done by the same docker command line, on doliumd and on dockerd in turn, each round in another order, and by
dolium's own command line; the data path is network_paths.py. dockerd is in a network namespace of its own, with the firewall
it makes itself; so is doliumd, for both to have the same neighbours.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from beside import DOLIUM_CLI, Env, both, docker, page, waited
from daemon import DOLIUM, base_tar
from network_paths import PORT, paths
from spine import DOCKER, Report, interleaved, no_words, timed

N = int(os.environ.get("BENCH_N", "15"))
BRIDGE_BUDGET = 3.0


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


def measure(report: Report, folder: Path) -> None:
    """Both engines, all figures."""
    with both(folder, base_tar()) as engines:
        for engine in engines.values():
            for network in ("lab", "other"):
                docker(engine, "network", "create", network)
            docker(engine, "run", "-d", "--name", "still", "--network", "lab", "base:1", "sleep", "3600")
        jobs = {DOLIUM_CLI: waits(DOLIUM, engines["dolium"].env), "dolium": waits(DOCKER, engines["dolium"].env),
                "docker": waits(DOCKER, engines["docker"].env)}
        for what in jobs["dolium"]:
            if not what.startswith("run"):
                waited(report, what, interleaved({name: jobs[name][what] for name in jobs}, N), setup=True)
        # in one: what a network adds to a start is far less than the machine changes from one minute to the next
        runs = [what for what in jobs["dolium"] if what.startswith("run")]
        figures = interleaved({f"{name}: {what}": jobs[name][what] for what in runs for name in jobs}, N)
        for what in runs:
            waited(report, what, {name: figures[f"{name}: {what}"] for name in jobs}, setup=False)
        report.say("")
        for name in (DOLIUM_CLI, "dolium"):
            for kind, what in (("a bridge", runs[1]), ("a network with names", runs[2])):
                pairs = zip(figures[f"{name}: {what}"].values, figures[f"{name}: {runs[0]}"].values, strict=True)
                extra = statistics.median(one - none for one, none in pairs)
                report.say(f"- {kind} adds {extra:.1f} ms to a start on {name} (median of pairs), budget {BRIDGE_BUDGET:.0f} ms: "
                           f"**{'met' if extra <= BRIDGE_BUDGET else 'missed'}**")
        paths(report, engines, folder, N)


def main() -> int:
    """Run all; write docs/benchmarks-network.md."""
    no_words(__doc__)
    return page("network", "Benchmarks of networks", measure)


if __name__ == "__main__":
    sys.exit(main())
