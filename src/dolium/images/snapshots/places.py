"""Where snapshots lie: a folder each, which may be held to a size.

    active/KEY/         a container's
    active/KEY/disk     the file that holds all of it, when the file system cannot count

A size is kept by the file system where it can: project quotas (ext4 and xfs with prjquota), a btrfs qgroup. Elsewhere the
snapshot lies in a file with an ext4 of its own, mounted as long as this process lives or a container has it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from dolium import faults
from dolium.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from dolium.images.snapshots.base import Usage
from dolium.images.snapshots.held import HeldMount
from dolium.linux import disk_file, quota, syscalls
from dolium.trash import Trash

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", re.ASCII)
_DISK = "disk"
faults.register("snapshot.begun", "driver.sized", "snapshot.removed")


class Places:
    """The snapshots' folders under ``root``, which one process writes. ``trash``: where they go."""

    def __init__(self, root: Path, trash: Trash) -> None:
        self._active, self._trash = root / "active", trash
        self._active.mkdir(exist_ok=True)
        self._disks: dict[str, HeldMount] = {}
        self._lock = threading.Lock()  # what is read is read in threads

    def path(self, key: str) -> Path:
        """The folder of a key, whether it exists or not. Raises InvalidArgument."""
        if not _KEY.fullmatch(key):
            raise InvalidArgument(f"invalid snapshot key {key!r}")
        return self._active / key

    def existing(self, key: str) -> Path:
        """The folder of a snapshot. Raises NotFound."""
        path = self.path(key)
        if not path.is_dir():
            raise NotFound(f"no snapshot {key}")
        return path

    def make(self, key: str, size: int) -> None:
        """An empty folder that may take ``size`` bytes; 0 for no limit. Raises AlreadyExists, InvalidArgument,
        FailedPrecondition, OSError; then there is none."""
        path = self.path(key)
        if size and size < disk_file.SMALLEST:
            raise InvalidArgument(f"--storage-opt size={size}: at least {disk_file.SMALLEST >> 20} MiB")
        try:
            if size and quota.is_btrfs(str(self._active)):
                quota.make_limited_subvolume(str(path), size)
                faults.point("snapshot.begun")
                return
            os.mkdir(path, 0o755)
        except FileExistsError:
            raise AlreadyExists(f"snapshot {key} exists already") from None
        faults.point("snapshot.begun")
        try:
            if size and not quota.limit_project(str(path), size):
                disk_file.make(str(path / _DISK), size, "--storage-opt size")
                faults.point("driver.sized")
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise

    def disk(self, key: str) -> HeldMount | None:
        """The disk that holds the snapshot, which stays this object's; None when it lies in its folder itself.

        Raises NotFound, FailedPrecondition.
        """
        path = self.existing(key) / _DISK
        with self._lock:  # one after the other: two mounts by two devices would be the end of the file system
            mount = self._disks.get(key)
            if mount is None and path.exists():
                mount = self._disks[key] = _mount_disk(path)
            return mount

    def inside(self, key: str) -> Path:
        """The folder to write to: of this process alone when it is on a disk of its own. Raises as ``disk``."""
        disk = self.disk(key)
        return self.existing(key) if disk is None else Path(f"/proc/self/fd/{disk.fd}")

    def rename(self, key: str, new: str) -> None:
        """Raises AlreadyExists, NotFound."""
        try:
            os.rename(self.path(key), self.path(new))
        except FileNotFoundError:
            raise NotFound(f"no snapshot {key}") from None
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise AlreadyExists(f"snapshot {new} exists already") from None
        if key in self._disks:
            self._disks[new] = self._disks.pop(key)

    def remove(self, key: str) -> None:
        """Idempotent; only renames."""
        disk = self._disks.pop(key, None)
        if disk is not None:
            disk.close()
        self._trash.discard(str(self.path(key)))
        faults.point("snapshot.removed")

    def keys(self) -> list[str]:
        """All of them."""
        return os.listdir(self._active)

    def recover(self) -> None:
        """Drop what dolium 0.1 left half made."""
        for name in os.listdir(self._active):
            if name.startswith("."):
                self._trash.discard(str(self._active / name))

    def close(self) -> None:
        """Let go of the disks; what containers have stays mounted there."""
        disks, self._disks = self._disks, {}
        for disk in disks.values():
            disk.close()


def _mount_disk(path: Path) -> HeldMount:
    try:
        fd, device = disk_file.device(str(path))  # a container that runs since an earlier daemon has it
        try:
            return HeldMount.make("ext4", device)
        finally:
            os.close(fd)
    except OSError as error:
        raise FailedPrecondition(f"mount {path}: {error.strerror}", errno=error.errno,
                                 hint="a snapshot with a size needs loop devices here") from error


_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def _folder(root: int, path: str) -> int | None:
    """A folder below another one, without following a link; None when it is none any more, or too deep for a path."""
    try:
        return syscalls.openat2(root, path, os.O_RDONLY | os.O_DIRECTORY, resolve=syscalls.RESOLVE_NO_SYMLINKS)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise


def _entries(root: int, path: str) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
    folder = _folder(root, path)
    if folder is None:
        return
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    yield entry, entry.stat(follow_symlinks=False)
    finally:
        os.close(folder)


def tree_usage(path: Path) -> Usage:
    """Space and inodes under a directory that a container may be writing to: links lead nobody out of it, and what vanishes
    meanwhile is left out, as is what lies deeper than a path can name."""
    try:
        root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return Usage(0, 0)
    size = inodes = 0
    seen: set[tuple[int, int]] = set()
    waiting = ["."]
    try:
        while waiting:
            place = waiting.pop()
            for entry, info in _entries(root, place):
                folder = entry.is_dir(follow_symlinks=False)
                if info.st_nlink > 1 and not folder:
                    if (info.st_dev, info.st_ino) in seen:
                        continue
                    seen.add((info.st_dev, info.st_ino))
                size += info.st_blocks * 512
                inodes += 1
                if folder:
                    waiting.append(f"{place}/{entry.name}")
    finally:
        os.close(root)
    return Usage(size, inodes)
