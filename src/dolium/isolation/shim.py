"""The daemon's side of ``dolium-shim``: an asyncio client without threads. ``docs/shim-protocol.md`` has the messages.

A ``Spawner`` is started once per daemon; it makes shims, one per sandbox. A ``Shim`` is a connection to one of them,
made after ``spawn`` or, by ``connect``, after a crash of the daemon. Every wait has a deadline: when it passes,
``DeadlineExceeded`` is raised and what the shim does about the request is unknown until ``status``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno as errnos
import fcntl
import os
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from dolium.errors import (
    AlreadyExists,
    DeadlineExceeded,
    DoliumError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from dolium.linux.limits import OPEN_FILES
from dolium.native import program as native_program
from dolium.runtime.wire import FRAME_LIMIT, decode_fields, encode_fields, frame

if TYPE_CHECKING:
    from dolium.runtime.wire import Value

VERSION = 1
DEADLINE = 10.0
LAUNCH_DEADLINE = 120.0  # a launch runs hooks, which have time limits of their own
MFD_EXEC = 0x10

Fields: TypeAlias = dict[str, list[bytes]]
_T = TypeVar("_T")

_ERRORS: dict[int, type[DoliumError]] = {
    errnos.ENOENT: NotFound,
    errnos.ESRCH: FailedPrecondition,
    errnos.EBUSY: FailedPrecondition,
    errnos.ENOTTY: FailedPrecondition,
    errnos.EEXIST: AlreadyExists,
    errnos.EINVAL: InvalidArgument,
    errnos.EPERM: PermissionDenied,
    errnos.EACCES: PermissionDenied,
    errnos.ENOMEM: ResourceExhausted,
    errnos.ENOSPC: ResourceExhausted,
    errnos.EDQUOT: ResourceExhausted,
    errnos.EMFILE: ResourceExhausted,
    errnos.ENFILE: ResourceExhausted,
    errnos.EAGAIN: ResourceExhausted,
    errnos.ENOSYS: Unimplemented,
    errnos.EPROTO: Unimplemented,
    errnos.ETIMEDOUT: DeadlineExceeded,
}


@dataclass(frozen=True, slots=True)
class ShimHandle:
    """A shim as its state file names it. ``start_time`` is in clock ticks after boot."""

    dir: str
    id: str
    pid: int
    start_time: int
    boot_id: str
    nonce: str


@dataclass(frozen=True, slots=True)
class Launched:
    """A process that runs. ``microseconds`` has one number per operation of the plan."""

    pid: int
    start_time: int
    started_at_ns: int
    microseconds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """How a process ended. ``exit_code`` is 128 + ``signal`` when a signal ended it; times are CLOCK_REALTIME.

    ``oom``: the kernel killed something in its cgroups for want of memory while it ran. ``after_exit_error`` is what
    went wrong in the plan's after-exit operations: empty when they ran and none failed, None when nobody says so; only the
    event has it.
    """

    id: str
    pid: int
    start_time: int
    exit_code: int
    signal: int
    oom: bool
    started_at_ns: int
    exited_at_ns: int
    after_exit_error: str | None = None


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """A process the shim knows. ``state``: new (mentioned, not launched), running, exiting, exited."""

    state: str
    record: ExitRecord

    @property
    def id(self) -> str:
        return self.record.id


@dataclass(frozen=True, slots=True)
class Exited:
    """Event: a process is dead, its output is read, its log and exit record are written, its clean-up has run."""

    record: ExitRecord


@dataclass(frozen=True, slots=True)
class Detached:
    """Event: an attached client typed the detach keys. ``client`` is the number ``attach`` gave."""

    id: str
    client: int


@dataclass(frozen=True, slots=True)
class Closed:
    """Event, the last one: the connection is gone. The shim may live; ``Shim.connect`` tells."""

    reason: str


Event: TypeAlias = Exited | Detached | Closed


class _Channel:
    """Frames over a non-blocking unix stream socket, fds with the first byte of their frame. Never blocks the loop."""

    def __init__(self, sock: socket.socket, received: Callable[[Fields], None], closed: Callable[[str], None]) -> None:
        self._sock = sock
        self._received = received
        self._closed = closed
        self._in = bytearray()
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._read)

    @property
    def open(self) -> bool:
        return self._sock.fileno() >= 0

    def send(self, fields: Mapping[str, Value], fds: Sequence[int] = ()) -> None:
        """Queue a frame. The fds are duplicated: the caller may close its own at once."""
        if not self.open:
            raise Unavailable("the connection to the shim is closed")
        data = frame(encode_fields(fields))
        self._out.append((memoryview(data), [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in fds]))
        if len(self._out) == 1:
            self._write()

    def _write(self) -> None:
        while self._out:
            data, fds = self._out[0]
            try:
                sent = socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._write)
                return
            except OSError as error:
                self.close(f"send: {error.strerror}")
                return
            for fd in fds:
                os.close(fd)
            if sent < len(data):
                self._out[0] = (data[sent:], [])
            else:
                self._out.popleft()
        self._loop.remove_writer(self._sock.fileno())

    def _read(self) -> None:
        try:
            data = self._sock.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(f"receive: {error.strerror}")
            return
        if not data:
            self.close("the shim closed the connection")
            return
        self._in += data
        while self.open and len(self._in) >= 4:
            size = int.from_bytes(self._in[:4], "little")
            if size > FRAME_LIMIT:
                self.close("a frame is too large")
                return
            if len(self._in) < 4 + size:
                return
            body = bytes(self._in[4 : 4 + size])
            del self._in[: 4 + size]
            try:
                fields = decode_fields(body)
            except ValueError as error:
                self.close(str(error))
                return
            self._received(fields)

    def close(self, reason: str) -> None:
        """Idempotent. ``closed`` is called once, with the reason."""
        if not self.open:
            return
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _, fds in self._out:
            for fd in fds:
                os.close(fd)
        self._out.clear()
        self._closed(reason)


class Spawner:
    """The one process that forks shims. ``start`` before use; shims outlive it and this object."""

    def __init__(self, program: str | None = None, env: Mapping[str, str] | None = None) -> None:
        self._program = program
        self._env = dict(env or {})
        self._channel: _Channel | None = None
        self._waiting: deque[asyncio.Future[Fields]] = deque()
        self._gone: asyncio.Future[None] | None = None
        self.pid = 0

    async def start(self, cgroup_procs: Sequence[str] = ()) -> None:
        """Start it, outside this session and in the cgroups whose ``cgroup.procs`` files are given.

        Raises NotFound without the program, PermissionDenied and the like when a cgroup cannot be joined.
        """
        with contextlib.ExitStack() as ends, contextlib.ExitStack() as fails:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            fails.callback(ours.close)
            ends.callback(theirs.close)
            image = _sealed_image(self._program or native_program("dolium-shim"))
            ends.callback(os.close, image)
            # Out of the way of fd 3, which the spawner is given.
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (theirs.fileno(), image)]
            for fd in high:
                ends.callback(os.close, fd)
            try:
                self.pid = os.posix_spawn(
                    f"/proc/self/fd/{high[1]}", ["dolium-shim", "--spawner", *cgroup_procs], self._env,
                    file_actions=[(os.POSIX_SPAWN_DUP2, high[0], 3)],
                )
            except OSError as error:
                raise Internal(f"start dolium-shim: {error.strerror}", errno=error.errno) from error
            fails.pop_all()
        with contextlib.suppress(ProcessLookupError):  # ended already: below it is told why
            OPEN_FILES.give_to(self.pid)  # before it is asked for a shim
        self._reap_later(os.pidfd_open(self.pid))
        ready = self._expect()
        self._channel = _Channel(ours, self._received, self._closed)
        try:
            _raise_error(await _within(ready, DEADLINE, "the spawner did not start"), "start the spawner")
        except DoliumError:
            await self.close()
            raise

    def _reap_later(self, pidfd: int) -> None:
        loop = asyncio.get_running_loop()
        gone = self._gone = loop.create_future()

        def ended() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            if not gone.done():
                gone.set_result(None)

        loop.add_reader(pidfd, ended)

    def _expect(self) -> asyncio.Future[Fields]:
        future: asyncio.Future[Fields] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return future

    def _received(self, fields: Fields) -> None:
        future = self._waiting.popleft() if self._waiting else None
        if future is not None and not future.done():
            future.set_result(fields)

    def _closed(self, reason: str) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_exception(Unavailable(f"the spawner is gone: {reason}"))
        self._waiting.clear()

    async def spawn(self, id: str, dir: str) -> ShimHandle:
        """Make a shim that lives in ``dir`` (absolute, existing, its own). Raises Unavailable without a spawner."""
        if self._channel is None or not self._channel.open:
            raise Unavailable("the spawner is not running")
        nonce, boot_id = os.urandom(16).hex(), _boot_id()
        self._channel.send({"id": id, "dir": dir, "nonce": nonce, "boot_id": boot_id})
        answer = await _within(self._expect(), DEADLINE, f"the spawner did not make a shim for {id}")
        _raise_error(answer, f"make a shim for {id}")
        return ShimHandle(dir, id, _number(answer, "pid"), _number(answer, "start_time"), boot_id, nonce)

    async def close(self) -> None:
        """End the spawner and wait until it is reaped. Its shims live on."""
        if self._channel is not None:
            self._channel.close("closed")
        if self._gone is not None and not self._gone.done():
            try:
                await _within(self._gone, DEADLINE, "the spawner did not end")
            except DeadlineExceeded:
                os.kill(self.pid, signal.SIGKILL)
                raise


class Shim:
    """A connection to one shim. Made by ``connect``; a newer connection to the same shim ends an older one."""

    def __init__(self, handle: ShimHandle, on_event: Callable[[Event], None]) -> None:
        self.handle = handle
        self.processes: dict[str, ProcessInfo] = {}  # as `hello` found them; not kept up to date
        self._on_event = on_event
        self._channel: _Channel | None = None
        self._greeted = False
        self._waiting: dict[int, asyncio.Future[Fields]] = {}
        self._number = 0

    @classmethod
    async def connect(cls, dir: str, on_event: Callable[[Event], None], deadline: float = DEADLINE) -> Shim:
        """Say hello to the shim in ``dir`` and check that it is the one its state file names.

        Raises NotFound without a state file, Unavailable when that shim is dead (or from before a reboot).
        """
        handle = read_state(dir)
        if not is_alive(handle):
            raise Unavailable(f"the shim of {handle.id} is dead")
        shim = cls(handle, on_event)
        with contextlib.ExitStack() as undo:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(sock.close)
            sock.setblocking(False)
            # Through the folder's fd, since sun_path holds 108 bytes. Connecting to a unix socket never waits here: a
            # full queue is EAGAIN.
            folder = os.open(dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, folder)
            try:
                sock.connect(f"/proc/self/fd/{folder}/shim.sock")
            except OSError as error:
                raise Unavailable(f"connect to the shim of {handle.id}: {error.strerror}", errno=error.errno) from error
            peer, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if peer != handle.pid or uid not in (0, os.geteuid()):
                raise Unavailable(f"process {peer} listens in place of the shim of {handle.id}")
            shim._channel = _Channel(sock, shim._received, shim._closed)
            undo.pop_all()
            os.close(folder)
        try:
            answer = await shim._request("hello", {"version": VERSION, "nonce": handle.nonce}, deadline=deadline)
            if (_number(answer, "pid"), _number(answer, "start_time")) != (handle.pid, handle.start_time):
                raise Unavailable(f"the shim in {dir} is not the one its state file names")
            if not shim.connected:
                raise Unavailable(f"the shim of {handle.id} closed the connection")
        except BaseException:
            shim.close()
            raise
        shim._greeted = True
        shim.processes = _processes(answer)
        return shim

    def taken(self, dir: str, on_event: Callable[[Event], None]) -> Shim:
        """This shim, whose folder was renamed to ``dir``, with another receiver of its events."""
        self.handle = replace(self.handle, dir=dir, id=os.path.basename(dir))
        self._on_event = on_event
        return self

    @property
    def connected(self) -> bool:
        return self._channel is not None and self._channel.open

    def close(self) -> None:
        """Drop the connection. The shim lives on."""
        if self._channel is not None:
            self._channel.close("closed")

    async def launch(
        self,
        id: str,
        plan: bytes,
        *,
        tty: bool = False,
        stdin: bool = False,
        stdin_once: int = 0,
        log: str = "",
        log_max_size: int = 20 << 20,
        log_max_files: int = 5,
        oom_files: Sequence[str] = (),
        after_exit: bytes = b"",
        fds: Mapping[int, int] | None = None,
        deadline: float = LAUNCH_DEADLINE,
    ) -> Launched:
        """Run a plan; ``id`` is new or only attached to so far.

        ``stdin_once``: 0 an attached client's end of input leaves the container's stdin open, 1 it closes it, 2 the
        last client's does. ``after_exit``: a plan of AFTER_EXIT operations, run when it has ended. ``fds`` maps slots of the
        plan to this process's fds. ``log_max_size`` 0 = never rotated.
        Raises the error of the plan's failed operation, its text as the message and its ``errno``; nothing is left.
        """
        passed = fds or {}
        answer = await self._request(
            "launch",
            {
                "id": id, "plan": plan, "tty": int(tty), "stdin": int(stdin), "stdin_once": int(stdin_once), "log": log,
                "log_max_size": log_max_size, "log_max_files": log_max_files, "oom_files": list(oom_files),
                "after_exit": after_exit, "fd_slots": [str(slot) for slot in passed],
            },
            list(passed.values()),
            deadline,
        )
        times = tuple(int(value) for value in answer.get("microseconds", []))
        return Launched(_number(answer, "pid"), _number(answer, "start_time"), _number(answer, "started_at_ns"), times)

    async def attach(
        self,
        id: str,
        fd: int,
        *,
        stdin: bool = False,
        stdout: bool = True,
        stderr: bool = True,
        mux: bool = False,
        detach_keys: bytes = b"",
        exit_frame: bool = False,
        late: bool = False,
    ) -> int:
        """Give the shim a connected stream socket (it keeps a duplicate); returns the client's number.

        Before ``launch`` of ``id`` too. ``mux``: Docker's 8-byte frames, else raw bytes. ``late``: the client's stream ends
        with the shim (``end``), not with the process; or when this connection is lost. Raises FailedPrecondition when the
        process has exited.
        """
        answer = await self._request(
            "attach",
            {
                "id": id, "stdin": int(stdin), "stdout": int(stdout), "stderr": int(stderr), "mux": int(mux),
                "detach_keys": detach_keys, "exit_frame": int(exit_frame), "late": int(late),
            },
            [fd],
        )
        return _number(answer, "client")

    async def resize(self, id: str, rows: int, columns: int) -> None:
        """Set the terminal's size. Raises FailedPrecondition without a terminal or when it is not running."""
        await self._request("resize", {"id": id, "rows": rows, "columns": columns})

    async def signal(self, id: str, number: int) -> None:
        """Signal the process by its pidfd. Raises FailedPrecondition when it is not running."""
        await self._request("signal", {"id": id, "signal": number})

    async def forget(self, id: str) -> None:
        """Drop an exited process and its exit file. Idempotent; raises FailedPrecondition when it runs."""
        with contextlib.suppress(NotFound):
            await self._request("forget", {"id": id})

    async def end(self) -> None:
        """End the shim; its socket and state file go. Raises FailedPrecondition when a process runs."""
        await self._request("end", {})

    async def _request(
        self, type: str, fields: Mapping[str, Value], fds: Sequence[int] = (), deadline: float = DEADLINE
    ) -> Fields:
        if self._channel is None:
            raise Unavailable(f"no connection to the shim of {self.handle.id}")
        self._number += 1
        number = self._number
        future: asyncio.Future[Fields] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._channel.send({"request": number, "type": type, **fields}, fds)
            answer = await _within(future, deadline, f"the shim of {self.handle.id} did not answer {type}")
        finally:
            self._waiting.pop(number, None)
        _raise_error(answer, "")
        return answer

    def _received(self, fields: Fields) -> None:
        if "event" not in fields:
            future = self._waiting.get(_number(fields, "answer"))
            if future is not None and not future.done():
                future.set_result(fields)
            return
        event = _text(fields, "event")
        if event == "exited":
            self._on_event(Exited(_exit_record(fields)))
        elif event == "detached":
            self._on_event(Detached(_text(fields, "id"), _number(fields, "client")))

    def _closed(self, reason: str) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Unavailable(f"the shim of {self.handle.id} is gone: {reason}"))
        if self._greeted:
            self._on_event(Closed(reason))


