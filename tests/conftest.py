"""For every test: functional tests need root and must leave the machine as they found it; a skip must say why.

The leak check compares what is attributable to a container engine before and after each functional test: mounts,
network links, nftables rules, cgroups, processes, network namespaces, folders in /run. Ends are asynchronous in the
kernel, so a difference is looked at again until a deadline. While another test session runs on the same machine, only
what descends from this one is held against a test. A test that must leave something says
``@pytest.mark.leaves("nft", ...)``.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No test asserts a wall-clock time, hypothesis' own limits included: these machines are shared.
settings.register_profile("dolium", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dolium")

os.environ["DOLIUM_WARM"] = "off"  # but where a test says otherwise

DEADLINE = 10.0
CGROUPS = "/sys/fs/cgroup"
SHARED = "dolium"  # the parent of all groups stays; it is empty between tests
PEERS = ("default", "libpod_parent")  # containerd's and podman's parents, which no OCI runtime removes; gone at the end
KINDS = ("mounts", "links", "nft", "cgroups", "run", "children", "processes", "netns")


def _mounts() -> set[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        lines = [line.split() for line in file]
    return {f"{fields[0]} {fields[4]} {fields[fields.index('-') + 1]}" for fields in lines}


def _links() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def _nft_generation() -> int:
    """The rule set's generation: it changes with every commit, so the rules are only listed when it did."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:
        netlink.sendto(struct.pack("=IHHII", 20, 0x0A10, 1, 1, 0) + b"\0\0\0\0", (0, 0))
        if select.select([netlink], [], [], 1)[0]:
            answer = netlink.recv(4096)
            if struct.unpack_from("=H", answer, 4)[0] == 0x0A0F and len(answer) >= 28:
                return int(struct.unpack_from(">I", answer, 24)[0])
    return 0


class _Nft:
    generation = -1
    rules: set[str] = set()

    @classmethod
    def read(cls) -> set[str]:
        generation = _nft_generation()
        if generation != cls.generation:
            with contextlib.suppress(FileNotFoundError):
                listed = subprocess.run(["nft", "-s", "list", "ruleset"], capture_output=True, text=True, check=False)
                cls.rules = _with_tables(listed.stdout)
            cls.generation = generation
        return cls.rules


def _with_tables(text: str) -> set[str]:
    """Each line with the table and chain it is in, so that equal rules of two chains are two."""
    lines: set[str] = set()
    table = chain = ""
    for line in text.splitlines():
        if line.startswith("table "):
            table, chain = line.rstrip(" {"), ""
            lines.add(table)
        elif line.startswith("\t") and not line.startswith("\t\t") and line.endswith("{"):
            chain = line.strip().rstrip(" {")
            lines.add(f"{table} {chain}")
        elif line.strip() not in ("", "}"):
            lines.add(f"{table} {chain} {line.strip()}")
    return lines


def _hierarchies() -> list[str]:
    if os.path.exists(f"{CGROUPS}/cgroup.controllers"):
        return [CGROUPS]
    with os.scandir(CGROUPS) as entries:
        return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]


def _cgroups() -> set[str]:
    found: set[str] = set()
    for hierarchy in _hierarchies():
        with os.scandir(hierarchy) as entries:
            tops = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for top in tops:
            name = os.path.basename(top)
            if name != SHARED and name not in PEERS:
                found.add(top)
            if SHARED in name:
                found.update(os.path.join(base, one) for base, below, _ in os.walk(top) for one in below)
    return found


def _run_folders() -> set[str]:
    found: set[str] = set()
    with os.scandir("/run") as entries:
        for entry in entries:
            # an engine calls the runtime without this session's environment: that may start a warm compiler, which stays a while
            if entry.name.startswith("dolium") and entry.name != "dolium-warm" and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    found.update(f"{entry.path}/{name}" for name in os.listdir(entry.path) if name != ".cache")
    return found


class _Process:
    __slots__ = ("name", "parent", "pid", "start", "zombie")

    def __init__(self, pid: int, text: bytes) -> None:
        after = text.rindex(b")")
        fields = text[after + 2 :].split()
        self.pid = pid
        self.name = text[text.index(b"(") + 1 : after].decode(errors="replace")
        self.zombie = fields[0] == b"Z"
        self.parent = int(fields[1])
        self.start = int(fields[19])


def _processes() -> dict[int, _Process]:
    found: dict[int, _Process] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/stat", "rb") as file:
                found[int(name)] = _Process(int(name), file.read())
    return found


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _descends(process: _Process, every: dict[int, _Process], ancestor: int) -> bool:
    for _ in range(100):
        if process.parent == ancestor:
            return True
        if process.parent not in every:
            return False
        process = every[process.parent]
    return False


def _of_an_engine(process: _Process) -> bool:
    """An orphan that an engine made: named dolium, in a group of ours, or in a pid namespace of its own."""
    if process.zombie:  # whoever adopted it reaps it when it likes
        return False
    if process.name.startswith("dolium") or "conmon" in process.name:
        return True
    with contextlib.suppress(OSError), open(f"/proc/{process.pid}/cgroup") as file:
        if f"/{SHARED}" in file.read():
            return True
    namespace = _link(f"/proc/{process.pid}/ns/pid")
    return bool(namespace) and namespace != _link("/proc/self/ns/pid")


