"""What the engine and every level of isolation have in common: a launch's words, and the interface of a level."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from dolium.isolation.shim import Launched, Shim
    from dolium.isolation.templates import Compiled
    from dolium.steps import Timings

INIT = "init"
SLOT_ROOT_TREE, SLOT_NETWORK, SLOT_USER, SLOT_CONSOLE = 243, 230, 231, 232
USER_IN_SLOT = "/proc/self/ns/user"
"""The path of a user namespace that the launcher gives as an fd: what it names is not looked at."""


@dataclass(slots=True)
class Stdio:
    """How a process's standard streams are kept. ``stdin_once``: the first client's end of input closes stdin."""

    tty: bool = False
    stdin: bool = False
    stdin_once: bool = False
    log: str = ""
    log_max_size: int = 0
    log_max_files: int = 1


@dataclass(slots=True)
class Attachment:
    """A client's connected socket, waiting for its process. ``fd`` is owned; closed when it was handed over."""

    fd: int
    options: dict[str, Any] = field(default_factory=dict)

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(slots=True)
class Started:
    """A launched init. ``phases``: milliseconds of the executor's work, by phase."""

    shim: Shim
    launched: Launched
    phases: dict[str, float]


@dataclass(frozen=True, slots=True)
class Wish:
    """What of a container a level may not have. Each is as in Docker's HostConfig and the engine's record."""

    host: dict[str, Any]
    user: bool  # it has ids of its own
    idmapped: bool  # a mount has ids of its own, or the container a user namespace
    shared: bool  # what is mounted inside is to be seen outside
    folder: bool  # the root is a folder of the host's, not an image


class Backend(Protocol):
    """A level of isolation by one runtime: create and start as one, exec, signal, pause."""

    level: str
    runtime: str
    report_file: str
    """The file in the shim's folder with what the sandbox reports; "" when it reports nothing."""
    live: bool
    """Does what is mounted, or plugged in, from outside reach a container that runs?"""

    def check(self, wish: Wish) -> None:
        """Raises InvalidArgument for what this level cannot do, naming one that can. Makes nothing."""

    def describe(self) -> dict[str, Any]:
        """For ``inspect``: the level, the runtime, and what else tells figures apart."""

    def compile(self, identity: str, config: dict[str, Any], folder: str, *, network: bool, hidden: list[str],
                user: bool = False) -> Compiled:
        """The plan of an init whose root tree, and namespaces (``network``, ``user``), ``run`` is given as fds. ``folder``:
        the shim's. Raises as the runtime's own compiler does."""

    async def run(self, preparing: asyncio.Future[Shim], folder: str, compiled: Compiled, stdio: Stdio, *, root: int,
                  network: int, user: int = -1, attachments: list[Attachment], oom_files: list[str],
                  timings: Timings) -> Started:
        """Launch init in the sandbox's shim, which is being prepared. The attachments are taken whatever happens.

        Raises the failed operation's error; then nothing of the launch is left, the shim included.
        """

    async def exec(self, shim: Shim, folder: str, identity: str, config: dict[str, Any], process: dict[str, Any],
                   exec_id: str, *, pid: int, start_time: int, stdio: Stdio, attachments: list[Attachment]) -> Launched:
        """One more process in a running container. Raises the failed operation's error."""

    async def signal(self, shim: Shim, identity: str, number: int) -> None:
        """To init. Raises FailedPrecondition when it does not run."""

    async def freeze(self, identity: str, folders: Sequence[str], frozen: bool) -> None:
        """Pause or resume; ``folders``: the container's cgroups. Raises OSError, TimeoutError, DoliumError."""

    async def is_frozen(self, identity: str, folders: Sequence[str]) -> bool:
        """Is it paused?"""

    async def forget(self, identity: str) -> None:
        """Of a container whose shim died before it could clean up: its processes are dead, what is kept of it goes."""

    def unsupported(self, path: str) -> list[tuple[str, str]]:
        """(name, text) of the system calls that a report file says the sandbox does not have. What has grown large is
        emptied."""

    def root_of(self, identity: str, pid: int) -> int:
        """The process whose root is the container's; ``pid``: its init. Raises FailedPrecondition."""

    async def listing(self, identity: str) -> tuple[list[str], list[list[str]]] | None:
        """(titles, rows) of the programs in it, in the columns of ``ps -ef``; None when the host's ps sees them."""
