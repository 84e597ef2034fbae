"""A seccomp agent for tests: takes listeners at a unix socket, and answers as it is told (seccomp_unotify(2))."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECV, SEND = 0xC0502100, 0xC0182101  # _IOWR('!', 0 and 1, of 80 and 24 bytes)
CONTINUE = 1
Answer = Callable[[int], tuple[int, int, int]]  # of a call's number: value, error (negative), flags


def go_on(number: int) -> tuple[int, int, int]:
    """Let the kernel do the call."""
    return 0, 0, CONTINUE


def fail_with(errno: int) -> Answer:
    """Give the call an error."""
    return lambda number: (0, -errno, 0)


class Agent:
    """Listens in a thread until it is closed. ``answer`` None: never answers; ``dies``: closes each listener at once;
    ``to_the_end``: the connection is to end behind the state, as the specification has it."""

    def __init__(self, path: Path, answer: Answer | None = go_on, *, dies: bool = False, to_the_end: bool = True) -> None:
        self.path = str(path)
        self.answer = answer
        self.dies = dies
        self.to_the_end = to_the_end
        self.states: list[dict[str, Any]] = []
        self.calls: list[int] = []
        self.listeners: list[int] = []
        self._ends, self._end = os.pipe()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(self.path)
        self._socket.listen(8)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *ignored: object) -> None:
        os.close(self._end)
        self._thread.join(30)
        assert not self._thread.is_alive()
        for fd in (*self.listeners, self._ends):
            os.close(fd)
        self._socket.close()

    def _take(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            data, fds, _, _ = socket.recv_fds(connection, 1 << 20, 4)
            while self.to_the_end and (more := connection.recv(1 << 20)):
                data += more
        if not data:
            return  # the start failed before
        self.states.append({**json.loads(data), "passed": len(fds)})
        for fd in fds:
            if self.dies:
                os.close(fd)
            else:
                self.listeners.append(fd)

    def _serve(self) -> None:
        while True:
            waiting = select.poll()
            for fd in (self._ends, self._socket.fileno(), *(self.listeners if self.answer else [])):
                waiting.register(fd, select.POLLIN)
            for fd, events in waiting.poll():
                if fd == self._ends:
                    return
                if fd == self._socket.fileno():
                    self._take()
                elif events & select.POLLIN:
                    self._notified(fd)
                else:  # the last process with the filter is gone; on Linux 6.1 taking a notification would wait for ever
                    self.listeners.remove(fd)
                    os.close(fd)

    def _notified(self, listener: int) -> None:
        notice = bytearray(80)
        with contextlib.suppress(FileNotFoundError):  # killed meanwhile
            fcntl.ioctl(listener, RECV, notice)
        identity, number = struct.unpack("Q8xi60x", notice)
        if not identity:
            return
        self.calls.append(number)
        assert self.answer
        with contextlib.suppress(FileNotFoundError):  # killed meanwhile
            fcntl.ioctl(listener, SEND, struct.pack("QqiI", identity, *self.answer(number)))