def another_session() -> bool:
    """Does another pytest run on this machine? Then what is new need not be ours."""
    ours = {os.getpid()}
    every = _processes()
    at = every.get(os.getpid())
    while at is not None:
        ours.add(at.pid)
        at = every.get(at.parent)
    for pid, process in every.items():
        if pid in ours or _descends(process, every, os.getpid()):
            continue
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
            if {word.rsplit(b"/", 1)[-1] for word in words[:4]} & {b"pytest", b"doliumd", b"dolium.daemon"}:
                return True
    return False


class Snapshot:
    """The machine at one moment."""

    def __init__(self, previous: Snapshot | None = None) -> None:
        self.sets = {"mounts": _mounts(), "links": _links(), "nft": _Nft.read(), "cgroups": _cgroups(),
                     "run": _run_folders()}
        self.every = _processes()
        self.pids = {(process.pid, process.start) for process in self.every.values()}
        self.netns = {_link(f"/proc/{pid}/ns/net") for pid in self.every}

    def difference(self, now: Snapshot) -> dict[str, set[str]]:
        """Kind to what is in one and not in the other; only new processes and namespaces count."""
        found: dict[str, set[str]] = {}
        for kind, before in self.sets.items():
            after = now.sets[kind]
            found[kind] = {f"+{item}" for item in after - before} | {f"-{item}" for item in before - after}
        new = [process for process in now.every.values()
               if (process.pid, process.start) not in self.pids and not _is_spare(process.pid)]
        ours = [process for process in new if _descends(process, now.every, os.getpid())]
        found["children"] = {f"{process.pid} ({process.name})" for process in ours}
        found["processes"] = {f"{process.pid} ({process.name})" for process in new
                              if process not in ours and _of_an_engine(process)}
        found["netns"] = now.netns - self.netns - {""}
        return {kind: items for kind, items in found.items() if items}


def _is_spare(pid: int) -> bool:
    """A shim that a daemon which several tests share keeps for its next container: its folder tells."""
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/cwd")).startswith("spare-")
    except OSError:
        return False


def settled_difference(before: Snapshot, allowed: set[str]) -> dict[str, set[str]]:
    """What is still different at the deadline, or nothing as soon as nothing is."""
    deadline, pause = time.monotonic() + DEADLINE, 0.005
    while True:
        left = {kind: items for kind, items in before.difference(Snapshot()).items() if kind not in allowed}
        # what an earlier test's asynchronous end takes away is no leak of this one; a mount that is gone is
        left = {kind: items for kind, items in left.items()
                if kind == "mounts" or not all(item.startswith("-") for item in items)}
        if not left:
            return left
        if another_session():
            left = {kind: items for kind, items in left.items() if kind == "children"}
            if not left:
                return left
        if time.monotonic() > deadline:
            return left
        time.sleep(pause)
        pause = min(pause * 2, 0.2)


def _told(left: dict[str, set[str]]) -> str:
    return "; ".join(f"{kind}: {', '.join(sorted(items)[:6])}{' ...' if len(items) > 6 else ''}"
                     for kind, items in left.items())


@pytest.fixture(autouse=True)
def leaks_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a functional test that leaves something behind."""
    if "functional" not in request.path.parts or os.geteuid() != 0:
        yield
        return
    allowed = {kind for mark in request.node.iter_markers("leaves") for kind in mark.args}
    before = Snapshot()
    yield
    left = settled_difference(before, allowed)
    if left:
        pytest.fail(f"left behind: {_told(left)}")


@pytest.fixture(autouse=True, scope="session")
def session_leaks_nothing() -> Iterator[None]:
    """The same over the whole session, when the last daemon has been stopped."""
    if os.geteuid() != 0:
        yield
        return
    before = Snapshot()
    yield
    for group in (f"{hierarchy}/{name}" for hierarchy in _hierarchies() for name in PEERS):
        with contextlib.suppress(OSError):
            os.rmdir(group)
    left = settled_difference(before, {"netns"})
    if left:
        pytest.fail(f"the session left: {_told(left)}")


def pytest_configure(config: pytest.Config) -> None:
    """Markers of this file."""
    config.addinivalue_line("markers", f"leaves(*kinds): a functional test may leave these: {', '.join(KINDS)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Functional tests make namespaces, mounts and cgroups."""
    if os.geteuid() == 0:
        return
    for item in items:
        if "functional" in Path(item.path).parts:
            item.add_marker(pytest.mark.skip(reason="needs root: namespaces, mounts and cgroups"))


_nameless: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A skip that gives no reason is counted."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if reason.removeprefix("Skipped:").strip() in ("", "unconditional skip"):
            _nameless.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skip must name what is missing."""
    if _nameless and os.environ.get("CI") == "true":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell which ones."""
    for name in _nameless:
        terminalreporter.write_line(f"ERROR a skip without a reason: {name}")
