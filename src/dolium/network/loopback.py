"""The daemon's side of the relay (relay.py): started when a port is first published at ::1, watched, and taken over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
import subprocess
import sys

from dolium.errors import Unavailable

_log = logging.getLogger(__name__)
ADDRESS = "::1"
_BACKLOG = 128
_READY_SECONDS = 20.0
_RETIRE_SECONDS = 5.0
_PAUSES = (0.0, 0.2, 1.0, 5.0)  # before one that died is started again: the first time, the second …


class Loopback:
    """Of one instance. Methods are called on one event loop, but for ``port``."""

    def __init__(self, table: str, run_dir: str) -> None:
        """``table``: the firewall's."""
        self._table, self._path, self._log_path = table, f"{run_dir}/relay.sock", f"{run_dir}/relay.log"
        self._listener: socket.socket | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._spawning: asyncio.Future[None] | None = None

    @property
    def port(self) -> int:
        """Of ::1, where connections wait until the relay takes them. Raises OSError."""
        if self._listener is None:
            sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                sock.bind((ADDRESS, 0))
                sock.listen(_BACKLOG)
            except BaseException:
                sock.close()
                raise
            self._listener = sock
        return int(self._listener.getsockname()[1])

    @property
    def pid(self) -> int:
        """Of the relay; 0 while there is none."""
        return self._child.pid if self._child is not None else 0

    @property
    def asked(self) -> bool:
        """Is there to be a relay?"""
        return self._keeping is not None

    def wanted(self) -> None:
        """A port leads from ::1 to a container: from now on there is a relay."""
        if self._keeping is None:
            self._keeping = asyncio.get_running_loop().create_task(self._keep())

    async def unwanted(self) -> None:
        """At a start without such ports: what an earlier daemon has left ends."""
        if os.path.exists(self._path):
            await asyncio.to_thread(self._retire)

    async def _keep(self) -> None:
        deaths = 0
        while True:
            try:
                self._spawning = asyncio.ensure_future(asyncio.to_thread(self._spawn))
                await asyncio.shield(self._spawning)
                await self._end()
                _log.warning("the relay of ::1 has died: it is started again")
            except (OSError, Unavailable) as error:
                _log.error("published ports cannot be reached at ::1: %s", error)
            await asyncio.sleep(_PAUSES[min(deaths, len(_PAUSES) - 1)])
            deaths += 1

    async def _end(self) -> None:
        """When the child has ended."""
        assert self._child is not None
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        fd = os.pidfd_open(self._child.pid)
        try:
            loop.add_reader(fd, ended.set)
            await ended.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)
        self._child.wait()

    def _retire(self) -> None:
        """An earlier daemon's takes no more connections, and ends with its last one."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, contextlib.suppress(OSError):
            sock.settimeout(_RETIRE_SECONDS)
            sock.connect(self._path)
            sock.recv(1)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _spawn(self) -> None:
        """Blocks until it takes connections. It is nobody's: it outlives this daemon. Raises OSError, Unavailable."""
        self._retire()
        self.port  # noqa: B018 (there is a socket)
        assert self._listener is not None
        with open(self._log_path, "ab") as log:
            os.chmod(self._log_path, 0o600)
            child = self._child = subprocess.Popen(
                [sys.executable, "-I", "-m", "dolium.network.relay", str(self._listener.fileno()), self._table, self._path],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True, cwd="/",
                env={"LANG": "C.UTF-8"}, pass_fds=[self._listener.fileno()])
        assert child.stdout is not None
        with child.stdout as said:
            if not select.select([said], [], [], _READY_SECONDS)[0] or said.readline() != b"ready\n":
                child.kill()
                child.wait()
                raise Unavailable(f"the relay ended with {child.returncode} before it was ready",
                                  hint=f"see {self._log_path}")

    async def close(self, *, keep: bool) -> None:
        """``keep``: containers that live have ports, and it goes on."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping, *([self._spawning] if self._spawning is not None else [])])
        if self._child is not None and not keep:
            self._child.kill()
            await asyncio.to_thread(self._child.wait)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
