"""The process level: namespaces, by our own runtime. A launch is compiled here and executed by the sandbox's shim."""

from __future__ import annotations

import asyncio
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

from dolium.errors import NotFound
from dolium.isolation.base import INIT, SLOT_NETWORK, SLOT_ROOT_TREE, SLOT_USER, Attachment, Started, Stdio, Wish
from dolium.isolation.launcher import Launcher
from dolium.isolation.shim import Launched, Shim
from dolium.isolation.templates import Compiled, Templates
from dolium.linux.cgroup import manage, tree
from dolium.runtime import plan as P
from dolium.runtime import seccomp_cache
from dolium.runtime.cgroups import remove
from dolium.runtime.compile import Launch, compile_container, compile_exec
from dolium.runtime.facts import ENOENT, Facts
from dolium.runtime.plan import Plan
from dolium.runtime.spec import validate
from dolium.steps import Timings

PROFILES_KEPT, EXEC_PLANS_KEPT = 256, 64


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


class ProcessIsolation:
    """Implements the backend interface (create and start as one, exec, signal, adopt, delete) with namespaces."""

    level, runtime, live, report_file = "process", "dolium", True, ""

    def __init__(self, launcher: Launcher, layout: tree.Layout, cache: str) -> None:
        """``cache``: folder of compiled profiles."""
        self._launcher = launcher
        self._layout = layout
        self._cache = cache
        self._programs: dict[str, bytes] = {}
        self._profiles: dict[int, tuple[dict[str, Any], bytes]] = {}  # by identity: most containers have the same one
        self._templates = Templates()
        self._exec_plans: dict[tuple[object, ...], bytes] = {}

    def check(self, wish: Wish) -> None:
        """See ``Backend``: there is nothing it cannot do."""

    def describe(self) -> dict[str, Any]:
        """See ``Backend``."""
        return {"Isolation": self.level, "Runtime": self.runtime}

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

    def compile(self, identity: str, config: dict[str, Any], folder: str, *, network: bool, hidden: list[str],
                user: bool = False) -> Compiled:
        """See ``Backend``."""
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

    async def run(self, preparing: asyncio.Future[Shim], folder: str, compiled: Compiled, stdio: Stdio, *, root: int,
                  network: int, user: int = -1, attachments: list[Attachment], oom_files: list[str],
                  timings: Timings) -> Started:
        """See ``Backend``."""
        fds = {slot: fd for slot, fd in ((SLOT_ROOT_TREE, root), (SLOT_NETWORK, network), (SLOT_USER, user)) if fd >= 0}
        return await self._launcher.run(preparing, folder, compiled, stdio, fds=fds, attachments=attachments,
                                        oom_files=oom_files, timings=timings)

    async def exec(self, shim: Shim, folder: str, identity: str, config: dict[str, Any], process: dict[str, Any],
                   exec_id: str, *, pid: int, start_time: int, stdio: Stdio, attachments: list[Attachment]) -> Launched:
        """See ``Backend``."""
        try:
            with open(f"/proc/{pid}/cgroup") as file:
                groups = file.read()
        except OSError as error:
            raise NotFound(f"the init of {identity} is gone") from error
        plan = self._exec_plan(identity, config, process, pid, start_time, groups)
        return await self._launcher.exec(shim, exec_id, plan, stdio, attachments)

    async def signal(self, shim: Shim, identity: str, number: int) -> None:
        """See ``Backend``."""
        await shim.signal(INIT, number)

    async def freeze(self, identity: str, folders: Sequence[str], frozen: bool) -> None:
        """See ``Backend``."""
        await asyncio.to_thread(manage.freeze, list(folders), frozen)

    async def is_frozen(self, identity: str, folders: Sequence[str]) -> bool:
        """See ``Backend``."""
        found = manage.freezer_file(list(folders))
        if found is None:
            return False
        with open(found[0]) as file:
            return file.read().strip() == found[1]

    async def forget(self, identity: str) -> None:
        """See ``Backend``: nothing is kept."""

    def unsupported(self, path: str) -> list[tuple[str, str]]:
        """See ``Backend``: what is not there is the host's kernel's to say."""
        return []

    def root_of(self, identity: str, pid: int) -> int:
        """See ``Backend``."""
        return pid

    async def listing(self, identity: str) -> tuple[list[str], list[list[str]]] | None:
        """See ``Backend``."""
        return None

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
