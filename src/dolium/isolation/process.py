"""The process level: namespaces, by our own runtime. A launch is compiled here and executed by the sandbox's shim."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import platform
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dolium.errors import DoliumError, NotFound, Unavailable
from dolium.isolation import shim as shims
from dolium.isolation.shim import Event, Launched, Shim, ShimHandle, Spawner
from dolium.isolation.spares import Spares
from dolium.isolation.templates import Compiled, Templates
from dolium.linux.cgroup import tree
from dolium.runtime import plan as P
from dolium.runtime import seccomp_cache
from dolium.runtime.cgroups import remove
from dolium.runtime.compile import Launch, compile_container, compile_exec
from dolium.runtime.facts import ENOENT, Facts
from dolium.runtime.plan import Plan
from dolium.runtime.spec import validate
from dolium.steps import Timings

_log = logging.getLogger(__name__)
INIT = "init"
SLOT_ROOT_TREE, SLOT_NETWORK, SLOT_USER = 243, 230, 231
USER_IN_SLOT = "/proc/self/ns/user"
"""The path of a user namespace that the launcher gives as an fd: what it names is not looked at."""


class HostFacts(Facts):
    """Facts read from this machine at once: the daemon asks nobody."""

    def _get(self, query: str) -> tuple[int, list[bytes]]:
        kind, _, path = query.partition(":")
        try:
            if kind == "stat":
                info = os.stat(path)
                return 0, [f"{info.st_mode} {info.st_uid} {info.st_gid} {info.st_rdev}".encode()]
            if kind == "read":
                with open(path, "rb") as file:
                    return 0, [file.read()]
            if kind == "list":
                return 0, [os.fsencode(name) for name in os.listdir(path)]
        except OSError as error:
            return error.errno or ENOENT, []
        raise ValueError(query)

    def want(self, *queries: str) -> None:
        """Nothing to fetch ahead."""


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


PROFILES_KEPT, EXEC_PLANS_KEPT = 256, 64

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


class ProcessIsolation:
    """Implements the backend interface (create and start as one, exec, signal, adopt, delete) with namespaces."""

    def __init__(self, layout: tree.Layout, cache: str, shims: str,
                 discard: Callable[[str], object]) -> None:
        """``cache``: folder of compiled profiles; ``shims``: the folder that has the shims' folders; ``discard``: takes a
        folder away, if it is there.
        """
        self._discard = discard
        self._layout = layout
        self._cache = cache
        self._spawner = Spawner()
        self._programs: dict[str, bytes] = {}
        self._profiles: dict[int, tuple[dict[str, Any], bytes]] = {}  # by identity: most containers have the same one
        self._groups: list[str] = []
        self._templates = Templates()
        self._exec_plans: dict[tuple[object, ...], bytes] = {}
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

    def seccomp(self, profile: dict[str, Any] | None) -> bytes | None:
        """The compiled program of a profile, from memory, from disk, or made and kept."""
        if profile is None:
            return None
        if id(profile) in self._profiles:
            return self._profiles[id(profile)][1]
        key = seccomp_cache.digest(profile, platform.machine(), platform.release())
        if key not in self._programs:
            compiled, path = seccomp_cache.program(profile, platform.machine(), HostFacts(), self._cache,
                                                   os.geteuid())
            if path is not None:
                os.makedirs(self._cache, mode=0o700, exist_ok=True)
                beside = f"{path}.{os.getpid()}"
                with open(beside, "wb") as file:
                    file.write(compiled)
                os.rename(beside, path)
            self._programs[key] = compiled
        if len(self._profiles) > PROFILES_KEPT:
            self._profiles.clear()
        self._profiles[id(profile)] = profile, self._programs[key]
        return self._programs[key]

    def _check(self, config: dict[str, Any]) -> None:
        """Validate, but not a profile that was compiled before."""
        linux = config.get("linux") or {}
        if id(linux.get("seccomp")) in self._profiles:
            config = {**config, "linux": {key: value for key, value in linux.items() if key != "seccomp"}}
        validate(config)

    def compile(self, identity: str, config: dict[str, Any], *, network: bool, hidden: list[str],
                user: bool = False) -> Compiled:
        """The plan of an init whose root tree, and namespaces (``network``, ``user``), the launcher puts in slots."""
        facts = HostFacts()
        profile = (config.get("linux") or {}).get("seccomp")
        program = self.seccomp(profile)
        loaded = json.dumps({key: value for key, value in (profile or {}).items() if key != "syscalls"})

        def anew() -> Plan:
            self._check(config)
            launch = Launch(identity, "/", self._layout)
            launch.stdio = True
            launch.root_in_slot = True
            launch.hidden = hidden
            launch.seccomp = program
            if network:
                launch.joined["network"] = SLOT_NETWORK
            if user:
                launch.joined["user"] = SLOT_USER
            plan = compile_container(config, facts, launch)
            remove(plan, P.AFTER_EXIT, self._layout.paths(config["linux"]["cgroupsPath"]))
            return plan

        return self._templates.get(identity, config, facts, (program, loaded, network, user, *hidden), anew)

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

    async def run(self, preparing: asyncio.Future[Shim], folder: str, compiled: Compiled, stdio: Stdio, *, root: int,
                  network: int, user: int = -1, attachments: list[Attachment], oom_files: list[str],
                  timings: Timings) -> Started:
        """Launch init in the sandbox's shim, which is being prepared. The attachments are taken whatever happens.

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
            fds = {SLOT_ROOT_TREE: root}
            for slot, fd in ((SLOT_NETWORK, network), (SLOT_USER, user)):
                if fd >= 0:
                    fds[slot] = fd
            begun = time.perf_counter()
            launched = await _attached(shim, INIT, attachments, shim.launch(
                INIT, compiled.encoded, tty=stdio.tty, stdin=stdio.stdin, stdin_once=int(stdio.stdin_once), log=stdio.log,
                log_max_size=stdio.log_max_size, log_max_files=stdio.log_max_files, oom_files=oom_files,
                after_exit=compiled.after_exit, fds=fds))
        except DoliumError:
            await self.end(shim, folder)
            raise
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

    async def exec(self, shim: Shim, identity: str, config: dict[str, Any], process: dict[str, Any], exec_id: str, *,
                   pid: int, start_time: int, stdio: Stdio, attachments: list[Attachment]) -> Launched:
        """One more process in a running container. Raises the failed operation's error."""
        try:
            with open(f"/proc/{pid}/cgroup") as file:
                groups = file.read()
        except OSError as error:
            raise NotFound(f"the init of {identity} is gone") from error
        plan = self._exec_plan(identity, config, process, pid, start_time, groups)
        try:
            return await _attached(shim, exec_id, attachments, shim.launch(
                exec_id, plan, tty=stdio.tty, stdin=stdio.stdin, stdin_once=int(stdio.stdin_once)))
        except DoliumError:
            with contextlib.suppress(DoliumError):
                await shim.forget(exec_id)
            raise
        finally:
            for attachment in attachments:
                attachment.close()

    def _exec_plan(self, identity: str, config: dict[str, Any], process: dict[str, Any], pid: int, start_time: int,
                   groups: str) -> bytes:
        """Encoded. What asks for the same again and again, as health checks do, has it compiled once."""
        program = self.seccomp((config.get("linux") or {}).get("seccomp"))
        key = (identity, pid, start_time, groups, json.dumps(process), program)
        plan = self._exec_plans.pop(key, None)
        if plan is None:
            launch = Launch(identity, "/", self._layout)
            launch.stdio = True
            launch.seccomp = program
            if any(entry["type"] == "network" for entry in config["linux"]["namespaces"]):
                launch.joined["network"] = SLOT_NETWORK
            folders = tree.parse_membership(groups, self._layout)
            plan = compile_exec(config, process, HostFacts(), pid, start_time, launch, folders).encode()
        self._exec_plans[key] = plan
        if len(self._exec_plans) > EXEC_PLANS_KEPT:
            del self._exec_plans[next(iter(self._exec_plans))]
        return plan

    async def adopt(self, folder: str, on_event: Callable[[Event], None]) -> Shim:
        """Connect to a shim that an earlier daemon made. Raises NotFound or Unavailable when it is dead."""
        return await Shim.connect(folder, on_event)

    def kill_shim(self, folder: str) -> None:
        """Kill the shim that a folder names, if it is that very process. Idempotent."""
        try:
            handle = shims.read_state(folder)
        except NotFound:
            return
        if shims.is_alive(handle):
            with contextlib.suppress(ProcessLookupError):
                os.kill(handle.pid, signal.SIGKILL)
