"""Containers' lives: create, start, stop, kill, pause, rename, remove, wait. Docker's rules and words.

Intent is stored before an object is made, a record goes after everything it speaks of. A fault point follows each side
effect, and the crash tests kill the daemon at every one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import time
from functools import partial
from typing import Any

from dolium import faults, policy
from dolium.engine import id_ranges, model, names, request, specs
from dolium.engine.engine import Engine
from dolium.engine.etc_files import write_endpoint, write_etc_files
from dolium.engine.model import Container
from dolium.engine.mounts import parse_mounts
from dolium.engine.networks import ContainerNetworks, wished_networks
from dolium.engine.reports import Reports
from dolium.engine.restart import Restarts
from dolium.engine.rootfs import maps_of, open_subpath
from dolium.engine.users import resolve
from dolium.engine.volumes import ContainerVolumes, check_sources
from dolium.errors import (
    AlreadyExists,
    DeadlineExceeded,
    DoliumError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from dolium.isolation.base import INIT, USER_IN_SLOT, Attachment, Started, Stdio, Wish
from dolium.isolation.shim import Closed, Event, Exited, ExitRecord, Shim
from dolium.linux import syscalls, user_namespaces
from dolium.linux.cgroup import manage
from dolium.native import program
from dolium.network.base import Prepared
from dolium.runtime.cli import SIGNALS, signal_number
from dolium.steps import Timings

_log = logging.getLogger(__name__)
faults.register("create.snapshot", "create.folder", "start.intent", "start.mounted", "start.network", "start.files",
                "start.launched", "start.recorded", "exit.recorded", "exit.network", "exit.shim", "remove.intent",
                "remove.killed", "remove.network", "remove.snapshot", "remove.folder", "remove.volumes", "stop.signalled")

SIGKILL = SIGNALS["KILL"]
JOINING = ("PidMode", "IpcMode", "NetworkMode")


class Containers:
    """The life of every container of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.shims: dict[str, Shim] = {}
        self.specs: dict[str, dict[str, Any]] = {}
        self._pending: dict[str, list[Attachment]] = {}
        self._ending: dict[str, Shim] = {}
        self._waiters: dict[str, list[tuple[str, asyncio.Future[int]]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._making: dict[str, list[int]] = {}  # ids of containers that are not on record yet
        self._groupless: set[str] = set()  # ended, and their shims have removed the cgroups
        self.on_exec_exit: dict[str, Any] = {}
        self.restarts, self.reports = Restarts(self), Reports(engine)
        self.networks = ContainerNetworks(engine)
        self.volumes = ContainerVolumes(engine)
        self._closing = False

    def task(self, coroutine: Any) -> None:
        """Run something that nobody waits for; its failure is logged."""
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a background task failed", exc_info=task.exception())

    # -- create --

    async def create(self, name: str, config: dict[str, Any], host: dict[str, Any], networking: Any = None, *,
                     rootfs: str = "", starting: bool = False, platform: str = "") -> Container:
        """Make a container: record, writable layer, folder, volumes. Raises NotFound for a missing image or one for
        another ``platform``, AlreadyExists for a name in use, InvalidArgument. ``networking``: Docker's NetworkingConfig;
        ``starting``: its start, or its removal, is the caller's next act.
        """
        engine = self._engine
        request.check_host_config(host)
        image_id, chain_ids, image_config = "", [], None
        if rootfs:
            if not os.path.isdir(rootfs):
                raise NotFound(f"--rootfs {rootfs}: no such folder")
        else:
            image = engine.images.resolve(config.get("Image") or "")
            request.check_platform(config["Image"], image.platform, platform)
            image_id, chain_ids, image_config = image.id, list(image.chain_ids), engine.images.config(image.id)
        done, argv = request.complete(config, image_config)
        request.published(host, done)
        mounts = parse_mounts(done, host, self.volumes.lent(host))
        check_sources(mounts)
        if any(request.bandwidth(host)) and (host.get("NetworkMode") or "").partition(":")[0] in ("host", "container"):
            raise InvalidArgument(f"--bandwidth does not go with --network {host['NetworkMode']}: the container has no "
                                  "network of its own")
        rules = request.rules(host, done)
        host = {key: value for key, value in host.items() if key not in request.RULES} | rules
        host["Runtime"] = await asyncio.to_thread(engine.levels.choose, host) if (
            host.get("Runtime") or host.get("Isolation")) else engine.levels.default
        networks = wished_networks(engine, host, networking)
        mode = host.get("NetworkMode") or "default"
        for key in JOINING:  # by id: another container may have the name later
            kind, _, other = (host.get(key) or "").partition(":")
            if kind == "container":
                try:
                    joined = engine.find(other)
                    if not engine.backend(joined).live:
                        raise InvalidArgument(f"--{key.removesuffix('Mode').lower()} {kind}:{other}: that container's "
                                              "isolation keeps its namespaces to itself",
                                              hint="isolation process can lend")
                    host[key] = f"container:{joined.id}"
                    if key == "NetworkMode":  # who joins is bound by the rules of the namespace
                        theirs = engine.find(other).host_config
                        bound = {name: list(theirs[name]) for name in request.RULES if theirs.get(name)}
                        request.check_restricted(host, bound)
                        host |= bound
                except NotFound as error:  # not as 404: clients take that for a missing image, and pull
                    raise InvalidArgument(f"--{key.removesuffix('Mode').lower()} {kind}:{other}: {error}") from error
        identity = secrets.token_hex(32)
        chosen = request.check_name(name) if name else names.random_name(engine.names)
        if chosen in engine.names:
            raise AlreadyExists(f"Conflict. The container name \"/{chosen}\" is already in use by container "
                                f"\"{engine.names[chosen]}\". You have to remove (or rename) that container to be able "
                                "to reuse that name.")
        engine.names[chosen] = identity
        container = Container(identity, chosen, time.time(), config.get("Image") or rootfs, image_id, chain_ids, rootfs,
                              done, host, argv[0], argv[1:], mounts)
        container.starting, container.endpoint_settings = starting, networks
        engine.creating[identity] = container
        try:
            container.ids = self._making[identity] = self._ids(host)
            idmapped = any(mount.idmap or (container.ids and mount.kind == "volume") for mount in mounts)
            engine.backend(container).check(Wish(host, bool(container.ids), idmapped,
                                                 any("shared" in mount.propagation for mount in mounts), bool(rootfs)))
            if not container.ids and any(mount.idmap == "idmap" for mount in mounts):
                raise InvalidArgument("idmap: the container has no user namespace of its own whose mapping there is",
                                      hint="--userns auto, or idmap=uids=…;gids=…")
        except BaseException:
            engine.names.pop(chosen, None)
            del engine.creating[identity]
            raise
        container.config.setdefault("Hostname", "")
        own = os.uname().nodename if mode == "host" else container.short_id
        container.config["Hostname"] = container.config["Hostname"] or own
        try:
            await self.volumes.make(container)
            await engine.roots.create(container)
            faults.point("create.snapshot")
            os.makedirs(engine.paths.container(identity), mode=0o710, exist_ok=True)
            faults.point("create.folder")
            engine.save(container)
        except BaseException:
            engine.names.pop(chosen, None)
            with contextlib.suppress(DoliumError):
                engine.roots.remove(identity)
            shutil.rmtree(engine.paths.container(identity), ignore_errors=True)
            await self.volumes.drop_anonymous(container)
            raise
        finally:
            del self._making[identity], engine.creating[identity]
        engine.event(container, "create")
        return container

    def _ids(self, host: dict[str, Any]) -> list[int]:
        """The host ids of a new container's user namespace; who joins another container's namespaces is in that one's.
        Raises InvalidArgument, ResourceExhausted."""
        joined = [self._engine.find(host[key].partition(":")[2]) for key in JOINING
                  if (host.get(key) or "").startswith("container:")]
        mode = host.get("UsernsMode") or ""
        if joined:
            if any(other.ids != joined[0].ids for other in joined) or mode == "auto" or (mode and joined[0].ids):
                raise InvalidArgument("the containers whose namespaces are joined are in different user namespaces"
                                      + (f" than --userns {mode} asks for" if mode else ""), hint="leave --userns out")
            return joined[0].ids
        ids: list[int] = []
        if mode == "auto":
            ids = id_ranges.free([*(other.ids for other in self._engine.containers.values()), *self._making.values(),
                                  self._engine.remapped])
        elif mode == "":
            ids = self._engine.remapped
        if ids:
            id_ranges.check(host)
        return ids

    # -- start --

    async def start(self, reference: str) -> bool:
        """Start a container; False when it runs already. Raises FailedPrecondition, and whatever stopped the launch."""
        container = self._engine.find(reference)
        async with self._engine.lock(container.id):
            container = self._engine.find(container.id)
            if container.status == model.PAUSED:
                raise FailedPrecondition("cannot start a paused container, try unpause instead")
            if container.live:
                return False
            if container.status in (model.REMOVING, model.DEAD):
                raise FailedPrecondition("container is marked for removal and cannot be started")
            self.restarts.forget(container.id)
            container.stopped_by_user = False
            container.restart_count = 0
            await self.launch(container)
        return True

    async def launch(self, container: Container) -> None:
        """One run in fresh namespaces; the container's lock is held. On failure the record says why."""
        timings = Timings()
        begun = time.perf_counter()
        engine = self._engine
        network: asyncio.Task[Prepared] | None = None
        root = user = own = -1
        subpaths: list[int] = []
        shim: asyncio.Future[Shim] | None = None
        intended, container.starting, container.error = container.starting, True, ""
        self._groupless.discard(container.id)
        try:
            if not intended:
                engine.save(container)
            faults.point("start.intent")
            # a spare, or one that is made while the rest is
            shim = engine.launcher.prepare(engine.paths.shim(container.id), partial(self.on_event, container.id))
            if container.ids:
                with timings.step("user namespace"):
                    user, own = await self._user_namespace(container)
            with timings.step("network"):
                network = await self.networks.begin(container, own)
            with timings.step("snapshot"):
                root = await engine.roots.mount(container, user)  # a tenth of a millisecond, on the loop
                faults.point("start.mounted")
                await self.volumes.mount(container, root)
            with timings.step("configuration"):
                around = self._surroundings(container, root)
                for mount in container.mounts:
                    if mount.subpath:
                        # by fd: who mounts the volume, too, may put a link there meanwhile
                        subpaths.append(open_subpath(mount))
                        around.sources[mount.target] = f"/proc/{os.getpid()}/fd/{subpaths[-1]}"
                self._prepare_root(container, root)
                write_etc_files(engine.paths.container(container.id), container)
                faults.point("start.files")
                spec = specs.build(container, around)
            started = await self._run(container, spec, around, root, user, network, shim, timings)
        except BaseException as error:
            async with contextlib.AsyncExitStack() as undo:  # the last first, and one that fails keeps no other back
                undo.push_async_callback(self.volumes.release, container)
                undo.push_async_callback(self._launch_failed, container, error)
                undo.push_async_callback(self.networks.drop, container, network)
                undo.push_async_callback(self._drop_prepared, container, shim)
            if isinstance(error, (DoliumError, OSError)):
                kind = type(error) if isinstance(error, DoliumError) else _kind_of(error)
                raise kind(container.error, errno=error.errno) from error
            raise
        finally:
            if root >= 0:
                engine.roots.release(container, root)
            for fd in (user, own, *subpaths):
                if fd >= 0:
                    os.close(fd)
        if network is not None:
            os.close(network.result().fd)
        faults.point("start.launched")
        for phase, milliseconds in started.phases.items():
            timings.add(phase, milliseconds)
        timings.add("total", (time.perf_counter() - begun) * 1000)
        self.shims[container.id], self.specs[container.id] = started.shim, spec
        container.status, container.starting = model.RUNNING, False
        container.pid, container.start_time = started.launched.pid, started.launched.start_time
        container.started_at, container.finished_at = started.launched.started_at_ns / 1e9, 0.0
        container.exit_code, container.oom_killed = 0, False
        container.timings = timings.as_dict()
        self._engine.record(container)
        faults.point("start.recorded")
        self.networks.tell(container, "connect")
        self._engine.event(container, "start")
        self.reports.begin(container)

    async def _drop_prepared(self, container: Container, preparing: asyncio.Future[Shim] | None) -> None:
        """End the shim of a launch that failed before or in it. Idempotent."""
        if preparing is None:
            return
        shim: Shim | None = None
        with contextlib.suppress(DoliumError):
            shim = await asyncio.shield(preparing)
        if shim is not None and not shim.connected:  # it has died in the middle: what it has begun is undone by us
            group = self._engine.layout.paths(self._engine.container_group(container.id))
            await asyncio.to_thread(manage.kill_and_remove, group)
            await self._engine.forgotten(container)
        await self._engine.launcher.end(shim, self._engine.paths.shim(container.id))

    async def user_namespace(self, container: Container) -> int:
        """An fd of a user namespace with the container's ids: its own while it runs. Raises FailedPrecondition."""
        if container.live:
            try:
                return os.open(f"/proc/{container.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise FailedPrecondition(f"container {container.name} ended just now") from error
        maps = maps_of(container)
        return (await asyncio.to_thread(user_namespaces.make, maps, maps))[0]

    async def _user_namespace(self, container: Container) -> tuple[int, int]:
        """(the user namespace, a network namespace of its own or -1), as fds. Raises FailedPrecondition."""
        for key in JOINING:
            mode = container.host_config.get(key) or ""
            if mode.startswith("container:"):
                other = self._engine.find(mode.partition(":")[2])
                try:
                    return os.open(f"/proc/{other.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC), -1
                except OSError as error:
                    raise FailedPrecondition(f"cannot join the namespaces of a non running container: {other.id}") from error
        maps = maps_of(container)
        return await asyncio.to_thread(user_namespaces.make, maps, maps, network=True)

    def _namespaces(self, container: Container) -> dict[str, str | None]:
        host = container.host_config
        found: dict[str, str | None] = dict.fromkeys(("pid", "ipc", "uts", "mount", "network"), "")
        found["cgroup"] = None if host.get("CgroupnsMode") == "host" else ""
        if container.ids:
            found["user"] = USER_IN_SLOT
        for kind, key, file in (("pid", "PidMode", "pid"), ("ipc", "IpcMode", "ipc"), ("uts", "UTSMode", "uts"),
                                ("network", "NetworkMode", "net")):
            mode = host.get(key) or ""
            if mode == "host":
                found[kind] = None
            elif mode.startswith("container:"):
                other = self._engine.find(mode.partition(":")[2])
                if not other.live:
                    raise FailedPrecondition(f"cannot join {kind} of a non running container: {other.id}")
                found[kind] = f"/proc/{other.pid}/ns/{file}"
                if kind == "network":
                    found["uts"] = f"/proc/{other.pid}/ns/uts"
        return found

    def _surroundings(self, container: Container, root: int) -> specs.Surroundings:
        engine = self._engine

        def read(path: str) -> bytes | None:
            return syscalls.read_in_root(root, path)

        user = resolve(container.config.get("User") or "", read, container.host_config.get("GroupAdd") or [])
        mode = container.host_config.get("NetworkMode") or ""
        owner = engine.find(mode.partition(":")[2]).id if mode.startswith("container:") else container.id
        etc = engine.paths.container(owner)
        if not os.path.exists(f"{etc}/hosts") and owner != container.id:
            etc = engine.paths.shim(owner)  # where an earlier daemon has put them, and the owner runs since
        return specs.Surroundings(
            etc_folder=etc, user=user, namespaces=self._namespaces(container),
            group=engine.container_group(container.id), hostname=container.config["Hostname"], layout=engine.layout,
            kernel=engine.kernel, init_program=program("dolium-init"), has_swap_limit=engine.has_swap_limit,
            shm=self._shared_memory(container),
            hidden=[engine.paths.data, engine.paths.run] if container.rootfs else [])

    def _shared_memory(self, container: Container) -> str:
        """The /dev/shm on the host that it shares, made if it is its own; or "". Raises FailedPrecondition, Internal."""
        shared, mode = self._engine.shared_memory, container.host_config.get("IpcMode") or ""
        if mode == "shareable":
            size = container.host_config.get("ShmSize") or policy.SHM_SIZE
            shared.make(container.id, size, container.owner)
            return shared.path(container.id)
        if not mode.startswith("container:"):
            return ""
        other = self._engine.find(mode.partition(":")[2])
        others = other.host_config.get("IpcMode") or ""
        if others == "host":
            return "/dev/shm"
        if others != "shareable":
            raise FailedPrecondition(f"cannot join IPC of container {other.id}: non-shareable IPC (hint: use "
                                     "IpcMode:shareable for the donor container)")
        return shared.path(other.id)

    def _prepare_root(self, container: Container, root: int) -> None:
        """The working directory is made when the image has none (Docker does), owned by root."""
        cwd = container.config.get("WorkingDir") or "/"
        if cwd != "/":
            try:
                syscalls.make_dirs_in_root(root, cwd, owner=container.owner)
            except OSError as error:
                raise InvalidArgument(f"cannot make the working directory {cwd}: {error.strerror}") from error

    async def _run(self, container: Container, spec: dict[str, Any], around: specs.Surroundings, root: int, user: int,
                   network: asyncio.Task[Prepared] | None, shim: asyncio.Future[Shim], timings: Timings) -> Started:
        engine, config = self._engine, container.config
        hidden = [path for path in around.hidden if os.path.isdir(path)]
        with timings.step("plan"):
            backend, folder = engine.backend(container), engine.paths.shim(container.id)
            plan = backend.compile(container.id, spec, folder, network=network is not None, user=user >= 0, hidden=hidden)
        size, files = request.log_limits(container.host_config)
        logged = ((container.host_config.get("LogConfig") or {}).get("Type") or "json-file") != "none"
        stdio = Stdio(bool(config.get("Tty")), bool(config.get("OpenStdin")), bool(config.get("StdinOnce")),
                      self.log_path(container) if logged else "", size, files)
        folders = engine.layout.paths(around.group)
        oom_files = [path for folder in folders for path in self._oom_files(folder)]
        with timings.step("network"):
            namespace = (await asyncio.shield(network)).fd if network is not None else -1
            if network is not None:
                write_endpoint(engine.paths.container(container.id), container)
            faults.point("start.network")
        return await backend.run(
            shim, folder, plan, stdio, root=root, network=namespace, user=user,
            attachments=self._pending.pop(container.id, []), oom_files=oom_files, timings=timings)

    def _oom_files(self, folder: str) -> list[str]:
        layout = self._engine.layout
        memory = layout.v1.get("memory")
        if memory and folder.startswith(f"{memory}/"):
            return [f"{folder}/memory.oom_control"]
        if layout.pure_v2:
            return [f"{folder}/memory.events"]
        return []

    async def _launch_failed(self, container: Container, error: BaseException) -> None:
        for attachment in self._pending.pop(container.id, []):
            attachment.close()
        text = f"failed to create task for container: {error}"
        if re.search(r"\bbind \S+ on \S+: (EINVAL|ENOTDIR|EISDIR)", text):
            text += ": Are you trying to mount a directory onto a file (or vice-versa)? Check the source and the target"
        container.starting = False
        container.network = {}
        self._engine.shared_memory.remove(container.id)
        container.error = text
        container.exit_code = launch_exit_code(text)
        self._engine.record(container)
        self._wake(container)
        if container.host_config.get("AutoRemove"):
            self.task(self.remove_quietly(container.id))

    # -- what the shim tells --

    def on_event(self, identity: str, event: Event) -> None:
        """Called on the loop by the sandbox's shim client."""
        if self._closing:
            return  # the connection is let go by us; whatever happens now, the next daemon finds out
        if isinstance(event, Exited):
            if event.record.id == INIT:
                self.task(self._on_exit(identity, event.record))
            else:
                callback = self.on_exec_exit.pop(event.record.id, None)
                if callback is not None:
                    callback(event.record)
        elif isinstance(event, Closed):
            shim = self.shims.get(identity)
            if shim is not None and not shim.connected:
                self.task(self._on_shim_gone(identity, event.reason))

    async def _on_exit(self, identity: str, record: ExitRecord) -> None:
        async with self._engine.lock(identity):
            container = self._engine.containers.get(identity)
            if container is None or not container.live or container.pid != record.pid:
                return
            if record.after_exit_error == "":
                self._groupless.add(identity)
            await self.ended(container, record.exit_code, record.exited_at_ns / 1e9, oom=record.oom)

    async def _on_shim_gone(self, identity: str, reason: str) -> None:
        """A dead shim means a dead sandbox: what is left of it is killed, the container has ended with a reason."""
        async with self._engine.lock(identity):
            container = self._engine.containers.get(identity)
            if container is None or not container.live or identity not in self.shims:
                return
            _log.warning("the shim of container %s is gone: %s", container.name, reason)
            group = self._engine.layout.paths(self._engine.container_group(identity))
            await asyncio.to_thread(manage.kill_and_remove, group)
            await self._engine.forgotten(container)
            await self.ended(container, 128 + SIGKILL, time.time(), error=f"its shim died: {reason}")

    async def ended(self, container: Container, code: int, when: float, *, oom: bool = False, error: str = "") -> None:
        """Init is dead: record, give back, tell. The container's lock is held."""
        engine = self._engine
        network = container.network
        container.pid, container.start_time, container.starting = 0, 0, False
        container.exit_code, container.finished_at, container.oom_killed, container.error = code, when, oom, error
        again = self.restarts.schedule(container)  # first: nobody is to see, or to store, an end between two runs
        container.status = model.RESTARTING if again else model.EXITED
        if not self._told_by_shim(container):
            engine.record(container)
        faults.point("exit.recorded")
        await self.networks.release(container, network)
        await self.volumes.release(container)
        engine.shared_memory.remove(container.id)
        faults.point("exit.network")
        shim = self.shims.pop(container.id, None)
        self.specs.pop(container.id, None)
        self.reports.look(container)
        self.reports.forget(container.id)
        if shim is not None and container.host_config.get("AutoRemove"):
            self._ending[container.id] = shim  # its clients wait until the container is removed
        else:
            await engine.launcher.end(shim, engine.paths.shim(container.id))
        faults.point("exit.shim")
        if oom:
            engine.event(container, "oom")
        engine.event(container, "die", exitCode=str(code))
        self.networks.tell(container, "disconnect")
        self._wake(container)
        if container.host_config.get("AutoRemove") and not again:
            self.task(self.remove_quietly(container.id))

    def _told_by_shim(self, container: Container) -> bool:
        """Need its end not be stored? With --rm the record is the next thing to go, and until then the shim stays, which
        tells another daemon how it ended; that one then removes it."""
        return container.id in self.shims and bool(container.host_config.get("AutoRemove"))

    # -- waiting --

    def _wake(self, container: Container, *, removed: bool = False) -> None:
        """Tell those who wait that the container has ended, or is gone."""
        waiting = self._waiters.pop(container.id, [])
        kept = [entry for entry in waiting if entry[0] == "removed" and not removed]
        if kept:
            self._waiters[container.id] = kept
        for condition, future in waiting:
            if (removed or condition != "removed") and not future.done():
                future.set_result(container.exit_code)

    def wait(self, reference: str, condition: str = "not-running") -> asyncio.Future[int]:
        """A future of the exit code: ``not-running`` (at once when it is not), ``next-exit``, ``removed``."""
        container = self._engine.find(reference)
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if condition not in ("not-running", "next-exit", "removed", ""):
            raise InvalidArgument(f"invalid condition: {condition!r}")
        if condition in ("not-running", "") and not container.live and container.status != model.RESTARTING \
                and not container.starting:
            future.set_result(container.exit_code)
        else:
            self._waiters.setdefault(container.id, []).append((condition, future))
        return future

    # -- attach --

    async def attach(self, container: Container, attachment: Attachment) -> None:
        """Give a client's socket to the container's shim, or keep it until there is one."""
        shim = self.shims.get(container.id)
        if container.live and shim is not None:
            try:
                await shim.attach(INIT, attachment.fd, **attachment.options)
            finally:
                attachment.close()
        else:
            self._pending.setdefault(container.id, []).append(attachment)

    def log_path(self, container: Container) -> str:
        """Where the shim writes the container's log."""
        return f"{self._engine.paths.container(container.id)}/{container.id}-json.log"

    def running(self, reference: str) -> tuple[Container, Shim]:
        """A running container and its shim. Raises FailedPrecondition in Docker's words."""
        container = self._engine.find(reference)
        shim = self.shims.get(container.id)
        if not container.live or shim is None:
            raise FailedPrecondition(f"container {container.id} is not running")
        return container, shim

    # -- signals --

    async def kill(self, reference: str, signal: str) -> None:
        """Send a signal to init; SIGKILL to a paused one takes effect at once."""
        number = signal_number(signal or "KILL")
        container, shim = self.running(reference)
        group = self._engine.layout.paths(self._engine.container_group(container.id))
        if number in (SIGKILL, signal_number(container.config.get("StopSignal") or "TERM")):
            container.stopped_by_user = True
        try:
            await self._signal(container, shim, number)
        except DeadlineExceeded:
            if number != SIGKILL:
                raise
            # it waits for the process of an exec, which the container has stopped: with init both end
            await asyncio.to_thread(manage.kill, group)
        if number == SIGKILL and container.status == model.PAUSED:  # by the kernel: a runtime may have gone, or hang
            with contextlib.suppress(OSError):  # of one that is dying
                await asyncio.to_thread(manage.freeze, group, False)
        self._engine.event(container, "kill", signal=str(number))

    async def _signal(self, container: Container, shim: Shim, number: int) -> None:
        try:
            backend = self._engine.backend(container)
        except DoliumError as error:  # its runtime has been taken away: the process that it left is known
            _log.warning("container %s: %s", container.name, error)
            await shim.signal(INIT, number)
            return
        await backend.signal(shim, container.id, number)

    async def stop(self, reference: str, timeout: int | None = None, signal: str = "") -> bool:
        """The stop signal, then SIGKILL after ``timeout`` seconds (-1 waits for ever). False when it was not running."""
        container = self._engine.find(reference)
        async with self._engine.lock(container.id):  # a start under way, of a restart policy's too, comes to its end first
            container = self._engine.find(container.id)
            if self.restarts.forget(container.id):
                container.status = model.EXITED
                container.stopped_by_user = True
                self._engine.record(container)
                self._wake(container)  # nobody else will: it has ended before, and does not start again
                return True
            if not container.live:
                return False
            container.stopped_by_user = True
            self._engine.record(container)
        if timeout is None:
            chosen = container.config.get("StopTimeout")
            timeout = policy.STOP_TIMEOUT if chosen is None else int(chosen)
        ended = self.wait(container.id, "next-exit")
        with contextlib.suppress(FailedPrecondition):
            await self.kill(container.id, signal or container.config.get("StopSignal") or "TERM")
            if container.status == model.PAUSED:
                await self._freeze(container, False)
        faults.point("stop.signalled")
        try:
            async with asyncio.timeout(timeout if timeout >= 0 else None):
                await asyncio.shield(ended)
        except TimeoutError:
            with contextlib.suppress(FailedPrecondition):
                await self.kill(container.id, "KILL")
            await ended
        self._engine.event(container, "stop")
        return True

    async def restart(self, reference: str, timeout: int | None = None, signal: str = "") -> None:
        """Stop, then start in fresh namespaces."""
        container = self._engine.find(reference)
        await self.stop(container.id, timeout, signal)
        await self.start(container.id)
        self._engine.event(container, "restart")

    async def pause(self, reference: str, frozen: bool) -> None:
        """Freeze or thaw. Raises FailedPrecondition in Docker's words."""
        container = self._engine.find(reference)
        async with self._engine.lock(container.id):
            if frozen and container.status == model.PAUSED:
                raise FailedPrecondition(f"container {container.id} is already paused")
            if frozen and container.status != model.RUNNING:
                raise FailedPrecondition(f"container {container.id} is not running")
            if not frozen and container.status != model.PAUSED:
                raise FailedPrecondition(f"Container {container.id} is not paused")
            try:
                await self._freeze(container, frozen)
            except (OSError, TimeoutError) as error:
                raise Unavailable(f"{'pause' if frozen else 'unpause'} container {container.name}: {error}") from error
            container.status = model.PAUSED if frozen else model.RUNNING
            self._engine.record(container)
            self._engine.event(container, "pause" if frozen else "unpause")

    async def _freeze(self, container: Container, frozen: bool) -> None:
        folders = self._engine.layout.paths(self._engine.container_group(container.id))
        await self._engine.backend(container).freeze(container.id, folders, frozen)

    async def rename(self, reference: str, name: str) -> None:
        """Give another name. Raises AlreadyExists, InvalidArgument."""
        container = self._engine.find(reference)
        new = request.check_name(name)
        if new == container.name:
            raise InvalidArgument("Renaming a container with the same name as its current name")
        if new in self._engine.names:
            raise AlreadyExists(f"Conflict. The container name \"/{new}\" is already in use by container "
                                f"\"{self._engine.names[new]}\".")
        old, container.name = container.name, new
        try:
            self._engine.save(container)
        except DoliumError:
            container.name = old
            raise
        self._engine.names.pop(old, None)
        self._engine.names[new] = container.id
        await self.networks.renamed(container, old)
        self._engine.event(container, "rename", oldName=f"/{old}")

    # -- remove --

    async def remove_quietly(self, identity: str) -> None:
        """--rm: nobody waits; what cannot be removed stays listed and is logged."""
        with contextlib.suppress(NotFound):
            try:
                await self.remove(identity, force=True, volumes=True)
            except (DoliumError, OSError) as error:
                _log.warning("remove container %s: %s", identity, error)
                kept = self._engine.containers.get(identity)
                if kept is not None:  # only the shim knew how it ended, and that goes now
                    self._engine.record(kept)
            finally:
                await self._end_shim(identity)

    async def _end_shim(self, identity: str) -> None:
        """The end of a shim whose clients waited for a removal. Idempotent."""
        await self._engine.launcher.end(self._ending.pop(identity, None), self._engine.paths.shim(identity))

    async def remove(self, reference: str, *, force: bool = False, volumes: bool = False) -> None:
        """Remove a container and all of it; the record goes last. Raises FailedPrecondition in Docker's words."""
        container = self._engine.find(reference)
        while not await self._removed(container, force, volumes):
            continue  # it was started meanwhile

    async def _removed(self, container: Container, force: bool, volumes: bool) -> bool:
        if (container.live or container.status == model.RESTARTING) and not force:
            if container.status == model.PAUSED:
                raise FailedPrecondition(f"cannot remove container \"/{container.name}\": container is paused and must be "
                                         "unpaused first")
            raise FailedPrecondition(f"cannot remove container \"/{container.name}\": container is {container.status}: "
                                     "stop the container before removing or force remove")
        self.restarts.forget(container.id)
        if container.live:
            container.stopped_by_user = True
            ended = self.wait(container.id, "next-exit")
            with contextlib.suppress(FailedPrecondition):
                await self.kill(container.id, "KILL")
            await ended
        async with self._engine.lock(container.id):
            if container.live:
                return False
            if container.id in self._engine.containers:
                await self._remove_all(container, volumes)
        return True

    async def _remove_all(self, container: Container, volumes: bool) -> None:
        engine = self._engine
        container.status = model.REMOVING
        if container.id not in self._ending:  # else it is known, see ``_told_by_shim``
            engine.record(container)
        faults.point("remove.intent")
        if container.id not in self._groupless:
            group = engine.layout.paths(engine.container_group(container.id))
            left = await asyncio.to_thread(manage.kill_and_remove, group)
            if left:
                raise FailedPrecondition(f"container {container.name} has processes that do not die: {', '.join(left)}")
        self._groupless.discard(container.id)
        faults.point("remove.killed")
        if container.network:
            await engine.network.release(container.id, container.network)
        faults.point("remove.network")
        for attachment in self._pending.pop(container.id, []):
            attachment.close()
        engine.roots.remove(container.id)
        faults.point("remove.snapshot")
        engine.trash.discard(engine.paths.container(container.id))
        faults.point("remove.folder")
        if volumes:
            await self.volumes.drop_anonymous(container)
        faults.point("remove.volumes")
        engine.forget(container)
        await self._end_shim(container.id)
        self._wake(container, removed=True)
        engine.event(container, "destroy")

    async def close(self) -> None:
        """Let go of shims and clients; containers live on."""
        self._closing = True
        self.restarts.close()
        self.reports.close()
        for task in list(self._tasks):
            task.cancel()
        for shim in [*self.shims.values(), *self._ending.values()]:
            shim.close()
        for attachments in self._pending.values():
            for attachment in attachments:
                attachment.close()


def _kind_of(error: OSError) -> type[DoliumError]:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    return ResourceExhausted if full else Internal


def launch_exit_code(text: str) -> int:
    """Docker's code for a container that could not be started: 127 not found, 126 not executable, else 128."""
    text = text.lower()
    if "executable file not found" in text or "no such file or directory" in text or "onto a file (or" in text:
        return 127
    if "permission denied" in text or "is a directory" in text:
        return 126
    return 128
