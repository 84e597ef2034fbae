"""Execs: one more process in a running container. They live in memory only, as Docker's do."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from dolium import faults
from dolium.engine import model, request, specs
from dolium.engine.containers import Containers, launch_exit_code
from dolium.engine.engine import Engine
from dolium.engine.model import Container
from dolium.engine.users import resolve
from dolium.errors import AlreadyExists, DoliumError, FailedPrecondition, InvalidArgument, NotFound
from dolium.isolation.base import Attachment, Stdio
from dolium.isolation.shim import ExitRecord, Shim
from dolium.linux import syscalls

faults.register("exec.launched")
KEPT = 1000  # ended execs that inspect still knows


@dataclass(slots=True)
class Exec:
    """``config`` has Docker's keys (Cmd, Env, Tty, User, WorkingDir, AttachStdin …)."""

    id: str
    container: str
    config: dict[str, Any]
    running: bool = False
    exit_code: int | None = None
    pid: int = 0
    process: dict[str, Any] = field(default_factory=dict)


class Execs:
    """All execs of one engine."""

    def __init__(self, engine: Engine, containers: Containers) -> None:
        self._engine = engine
        self._containers = containers
        self._execs: dict[str, Exec] = {}

    def create(self, reference: str, config: dict[str, Any]) -> Exec:
        """Check and remember. Raises FailedPrecondition for a container that is paused or not running."""
        container, _ = self._containers.running(reference)
        if container.status == model.PAUSED:
            raise FailedPrecondition(f"container {container.id} is paused, unpause the container before exec")
        request.check_text(config, "ExecConfig")
        command = request.strings(config.get("Cmd"), "Cmd")
        if not command or not command[0]:
            raise InvalidArgument("No exec command specified")
        made = Exec(secrets.token_hex(32), container.id, config)
        while len(self._execs) >= KEPT:
            ended = next((one for one in self._execs.values() if not one.running), None)
            if ended is None:
                break
            del self._execs[ended.id]
        self._execs[made.id] = made
        self._engine.event(container, f"exec_create: {' '.join(command)}", execID=made.id)
        return made

    def find(self, identity: str) -> Exec:
        """Raises NotFound in Docker's words."""
        if identity not in self._execs:
            raise NotFound(f"No such exec instance: {identity}")
        return self._execs[identity]

    def of(self, container: str) -> list[str]:
        """Ids of a container's execs."""
        return [one.id for one in self._execs.values() if one.container == container]

    def check(self, one: Exec) -> tuple[Container, Shim]:
        """The container and shim it would start in. Raises AlreadyExists, FailedPrecondition."""
        if one.running or one.exit_code is not None:
            raise AlreadyExists(f"Exec command {one.id} has already run")
        container, shim = self._containers.running(one.container)
        if container.status == model.PAUSED:
            raise FailedPrecondition(f"container {container.id} is paused, unpause the container before exec")
        return container, shim

    async def start(self, one: Exec, attachments: list[Attachment], *, size: tuple[int, int] = (0, 0)) -> None:
        """Launch it. The attachments are taken whatever happens. Raises the failed operation's error."""
        checked = False
        try:
            container, shim = self.check(one)
            checked, config = True, one.config
            async with self._engine.roots.opened(container) as root:
                user = resolve(config.get("User") or container.config.get("User") or "",
                               lambda path: syscalls.read_in_root(root, path),
                               [] if config.get("User") else container.host_config.get("GroupAdd") or [])
            given = specs.environment(container, user)
            extra = list(config.get("Env") or [])
            replaced = {entry.partition("=")[0] for entry in extra}
            env = [entry for entry in given if entry.partition("=")[0] not in replaced] + extra
            if config.get("Tty") and not any(entry.startswith("TERM=") for entry in env):
                env.append("TERM=xterm")
            privileged = bool(config.get("Privileged") or container.host_config.get("Privileged"))
            bound = [key.lower() for key in request.RULES if container.host_config.get(key)]
            if privileged and bound:
                raise InvalidArgument(f"container {container.name} has rules of --{bound[0]}: a privileged process could "
                                      "take them away")
            process = specs.process_for(container, user, list(config["Cmd"]), env, terminal=bool(config.get("Tty")),
                                        cwd=config.get("WorkingDir") or container.config.get("WorkingDir") or "/",
                                        privileged=privileged)
            process.pop("consoleSize", None)
            if config.get("Tty") and size[0] and size[1]:
                process["consoleSize"] = {"height": size[0], "width": size[1]}
        except BaseException:
            for attachment in attachments:
                attachment.close()
            if checked:  # it was tried: a client that has hijacked the connection learns of it by the code alone
                one.exit_code = 126
            raise
        one.running = True
        self._containers.on_exec_exit[one.id] = lambda record: self._ended(one, record)
        stdio = Stdio(bool(config.get("Tty")), bool(config.get("AttachStdin")), True)
        try:
            launched = await self._engine.backend(container).exec(
                shim, self._engine.paths.shim(container.id), container.id, self._containers.specs[container.id], process,
                one.id, pid=container.pid, start_time=container.start_time, stdio=stdio, attachments=attachments)
        except BaseException as error:
            for attachment in attachments:
                attachment.close()
            one.running, one.exit_code = False, 127 if launch_exit_code(str(error)) == 127 else 126
            self._containers.on_exec_exit.pop(one.id, None)
            raise
        faults.point("exec.launched")
        one.pid = launched.pid
        self._engine.event(container, f"exec_start: {' '.join(config['Cmd'])}", execID=one.id)

    def _ended(self, one: Exec, record: ExitRecord) -> None:
        one.running, one.exit_code = False, record.exit_code
        container = self._engine.containers.get(one.container)
        if container is not None:
            self._engine.event(container, "exec_die", execID=one.id, exitCode=str(record.exit_code))
        shim = self._containers.shims.get(one.container)
        if shim is not None and shim.connected:
            self._containers.task(_forget(shim, one.id))

    async def resize(self, one: Exec, rows: int, columns: int) -> None:
        """Raises FailedPrecondition when it is not running or has no terminal."""
        _, shim = self._containers.running(one.container)
        await shim.resize(one.id, rows, columns)


async def _forget(shim: Any, identity: str) -> None:
    try:
        await shim.forget(identity)
    except DoliumError:
        return  # the shim went with its container
