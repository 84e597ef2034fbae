"""Volumes attached to, and detached from, a container that is there: while it runs, too.

The record says first what is going on (``Mount.pending``): a daemon that dies in the middle leaves the next one to end it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from contextlib import ExitStack

from dolium import faults
from dolium.engine.containers import Containers
from dolium.engine.engine import Engine
from dolium.engine.model import Container, Mount
from dolium.engine.mounts import parse_volume
from dolium.engine.rootfs import open_subpath
from dolium.errors import AlreadyExists, DoliumError, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from dolium.linux import live_mounts, syscalls

_log = logging.getLogger(__name__)
ATTACH, DETACH = "attach", "detach"
_KERNEL_S = ("/proc", "/sys", "/dev")
_DETACH_HINTS = {
    errno.EBUSY: "a process has a file or folder open there, or something is mounted below: end it, or give --force, and it "
                 "keeps what it has open",
    errno.ELOOP: "the container has put a symbolic link in the way"}
faults.register("volume.attach.intent", "volume.attached", "volume.detach.intent", "volume.detached")


class LiveVolumes:
    """All of one engine's."""

    def __init__(self, engine: Engine, containers: Containers) -> None:
        self._engine, self._containers = engine, containers

    async def attach(self, reference: str, text: str) -> Mount:
        """``NAME:/target[:ro]``, as -v has it: a volume that is made when it is not there. A container that does not run has
        it at its next start.

        Raises NotFound, InvalidArgument, AlreadyExists for a target in use, FailedPrecondition, PermissionDenied.
        """
        engine = self._engine
        mount = parse_volume(text)
        container = engine.find(reference)
        async with engine.lock(container.id):
            container = engine.find(container.id)
            engine.check_live(container, "attach a volume:")
            if any(f"{mount.target}/".startswith(f"{place}/") for place in _KERNEL_S):
                raise InvalidArgument(f"cannot attach a volume at {mount.target}: that is the kernel's",
                                      hint=f"a place outside of {', '.join(_KERNEL_S)}")
            if any(one.target == mount.target for one in container.mounts):
                raise AlreadyExists(f"container {container.name} has something mounted at {mount.target} already")
            mount.name = (await engine.volumes.ensure(mount.name)).name
            mount.source, mount.pending = engine.volumes.path(mount.name), ATTACH if container.live else ""
            before = container.mounts
            container.mounts = sorted([*before, mount], key=lambda one: one.target.count("/"))
            try:
                engine.save(container)
                faults.point("volume.attach.intent")
                if container.live:
                    await self._mount(container, mount)
            except BaseException:
                container.mounts = before
                engine.record(container)
                await self._containers.volumes.unused(mount.name)
                raise
            faults.point("volume.attached")
            mount.pending = ""
            engine.record(container)
        self._tell(container, mount, "mount")
        return mount

    async def detach(self, reference: str, which: str, *, force: bool = False) -> Mount:
        """A volume by its name, or by where it is mounted. ``force``: also while processes have files open in it, which they
        keep. Raises NotFound, InvalidArgument, FailedPrecondition."""
        engine = self._engine
        container = engine.find(reference)
        async with engine.lock(container.id):
            container = engine.find(container.id)
            mount = _chosen(container, which)
            engine.check_live(container, "detach a volume:")
            if container.live:
                mount.pending = DETACH
                try:
                    engine.save(container)
                    faults.point("volume.detach.intent")
                    if not await self._unmount(container, mount, force) and not force:
                        raise FailedPrecondition(
                            f"detach {mount.name} of container {container.name}: it is not at {mount.target} any more",
                            hint="the container has moved or unmounted it; --force forgets it all the same")
                except BaseException:
                    mount.pending = ""
                    engine.record(container)
                    raise
                faults.point("volume.detached")
            container.mounts = [one for one in container.mounts if one is not mount]
            engine.record(container)
            await self._containers.volumes.unused(mount.name)
        self._tell(container, mount, "unmount")
        return mount

    async def recover(self) -> None:
        """What a dead daemon was in the middle of: attached is what can be, and detached."""
        for container in list(self._engine.containers.values()):
            for mount in [one for one in container.mounts if one.pending]:
                async with self._engine.lock(container.id):
                    await self._recover(container, mount)

    async def _recover(self, container: Container, mount: Mount) -> None:
        keep = mount.pending == ATTACH
        try:
            if container.live and keep:
                await self._mount(container, mount)
            elif container.live:
                await self._unmount(container, mount, False)
        except DoliumError as error:
            _log.warning("container %s: %s of volume %s was not done: %s", container.name, mount.pending, mount.name, error)
            keep = not keep  # it is not there, or it is there still
        mount.pending = ""
        if not keep:
            container.mounts = [one for one in container.mounts if one is not mount]
        self._engine.record(container)

    def _tell(self, container: Container, mount: Mount, action: str) -> None:
        self._engine.events.publish("volume", action, mount.name, {
            "container": container.id, "destination": mount.target, "driver": "local", "propagation": mount.propagation,
            **({"read/write": str(not mount.read_only).lower()} if action == "mount" else {})})

    # -- the kernel's part --

    async def _mount(self, container: Container, mount: Mount) -> None:
        async with self._engine.roots.opened(container) as root:
            with ExitStack() as held:
                namespace = _namespace(container)
                held.callback(os.close, namespace)
                user = await self._containers.user_namespace(container) if container.ids else -1
                if user >= 0:
                    held.callback(os.close, user)
                target = await asyncio.to_thread(_open_target, container, mount, root)
                held.callback(os.close, target)
                # not from what is mounted in it: /proc shows the daemon what it does not show the container
                try:
                    alone = await asyncio.to_thread(live_mounts.root_alone, namespace)
                except OSError as error:
                    raise FailedPrecondition(f"{_what(container, mount)}: its root: {error.strerror}",
                                             errno=error.errno) from error
                held.callback(os.close, alone)
                await self._containers.volumes.mount_one(container, mount, alone)
                await asyncio.to_thread(_attach, container, mount, namespace, target, user)

    async def _unmount(self, container: Container, mount: Mount, force: bool) -> bool:
        """False when something else is there."""
        async with self._engine.roots.opened(container) as root:
            namespace = _namespace(container)
            try:
                # in the thread: a server of files that hangs holds up this one alone
                return await asyncio.to_thread(lambda: live_mounts.detach(namespace, root, mount.target, _identity(mount),
                                                                          force=force))
            except OSError as error:
                raise FailedPrecondition(
                    f"detach {mount.name} from {mount.target} of container {container.name}: {error.strerror}",
                    errno=error.errno, hint=_DETACH_HINTS.get(error.errno or 0, "")) from error
            finally:
                os.close(namespace)


