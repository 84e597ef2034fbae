"""The native driver: a container's root is a copy of its layers, for kernels and file systems without overlayfs.

    snapshots/active/KEY/root     a container's; inside its disk when it has one

Where the file system can (btrfs, xfs) a copied file shares its blocks with the layer's until one of them is written to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dolium import depth, faults, policy
from dolium.errors import FailedPrecondition, NotFound, ResourceExhausted
from dolium.images.snapshots.base import MountOptions, Usage
from dolium.images.snapshots.driver import Driver
from dolium.images.snapshots.layers import FolderLayers
from dolium.images.snapshots.places import tree_usage
from dolium.linux import syscalls
from dolium.trash import delete

_FICLONE = 0x40049409
_OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")
_OWN = ("trusted.overlay.", "user.overlay.")
_UNSHARED = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY)
faults.register("driver.copied")


class NativeSnapshotter(Driver):
    """Implements ``Snapshotter`` by copies."""

    name = "native"
    writes_mapped = False

    def __init__(self, layers: FolderLayers) -> None:
        super().__init__(layers)
        self._word = secrets.token_hex(4)

    def _drop_written(self, key: str) -> None:
        """What a process that was killed has compared: further names, which keep what the container deletes."""
        inside = self._places.inside(key)
        for name in os.listdir(inside):
            if name.startswith("written-") and not name.startswith(f"written-{self._word}-"):
                self._layers.trash.discard(f"{inside}/{name}")

    def prepare(self, key: str, chain_ids: Sequence[str], *, owner: tuple[int, int] = (0, 0), size: int = 0) -> None:
        """See ``Snapshotter``. Takes as long as copying does. The copy keeps the layers' owners, whatever ``owner``: the
        mount maps them."""
        layers = self._layers.folders(chain_ids)
        self._places.make(key, size)
        try:
            root = self._places.inside(key) / "root"
            root.mkdir(mode=0o755)
            for layer in reversed(layers):
                apply(layer, root)
            _add_mount_points(root)  # what is there now is no change of the container's
            os.close(os.open(root.parent / "copied", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            self._places.remove(key)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhausted(
                    f"copy the image for container {key[:12]}: {error.strerror}", errno=error.errno,
                    hint="the native snapshotter copies it whole, into --storage-opt size too") from error
            raise
        except BaseException:
            self._places.remove(key)
            raise
        faults.point("driver.copied")

    def mount(self, key: str, chain_ids: Sequence[str], options: MountOptions) -> int:
        """See ``Snapshotter``."""
        self._drop_written(key)
        root = self._places.inside(key) / "root"
        if not root.is_dir():
            raise FailedPrecondition(f"snapshot {key[:12]} was made by another snapshotter than native")
        if options.lower:
            raise FailedPrecondition(f"a root that is shared read-only ({options.lower}) needs a snapshotter by overlayfs")
        disk = self._places.disk(key)
        mount = syscalls.open_tree(str(root)) if disk is None else disk.folder("root")
        if options.user_namespace >= 0:
            try:
                syscalls.set_idmap(mount, options.user_namespace)
            except OSError:
                os.close(mount)
                raise
        return mount

    @contextmanager
    def view(self, chain_ids: Sequence[str], options: MountOptions, key: str = "") -> Iterator[int]:
        """See ``Snapshotter``. The layers alone are copied once more."""
        if not key:
            with tempfile.TemporaryDirectory(prefix="view-", dir=self.root / "trash") as place:
                for layer in reversed(self._layers.folders(chain_ids)):
                    apply(layer, Path(place))
                if options.lowest:
                    _add_mount_points(Path(place))
                fd = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    yield fd
                finally:
                    os.close(fd)
            return
        fd = self.mount(key, chain_ids, MountOptions(user_namespace=options.user_namespace))
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def written(self, key: str, chain_ids: Sequence[str]) -> Iterator[Path]:
        """See ``Snapshotter``. Found by comparing; files are further names of the container's own."""
        self._drop_written(key)
        inside = self._places.inside(key)
        with self.view(chain_ids, MountOptions(lowest="policy.MOUNT_POINTS")) as layers, contextlib.ExitStack() as made:
            place = tempfile.mkdtemp(prefix=f"written-{self._word}-", dir=inside)
            made.callback(delete, place)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            with contextlib.ExitStack() as opened:
                fds = []
                for path in (f"/proc/self/fd/{layers}", f"{inside}/root", place):
                    fds.append(os.open(path, flags))
                    opened.callback(os.close, fds[-1])
                lower, root, out = fds
                depth.run(_compare(lower, root, out, os.stat(f"{inside}/copied").st_mtime_ns))
            yield Path(place)

    def usage(self, key: str) -> Usage:
        """See ``Snapshotter``."""
        path = self._places.inside(key) / "root"
        if not path.is_dir():
            raise NotFound(f"no snapshot {key}")
        return tree_usage(path)


