"""What choices on the way of a start are worth: daemons with and without each, in turn, with quiet between.

The quiet is the point: only the first cgroup move in a while waits for a grace period of RCU, and the pool of namespaces is full.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "functional"), str(ROOT / "bench")]
from daemon import Daemon, eventually  # noqa: E402
from spine import Figure, native_request  # noqa: E402

VARIANTS = {
    "as shipped": "",
    "groups joined by cgroup.procs": "import dolium.runtime.cgroups as c; c._kind = lambda *rest: c.PROCS; ",
    "pool refilled at once": "import dolium.network.drivers.bridge as b; b.FILL_PAUSE = 0; ",
    "no spare shims": "import dolium.isolation.spares as s; s.Spares.take = lambda *rest: None; ",
    "no spare roots": "import dolium.engine.spare_roots as s; s.SpareRoots.take = lambda *rest: None; ",
    "roots not volatile": "import dolium.engine.rootfs as r; r._volatile = lambda container: False; ",
    "plans compiled anew": "import dolium.isolation.templates as t; t.ID = 0; ",
    "deleted at once": "import dolium.trash as t; t.MOST = -1; ",
}
"""What is run before the daemon, by the name that is printed."""


def daemon(before: str) -> Daemon:
    """A doliumd after a line of Python."""
    one = Daemon(Path(tempfile.mkdtemp(prefix="dolium-grace-")))
    code = f"{before}from dolium.daemon import entry; import sys; sys.exit(entry())"
    with open(one.log, "wb") as log:
        one.process = subprocess.Popen(
            [sys.executable, "-c", code, "-H", f"unix://{one.socket}", "--data-root", f"{one.folder}/data", "--run-root",
             f"{one.folder}/run"], stdout=log, stderr=log)
    eventually(one.listening, "it listens")
    one.import_base()
    return one


def main() -> int:
    """Print each figure, milliseconds of the one native request."""
    daemons = {name: daemon(before) for name, before in VARIANTS.items()}
    jobs = {name: native_request(one.socket) for name, one in daemons.items()}
    figures: dict[str, Figure] = {name: Figure([]) for name in jobs}
    for turn in range(31):
        for name, job in jobs.items():
            value = job()
            if turn:
                figures[name].values.append(value)
            time.sleep(0.15)
    for one in daemons.values():
        one.close()
    for name, figure in figures.items():
        print(f"{name:<22} {figure} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
