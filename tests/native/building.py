"""Small C programs of the tests, built with clang; the sanitizers end a program that does wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE=", "-g", "-O1", "-Wall", "-Wextra", "-Werror"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def build(folder: Path, name: str, sources: list[str], *, sanitize: bool = True) -> Path:
    """Compile ``tests/native/<name>.c`` and sources of ``native/``."""
    if shutil.which("clang") is None:
        pytest.skip("needs the package clang")
    files = [str(ROOT / "tests/native" / f"{name}.c"), *(str(ROOT / "native" / source) for source in sources)]
    subprocess.run(["clang", *FLAGS, *(SANITIZE if sanitize else []), *files, "-o", str(folder / name)], check=True)
    return folder / name


def output(program: Path, data: bytes) -> bytes:
    """What the program prints; a crash or a sanitizer's report fails the test."""
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([str(program)], input=data, capture_output=True, timeout=60, check=False, env=env)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout
