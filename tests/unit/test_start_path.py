"""What the other house tests leave: C sources stay short, the client's start path stays light, make knows its packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_c_sources_are_short() -> None:
    for path in [*ROOT.glob("native/*/*.c"), *ROOT.glob("native/*/*.h")]:
        assert len(path.read_text().splitlines()) <= 800, path


def test_the_clients_start_path_imports_no_asyncio_http_or_sqlite() -> None:
    code = "import dolium.cli.main, dolium.cli.run, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    for name in ("asyncio", "http", "http.client", "sqlite3", "aiohttp", "argparse", "subprocess", "socket"):
        assert name not in done.stdout.split()


def test_make_names_its_packages() -> None:
    """make installs what the tests need: the lists exist and name packages only."""
    for name in ("debian-packages.txt", "debian-packages-test.txt"):
        lines = [line for line in (ROOT / "packaging" / name).read_text().splitlines() if not line.startswith("#")]
        assert lines
        assert all(line.strip() and os.sep not in line for line in lines)
