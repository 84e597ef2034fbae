"""The daemon's side of the name server: it is started when the first container needs it, told who is called what, and
watched. One that dies is started again and told everything anew; one that an earlier daemon has left is found."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dolium import faults
from dolium.errors import DoliumError, Unavailable
from dolium.network.dns import outside
from dolium.network.dns.across import Across
from dolium.network.dns.outside import Outside, OutsideTable
from dolium.network.dns.sandbox import open_sockets
from dolium.network.dns.server import LARGEST, VERSION

_log = logging.getLogger(__name__)
_READY_SECONDS = 20.0
_ANSWER_SECONDS = 10.0
_PAUSES = (0.0, 0.2, 1.0, 5.0)  # before one that died is started again: the first time, the second …
faults.register("dns.started", "dns.sandbox")


@dataclass(slots=True)
class Known:
    """A container as the server is to know it. ``namespace``: a duplicate fd, kept until the container is gone. ``names``:
    what it is called, by network's id: ``(network_name, names, address, address6)``. ``fresh``: nothing of ours was ever in
    the namespace; ``sockets``: of it, where they are open already; ``told``: the server that runs has it; ``egress``: what
    it may reach, None for everything."""

    namespace: int
    servers: list[str] | None
    names: dict[str, tuple[str, list[str], str, str]] = field(default_factory=dict)
    forward: bool = True
    fresh: bool = False
    sockets: Sequence[socket.socket] = ()
    told: bool = False
    egress: list[str] | None = None
    outside: Outside | None = None  # where it asks, when that is not its namespace's loopback

    def close(self) -> None:
        """Let go of the namespace. Idempotent."""
        for sock in self.sockets:
            sock.close()
        self.sockets = ()
        if self.namespace >= 0:
            os.close(self.namespace)
            self.namespace = -1

    def wish(self, container: str) -> dict[str, Any]:
        """As a command."""
        return {"op": "sandbox", "container": container, "servers": self.servers, "forward": self.forward,
                "egress": self.egress, "networks": [
            {"id": network, "name": name, "names": names, "address": address, "address6": address6}
            for network, (name, names, address, address6) in self.names.items()]}


class NameServer:
    """All methods are called on one event loop. What fails to reach the server is made good when it is started again."""

    def __init__(self, run_dir: str, instance: str) -> None:
        self._outside = OutsideTable(instance, f"{run_dir}/names-outside")
        self._outside_lock = asyncio.Lock()
        self._path = f"{run_dir}/dns.sock"
        self._log_path = f"{run_dir}/dns.log"
        self._known: dict[str, Known] = {}
        self._across: dict[str, Across] = {}
        self._sock: socket.socket | None = None
        self._lock = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        self._closing = False
        self._deaths = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self.pid = 0

    # -- what networks ask for --

    async def adopt(self, known: dict[str, Known]) -> None:
        """After a start of the daemon: what lives. A server without containers is ended."""
        self._known = known
        await self._lead()
        if known:
            await self.prepare()
        elif os.path.exists(self._path) and await self._connect():
            await self._end()

    async def prepare(self) -> None:
        """Have it running before somebody waits for it. A failure is logged; who needs it is told once more."""
        try:
            await self._ready()
        except (DoliumError, OSError) as error:
            _log.error("containers have no name server: %s", error)
            self._watch_later()

    async def rest(self) -> None:
        """Nobody will need it soon: it ends when no container has it."""
        async with self._lock:
            if self._sock is not None and not self._known:
                await self._end()

    async def attach(self, container: str, known: Known) -> None:
        """A container that starts, or has come into a network with names. ``known``, with its descriptors, is this one's.
        Raises Unavailable, OSError, DoliumError; then it is forgotten."""
        self._known[container] = known
        try:
            await self._ready()
            async with self._lock:
                if not known.told:  # whoever had to start the server has told it of all
                    await self._introduce(container, known)
        except BaseException:
            await self.gone(container)
            raise

    async def change(self, container: str) -> None:
        """Its networks or names have changed in ``known(container)``."""
        known = self._known[container]
        with contextlib.suppress(Unavailable):  # the watch starts another, which is told everything
            await self._say(known.wish(container))

    async def gone(self, container: str) -> None:
        """A container that has ended; idempotent."""
        known = self.forget(container)
        if known is not None:
            await self.tell_gone(container, known)

    def forget(self, container: str) -> Known | None:
        """Let go of what is kept of one that has ended: what it was, for ``tell_gone``; None when there was nothing."""
        known = self._known.pop(container, None)
        if known is not None:
            known.close()
        return known

    async def tell_gone(self, container: str, known: Known) -> None:
        """The server, of one that was forgotten; not when it is there again: what it is told then takes the old one's
        place."""
        if known.outside is not None:
            await self._lead()
        async with self._lock:
            if self._sock is not None and container not in self._known:
                with contextlib.suppress(Unavailable):
                    await self._ask({"op": "gone", "container": container})

    async def _lead(self) -> None:
        """Those who ask outside of their namespaces are led to their sockets. A failure is logged: they have no names."""
        async with self._outside_lock:
            every = [known.outside for known in self._known.values() if known.outside is not None and known.outside.port]
            try:
                await asyncio.to_thread(self._outside.write, every)
            except (OSError, DoliumError) as error:
                _log.error("containers with a network stack of their own have no name server: %s", error)

    def set_across(self, network: str, across: Across | None) -> None:
        """How an overlay's other hosts are asked for names, by the network's id; None for a network without such. For
        ``tell_across`` to say, and for every server that is started."""
        if across is None:
            self._across.pop(network, None)
        else:
            self._across[network] = across

    async def tell_across(self, network: str) -> None:
        """What was set last of a network."""
        async with self._lock:
            if self._sock is not None:
                with contextlib.suppress(Unavailable):  # the watch starts another, which is told everything
                    await self._introduce_across(network)

    def known(self, container: str) -> Known | None:
        """What the server was told."""
        return self._known.get(container)

    async def close(self) -> None:
        """The server ends when no container needs it, else it goes on."""
        self._closing = True
        if self._watching is not None:
            self._watching.cancel()
        if self._sock is not None and not self._known:
            await self._end()
        if self._sock is not None:
            self._sock.close()
        for known in self._known.values():
            known.close()
        self._let_go()

    # -- the process --

    async def _ready(self) -> None:
        """Connected to a server that has been told of all."""
        async with self._lock:
            if self._sock is not None:
                return
            for known in self._known.values():
                known.told = False
            there, across = set[str](), set[str]()
            if os.path.exists(self._path) and await self._connect():
                hello = await self._ask({"op": "hello"})
                there, across = set(hello["sandboxes"]), set(hello["across"])
            if self._sock is None:
                await asyncio.to_thread(self._spawn)
                faults.point("dns.started")
                if not await self._connect():
                    raise Unavailable("the name server does not answer", hint=f"see {self._log_path}")
            for container in there - self._known.keys():
                await self._ask({"op": "gone", "container": container})
            for network in across | self._across.keys():
                await self._introduce_across(network)
            for container, known in list(self._known.items()):
                try:
                    await self._introduce(container, known, there=container in there)
                except (OSError, DoliumError) as error:
                    _log.warning("container %s has no name server: %s", container[:12], error)
            self._watch()

    async def _connect(self) -> bool:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            return False
        self._sock = sock
        with contextlib.suppress(Unavailable):
            hello = await self._ask({"op": "hello"})
            if hello.get("version") == VERSION:
                self._hold(int(hello["pid"]))
                return True
            _log.info("a name server of version %s is replaced", hello.get("version"))
            await self._end()
        self._drop_connection()
        return False

    def _hold(self, pid: int) -> None:
        self._let_go()
        self.pid = pid
        with contextlib.suppress(OSError):  # it has ended meanwhile
            self._pidfd = os.pidfd_open(pid)

    def _let_go(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._pidfd = -1
        if self._child is not None:
            self._child.poll()

    def _spawn(self) -> None:
        """Blocks until it listens. It is nobody's: it outlives this daemon. One that hangs makes room."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        with open(self._log_path, "ab") as log:
            os.chmod(self._log_path, 0o600)
            process = subprocess.Popen(
                [sys.executable, "-I", "-m", "dolium.network.dns.server", self._path], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=log, start_new_session=True, env={"LANG": "C.UTF-8"}, cwd="/")
        assert process.stdout is not None
        with process.stdout as said:
            if not select.select([said], [], [], _READY_SECONDS)[0] or said.readline() != b"ready\n":
                process.kill()
                process.wait()
                raise Unavailable(f"the name server ended with {process.returncode} before it was ready",
                                  hint=f"see {self._log_path}")
        self._child = process

    async def _introduce(self, container: str, known: Known, *, there: bool = False) -> None:
        """Its sockets and its names, in one command; the lock is held. ``there``: the server has its sockets."""
        if there:
            await self._ask(known.wish(container))
        else:
            if known.outside is not None:
                sockets: Sequence[socket.socket] = await asyncio.to_thread(outside.open_sockets, known.outside)
                await self._lead()
            else:
                sockets = known.sockets or await asyncio.to_thread(open_sockets, known.namespace, fresh=known.fresh)
            known.sockets, known.fresh = (), False
            try:
                restricted = [known.namespace] if known.egress is not None else []
                await self._ask(known.wish(container), [*(sock.fileno() for sock in sockets), *restricted])
            finally:
                for sock in sockets:
                    sock.close()
        known.told = True
        faults.point("dns.sandbox")

    async def _introduce_across(self, network: str) -> None:
        """The lock is held. Raises Unavailable."""
        across = self._across.get(network)
        trouble = (await self._ask({"op": "across", "network": network, "across": across and across.wish()}))["trouble"]
        if trouble and across is not None:
            _log.warning("network %s: other hosts cannot ask for names here: %s; it is tried again (-o names_port= names "
                         "another, the same on all hosts)", across.name, trouble)

    async def _say(self, wish: dict[str, Any]) -> None:
        async with self._lock:
            if self._sock is None:
                raise Unavailable("there is no name server")
            await self._ask(wish)

    async def _ask(self, wish: dict[str, Any], fds: list[int] | None = None) -> dict[str, Any]:
        """One command and its answer; the lock is held, or nobody else knows the connection. Raises Unavailable."""
        sock, loop = self._sock, asyncio.get_running_loop()
        if sock is None:
            raise Unavailable("there is no name server")
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                data = json.dumps(wish).encode()
                if fds:
                    socket.send_fds(sock, [data], fds)
                else:
                    await loop.sock_sendall(sock, data)
                answer = await loop.sock_recv(sock, LARGEST)
        except (OSError, TimeoutError) as error:
            self._drop_connection()
            raise Unavailable(f"the name server does not answer: {error or 'too late'}") from error
        if not answer:
            self._drop_connection()
            raise Unavailable("the name server is gone")
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise Unavailable(f"the name server: {found['error']}")
        return found

    def _drop_connection(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._watch_later()

    async def _end(self) -> None:
        with contextlib.suppress(Unavailable):
            await self._ask({"op": "stop"})
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._child is not None:
            await asyncio.to_thread(self._child.wait)

    # -- the watch --

    def _watch(self) -> None:
        if self._watching is None or self._watching.done():
            self._watching = asyncio.get_running_loop().create_task(self._until_dead())

    def _watch_later(self) -> None:
        if self._known and not self._closing:
            self._watch()

    async def _until_dead(self) -> None:
        """Notice its end, and start another as long as somebody needs one."""
        loop = asyncio.get_running_loop()
        while not self._closing:
            if self._sock is not None:
                watched = self._sock
                await self._wait_for_end(loop)  # cancelled when this daemon ends
                if self._sock is watched:  # not that of one started since
                    self._drop_connection()
            if not self._known:
                return
            await asyncio.sleep(_PAUSES[min(self._deaths, len(_PAUSES) - 1)])
            self._deaths += 1
            _log.warning("the name server has died: it is started again")
            try:
                await self._ready()
            except (DoliumError, OSError) as error:
                _log.error("containers have no name server: %s", error)

    async def _wait_for_end(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._pidfd < 0:
            return
        fd, ended = os.dup(self._pidfd), asyncio.Event()
        loop.add_reader(fd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)
