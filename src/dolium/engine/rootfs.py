"""A container's root seen from the daemon: as a detached overlay mount while it is stopped, through init while it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from dolium.engine.model import Container
from dolium.errors import FailedPrecondition, Internal, NotFound, ResourceExhausted
from dolium.images.snapshots.base import Snapshotter
from dolium.isolation.process import HostFacts
from dolium.linux import syscalls
from dolium.runtime.state import alive


class Roots:
    """Mounts and opens roots. Nothing it mounts has a path on the host."""

    def __init__(self, snapshots: Snapshotter) -> None:
        self._snapshots = snapshots

    def create(self, container: Container) -> None:
        """Make the writable layer. Raises NotFound when a layer is missing."""
        self._snapshots.prepare(container.id, container.chain_ids)

    def mount(self, container: Container) -> int:
        """An fd of the container's overlay, detached. Raises Internal, NotFound, ResourceExhausted."""
        parts = self._snapshots.rootfs(container.id, container.chain_ids)
        lowers = [container.rootfs] if container.rootfs else [str(path) for path in parts.lowerdirs]
        try:
            return syscalls.mount_overlay(lowers, str(parts.upper), str(parts.work))
        except OSError as error:
            kind = ResourceExhausted if error.errno == 28 else Internal
            raise kind(f"mount the root of container {container.name}: {error.strerror}", errno=error.errno) from error

    @contextmanager
    def opened(self, container: Container) -> Iterator[int]:
        """The root as an fd, whatever the container's state, closed at the end."""
        if container.live:
            try:
                root = os.open(f"/proc/{container.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise FailedPrecondition(f"container {container.name} ended just now") from error
            if not alive(HostFacts(), container.pid, container.start_time):
                os.close(root)  # of whoever has the pid now: it may be the host's
                raise FailedPrecondition(f"container {container.name} ended just now")
        else:
            root = self.mount(container)
        try:
            yield root
        finally:
            os.close(root)

    def remove(self, container_id: str) -> None:
        """Remove the writable layer; idempotent."""
        self._snapshots.remove(container_id)

    def active(self) -> list[str]:
        """Ids with a writable layer."""
        return self._snapshots.active()

    def size(self, container: Container) -> int:
        """Bytes in the writable layer; 0 when it is gone."""
        try:
            return self._snapshots.usage(container.id).size
        except NotFound:
            return 0


def copy_up(root: int, target: str, destination: str) -> None:
    """What the image has at a volume's mount point becomes the new volume's first content, with owners and modes.

    Blocks. Nothing happens when the image has no folder there.
    """
    try:
        source = syscalls.open_in_root(root, target, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno in (2, 20, 40):
            return
        raise
    try:
        info = os.fstat(source)
        os.chown(destination, info.st_uid, info.st_gid)
        os.chmod(destination, info.st_mode & 0o7777)
        _copy_tree(source, destination)
    finally:
        os.close(source)


def _copy_tree(source: int, destination: str) -> None:
    for entry in os.scandir(source):
        info = entry.stat(follow_symlinks=False)
        path = f"{destination}/{entry.name}"
        if entry.is_symlink():
            os.symlink(os.readlink(entry.name, dir_fd=source), path)
        elif entry.is_dir(follow_symlinks=False):
            os.mkdir(path, info.st_mode & 0o7777)
            child = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
            try:
                _copy_tree(child, path)
            finally:
                os.close(child)
        elif entry.is_file(follow_symlinks=False):
            _copy_file(source, entry.name, path, info.st_mode & 0o7777)
        else:
            os.mknod(path, info.st_mode, info.st_rdev)
        os.chown(path, info.st_uid, info.st_gid, follow_symlinks=False)
        if not entry.is_symlink():
            os.chmod(path, info.st_mode & 0o7777)
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def _copy_file(source: int, name: str, path: str, mode: int) -> None:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
    try:
        out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            at = 0
            while moved := os.sendfile(out, fd, at, 1 << 30):
                at += moved
        finally:
            os.close(out)
    finally:
        os.close(fd)
