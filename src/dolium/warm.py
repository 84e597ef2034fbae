"""The warm compiler: a process that has Python, the runtime and the command line loaded, and answers fronts on a socket.

It takes bytes and gives bytes. A request carries all of its caller's context; for one, this process opens no path and
runs nothing. One serves one user, one installation and one set of namespaces (that is what its socket's name is made
of); it ends when its own files have changed, when another has taken its place, or when nobody asked for a while.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time

from dolium.cli import containers, facts, images, run, system  # noqa: F401  what is loaded now costs no call later
from dolium.linux import seccomp  # noqa: F401  a miss of the cache opens no path either
from dolium.runtime import cold, features, seccomp_cache  # noqa: F401
from dolium.runtime.wire import FRAME_LIMIT, decode_fields, frame

IDLE_SECONDS = 600.0
TICK = 2.0

Fields = dict[str, list[bytes]]
PROGRAMS = {b"dolium": facts.answer, b"dolium-runtime": cold.answer}


class Sources:
    """The files this process is made of, as they were when it read them."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}

    def changed(self) -> bool:
        """Has one been replaced? Then what is loaded is not what is installed."""
        for name, module in list(sys.modules.items()):
            path = getattr(module, "__file__", None)
            if not path or name.partition(".")[0] != "dolium":
                continue
            try:
                status = os.stat(path)
            except OSError:
                return True
            now = (status.st_ino, status.st_mtime_ns)
            if self._seen.setdefault(path, now) != now:
                return True
        return False


class Caller:
    """One front's connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._data = bytearray()
        self._unsent = b""
        self._request: Fields = {}
        self._known: Fields = {}

    def ready(self) -> bool:
        """Take what has come and answer it; False when the conversation is over."""
        try:
            if self._unsent:
                return self._send()
            data = self.sock.recv(1 << 18)
        except BlockingIOError:
            return True
        self._data += data
        size = int.from_bytes(self._data[:4], "little")
        if not data or size > FRAME_LIMIT:
            return False
        if len(self._data) < 4 or len(self._data) < 4 + size:
            return True
        fields = decode_fields(bytes(self._data[4 : 4 + size]))
        del self._data[: 4 + size]
        if self._request:
            self._known.update(fields)
        else:
            self._request = fields
        answer = PROGRAMS[self._request["program"][0]](self._request, self._known)
        self._unsent = frame(answer)
        return self._send()

    def _send(self) -> bool:
        sent = self.sock.send(self._unsent)
        self._unsent = self._unsent[sent:]
        return True

    @property
    def events(self) -> int:
        """What to wait for."""
        return select.EPOLLOUT if self._unsent else select.EPOLLIN


def _stand_apart() -> None:
    """Out of the caller's cgroups, and without what it changed for itself."""
    for number in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):  # those that cannot be caught
            signal.signal(number, signal.SIG_IGN if number == signal.SIGPIPE else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.umask(0o077)
    with contextlib.suppress(OSError):  # not allowed: it stays where it was started
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    for path, word in (*((f"{base}/cgroup.procs", b"0") for base in _hierarchies()), ("/proc/self/oom_score_adj", b"0")):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_WRONLY)
            os.write(fd, word)
            os.close(fd)


def _hierarchies() -> list[str]:
    root = "/sys/fs/cgroup"
    try:
        return [root, *(f"{root}/{name}" for name in sorted(os.listdir(root)))]
    except OSError:
        return []


def _listen(place: str) -> tuple[socket.socket, int] | None:
    """The listening socket and its file's inode; None when another compiler answers there."""
    sock = socket.socket(socket.AF_UNIX)
    fresh = f"{place}.{os.getpid()}"
    sock.bind(fresh)
    sock.listen(128)
    inode = os.stat(fresh).st_ino  # before it has the name that another may take
    try:
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(place)
        os.unlink(fresh)
        sock.close()
        return None
    except OSError:
        os.rename(fresh, place)  # in the place of one that is dead, or of none
    sock.setblocking(False)
    return sock, inode


class Worker:
    """Accepts fronts and answers them, one event at a time."""

    def __init__(self, place: str, listener: socket.socket, inode: int) -> None:
        self._place = place
        self._listener = listener
        self._inode = inode
        self._sources = Sources()
        self._callers: dict[int, Caller] = {}
        self._poll = select.epoll()
        self._poll.register(listener.fileno(), select.EPOLLIN)
        self._last = time.monotonic()

    def _stays(self) -> bool:
        try:
            mine = os.stat(self._place).st_ino == self._inode
        except OSError:
            mine = False
        return mine and (bool(self._callers) or time.monotonic() - self._last < IDLE_SECONDS)

    def _drop(self, fd: int) -> None:
        self._poll.unregister(fd)
        self._callers.pop(fd).sock.close()

    def _accept(self) -> bool:
        """False when this process is of yesterday: the front goes to the cold compiler, and the next starts a new one."""
        try:
            sock = self._listener.accept()[0]
        except OSError:
            return True
        if self._sources.changed():
            sock.close()
            return False
        sock.setblocking(False)
        self._callers[sock.fileno()] = Caller(sock)
        self._poll.register(sock.fileno(), select.EPOLLIN)
        self._last = time.monotonic()
        return True

    def _serve(self, fd: int) -> None:
        caller = self._callers[fd]
        try:
            goes_on = caller.ready()
        except Exception as error:  # noqa: BLE001  one bad request must not end the others' compiler
            print(f"dolium.warm: {error!r}", file=sys.stderr)
            goes_on = False
        if goes_on:
            self._poll.modify(fd, caller.events)
        else:
            self._drop(fd)

    def run(self) -> None:
        """Until it is not needed any more. Conversations under way are finished."""
        self._sources.changed()
        accepts = True
        while accepts or self._callers:
            events = self._poll.poll(TICK)
            for fd, _ in events:
                if fd != self._listener.fileno():
                    self._serve(fd)
                elif not self._accept():
                    accepts = False
            if accepts and not events:
                accepts = self._stays()
            if not accepts and self._listener.fileno() >= 0:
                self._poll.unregister(self._listener.fileno())
                self._leave()
                self._listener.close()

    def _leave(self) -> None:
        with contextlib.suppress(OSError):  # somebody else's by now
            if os.stat(self._place).st_ino == self._inode:
                os.unlink(self._place)


def main(place: str) -> None:
    """The program; ``place`` is the socket's path."""
    _stand_apart()
    listening = _listen(place)
    if listening is not None:
        Worker(place, *listening).run()
