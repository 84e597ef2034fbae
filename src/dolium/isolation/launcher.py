"""The shims of one daemon: made, kept ready, given plans to launch, adopted and ended. Every level launches by them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from dolium.errors import DoliumError, NotFound, Unavailable
from dolium.isolation import shim as shims
from dolium.isolation.base import INIT, Attachment, Started, Stdio
from dolium.isolation.shim import Event, Launched, Shim, ShimHandle, Spawner
from dolium.isolation.spares import Spares
from dolium.isolation.templates import Compiled
from dolium.runtime import plan as P
from dolium.runtime.plan import Plan
from dolium.steps import Timings

_log = logging.getLogger(__name__)

# Which phase of a start an operation belongs to, for people; by the operation's name.
_PHASES = {
    "cgroup": ("cg_mkdir", "cg_write", "cg_join", "cg_bpf_devices"),
    "namespaces": ("clone", "ns_open", "ns_join", "unshare", "become_root", "proc_write", "hostname",
                   "domainname", "sysctl", "loopback", "enter_time"),
    "exec": ("exec", "seccomp", "seccomp_listener", "capabilities", "drop_bounding", "user", "find_executable", "cwd",
             "no_new_privs", "rlimit", "umask", "keep_caps", "keyring", "setsid", "stdio", "console"),
    "hooks": ("hook",),
}
_PHASE_OF = {name: phase for phase, names in _PHASES.items() for name in names}


def phases_of(plan: Plan, microseconds: Sequence[int]) -> dict[str, float]:
    """Milliseconds by phase: cgroup, namespaces, root file system, exec, hooks."""
    sums: dict[str, float] = {}
    for op, spent in zip(plan.ops, microseconds, strict=False):
        if op.stage in (P.AFTER_EXIT, P.ON_FAILURE):
            continue
        phase = _PHASE_OF.get(op.name, "root file system")
        sums[phase] = sums.get(phase, 0.0) + spent / 1000
    return {phase: round(value, 3) for phase, value in sums.items()}


async def _attached(shim: Shim, process: str, attachments: list[Attachment], launch: Awaitable[Launched]) -> Launched:
    """A launch with its clients. The requests are sent at once, in this order, and answered so: a client is there before
    the process. One that cannot be is told by the end of its connection, as it is when it comes too late."""
    attached = [asyncio.ensure_future(shim.attach(process, one.fd, **one.options)) for one in attachments]
    launched = asyncio.ensure_future(launch)
    try:
        for client in attached:
            try:
                await client
            except DoliumError as error:
                _log.warning("a client of %s: %s", process, error)
        return await launched
    finally:
        launched.cancel()


class Launcher:
    """Makes shims and hands them plans."""

    def __init__(self, shims: str, discard: Callable[[str], object]) -> None:
        """``shims``: the folder that has the shims' folders; ``discard``: takes a folder away, if it is there."""
        self._discard = discard
        self._spawner = Spawner()
        self._groups: list[str] = []
        self._spares = Spares(shims, self._make)

    async def start(self, group_files: Sequence[str]) -> None:
        """Start the spawner, in the cgroups whose ``cgroup.procs`` files are given."""
        self._groups = list(group_files)
        await self._spawner.start(group_files)

    def prepare_spares(self) -> None:
        """Have shims ready from now on, in the background."""
        self._spares.fill()

    async def close(self) -> None:
        """End the spawner and the spare shims; the others live on."""
        await self._spares.close()
        await self._spawner.close()

    def prepare(self, folder: str, on_event: Callable[[Event], None]) -> asyncio.Future[Shim]:
        """The sandbox's shim, waiting for a launch; its folder is there when this returns. The future raises Unavailable."""
        self._discard(folder)
        loop = asyncio.get_running_loop()
        spare = self._spares.take(folder, on_event)
        if spare is None:
            os.mkdir(folder, 0o700)
            return loop.create_task(self._make(folder, on_event))
        ready: asyncio.Future[Shim] = loop.create_future()
        ready.set_result(spare)
        return ready

    async def _make(self, folder: str, on_event: Callable[[Event], None]) -> Shim:
        """In a folder that exists. Raises Unavailable; then there is no shim."""
        made: ShimHandle | None = None
        try:
            try:
                made = await self._spawner.spawn("", folder)
            except Unavailable:
                # the spawner was killed: one more, then again
                self._spawner = Spawner()
                await self._spawner.start(self._groups)
                made = await self._spawner.spawn("", folder)
            return await Shim.connect(folder, on_event)
        except BaseException as error:
            if made is not None:
                # it has never heard from us, so it would not end by itself; it was born a moment ago, and the pid is its own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(made.pid, signal.SIGKILL)
            if isinstance(error, OSError):
                raise Unavailable(f"prepare a shim: {error.strerror}", errno=error.errno) from error
            raise

    async def run(self, preparing: asyncio.Future[Shim], folder: str, compiled: Compiled, stdio: Stdio, *,
                  fds: Mapping[int, int], attachments: list[Attachment], oom_files: list[str], timings: Timings,
                  explain: Callable[[DoliumError], DoliumError] = lambda error: error) -> Started:
        """Launch init in the sandbox's shim, which is being prepared. The attachments are taken whatever happens.

        ``fds``: by the plan's slots; ``explain``: what is raised for an error, asked while the shim's folder is there.
        Raises the failed operation's error; then nothing of the launch is left, the shim included.
        """
        try:
            with timings.step("shim"):
                shim = await asyncio.shield(preparing)  # who is cancelled ends it by ``end``
        except BaseException:
            for attachment in attachments:
                attachment.close()
            raise
        try:
            begun = time.perf_counter()
            launched = await _attached(shim, INIT, attachments, shim.launch(
                INIT, compiled.encoded, tty=stdio.tty, stdin=stdio.stdin, stdin_once=int(stdio.stdin_once), log=stdio.log,
                log_max_size=stdio.log_max_size, log_max_files=stdio.log_max_files, oom_files=oom_files,
                after_exit=compiled.after_exit, fds=fds))
        except DoliumError as error:
            told = explain(error)
            await self.end(shim, folder)
            raise told from (error if told is not error else None)
        finally:
            for attachment in attachments:
                attachment.close()
        # What the executor's operations do not account for: messages, clone3 and the processes' waits for each other.
        phases = phases_of(compiled.plan, launched.microseconds)
        phases["waits"] = round((time.perf_counter() - begun) * 1000 - sum(phases.values()), 3)
        return Started(shim, launched, phases)

    async def end(self, shim: Shim | None, folder: str) -> None:
        """End a shim whose processes are gone, and remove its folder. Idempotent; a dead shim is fine."""
        if shim is not None:
            with contextlib.suppress(DoliumError):
                await shim.end()
            shim.close()
        self._discard(folder)

    async def exec(self, shim: Shim, exec_id: str, plan: bytes, stdio: Stdio, attachments: list[Attachment],
                   fds: Mapping[int, int] | None = None) -> Launched:
        """Launch one more process by a plan. The attachments are taken whatever happens. Raises the failed operation's
        error; then the shim does not know the process any more."""
        try:
            return await _attached(shim, exec_id, attachments, shim.launch(
                exec_id, plan, tty=stdio.tty, stdin=stdio.stdin, stdin_once=int(stdio.stdin_once), fds=fds))
        except DoliumError:
            with contextlib.suppress(DoliumError):
                await shim.forget(exec_id)
            raise
        finally:
            for attachment in attachments:
                attachment.close()

    async def adopt(self, folder: str, on_event: Callable[[Event], None], *, patient: bool) -> Shim:
        """Connect to a shim that an earlier daemon made; ``patient``: it may be in the middle of an exec. Raises NotFound or
        Unavailable when it is dead, DeadlineExceeded."""
        return await Shim.connect(folder, on_event, shims.LAUNCH_DEADLINE if patient else shims.DEADLINE)

    def kill_shim(self, folder: str) -> None:
        """Kill the shim that a folder names, if it is that very process. Idempotent."""
        try:
            handle = shims.read_state(folder)
        except NotFound:
            return
        if shims.is_alive(handle):
            with contextlib.suppress(ProcessLookupError):
                os.kill(handle.pid, signal.SIGKILL)