def _add_mount_points(root: Path) -> None:
    """What overlayfs has from a folder below all layers. A link of the image is not followed: it may lead anywhere."""
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in policy.MOUNT_POINTS:
            folder, _, last = name.rstrip("/").rpartition("/")
            try:
                parent = syscalls.openat2(fd, folder or ".", os.O_PATH | os.O_DIRECTORY,
                                          resolve=syscalls.RESOLVE_NO_SYMLINKS)
                try:
                    if name.endswith("/"):
                        os.mkdir(last, 0o755, dir_fd=parent)
                    else:
                        os.close(os.open(last, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=parent))
                finally:
                    os.close(parent)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
    finally:
        os.close(fd)


def _compare(lower: int, root: int, out: int, copied: int) -> depth.Steps[bool]:
    """Put into the folder ``out`` what makes ``root`` of ``lower``; whether there is anything. What was touched after
    ``copied`` (a time in nanoseconds) is taken for changed: a change of content shows in no other attribute for sure. What
    a running container takes away, or exchanges for something else, while it is looked at is left out."""
    flags, found = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, False
    below, names = set(os.listdir(lower)), os.listdir(root)
    for name in sorted(below.difference(names)):
        os.mknod(name, stat.S_IFCHR, 0, dir_fd=out)
        found = True
    for name in names:
        info = _lstat(root, name)
        if info is None:
            continue
        before = _lstat(lower, name) if name in below else None
        changed = before is None or stat.S_IFMT(before.st_mode) != stat.S_IFMT(info.st_mode) or info.st_ctime_ns > copied
        if not stat.S_ISDIR(info.st_mode):
            found = (changed and _further_name(root, name, out)) or found
            continue
        with contextlib.ExitStack() as opened:
            try:
                child = os.open(name, flags, dir_fd=root)
            except (FileNotFoundError, NotADirectoryError):
                continue
            opened.callback(os.close, child)
            os.mkdir(name, dir_fd=out)
            made = os.open(name, flags, dir_fd=out)
            opened.callback(os.close, made)
            if before is not None and stat.S_ISDIR(before.st_mode):
                under = os.open(name, flags, dir_fd=lower)
                opened.callback(os.close, under)
                changed = (yield _compare(under, child, made, copied)) or (info.st_mode, info.st_uid, info.st_gid) != (
                    before.st_mode, before.st_uid, before.st_gid)
            else:
                with _nothing() as empty:
                    yield _compare(empty, child, made, copied)
            if changed:
                _attributes(child, made)
                found = True
        if not changed:
            os.rmdir(name, dir_fd=out)
    return found