def _namespace(container: Container) -> int:
    try:
        return os.open(f"/proc/{container.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise FailedPrecondition(f"container {container.name} ended just now") from error


def _identity(mount: Mount) -> tuple[int, int]:
    source = open_subpath(mount) if mount.subpath else os.open(mount.source, os.O_PATH | os.O_CLOEXEC)
    try:
        info = os.fstat(source)
    finally:
        os.close(source)
    return info.st_dev, info.st_ino


def _what(container: Container, mount: Mount) -> str:
    return f"attach volume {mount.name} at {mount.target} of container {container.name}"


def _open_target(container: Container, mount: Mount, root: int) -> int:
    """An fd of the folder, made if it is missing. Raises FailedPrecondition."""
    try:
        syscalls.make_dirs_in_root(root, mount.target, owner=container.owner)
        return syscalls.openat2(root, mount.target.lstrip("/"), os.O_PATH | os.O_DIRECTORY,
                                resolve=syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS)
    except OSError as error:
        reason, hint = error.strerror or "", ""
        if error.errno == errno.ELOOP:
            reason, hint = "a symbolic link is in the way", "name the place it leads to"
        elif error.errno == errno.EROFS:
            hint = "the root is read-only: name a folder that is there"
        raise FailedPrecondition(f"{_what(container, mount)}: {reason}", errno=error.errno, hint=hint) from error


def _attach(container: Container, mount: Mount, namespace: int, target: int, user: int) -> None:
    tree = -1
    try:
        info = os.fstat(target)
        if (info.st_dev, info.st_ino) == _identity(mount):
            return  # an earlier daemon came that far
        tree = syscalls.open_tree(mount.source, recursive=True)
        if user >= 0:
            syscalls.set_idmap(tree, user)
        if mount.read_only:
            syscalls.set_attributes(tree, syscalls.ATTR_READ_ONLY, 0, recursive=True)
        live_mounts.attach(namespace, tree, target)
    except OSError as error:
        kind = PermissionDenied if error.errno in (errno.EPERM, errno.EACCES) else FailedPrecondition
        raise kind(f"{_what(container, mount)}: {error.strerror}", errno=error.errno) from error
    finally:
        if tree >= 0:
            os.close(tree)


def _chosen(container: Container, which: str) -> Mount:
    """Raises NotFound, InvalidArgument."""
    volumes = [mount for mount in container.mounts if mount.kind == "volume"]
    clean = "/" + which.strip("/") if which.startswith("/") else ""
    found = [mount for mount in volumes if (mount.target == clean if clean else mount.name == which)]
    if not found:
        have = ", ".join(f"{mount.name}:{mount.target}" for mount in volumes) or "none"
        raise NotFound(f"container {container.name} has no volume {which}", hint=f"it has {have}")
    if len(found) > 1:
        raise InvalidArgument(f"container {container.name} has the volume {which} at several places",
                              hint=f"name one: {', '.join(mount.target for mount in found)}")
    return found[0]
