"""Builds the C programs with ziglang (static musl) into ``src/dolium/_native`` and copies the seccomp profile in.

Run as a program by ``make``, and by hatchling as a build hook of ``pip install .``.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "native"
OUT = ROOT / "src" / "dolium" / "_native"
DATA = ROOT / "src" / "dolium" / "data"

EXECUTOR = ["executor/plan.c", "executor/fields.c", "executor/launch.c", "executor/paths.c",
            "executor/ops_parent.c", "executor/ops_mount.c", "executor/ops_process.c"]
PROGRAMS: dict[str, list[str]] = {
    "dolium-front": [*EXECUTOR, "front/*.c"],
    "dolium-shim": [*EXECUTOR, "shim/*.c"],
    "dolium-untar": ["untar/*.c"],
}
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE=", "-Os", "-Wall", "-Wextra", "-Werror", "-Wshadow", "-fno-sanitize=all",
         "-static", "-s"]

# Where Debian's golang-github-containers-common puts Docker's default profile (Apache-2.0).
SECCOMP_PROFILES = (Path("/usr/share/containers/seccomp.json"), Path("/etc/containers/seccomp.json"))


def compiler() -> list[str]:
    """The command that compiles: ``ziglang`` from PyPI, so that no compiler need be on the machine."""
    target = {"x86_64": "x86_64-linux-musl", "aarch64": "aarch64-linux-musl"}[platform.machine()]
    return [sys.executable, "-m", "ziglang", "cc", "-target", target]


def sources(patterns: list[str]) -> list[Path]:
    """The C files of one program."""
    return sorted(path for pattern in patterns for path in NATIVE.glob(pattern))


def build(force: bool = False, only: list[str] | None = None) -> list[str]:
    """Compile what is older than its sources (of the programs named, or all); returns the names of what was built."""
    OUT.mkdir(parents=True, exist_ok=True)
    built = []
    headers = [*NATIVE.rglob("*.h"), *NATIVE.rglob("*.def"), Path(__file__)]
    newest_header = max(path.stat().st_mtime for path in headers)
    for name, patterns in PROGRAMS.items():
        files = sources(patterns)
        if only and name not in only:
            continue
        if not files or (patterns[-1].startswith("shim/") and not sources(patterns[-1:])):
            continue
        target = OUT / name
        newest = max(newest_header, *(path.stat().st_mtime for path in files))
        if not force and target.exists() and target.stat().st_mtime >= newest:
            continue
        fresh = OUT / f".{name}.{os.getpid()}"
        subprocess.run([*compiler(), *FLAGS, *map(str, files), "-o", str(fresh)], check=True)
        fresh.rename(target)
        built.append(name)
    return built


def copy_profile() -> None:
    """Docker's default seccomp profile, from the Debian package that ships it; its absence is an error at run time."""
    for path in SECCOMP_PROFILES:
        if path.exists():
            DATA.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, DATA / "seccomp.json")
            return


def second_name() -> Path:
    """The front once more: its name tells it whom it serves, and a wheel's scripts have one name each."""
    path = NATIVE / "build" / "dolium"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.hardlink_to(OUT / "dolium-front")
    return path


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by make before hatchling is installed
    pass
else:

    class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
        """``pip install .`` builds the C programs too."""

        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Compile, and mark the wheel as one for this machine only."""
            build()
            copy_profile()
            build_data["pure_python"] = False
            machine = platform.machine()
            build_data["tag"] = f"py3-none-linux_{machine}"
            if version != "editable":
                build_data["shared_scripts"] = {str(OUT / "dolium-front"): "dolium-runtime", str(second_name()): "dolium"}


if __name__ == "__main__":
    words = sys.argv[1:]
    names = build("--force" in words, [word for word in words if word != "--force"])
    copy_profile()
    print("built " + ", ".join(names) if names else "native programs are up to date")
