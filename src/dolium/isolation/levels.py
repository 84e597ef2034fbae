"""Which level of isolation a container has, and by which runtime: Docker's --isolation and --runtime, daemon.json, PATH."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dolium import policy
from dolium.errors import DoliumError, FailedPrecondition, InvalidArgument, Unimplemented
from dolium.isolation.base import Backend
from dolium.isolation.launcher import Launcher
from dolium.isolation.oci import OciIsolation, Runtime
from dolium.isolation.process import ProcessIsolation
from dolium.linux.cgroup import tree
from dolium.settings import daemon_json

_log = logging.getLogger(__name__)
OWN = "dolium"
KNOWN = ("runc", "crun", "runsc")
"""Runtimes that are there when they are installed, by their programs' names."""
LEVELS = ("process", "gvisor", "vm")
_SANDBOX = "runsc"
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
_IDENTITY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Declared:
    """An entry of daemon.json's ``runtimes``."""

    path: str
    arguments: tuple[str, ...]


def read_runtimes(etc: Path) -> tuple[dict[str, Declared], str]:
    """(daemon.json's ``runtimes`` by name, its ``default-runtime`` or ""), of the first file there is. Raises
    FailedPrecondition naming file and key."""
    path, value = daemon_json(etc)
    wished, found = value.get("runtimes") or {}, {}
    for name, entry in wished.items() if isinstance(wished, dict) else [("", None)]:
        program = entry.get("path") if isinstance(entry, dict) else None
        arguments = entry.get("runtimeArgs") or [] if isinstance(entry, dict) else []
        if not isinstance(program, str) or not isinstance(arguments, list) or not all(
                isinstance(one, str) for one in arguments):
            raise FailedPrecondition(f"{path}: runtimes: {name}: no object with a path, and runtimeArgs that are texts",
                                     hint='{"runtimes": {"NAME": {"path": "/usr/bin/crun", "runtimeArgs": []}}}')
        if name == OWN or not _NAME.fullmatch(name):
            raise FailedPrecondition(f"{path}: runtimes: {name!r} is dolium's own or no name", hint="letters, digits, _ . -")
        found[name] = Declared(program, tuple(arguments))
    return found, str(value.get("default-runtime") or "")


class Levels:
    """The backends of one daemon, and the shims they share."""

    def __init__(self, layout: tree.Layout, *, etc: str, cache: str, run: str, discard: Callable[[str], object]) -> None:
        """``cache``: folder of compiled seccomp profiles; ``run``: has the shims' folders and the runtimes' own state;
        ``discard``: takes a folder away, if it is there. Raises FailedPrecondition for a daemon.json that cannot be read."""
        self.launcher = Launcher(f"{run}/shims", discard)
        self.process = ProcessIsolation(self.launcher, layout, cache)
        self._layout, self._states = layout, f"{run}/runtimes"
        self._declared, default = read_runtimes(Path(etc))
        self._kinds: dict[tuple[str, int], bool] = {}
        self._backends: dict[Runtime, OciIsolation] = {}
        self.default = self._meant(default or OWN)
        """The runtime of a container that wishes none."""
        self.find(self.default)

    def _meant(self, name: str) -> str:
        """Many files say runc and mean: as usual."""
        return OWN if name == "runc" and not self._is_there(name) else name

    def choose(self, host: Mapping[str, Any]) -> str:
        """The runtime's name for a HostConfig's ``Runtime`` and ``Isolation``. Raises InvalidArgument, FailedPrecondition,
        Unimplemented."""
        level, name = host.get("Isolation") or "default", host.get("Runtime") or ""
        if level not in ("default", *LEVELS):
            raise InvalidArgument(f"invalid isolation: {level!r}", hint=f"one of {', '.join(LEVELS)}")
        if level == "vm":
            raise Unimplemented("isolation vm is not there yet", hint="gvisor has a kernel of its own too")
        if not name and level == "gvisor":
            name = next((one for one in (_SANDBOX, *self._declared)
                         if self._is_there(one) and self.find(one).level == level), "")
            if not name:
                raise FailedPrecondition("isolation gvisor needs runsc, which is not installed",
                                         hint="apt-get install runsc, or name it in daemon.json's runtimes")
        if not name:
            name = self.default if level == "default" else OWN
        name = self._meant(name)
        backend = self.find(name)
        if level not in ("default", backend.level):
            raise InvalidArgument(f"--isolation {level} does not go with --runtime {name}, which is {backend.level}")
        return name

    def find(self, name: str) -> Backend:
        """The backend of a runtime. Raises InvalidArgument in Docker's words, FailedPrecondition."""
        if (name or OWN) == OWN:
            return self.process
        runtime = self._runtime(name)
        if runtime not in self._backends:
            self._backends[runtime] = OciIsolation(self.launcher, self._layout, runtime, f"{self._states}/{name}")
        return self._backends[runtime]

    async def recover(self, known: Collection[str]) -> None:
        """Runtimes keep nothing of containers that are not known: a dead daemon was in the middle of starting them. Their
        processes are dead."""
        for name in os.listdir(self._states) if os.path.isdir(self._states) else ():
            for entry in os.listdir(f"{self._states}/{name}"):
                found = _IDENTITY.search(entry)
                if found is None or found.group() in known:
                    continue
                try:
                    await self.find(name).forget(found.group())
                except DoliumError as error:
                    _log.warning("runtime %s has gone, and left %s/%s: %s", name, self._states, name, error)

    def table(self) -> dict[str, dict[str, Any]]:
        """For ``docker info``: the runtimes that are there."""
        found: dict[str, dict[str, Any]] = {OWN: {"path": "dolium-runtime"}}
        for name in (*KNOWN, *self._declared):
            declared = self._declared.get(name)
            if self._is_there(name):
                found[name] = {"path": declared.path if declared else name}
                if declared and declared.arguments:
                    found[name]["runtimeArgs"] = list(declared.arguments)
        return found

    def _is_there(self, name: str) -> bool:
        return name in self._declared or (name in KNOWN and bool(_program(name)))

    def _runtime(self, name: str) -> Runtime:
        declared = self._declared.get(name)
        if declared is None and name not in KNOWN:
            raise InvalidArgument(f"unknown or invalid runtime name: {name}", hint=f"{OWN}, one of daemon.json's runtimes, "
                                  f"or {', '.join(KNOWN)} where it is installed")
        program = _program(declared.path if declared else name)
        if not program:
            raise FailedPrecondition(f"runtime {name}: {declared.path if declared else name} is not installed")
        return Runtime(name, program, declared.arguments if declared else (), self._is_sandbox(program))

    def _is_sandbox(self, program: str) -> bool:
        key = program, os.stat(program).st_mtime_ns
        if key not in self._kinds:
            try:
                done = subprocess.run([program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                      timeout=10, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise FailedPrecondition(f"runtime {program}: --version: {error}") from error
            self._kinds[key] = done.stdout.startswith(_SANDBOX)
        return self._kinds[key]


def _program(name: str) -> str:
    """The absolute path of a program, "" when there is none."""
    return shutil.which(name, path=policy.DEFAULT_PATH) or ""
