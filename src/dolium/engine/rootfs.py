"""A container's root seen from the daemon: as a detached overlay mount while it is stopped, through init while it runs."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager

from dolium import depth, policy
from dolium.engine.model import Container, Mount
from dolium.engine.request import storage_size
from dolium.engine.spare_roots import Kind, SpareRoots, let_go
from dolium.errors import FailedPrecondition, Internal, NotFound, ResourceExhausted
from dolium.images.snapshots.base import MountOptions, Snapshotter
from dolium.isolation.process import HostFacts
from dolium.linux import syscalls, user_namespaces
from dolium.linux.user_namespaces import IdMap
from dolium.runtime.state import alive

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
KEPT_MOUNTED = 5.0
"""Seconds for which a created container's root stays mounted for its start."""


def maps_of(container: Container) -> list[IdMap]:
    """How the ids inside are the host's."""
    return [IdMap(0, *container.ids)] if container.ids else []


def _volatile(container: Container) -> bool:
    return bool(container.host_config.get("AutoRemove"))


class Roots:
    """Mounts and opens roots. Nothing it mounts has a path on the host."""

    def __init__(self, snapshots: Snapshotter, mount_points: str, folders: str, root_of: Callable[[Container], int]) -> None:
        """``mount_points``: the folder for ``policy.MOUNT_POINTS``, made if it is missing; ``folders``: where each container
        has a folder of its own; ``root_of``: a process of a live one that has its root."""
        self._root_of = root_of
        self._snapshots = snapshots
        self._lowest = mount_points
        self._spares = SpareRoots(snapshots, self._mount_spare, folders)
        self._mounted: dict[str, int] = {}  # of containers that took a spare and have not started
        self._closing: dict[str, asyncio.Future[None]] = {}
        os.makedirs(mount_points, mode=0o755, exist_ok=True)
        for name in policy.MOUNT_POINTS:
            path = f"{mount_points}/{name}"
            if name.endswith("/"):
                os.makedirs(path, mode=0o755, exist_ok=True)
            else:
                os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))

    async def create(self, container: Container) -> None:
        """Make the writable layer. Raises NotFound when a layer is missing, and as ``Snapshotter.prepare``."""
        size = storage_size(container.host_config)
        if self._snapshots.name == "native" or size:  # copies, makes a file system
            await asyncio.to_thread(self._snapshots.prepare, container.id, container.chain_ids, owner=container.owner,
                                    size=size)
            return
        if not container.rootfs and not container.ids:
            fd = self._spares.take((tuple(container.chain_ids), _volatile(container)), container.id)
            if fd is not None:
                self._mounted[container.id] = fd
                asyncio.get_running_loop().call_later(KEPT_MOUNTED, self._unmount, container.id)
                return
        self._snapshots.prepare(container.id, container.chain_ids, owner=container.owner)

    def _unmount(self, container_id: str) -> None:
        fd = self._mounted.pop(container_id, None)
        if fd is not None:
            self._let_go(container_id, fd)

    def _let_go(self, container_id: str, fd: int) -> None:
        def closed(future: asyncio.Future[None]) -> None:
            if self._closing.get(container_id) is future:
                del self._closing[container_id]

        self._closing[container_id] = let_go(fd)
        self._closing[container_id].add_done_callback(closed)

    async def mount(self, container: Container, user_namespace: int = -1) -> int:
        """An fd of the container's overlay, detached; the caller holds the container's lock and has no other. Raises
        Internal, NotFound, ResourceExhausted. ``user_namespace``: an fd, of the container that has one; the caller's.

        Two overlays with one upper folder corrupt it, so one that is still being closed is waited for. With --rm nothing is
        synced when it ends: what is removed then need not outlive a power cut.
        """
        fd = self._mounted.pop(container.id, None)
        if fd is not None:
            return fd
        while (closing := self._closing.get(container.id)) is not None:
            await asyncio.wait([closing])
        if container.ids and user_namespace < 0:
            maps = maps_of(container)
            user_namespace, _ = await asyncio.to_thread(user_namespaces.make, maps, maps)
            try:
                return await self.mount(container, user_namespace)
            finally:
                os.close(user_namespace)
        # a folder of the host may have the mount points' own folder in it, and lower folders must not
        lowest = "" if container.rootfs else self._lowest
        options = MountOptions(container.rootfs, lowest, _volatile(container), user_namespace)
        if storage_size(container.host_config):  # a disk of its own may have a journal to be read
            return await asyncio.to_thread(self._mount, container.id, container.chain_ids, options)
        return self._mount(container.id, container.chain_ids, options)

    def _mount_spare(self, key: str, kind: Kind) -> int:
        return self._mount(key, kind[0], MountOptions("", self._lowest, kind[1]))

    def _mount(self, key: str, chain_ids: Sequence[str], options: MountOptions) -> int:
        try:
            return self._snapshots.mount(key, chain_ids, options)
        except OSError as error:
            kind = ResourceExhausted if error.errno == 28 else Internal
            raise kind(f"mount the root of container {key[:12]}: {error.strerror}", errno=error.errno) from error

    @asynccontextmanager
    async def opened(self, container: Container) -> AsyncIterator[int]:
        """The root as an fd, whatever the container's state, closed at the end. Who opens that of a container which does
        not run holds its lock."""
        live = container.live
        if live:
            try:
                root = os.open(f"/proc/{self._root_of(container)}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise FailedPrecondition(f"container {container.name} ended just now") from error
            if not alive(HostFacts(), container.pid, container.start_time):
                os.close(root)  # of whoever has the pid now: it may be the host's
                raise FailedPrecondition(f"container {container.name} ended just now")
        else:
            root = await self.mount(container)
        try:
            yield root
        finally:
            if live:
                os.close(root)
            else:
                self.release(container, root)

    @contextmanager
    def written(self, container: Container) -> Iterator[str]:
        """A folder with what the container has changed, as overlayfs writes it down. Blocks. Raises NotFound."""
        with self._snapshots.written(container.id, container.chain_ids) as path:
            yield str(path)

    def ids_written(self, container: Container) -> list[int]:
        """The range whose ids are those inside in what ``written`` gives; none when they are as they are."""
        return container.ids if self._snapshots.writes_mapped else []

    @contextmanager
    def lower(self, container: Container) -> Iterator[int]:
        """What is below what ``written`` gives, as a folder's fd. Blocks. Raises NotFound, Internal."""
        if container.rootfs:
            root = syscalls.open_tree(container.rootfs)
        else:
            with self._view(container, self.ids_written(container), "") as root:
                yield root
            return
        try:
            if self.ids_written(container):
                maps = maps_of(container)
                user = user_namespaces.make(maps, maps)[0]
                try:
                    syscalls.set_idmap(root, user)
                finally:
                    os.close(user)
            yield root
        finally:
            os.close(root)

    @contextmanager
    def view(self, container: Container) -> Iterator[int]:
        """The root, without what is mounted in it, whether the container runs or not; owners are the host's. Not that of a
        host's folder, whose writable layer may lie below it. Blocks."""
        with self._view(container, container.ids, container.id) as root:
            yield root

    @contextmanager
    def _view(self, container: Container, ids: list[int], key: str) -> Iterator[int]:
        user = user_namespaces.make(maps_of(container), maps_of(container))[0] if ids else -1
        try:
            options = MountOptions(container.rootfs, "" if container.rootfs else self._lowest, False, user)
            with ExitStack() as held:
                try:
                    root = held.enter_context(self._snapshots.view(container.chain_ids, options, key))
                except OSError as error:
                    raise Internal(f"mount the root of container {container.short_id}: {error.strerror}",
                                   errno=error.errno) from error
                yield root
        finally:
            if user >= 0:
                os.close(user)

    def release(self, container: Container, root: int) -> None:
        """Close an fd of ``mount``."""
        if _volatile(container):
            os.close(root)
        else:
            self._let_go(container.id, root)

    def remove(self, container_id: str) -> None:
        """Remove the writable layer; idempotent."""
        self._unmount(container_id)
        self._snapshots.remove(container_id)

    def hurry(self) -> None:
        """Room is wanted: delete at once what was removed."""
        self._snapshots.hurry()

    def drop_spares(self) -> None:
        """An image is going: nothing shall hold its layers."""
        self._spares.drop()

    async def close(self) -> None:
        """Let go of what is mounted."""
        await self._spares.close()
        for container_id in list(self._mounted):
            self._unmount(container_id)

    def active(self) -> list[str]:
        """Ids with a writable layer."""
        return self._snapshots.active()

    def size(self, container: Container) -> int:
        """Bytes in the writable layer; 0 when it is gone."""
        try:
            return self._snapshots.usage(container.id).size
        except NotFound:
            return 0


def copy_up(root: int, target: str, destination: str, shift: int = 0) -> None:
    """What the image has at a volume's mount point becomes the new volume's first content, with owners and modes.

    ``shift``: what the root's owners are above those inside, which a volume has. Blocks. Nothing happens when the image has
    no folder there.
    """
    try:
        source = syscalls.open_in_root(root, target, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno in (2, 20, 40):
            return
        raise
    try:
        folder = os.open(destination, _FOLDER)
        try:
            depth.run(_copy_tree(source, folder, shift))
        finally:
            os.close(folder)
    finally:
        os.close(source)


def _copy_tree(source: int, target: int, shift: int) -> depth.Steps[None]:
    """By folders' fds: a path has an end (PATH_MAX), and whoever has the volume too cannot lead us out of it."""
    for name in os.listdir(source):
        info = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISDIR(info.st_mode):
            os.mkdir(name, 0o700, dir_fd=target)
            with ExitStack() as opened:
                below = os.open(name, _FOLDER, dir_fd=source)
                opened.callback(os.close, below)
                made = os.open(name, _FOLDER, dir_fd=target)
                opened.callback(os.close, made)
                yield _copy_tree(below, made, shift)
        elif stat.S_ISREG(info.st_mode):
            _copy_file(source, target, name, info, shift)
        else:
            if stat.S_ISLNK(info.st_mode):
                os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
            else:
                os.mknod(name, info.st_mode, info.st_rdev, dir_fd=target)
            os.chown(name, info.st_uid - shift, info.st_gid - shift, dir_fd=target, follow_symlinks=False)
            if not stat.S_ISLNK(info.st_mode):
                made = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=target)
                try:
                    os.chmod(f"/proc/self/fd/{made}", stat.S_IMODE(info.st_mode))  # what is there, were it a link by now
                finally:
                    os.close(made)
            os.utime(name, ns=(info.st_atime_ns, info.st_mtime_ns), dir_fd=target, follow_symlinks=False)
    _attributes(target, os.fstat(source), shift)


def _attributes(fd: int, info: os.stat_result, shift: int) -> None:
    os.chown(fd, info.st_uid - shift, info.st_gid - shift)
    os.chmod(fd, stat.S_IMODE(info.st_mode))  # after chown, which takes setuid away
    os.utime(fd, ns=(info.st_atime_ns, info.st_mtime_ns))


def _copy_file(source: int, target: int, name: str, info: os.stat_result, shift: int) -> None:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
    try:
        out = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
        try:
            at = 0
            while moved := os.sendfile(out, fd, at, 1 << 30):
                at += moved
            _attributes(out, info, shift)
        finally:
            os.close(out)
    finally:
        os.close(fd)


def open_subpath(mount: Mount) -> int:
    """An fd (O_PATH) of a volume's subpath, whose links lead to nothing outside of the volume. Raises NotFound,
    FailedPrecondition."""
    volume = os.open(mount.source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return syscalls.open_in_root(volume, mount.subpath, os.O_PATH)
    except OSError as error:
        kind = NotFound if error.errno in (errno.ENOENT, errno.ENOTDIR) else FailedPrecondition
        raise kind(f"cannot access path {mount.source}/{mount.subpath}: {(error.strerror or '').lower()}") from error
    finally:
        os.close(volume)