def _lstat(folder: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _further_name(root: int, name: str, out: int) -> bool:
    """False when it is not there any more, or is a folder by now."""
    try:
        os.link(name, name, src_dir_fd=root, dst_dir_fd=out, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except PermissionError:  # also what one cannot link for another reason
        info = _lstat(root, name)
        if info is not None and not stat.S_ISDIR(info.st_mode):
            raise
        return False
    return True


@contextmanager
def _nothing() -> Iterator[int]:
    with tempfile.TemporaryDirectory(prefix="dolium-") as place:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


def apply(layer: Path, root: Path) -> None:
    """Bring a layer in overlayfs's form over what is in ``root``, as overlayfs would show it. Raises OSError."""
    _Copy(os.open(layer, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC),
          os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)).run()


class _Copy:
    """All of one layer. Takes the two fds."""

    def __init__(self, source: int, target: int) -> None:
        self._source, self._target = source, target
        self._links: dict[tuple[int, int], str] = {}  # a file with several names, to the first of them

    def run(self) -> None:
        try:
            depth.run(self._folder(self._source, self._target, ""))
        finally:
            os.close(self._source)
            os.close(self._target)

    def _folder(self, source: int, target: int, path: str) -> depth.Steps[None]:
        names = os.listdir(source)
        if any(_xattr(source, key) == b"y" for key in _OPAQUE):
            for name in os.listdir(target):
                _remove(target, name)
        for name in names:
            info = os.stat(name, dir_fd=source, follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                yield self._below(source, target, name, f"{path}{name}/")
                continue
            _remove(target, name)
            if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
                continue  # a whiteout
            seen = (info.st_dev, info.st_ino)
            if info.st_nlink > 1 and seen in self._links:
                os.link(self._links[seen], name, src_dir_fd=self._target, dst_dir_fd=target, follow_symlinks=False)
                continue
            self._links[seen] = f"{path}{name}"
            _copy(source, target, name, info)
        _attributes(source, target)

    def _below(self, source: int, target: int, name: str, path: str) -> depth.Steps[None]:
        try:
            os.mkdir(name, 0o700, dir_fd=target)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=target, follow_symlinks=False).st_mode):
                _remove(target, name)
                os.mkdir(name, 0o700, dir_fd=target)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.ExitStack() as opened:
            inner = os.open(name, flags, dir_fd=source)
            opened.callback(os.close, inner)
            outer = os.open(name, flags, dir_fd=target)
            opened.callback(os.close, outer)
            yield self._folder(inner, outer, path)


def _xattr(fd: int, key: str) -> bytes | None:
    try:
        return os.getxattr(fd, key)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM):
            return None
        raise


def _remove(folder: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        delete(f"/proc/self/fd/{folder}/{name}")


def _copy(source: int, target: int, name: str, info: os.stat_result) -> None:
    """Anything but a folder."""
    if stat.S_ISREG(info.st_mode):
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
        try:
            out = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=target)
            try:
                _content(fd, out, info.st_size)
                _attributes(fd, out)
            finally:
                os.close(out)
        finally:
            os.close(fd)
        return
    if stat.S_ISLNK(info.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
    else:
        os.mknod(name, info.st_mode, info.st_rdev, dir_fd=target)
    os.chown(name, info.st_uid, info.st_gid, dir_fd=target, follow_symlinks=False)
    os.utime(name, ns=(info.st_atime_ns, info.st_mtime_ns), dir_fd=target, follow_symlinks=False)
    if not stat.S_ISLNK(info.st_mode):
        os.chmod(name, stat.S_IMODE(info.st_mode), dir_fd=target)  # nobody else writes here: it is what was just made


def _content(fd: int, out: int, size: int) -> None:
    """Shared blocks where the file system can, else a copy that keeps holes."""
    try:
        fcntl.ioctl(out, _FICLONE, fd)
        return
    except OSError as error:
        if error.errno not in _UNSHARED:
            raise
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break  # a hole up to the end
        end = os.lseek(fd, at, os.SEEK_HOLE)
        os.lseek(out, at, os.SEEK_SET)
        while at < end:
            moved = os.sendfile(out, fd, at, end - at)
            if not moved:
                raise OSError(errno.EIO, "a layer's file became shorter while it was copied")
            at += moved
    os.ftruncate(out, size)


def _attributes(fd: int, out: int) -> None:
    """Owner before mode and capabilities, which a change of owner takes away."""
    info = os.fstat(fd)
    os.fchown(out, info.st_uid, info.st_gid)
    os.fchmod(out, stat.S_IMODE(info.st_mode))
    for key in os.listxattr(fd):
        if not key.startswith(_OWN):
            os.setxattr(out, key, os.getxattr(fd, key))
    os.utime(out, ns=(info.st_atime_ns, info.st_mtime_ns))
