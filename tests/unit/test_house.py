"""Each floor imports only from floors below it; rooms of one floor do not import each other. And what keeps it readable."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src/dolium"

FLOORS = [
    {"errors", "steps", "units", "policy", "native", "faults", "memory", "trash", "depth", "settings",
     "__init__"},
    {"linux"},
    {"runtime"},
    {"images", "network", "volumes", "isolation"},
    {"engine"},
    {"build", "bench"},
    {"api"},
    {"cli"},
]
COMPOSITION = {"daemon", "warm", "mirror"}  # they put the house together, nobody imports them
# The ground is one room; api's shared files belong to all its rooms.
SHARED = {"dolium.api.hijack", "dolium.api.native", "dolium.api.store", "dolium.api.live", "dolium.api"}


def floor_of(room: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if room in rooms:
            return number
    raise AssertionError(f"src/dolium/{room} is in no floor of tests/unit/test_house.py")


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = list(path.relative_to(SOURCE.parent).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found.append((".".join(parts), path))
    return found


def room_of(module: str) -> str:
    """``images`` of dolium.images.store; ``api.docker`` of dolium.api.docker.app; ``errors`` of dolium.errors."""
    parts = module.split(".")
    if len(parts) == 1:
        return "__init__"
    if parts[1] == "api" and len(parts) > 2:
        return f"api.{parts[2]}"
    return parts[1]


def imports(path: Path, module: str) -> list[tuple[str, int]]:
    """(module, line) of every import of dolium's own, wherever it stands."""
    every = {name for name, _ in modules()}
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            base = node.module or ""
            found += [(f"{base}.{alias.name}" if f"{base}.{alias.name}" in every else base, node.lineno)
                      for alias in node.names]
    return [(name, line) for name, line in found if name.split(".")[0] == "dolium"]


def test_no_module_looks_up_or_sideways() -> None:
    wrong = []
    for module, path in modules():
        room = room_of(module)
        if room in COMPOSITION:
            continue
        for name, line in imports(path, module):
            other = room_of(name)
            where = f"{path.relative_to(SOURCE.parents[1])}:{line}: {room} imports {name}"
            if other in COMPOSITION:
                wrong.append(f"{where}: only a program starts with that")
                continue
            below, here = floor_of(other.split(".")[0]), floor_of(room.split(".")[0])
            if below > here:
                wrong.append(f"{where}: that is {below - here} floors up")
            elif below == here and here > 0 and other != room and name not in SHARED and module not in SHARED:
                wrong.append(f"{where}: another room of the same floor")
    assert wrong == []


def test_the_checker_sees_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from dolium.engine import engine\ndef f():\n    import dolium.errors\n")
    assert imports(bad, "dolium.linux.bad") == [("dolium.engine.engine", 1), ("dolium.errors", 3)]
    assert floor_of("engine") > floor_of("linux") and room_of("dolium.api.docker.app") == "api.docker"


CONTEXT = {("sys", name) for name in ("stdin", "stdout", "stderr", "argv")} | {
    (module, name) for module in ("os", "posix")
    for name in ("environ", "environb", "getenv", "getcwd", "getcwdb", "umask")}


@pytest.mark.parametrize("folder", ["runtime", "cli"])
def test_the_callers_context_is_never_read_here(folder: str) -> None:
    """A request carries it: reading it here would be the worker's own, not the caller's."""
    allowed = {"runtime/cold.py": {"stdout"},  # flushes its own streams before it ends
               "cli/context.py": {"environ", "getcwd", "stdout", "stderr", "argv"}}
    wrong = []
    for path in sorted((SOURCE / folder).glob("*.py")):
        name = f"{folder}/{path.name}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                read = (node.value.id, node.attr)
                if read in CONTEXT and read[1] not in allowed.get(name, set()):
                    wrong.append(f"{name}:{node.lineno}: {read[0]}.{read[1]}")
            elif isinstance(node, ast.ImportFrom) and node.module in ("os", "sys"):
                wrong.append(f"{name}:{node.lineno}: from {node.module} import")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("input",):
                wrong.append(f"{name}:{node.lineno}: {node.func.id}()")
    assert wrong == []


@pytest.mark.parametrize("folder", ["runtime", "linux"])
def test_the_pure_part_opens_no_path(folder: str) -> None:
    """The compiler asks for facts. Where the kernel is really called is listed."""
    real = {"linux/syscalls.py", "linux/seccomp.py", "linux/cgroup/manage.py", "linux/dbus.py",
            "linux/cgroup/systemd_calls.py", "linux/criu_calls.py", "linux/link_calls.py", "linux/notify_calls.py", "runtime/cold.py",
            "linux/loop.py", "linux/disk_file.py", "linux/live_mounts.py", "linux/quota.py", "linux/verity.py",
            "linux/user_namespaces.py"}
    wrong = []
    for path in sorted((SOURCE / folder).rglob("*.py")):
        name = str(path.relative_to(SOURCE))
        if name in real:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
                wrong.append(f"{name}:{node.lineno}: open()")
            if isinstance(node, ast.Import) and {alias.name for alias in node.names} & {"os", "subprocess", "pathlib", "socket"}:
                wrong.append(f"{name}:{node.lineno}: {[alias.name for alias in node.names]}")
    assert wrong == []


def test_modules_are_of_a_size_a_person_reads() -> None:
    long = [(str(path.relative_to(SOURCE)), count) for path in SOURCE.rglob("*.py")
            if (count := len(path.read_text().splitlines())) >= 800]
    assert long == []


def test_c_stays_small() -> None:
    native = SOURCE.parents[1] / "native"
    assert sum(len(path.read_text().splitlines()) for path in native.rglob("*.[ch]")) < 6000


def test_no_package_imports_everything_in_its_init() -> None:
    for path in SOURCE.rglob("__init__.py"):
        tree = ast.parse(path.read_text())
        assert not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body
                       if not (isinstance(node, ast.ImportFrom) and node.module == "__future__")), path


def test_every_module_says_what_it_is() -> None:
    without = [str(path.relative_to(SOURCE)) for _, path in modules() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert without == []


def test_no_test_sleeps_or_looks_at_the_clock() -> None:
    """But where it says how long it polls at most."""
    allowed = re.compile(r"deadline|until|pause|poll", re.IGNORECASE)
    wrong = []
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            around = "\n".join(lines[max(0, number - 12) : number + 6])
            if re.search(r"\btime\.sleep\(", line) and not allowed.search(around) and path.name != Path(__file__).name:
                wrong.append(f"{path.name}:{number + 1}: {line.strip()}")
    assert wrong == []


def test_no_mode_is_given_by_name() -> None:
    """fchmodat follows links: what a container shares with us it could exchange for one, between two calls."""
    assert [str(path) for path in (SOURCE.parents[1] / "native").rglob("*.c") if "fchmodat(" in path.read_text()] == []
