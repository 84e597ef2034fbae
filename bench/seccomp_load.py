"""What a seccomp program costs to make and to load: ours beside libseccomp's, in order and as its binary tree, in one run.

Each load is seccomp(2) in a child of its own, timed around the call alone; the kinds take turns. Needs no rights.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "unit")]
from seccomp_reference import LIBRARY, Reference  # noqa: E402

from dolium.linux import seccomp  # noqa: E402

PROFILE = Path("/usr/share/containers/seccomp.json")
SYS_SECCOMP, PR_SET_NO_NEW_PRIVS = 317, 38


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def load_time(program: bytes) -> float:
    """Seconds that seccomp(2) takes in a fresh child."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(program)
    prog = Program(len(program) // 8, ctypes.addressof(buffer))
    near, far = os.pipe()
    child = os.fork()
    if not child:
        try:
            libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            start = time.perf_counter_ns()
            failed = libc.syscall(SYS_SECCOMP, 1, 0, ctypes.byref(prog))
            taken = time.perf_counter_ns() - start
            os.write(far, struct.pack("q", -1 if failed else taken))
        finally:
            os._exit(0)
    os.close(far)
    try:
        (taken,) = struct.unpack("q", os.read(near, 8))
    finally:
        os.close(near)
        os.waitpid(child, 0)
    if taken < 0:
        raise OSError("seccomp(2) refuses the program")
    return taken / 1e9


def line(name: str, times: list[float], extra: str = "") -> str:
    """One figure: median, minimum and maximum in microseconds, and how many."""
    values = [value * 1e6 for value in times]
    return f"{name:<40} n {len(values):>4}  median {statistics.median(values):8.1f}  min {min(values):8.1f}  max {max(values):8.1f} us{extra}"


def main() -> int:
    """Print the table."""
    if os.uname().machine != "x86_64" or LIBRARY is None or not PROFILE.exists():
        print("needs x86-64, libseccomp2 and golang-github-containers-common", file=sys.stderr)
        return 1
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    profile = seccomp.resolve_profile(json.loads(PROFILE.read_text()), set(), "amd64", (6, 1))
    makers: dict[str, Callable[[], bytes]] = {
        "ours, balanced ranges": lambda: seccomp.compile_profile(profile, "x86_64"),
        "libseccomp, in order": lambda: Reference(profile, 1).program,
        "libseccomp, binary tree": lambda: Reference(profile, 2).program,
    }
    programs = {name: make() for name, make in makers.items()}
    loads: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(count):
        for name, program in programs.items():
            loads[name].append(load_time(program))
    print(f"Docker's profile, {len(profile['architectures'])} architectures, Linux {os.uname().release}")
    for name, times in loads.items():
        print(line(f"load: {name}", times, f"  {len(programs[name]) // 8} instructions"))
    for name, make in makers.items():
        times = []
        for _ in range(20):
            start = time.perf_counter()
            make()
            times.append(time.perf_counter() - start)
        # libseccomp's figure has its text for people and the tests' ctypes in it
        print(line(f"make: {name}", times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
