"""After a start of the daemon: every record is brought together with what really runs.

A shim that lives is adopted: the container keeps its init. A shim that is dead leaves an exit record or nothing; then
the sandbox is dead too: its cgroup is killed and the container has ended with a reason.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

from dolium import faults
from dolium.engine import model, specs
from dolium.engine.containers import Containers
from dolium.engine.engine import Engine
from dolium.engine.etc_files import read_endpoint
from dolium.engine.live_volumes import LiveVolumes
from dolium.engine.model import Container
from dolium.engine.users import User
from dolium.errors import DoliumError
from dolium.isolation.base import INIT, USER_IN_SLOT
from dolium.isolation.shim import ExitRecord, read_exit
from dolium.linux.cgroup import manage

_log = logging.getLogger(__name__)
faults.register("reconcile.cleaned")
AFTER_REBOOT = 255


async def reconcile(engine: Engine, containers: Containers, volumes: LiveVolumes) -> None:
    """Adopt, or record the end of, every container; then start what its restart policy wants running."""
    live: dict[str, dict[str, Any]] = {}
    ended: list[tuple[Container, ExitRecord | None]] = []
    for container in list(engine.containers.values()):
        if container.status == model.REMOVING:
            continue
        if container.live or container.starting:
            record = await _adopt(engine, containers, container)
            if container.live and record is None and container.id in containers.shims:
                live[container.id] = container.network
            else:
                ended.append((container, record))
        elif os.path.isdir(engine.paths.shim(container.id)):
            await _kill(engine, containers, container)  # its end was recorded, and then the daemon died
            await engine.launcher.end(None, engine.paths.shim(container.id))
    await engine.network.start(live, lambda identity: os.open(f"/proc/{engine.containers[identity].pid}/ns/net",
                                                              os.O_RDONLY | os.O_CLOEXEC))
    for container, record in ended:
        async with engine.lock(container.id):
            await _ended(engine, containers, container, record)
    for container in list(engine.containers.values()):
        if container.status == model.REMOVING or (
                container.host_config.get("AutoRemove") and not container.live
                and (container.started_at or container.error)):
            await containers.remove_quietly(container.id)
        elif not container.live and _starts_again(container):
            containers.restarts.resume(container)
    await volumes.recover()
    await containers.volumes.settle()


def _starts_again(container: Container) -> bool:
    name = (container.host_config.get("RestartPolicy") or {}).get("Name") or "no"
    if container.status == model.RESTARTING:
        return True
    if not container.started_at:
        return False
    return name == "always" or (name == "unless-stopped" and not container.stopped_by_user)


async def _adopt(engine: Engine, containers: Containers, container: Container) -> ExitRecord | None:
    folder, identity = engine.paths.shim(container.id), container.id
    try:
        shim = await engine.launcher.adopt(folder, lambda event: containers.on_event(identity, event),
                                           patient=not container.starting)
    except DoliumError as error:
        _log.info("container %s has no shim any more: %s", container.name, error)
        return read_exit(folder, INIT)
    info = shim.processes.get(INIT)
    if info is None or info.state == "new":
        # killed between the shim and the launch
        await engine.launcher.end(shim, folder)
        return None
    if info.state == "exited":
        # only the shim's folder tells how it ended, until that is stored
        containers.shims[identity] = shim
        container.status, container.pid = model.RUNNING, info.record.pid
        if not container.started_at or container.starting:
            container.started_at = info.record.started_at_ns / 1e9
        return info.record
    containers.shims[identity] = shim
    containers.specs[identity] = _spec_for_exec(engine, container)
    paused = await _is_paused(engine, container)
    container.status = model.PAUSED if paused else model.RUNNING
    container.pid, container.start_time = info.record.pid, info.record.start_time
    if container.starting:  # it was launched, and that is not on record
        container.started_at, container.starting = info.record.started_at_ns / 1e9, False
        container.network = read_endpoint(engine.paths.container(identity)) or container.network
    engine.save(container)
    containers.reports.begin(container)
    _log.info("adopted container %s, init %d", container.name, container.pid)
    return None


async def _is_paused(engine: Engine, container: Container) -> bool:
    """A runtime that is gone, or does not answer, leaves what is on record."""
    folders = engine.layout.paths(engine.container_group(container.id))
    try:
        backend = engine.backend(container)
        paused = await backend.is_frozen(container.id, folders)
        if paused and container.status != model.PAUSED:
            # a commit, or a pause that nobody was told of, was under way
            await backend.freeze(container.id, folders, False)
            paused = False
    except DoliumError as error:
        _log.warning("container %s: is it paused? %s", container.name, error)
        return container.status == model.PAUSED
    return paused


def _spec_for_exec(engine: Engine, container: Container) -> dict[str, Any]:
    """What exec needs of the configuration: namespaces and the filter; init's own are joined by pid."""
    kinds = ["pid", "ipc", "uts", "mount", "network", "cgroup"]
    host = container.host_config
    for kind, key in (("pid", "PidMode"), ("ipc", "IpcMode"), ("uts", "UTSMode"), ("network", "NetworkMode")):
        if host.get(key) == "host":
            kinds.remove(kind)
    if container.ids:
        kinds.append("user")
    process = specs.process_for(container, User(0, 0, (), "/"), ["true"], [], terminal=False, cwd="/",
                                privileged=bool(host.get("Privileged")))
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind, **({"path": USER_IN_SLOT} if kind == "user" else {})} for kind in kinds]}
    seccomp = specs.seccomp_for(host, process["capabilities"]["bounding"], engine.kernel)
    if seccomp is not None:
        linux["seccomp"] = seccomp
    return {"linux": linux}


async def _kill(engine: Engine, containers: Containers, container: Container) -> None:
    """End what is left of a sandbox whose container has ended; its shim's folder, with the exit record, stays."""
    await asyncio.to_thread(manage.kill_and_remove, engine.layout.paths(engine.container_group(container.id)))
    if container.id not in containers.shims:
        engine.launcher.kill_shim(engine.paths.shim(container.id))
        await engine.forgotten(container)


async def _ended(engine: Engine, containers: Containers, container: Container, record: ExitRecord | None) -> None:
    await _kill(engine, containers, container)
    faults.point("reconcile.cleaned")
    if container.starting and record is None and not container.live:
        # the start never came to its end: the container is as it was, and says why
        container.starting, container.error = False, "the daemon ended while it was starting"
        container.network = {}
        engine.save(container)
        await engine.launcher.end(None, engine.paths.shim(container.id))
        return
    if record is not None:
        await containers.ended(container, record.exit_code, record.exited_at_ns / 1e9, oom=record.oom)
    else:
        await containers.ended(container, AFTER_REBOOT, time.time(), error="its shim was gone when the daemon started")