def list_shims(root: str) -> list[ShimHandle]:
    """The shims whose folders are in ``root``, alive or dead; folders without a readable state file are left out."""
    found = []
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return []
    for name in names:
        with contextlib.suppress(NotFound):
            found.append(read_state(os.path.join(root, name)))
    return found


def read_state(dir: str) -> ShimHandle:
    """The state file of a shim's folder. Raises NotFound when it is absent or another version's, unreadable to us."""
    fields = _read_fields(os.path.join(dir, "shim.state"))
    if fields is None or _number(fields, "version") != VERSION:
        raise NotFound(f"no shim lives in {dir}")
    return ShimHandle(dir, _text(fields, "id") or os.path.basename(dir), _number(fields, "pid"),
                      _number(fields, "start_time"), _text(fields, "boot_id"), _text(fields, "nonce"))


def read_exit(dir: str, id: str) -> ExitRecord | None:
    """The exit record on disk, for when the shim is dead. None when the process has not exited under that shim."""
    fields = _read_fields(os.path.join(dir, f"exit.{id}"))
    return None if fields is None else _exit_record(fields)


def is_alive(handle: ShimHandle) -> bool:
    """Does that very process still run? (boot id, pid and start time; a zombie is dead)"""
    if handle.boot_id != _boot_id():
        return False
    try:
        with open(f"/proc/{handle.pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return len(fields) > 19 and int(fields[19]) == handle.start_time and fields[0] not in (b"Z", b"X")


def _read_fields(path: str) -> Fields | None:
    try:
        with open(path, "rb") as file:
            return decode_fields(file.read())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _sealed_image(path: str) -> int:
    """A sealed copy in memory, so that nothing can change the program that joins containers (CVE-2019-5736)."""
    try:
        with open(path, "rb") as file:
            data = memoryview(file.read())
    except OSError as error:
        raise NotFound(f"read {path}: {error.strerror}", errno=error.errno) from error
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create("dolium-shim", flags | MFD_EXEC)
    except OSError:  # before Linux 6.3 the flag is unknown and execution always allowed
        fd = os.memfd_create("dolium-shim", flags)
    while data:
        data = data[os.write(fd, data) :]
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


async def _within(future: asyncio.Future[_T], deadline: float, message: str) -> _T:
    try:
        async with asyncio.timeout(deadline):
            return await future
    except TimeoutError:
        raise DeadlineExceeded(f"{message} within {deadline:g} s") from None


def _raise_error(fields: Fields, what: str) -> None:
    if "error" not in fields:
        return
    number = _number(fields, "errno")
    text = _text(fields, "error")
    if what:
        text = f"{what}: {text}: {os.strerror(number)}"
    raise _ERRORS.get(number, Internal)(text, errno=number)


def _text(fields: Fields, key: str) -> str:
    values = fields.get(key)
    return values[0].decode("utf-8", "surrogateescape") if values else ""


def _number(fields: Fields, key: str) -> int:
    try:
        return int(_text(fields, key) or "0")
    except ValueError as error:
        raise Internal(f"the shim's {key} is not a number") from error


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _exit_record(fields: Fields) -> ExitRecord:
    return ExitRecord(
        _text(fields, "id"), _number(fields, "pid"), _number(fields, "start_time"), _number(fields, "exit_code"),
        _number(fields, "signal"), _number(fields, "oom") != 0, _number(fields, "started_at_ns"),
        _number(fields, "exited_at_ns"), _text(fields, "after_exit_error") if "after_exit_error" in fields else None,
    )


def _processes(fields: Fields) -> dict[str, ProcessInfo]:
    found = {}
    for value in fields.get("process", []):
        one = decode_fields(value)
        found[_text(one, "id")] = ProcessInfo(_text(one, "state"), _exit_record(one))
    return found
