"""The engine: owns the rooms and the containers' records, finds containers, brings things together after a crash."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dolium.engine.events import Bus
from dolium.engine.id_ranges import remapped
from dolium.engine.model import Container
from dolium.engine.rootfs import Roots
from dolium.engine.shared_memory import SharedMemory
from dolium.engine.specs import kernel_version
from dolium.engine.store import Store, open_database
from dolium.errors import DoliumError, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from dolium.images.names import Removal, Use
from dolium.images.records import SqliteImageRecords
from dolium.images.snapshots.drivers import DRIVERS, make_snapshotter
from dolium.images.store import ImageStore
from dolium.images.view import Image
from dolium.isolation.base import Backend
from dolium.isolation.levels import Levels
from dolium.linux.cgroup import manage, tree
from dolium.network.base import NetworkManager, Peer, Refused
from dolium.trash import Trash, delete
from dolium.volumes.store import Volumes

_log = logging.getLogger(__name__)
RETRY = 1.0  # seconds between tries to store what a full disk kept out of the database


@dataclass(frozen=True, slots=True)
class Paths:
    """Where an instance lives. ``data`` survives a reboot, ``run`` does not. ``etc``: the host's settings of registries."""

    data: str
    run: str
    etc: str = "/etc"

    def container(self, identity: str) -> str:
        """A container's own folder: log, hosts, hostname, resolv.conf."""
        return f"{self.data}/containers/{identity}"

    def shim(self, identity: str) -> str:
        """The folder of a sandbox's shim."""
        return f"{self.run}/shims/{identity}"


def host_layout() -> tree.Layout:
    """The cgroup hierarchies of this machine."""
    with open("/proc/self/cgroup") as file:
        text = file.read()
    # the kernel also lists a hierarchy that is mounted nowhere, and a folder of its name may have been left there
    names = [name for name in os.listdir(tree.ROOT)
             if os.path.islink(f"{tree.ROOT}/{name}") or os.path.ismount(f"{tree.ROOT}/{name}")]
    return tree.parse(text, names, os.path.exists(f"{tree.ROOT}/cgroup.controllers"))


