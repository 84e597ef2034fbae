"""Mounts put into, and taken out of, a mount namespace that processes live in, which are not trusted.

A thread that ends joins the namespace for it. What is a path to those processes is an fd here: they may exchange folders and
links while this goes on, and reach no other place than they could write to themselves.
"""

from __future__ import annotations

import ctypes
import os

from dolium.linux import syscalls
from dolium.linux.threads import in_thread

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000
_UMOUNT_NOFOLLOW, _MNT_DETACH = 8, 2


def _enter(namespace: int) -> None:
    """The calling thread has folders of its own, and is in the mount namespace. It imports and opens nothing any more."""
    for name, arguments in (("unshare", (_CLONE_FS,)), ("setns", (namespace, _CLONE_NEWNS))):
        if getattr(_LIBC, name)(*arguments) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), name)


def root_alone(namespace: int) -> int:
    """A detached mount of the namespace's root, as an fd, without anything that is mounted in it. Blocks. Raises OSError."""
    def inside() -> int:
        _enter(namespace)
        return syscalls.open_tree("/")

    return in_thread(inside)


def attach(namespace: int, mount: int, target: int) -> None:
    """Mount a detached mount at a folder or file of the namespace. All are fds. Blocks. Raises OSError."""
    def inside() -> None:
        _enter(namespace)
        syscalls.move_mount(mount, target)

    in_thread(inside)


def detach(namespace: int, root: int, target: str, expected: tuple[int, int], *, force: bool = False) -> bool:
    """Unmount what is mounted at ``target``, if it is the file of (device, inode) that is expected; False when it is not.

    ``namespace``, ``root``: fds, of the mount namespace and of the root in it; no link on the way is followed. ``force``:
    also when somebody has files open there, who keeps them. Blocks. Raises OSError: EBUSY without ``force``.
    """
    folder, _, name = target.rstrip("/").rpartition("/")
    try:
        parent = syscalls.openat2(root, folder.lstrip("/") or ".", os.O_PATH | os.O_DIRECTORY,
                                  resolve=syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS)
    except (FileNotFoundError, NotADirectoryError):
        return False
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if force else 0)

    def inside() -> None:
        _enter(namespace)
        os.fchdir(parent)
        if _LIBC.umount2(os.fsencode(name), flags) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), target)

    try:
        try:
            info = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if (info.st_dev, info.st_ino) != expected:
            return False
        in_thread(inside)
        return True
    finally:
        os.close(parent)
