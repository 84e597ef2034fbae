"""What the shim's tests share: hand-made plans, a spawner with its shims, the near end of an attached socket.

``DOLIUM_SHIM`` names another build of the program (a sanitizer build, say).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from dolium.isolation.shim import (
    VERSION,
    Event,
    Exited,
    ExitRecord,
    ProcessInfo,
    Shim,
    ShimHandle,
    Spawner,
    _processes,
    is_alive,
)
from dolium.native import init_program
from dolium.runtime import plan as p

needs_root = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts and namespaces"),
    pytest.mark.skipif(not os.path.exists("/bin/busybox"), reason="needs busybox-static"),
]

DEADLINE = 60.0
NEWNS, NEWPID, NEWUTS, NEWIPC = 0x20000, 0x20000000, 0x4000000, 0x8000000
REC_SLAVE = 0x4000 | 0x80000
PRIVATE = 1 << 18
ENV = ["PATH=/bin", "TERM=dumb"]
MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rootfs")
    for name in ("bin", "dev/pts", "proc", "tmp"):
        (root / name).mkdir(parents=True)
    (root / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (root / "bin/busybox").chmod(0o755)
    subprocess.run(["chroot", str(root), "/bin/busybox", "--install", "-s", "/bin"], check=True)
    (root / "bin/tini").write_bytes(Path(init_program()).read_bytes())
    (root / "bin/tini").chmod(0o755)
    for name, minor in (("null", 3), ("zero", 5)):
        os.mknod(root / "dev" / name, 0o20666, os.makedev(1, minor))
    os.mknod(root / "dev/tty", 0o20666, os.makedev(5, 0))
    return root


async def status(shim: Shim) -> dict[str, ProcessInfo]:
    """The processes that the shim knows now, by id: what it answers to one more hello."""
    return _processes(await shim._request("hello", {"version": VERSION, "nonce": shim.handle.nonce}))


def container(rootfs: Path, argv: list[str], *, tty: bool = False, cgroup: str = "", pidns: bool = True) -> p.Plan:
    """A new container with its own mounts, pids and names."""
    plan = p.Plan()
    plan.add(p.PARENT_BEFORE_CLONE, "open_tree", "open the root", 1, str(rootfs), 1, 1)
    plan.add(p.PARENT_BEFORE_CLONE, "mount_attr", "cut the root off a shared mount", 1, 0, 0, PRIVATE, 1, -1)
    if cgroup:
        plan.add(p.PARENT_BEFORE_CLONE, "open_path", "open the cgroup", 2, f"{cgroup}/cgroup.procs", os.O_WRONLY)
    flags = NEWNS | NEWUTS | NEWIPC | (NEWPID if pidns else 0)
    plan.add(p.PARENT_BEFORE_CLONE, "clone", "clone the container", flags, 0)
    if cgroup:
        plan.add(p.CHILD_BEFORE_PIVOT, "cg_join", "join the cgroup", 2)
    plan.add(p.CHILD_BEFORE_PIVOT, "propagation", "make mounts slaves", REC_SLAVE)
    plan.add(p.CHILD_BEFORE_PIVOT, "root_attach", "attach the root", 1)
    plan.add(p.CHILD_BEFORE_PIVOT, "mount_fs", "mount proc on /proc", "proc", "proc", [], 0, "/proc", 0)
    options = ["newinstance", "ptmxmode=0666", "mode=0620"]
    plan.add(p.CHILD_BEFORE_PIVOT, "mount_fs", "mount devpts on /dev/pts", "devpts", "devpts", options, 0, "/dev/pts",
             0)
    if tty:
        plan.add(p.CHILD_BEFORE_PIVOT, "setsid", "new session")
        plan.add(p.CHILD_BEFORE_PIVOT, "console", "make the terminal", -1, 24, 80)
    else:
        plan.add(p.CHILD_BEFORE_PIVOT, "stdio", "standard streams", p.SLOT_STDIN, p.SLOT_STDOUT, p.SLOT_STDERR)
    plan.add(p.CHILD_AFTER_PIVOT, "pivot", "pivot_root", 0)
    _program(plan, argv)
    return plan


def joined(pid: int, argv: list[str], *, tty: bool = False) -> p.Plan:
    """An exec: the namespaces of a running container."""
    plan = p.Plan()
    kinds = (("ipc", NEWIPC), ("uts", NEWUTS), ("pid", NEWPID), ("mnt", NEWNS))
    for slot, (name, kind) in enumerate(kinds, 3):
        plan.add(p.PARENT_BEFORE_CLONE, "ns_open", f"open the {name} namespace", slot, f"/proc/{pid}/ns/{name}", kind)
        plan.add(p.PARENT_BEFORE_CLONE, "ns_join", f"join the {name} namespace", slot, kind)
    plan.add(p.PARENT_BEFORE_CLONE, "clone", "clone into the container", 0, 0)
    plan.add(p.CHILD_AFTER_PIVOT, "setsid", "new session")
    if tty:
        plan.add(p.CHILD_AFTER_PIVOT, "console", "make the terminal", -1, 24, 80)
    else:
        plan.add(p.CHILD_AFTER_PIVOT, "stdio", "standard streams", p.SLOT_STDIN, p.SLOT_STDOUT, p.SLOT_STDERR)
    _program(plan, argv)
    return plan


def _program(plan: p.Plan, argv: list[str]) -> None:
    plan.add(p.CHILD_AFTER_PIVOT, "cwd", "change to /", "/")
    plan.add(p.CHILD_AFTER_PIVOT, "find_executable", f"find {argv[0]}", argv[0], ENV)
    plan.add(p.AFTER_START, "exec", f"run {argv[0]}", argv[0], argv, ENV)


class Bench:
    """A spawner and the shims made through it; what events came."""

    def __init__(self, base: Path, rootfs: Path) -> None:
        self.base = base
        self.rootfs = rootfs
        env = {name: os.environ[name] for name in os.environ if name.endswith("SAN_OPTIONS")}
        self.spawner = Spawner(os.environ.get("DOLIUM_SHIM"), env)
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.handles: list[ShimHandle] = []
        self.connections: list[Shim] = []

    async def spawn(self, id: str = "s1") -> Shim:
        folder = self.base / id
        folder.mkdir(exist_ok=True)
        self.handles.append(await self.spawner.spawn(id, str(folder)))
        return await self.connect(id)

    async def connect(self, id: str = "s1") -> Shim:
        shim = await Shim.connect(str(self.base / id), self.events.put_nowait)
        self.connections.append(shim)
        return shim

    async def exited(self, id: str) -> ExitRecord:
        """The exit event of a process; events of others are put back."""
        event = await self.event(lambda event: isinstance(event, Exited) and event.record.id == id)
        assert isinstance(event, Exited)
        return event.record

    async def event(self, wanted: Callable[[Event], bool]) -> Event:
        others: list[Event] = []
        try:
            async with asyncio.timeout(DEADLINE):
                while True:
                    event = await self.events.get()
                    if wanted(event):
                        return event
                    others.append(event)
        finally:
            for other in others:
                self.events.put_nowait(other)

    def sh(self, script: str, **options: bool | str) -> bytes:
        return container(self.rootfs, ["sh", "-c", script], **options).encode()  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def bench(base: Path, rootfs: Path) -> AsyncIterator[Bench]:
    it = Bench(base, rootfs)
    await it.spawner.start()
    try:
        yield it
    finally:
        for client in Client.all:
            client.sock.close()
        Client.all.clear()
        for shim in it.connections:
            shim.close()
        await it.spawner.close()
        for handle in it.handles:
            if is_alive(handle):
                _kill_shim(handle)
        for log in base.glob("*/shim.log"):
            print(log, log.read_text())


def _kill_shim(handle: ShimHandle) -> None:
    children = Path(f"/proc/{handle.pid}/task/{handle.pid}/children").read_text().split()
    for pid in map(int, children):
        os.kill(pid, signal.SIGKILL)
    os.kill(handle.pid, signal.SIGKILL)


@pytest.fixture
def run(tmp_path: Path, rootfs: Path) -> Callable[[Callable[[Bench], Awaitable[None]]], None]:
    def runner(body: Callable[[Bench], Awaitable[None]]) -> None:
        async def main() -> None:
            async with bench(tmp_path, rootfs) as it:
                await body(it)

        asyncio.run(main())

    return runner


Run = Callable[[Callable[[Bench], Awaitable[None]]], None]


class Client:
    """The near end of an attached socket."""

    all: list[Client] = []

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.all.append(self)
        self.sock = sock
        self.number = number
        self.seen = b""
        sock.setblocking(False)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    async def read(self) -> bytes:
        async with asyncio.timeout(DEADLINE):
            data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
        self.seen += data
        return data

    async def until(self, wanted: bytes) -> bytes:
        while wanted not in self.seen:
            assert await self.read(), f"ended after {self.seen!r}"
        return self.seen

    async def rest(self) -> bytes:
        """All that was not asked for by `until`, to the end."""
        while await self.read():
            pass
        self.sock.close()
        return self.seen


async def attach(shim: Shim, id: str, **options: bool | bytes) -> Client:
    ours, theirs = socket.socketpair()
    with theirs:
        number = await shim.attach(id, theirs.fileno(), **options)  # type: ignore[arg-type]
    return Client(ours, number)


def frames(data: bytes) -> list[tuple[int, bytes]]:
    out = []
    while data:
        size = int.from_bytes(data[4:8], "big")
        assert data[1:4] == b"\0\0\0" and len(data) >= 8 + size
        out.append((data[0], data[8 : 8 + size]))
        data = data[8 + size :]
    return out


def streams(data: bytes) -> dict[int, bytes]:
    out: dict[int, bytes] = {}
    for number, payload in frames(data):
        out[number] = out.get(number, b"") + payload
    return out


async def until(condition: Callable[[], bool]) -> None:
    """Until what no event tells is so, within the deadline."""
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.01)


def log_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