class Engine:
    """One instance. All methods are called on its event loop; what blocks runs in threads."""

    def __init__(self, paths: Paths, make_network: Callable[[str, Store], NetworkManager],
                 snapshotter: str = DRIVERS[0], userns_remap: str = "") -> None:
        """Open the database and the rooms. Raises FailedPrecondition when a newer dolium wrote them."""
        self.paths = paths
        for folder in (paths.data, f"{paths.data}/containers", paths.run, f"{paths.run}/shims"):
            os.makedirs(folder, mode=0o711, exist_ok=True)
        os.chmod(f"{paths.run}/shims", 0o700)
        # a volume may hold what the host's users must not reach: set-user-id programs and device nodes of containers
        os.chmod(paths.data, 0o710)
        self._connection = open_database(f"{paths.data}/dolium.db")
        self.store = Store(self._connection)
        self.instance = self.store.setting("instance", secrets.token_hex(4))
        self.layout = host_layout()
        self.group = f"{tree.PARENT}/{self.instance}"
        self.kernel = kernel_version()
        self.has_swap_limit = os.path.exists(f"{self.layout.v1.get('memory', '/')}/memory.memsw.limit_in_bytes")
        self.events = Bus()
        self.snapshotter = snapshotter
        self.remapped = remapped(userns_remap) if userns_remap else []
        self.images = ImageStore(Path(paths.data), SqliteImageRecords(self._connection), in_use=self._image_users,
                                 etc=Path(paths.etc), snapshots=make_snapshotter(snapshotter, Path(paths.data)))
        self.roots = Roots(self.images.snapshots, f"{paths.data}/mountpoints", f"{paths.data}/containers", self._root_of)
        self.volumes = Volumes(f"{paths.data}/volumes", self.store)
        self.shared_memory = SharedMemory(f"{paths.run}/shm")
        self.network = make_network(self.instance, self.store)
        self.network.on_refused = self._refused
        self.network.peer_of = self._peer
        self.trash, self.run_trash = Trash(f"{paths.data}/trash"), Trash(f"{paths.run}/trash")
        self.levels = Levels(self.layout, etc=paths.etc, cache=f"{paths.data}/cache/seccomp", run=paths.run,
                             discard=self.run_trash.discard)
        self.launcher = self.levels.launcher
        self.containers = {doc["id"]: Container.from_doc(doc) for doc in self.store.containers()}
        self.names = {container.name: container.id for container in self.containers.values()}
        self.creating: dict[str, Container] = {}  # without a record yet
        self._locks: dict[str, asyncio.Lock] = {}
        self._unsaved: set[str] = set()
        self._retry: asyncio.TimerHandle | None = None

    # -- finding --

    def find(self, reference: str) -> Container:
        """By id, name or unique id prefix. Raises NotFound, InvalidArgument in Docker's words."""
        name = reference.removeprefix("/")
        if name in self.containers:
            return self.containers[name]
        if name in self.names:
            return self.containers[self.names[name]]
        matches = [identity for identity in self.containers if name and identity.startswith(name)]
        if len(matches) > 1:
            raise InvalidArgument(f"multiple IDs found with provided prefix: {reference}")
        if not matches:
            raise NotFound(f"No such container: {reference}")
        return self.containers[matches[0]]

    def lock(self, identity: str) -> asyncio.Lock:
        """One change of a container at a time."""
        return self._locks.setdefault(identity, asyncio.Lock())

    def save(self, container: Container) -> None:
        """Store the record. A short transaction; on the loop. Raises ResourceExhausted."""
        try:
            self.store.put_container(container.to_doc())
        except ResourceExhausted:
            self.trash.hurry()
            self.roots.hurry()
            raise
        self.containers[container.id] = container
        self._unsaved.discard(container.id)
        if self._unsaved and self._retry is not None:  # there is room again
            self._retry.cancel()
            self._save_unsaved()

    def record(self, container: Container) -> None:
        """``save`` what has happened already or what makes room: a full disk does not stop it. It is tried again every
        second until it is stored."""
        try:
            self.save(container)
        except ResourceExhausted as error:
            self._again(container.id, error)

    def _again(self, identity: str, error: ResourceExhausted) -> None:
        self.trash.hurry()
        self.roots.hurry()
        if identity not in self._unsaved:
            _log.warning("container %s: %s; trying again until it is stored", identity, error)
        self._unsaved.add(identity)
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(RETRY, self._save_unsaved)

    def _save_unsaved(self) -> None:
        self._retry = None
        for identity in list(self._unsaved):
            container = self.containers.get(identity)
            try:
                if container is None:
                    self.store.delete_container(identity)
                else:
                    self.save(container)
            except ResourceExhausted as error:
                self._again(identity, error)
                return
            self._unsaved.discard(identity)

    def forget(self, container: Container) -> None:
        """The record goes last: all it speaks of is gone already."""
        try:
            self.store.delete_container(container.id)
            self._unsaved.discard(container.id)
        except ResourceExhausted as error:
            self._again(container.id, error)
        self.containers.pop(container.id, None)
        self.names.pop(container.name, None)
        self._locks.pop(container.id, None)

    def _image_users(self, image_id: str) -> Sequence[Use]:
        return [Use(container.id, container.live) for container in self.containers.values()
                if container.image_id == image_id]

    async def remove_image(self, name: str, *, force: bool) -> Sequence[Removal]:
        """``docker rmi``. Raises as ``ImageStore.remove``."""
        self.roots.drop_spares()
        return await self.images.remove(name, force=force)

    async def prune_images(self, wanted: Callable[[Image], bool]) -> tuple[list[Removal], int]:
        """``docker image prune``: see ``ImageStore.prune``."""
        self.roots.drop_spares()
        return await self.images.prune(wanted)

    def volume_users(self, name: str) -> list[str]:
        """Ids of containers that mount a volume, those that are being made among them."""
        return [container.id for container in {**self.creating, **self.containers}.values()
                if any(mount.name == name for mount in container.mounts)]

    async def remove_volume(self, name: str, users: Sequence[str]) -> None:
        """Remove a volume and, off the loop, what is in it. Raises as ``Volumes.remove``."""
        aside = self.volumes.remove(name, users)
        try:
            await asyncio.to_thread(delete, aside)
        except FileNotFoundError:
            return  # somebody else has deleted it
        except OSError as error:
            _log.warning("delete %s: %s", aside, error)  # the next start tries again

    def event(self, container: Container, action: str, **attributes: str) -> None:
        """Publish an event of a container, with Docker's attributes."""
        labels = container.config.get("Labels") or {}
        self.events.publish("container", action, container.id,
                            {**labels, "image": container.image, "name": container.name, **attributes})

    def _root_of(self, container: Container) -> int:
        return self.backend(container).root_of(container.id, container.pid)

    def _refused(self, identity: str, refused: Refused) -> None:
        container = self.containers.get(identity)
        if container is not None:
            self.event(container, "ingress-refused" if refused.incoming else "egress-refused", address=refused.address,
                       protocol=refused.protocol, port=str(refused.port))

    def _peer(self, identity: str) -> Peer:
        container = self.containers.get(identity)
        return Peer(container.name, container.config.get("Labels") or {}) if container is not None else Peer()

    def backend(self, container: Container) -> Backend:
        """The container's level of isolation. Raises InvalidArgument, FailedPrecondition when its runtime has gone."""
        return self.levels.find(str(container.host_config.get("Runtime") or ""))

    async def forgotten(self, container: Container) -> None:
        """Its shim is dead, and all of it: a runtime is told."""
        try:
            await self.backend(container).forget(container.id)
        except DoliumError as error:
            _log.warning("container %s: %s", container.name, error)

    def check_live(self, container: Container, what: str) -> None:
        """Raises FailedPrecondition when ``what`` is to be done to a container that runs, and does not reach into it."""
        if container.live and not (backend := self.backend(container)).live:
            raise FailedPrecondition(f"{what} container {container.name} runs with isolation {backend.level}, where that "
                                     "does not reach it", hint="stop it first; isolation process can have it while it runs")

    def container_group(self, identity: str) -> str:
        """The cgroup of a container."""
        return f"{self.group}/{identity}"

    # -- start and end --

    async def open(self) -> None:
        """Start the shims' spawner and recover the rooms; containers are adopted by ``reconcile``."""
        groups = [f"{folder}/cgroup.procs" for folder in self.layout.paths(f"{self.group}/shims")]
        for path in groups:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        self._inherit_cpuset()
        await self.launcher.start(groups)
        await self.images.recover()
        self.volumes.recover(lambda name: bool(self.volume_users(name)))
        await asyncio.to_thread(self._drop_orphans)
        await self.levels.recover(self.containers)
        self.launcher.prepare_spares()

    def _inherit_cpuset(self) -> None:
        """A new v1 cpuset takes no process before it has CPUs and memory nodes."""
        base = self.layout.v1.get("cpuset")
        if base is None:
            return
        for group in (tree.PARENT, self.group, f"{self.group}/shims"):
            for name in ("cpuset.cpus", "cpuset.mems"):
                path = f"{base}{group}/{name}"
                with open(path) as file:
                    if file.read().strip():
                        continue
                with open(f"{os.path.dirname(os.path.dirname(path))}/{name}") as above:
                    value = above.read()
                with open(path, "w") as file:
                    file.write(value)

    def _drop_orphans(self) -> None:
        """What has this instance's name and no record: a dead daemon was in the middle of making or removing it."""
        for identity in os.listdir(f"{self.paths.run}/shims"):
            if identity not in self.containers:
                self.launcher.kill_shim(f"{self.paths.run}/shims/{identity}")
                shutil.rmtree(f"{self.paths.run}/shims/{identity}", ignore_errors=True)
        known = set(self.containers) | {"shims"}
        orphans = {name for folder in self.layout.paths(self.group) if os.path.isdir(folder)
                   for name in os.listdir(folder) if os.path.isdir(f"{folder}/{name}") and name not in known}
        for name in orphans:
            left = manage.kill_and_remove(self.layout.paths(f"{self.group}/{name}"))
            if left:
                _log.warning("cgroups of a lost container remain: %s", ", ".join(left))
        for identity in self.roots.active():
            if identity not in self.containers:
                self.roots.remove(identity)
        for identity in os.listdir(f"{self.paths.data}/containers"):
            if identity not in self.containers:
                shutil.rmtree(self.paths.container(identity), ignore_errors=True)
        for identity in self.shared_memory.owners():
            if identity not in self.containers:
                self.shared_memory.remove(identity)
        self.trash.recover()
        self.run_trash.recover()

    async def close(self) -> None:
        """Containers and shims live on. Nothing may be under way."""
        self.events.close()
        if self._retry is not None:
            self._retry.cancel()
            self._save_unsaved()
            if self._retry is not None:
                self._retry.cancel()
        await self.launcher.close()
        await self.network.close()
        await self.roots.close()
        await asyncio.to_thread(self.images.close)
        for trash in (self.trash, self.run_trash):
            await asyncio.to_thread(trash.close)
        self._connection.close()

    def remove_groups(self) -> None:
        """Remove this instance's own cgroup folders when no container and no shim lives in them."""
        left = manage.kill_and_remove(self.layout.paths(self.group))
        if left:
            _log.warning("cgroups remain: %s", ", ".join(left))


def cleanup_step(what: str, error: BaseException) -> None:
    """A clean-up goes on after a failed step; the step is on record."""
    if not isinstance(error, (DoliumError, OSError)):
        raise error
    _log.warning("%s: %s", what, error)
