"""The house: imports go down the floors only; modules stay short; the cold path stays cold; the rooms say their purpose."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "dolium"
GROUND = {"errors", "steps", "units", "policy", "native", "faults"}
FLOORS = [{"cli"}, {"api"}, {"build", "bench"}, {"engine"}, {"images", "network", "volumes", "isolation"}, {"runtime"},
          {"linux"}, GROUND]
ROOTS = {"daemon", "warm", "__init__"}
MODULES = sorted(path for path in SOURCE.rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def level(name: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if name in floor)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "dolium")
    return {name for name in found if name.startswith("dolium.") and name != "dolium.__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own in ROOTS:
        return
    for name in imports(path):
        other = room(name)
        if other in (own, "__init__") or (own in GROUND and other in GROUND):
            continue
        assert level(other) > level(own), f"{path.name} ({own}) imports {name}"


def test_modules_are_short_and_say_what_they_are() -> None:
    for path in MODULES:
        text = path.read_text()
        assert len(text.splitlines()) <= 800, path
        assert ast.get_docstring(ast.parse(text)), path


def test_c_sources_are_short() -> None:
    for path in [*ROOT.glob("native/*/*.c"), *ROOT.glob("native/*/*.h")]:
        assert len(path.read_text().splitlines()) <= 800, path


# The wire to the front, JSON, and what the interpreter itself brings without site.
COLD = {"json", "json.decoder", "json.encoder", "json.scanner", "_json", "_blake2", "re", "re._casefix", "re._compiler",
        "re._constants", "re._parser", "enum", "types", "functools", "collections", "operator", "_operator", "keyword",
        "reprlib", "_collections_abc", "_collections", "_functools", "_sre", "copyreg", "itertools"}


def test_the_cold_path_imports_nothing_more() -> None:
    """json itself brings re, enum and collections; dolium's own modules add nothing of the library to it."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import json; before = set(sys.modules); "
            "import dolium.runtime.cold as cold; from dolium.runtime.facts import Facts; "
            "cold.answer({'argv': [b'dolium-runtime', b'list'], 'env': [], 'uid': [b'0'], 'now': [b'0'], "
            "'machine': [b'x86_64']}, {'list:/run/dolium-runtime': [b'2']}); "
            "from dolium.runtime.seccomp_cache import digest; digest({}, 'x86_64'); "
            "print(*sorted(name for name in set(sys.modules) - before if not name.startswith('dolium')))")
    done = subprocess.run([sys.executable, "-I", "-S", "-E", "-c", code, str(ROOT / "src")], capture_output=True, text=True,
                          check=True)
    assert set(done.stdout.split()) <= {"_blake2", "__future__"}
    code = "import sys; before = set(sys.modules); import json; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-I", "-S", "-E", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= COLD


def test_the_clients_start_path_imports_no_asyncio_http_or_sqlite() -> None:
    code = "import dolium.cli.main, dolium.cli.run, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    for name in ("asyncio", "http", "http.client", "sqlite3", "aiohttp", "argparse", "subprocess", "socket"):
        assert name not in done.stdout.split()


@pytest.mark.parametrize("folder", ["cli", "runtime"])
def test_nobody_looks_at_the_process_itself(folder: str) -> None:
    """A warm process serves callers whose environment is not its own: only these read argv, environ, cwd, streams."""
    allowed = {"cli/context.py", "cli/__main__.py", "runtime/cold.py"}
    for path in (SOURCE / folder).rglob("*.py"):
        if str(path.relative_to(SOURCE)) in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                if name in ("os.environ", "os.getcwd", "sys.argv", "os.getenv"):
                    pytest.fail(f"{path}:{node.lineno} reads {name}")


def test_every_skip_of_a_package_is_of_this_list() -> None:
    """make installs what the tests need: the lists exist and name packages only."""
    for name in ("debian-packages.txt", "debian-packages-test.txt"):
        lines = [line for line in (ROOT / "packaging" / name).read_text().splitlines() if not line.startswith("#")]
        assert lines
        assert all(line.strip() and os.sep not in line for line in lines)
