"""System calls Python does not wrap: one thin function each, named as the call, errors as OSError with the object.

x86-64 and arm64 share the numbers of every call made here (they are from after 5.1).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat as stat_module
from collections.abc import Iterator, Sequence

_LIBC = ctypes.CDLL(None, use_errno=True)
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _OPENAT2, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 437, 442
_OPEN_TREE_CLONE, _MS_PRIVATE, _MNT_DETACH, _EMPTY_PATH, _MOVE_MOUNT_F_EMPTY_PATH = 1, 1 << 18, 2, 0x1000, 4
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_ATTR_IDMAP = 0x100000
_AT_RECURSIVE = 0x8000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8

FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 0, 1, 6
ATTR_READ_ONLY = 1
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_IN_ROOT = 0x02, 0x04, 0x10


class _MountAttr(ctypes.Structure):
    _fields_ = [("set", ctypes.c_uint64), ("clear", ctypes.c_uint64), ("propagation", ctypes.c_uint64),
                ("userns_fd", ctypes.c_uint64)]


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def openat2(directory: int, path: str, flags: int, *, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2): an fd. EAGAIN (a rename raced the look-up) is tried again."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    for _ in range(64):
        result = _LIBC.syscall(_OPENAT2, directory, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
        if result >= 0 or ctypes.get_errno() != 11:
            break
    return _check(result, path)


def open_in_root(root: int, path: str, flags: int) -> int:
    """An fd of a path inside an untrusted root: links are resolved inside it, magic links refused."""
    return openat2(root, path.lstrip("/") or ".", flags, resolve=RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)


def fsopen(kind: str) -> int:
    """fsopen(2): a file system configuration context."""
    return _check(_LIBC.syscall(_FSOPEN, kind.encode(), 1), f"fsopen {kind}")


def fsconfig_string(context: int, key: str, value: str) -> None:
    """fsconfig(2) with FSCONFIG_SET_STRING."""
    _check(_LIBC.syscall(_FSCONFIG, context, FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0), f"{key}={value}")


def fsconfig_flag(context: int, key: str) -> None:
    """fsconfig(2) with FSCONFIG_SET_FLAG."""
    _check(_LIBC.syscall(_FSCONFIG, context, FSCONFIG_SET_FLAG, key.encode(), None, 0), key)


def fsconfig_create(context: int) -> None:
    """fsconfig(2) with FSCONFIG_CMD_CREATE. The error carries what the kernel wrote about it."""
    result = _LIBC.syscall(_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}{_said(context)}")


def fsmount(context: int, attributes: int = 0) -> int:
    """fsmount(2): an fd of a detached mount."""
    return _check(_LIBC.syscall(_FSMOUNT, context, 1, attributes), "fsmount")


def open_tree(path: str | int, *, recursive: bool = False) -> int:
    """open_tree(2) with OPEN_TREE_CLONE: an fd of a detached private mount of a folder, or of what an fd names; with what
    is mounted below it, or without."""
    name, flags = (b"", _EMPTY_PATH) if isinstance(path, int) else (os.fsencode(path), 0)
    flags |= _AT_RECURSIVE if recursive else 0
    directory = path if isinstance(path, int) else -100
    return _check(_LIBC.syscall(_OPEN_TREE, directory, name, _OPEN_TREE_CLONE | flags | os.O_CLOEXEC), f"open_tree {path}")


def set_idmap(mount: int, user_namespace: int) -> None:
    """mount_setattr(2): a detached mount shows owners as the user namespace maps them. Once only."""
    attributes = _MountAttr(set=_ATTR_IDMAP, propagation=_MS_PRIVATE, userns_fd=user_namespace)
    _check(_LIBC.syscall(_MOUNT_SETATTR, mount, b"", _EMPTY_PATH, ctypes.byref(attributes), ctypes.sizeof(attributes)),
           "mount_setattr MOUNT_ATTR_IDMAP")


def set_attributes(mount: int, attributes: int, clear: int, *, propagation: int = 0, recursive: bool = False) -> None:
    """mount_setattr(2): MOUNT_ATTR_* bits of a mount, and its propagation; with those of all mounts below it, or without."""
    change = _MountAttr(set=attributes, clear=clear, propagation=propagation)
    flags = _EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    _check(_LIBC.syscall(_MOUNT_SETATTR, mount, b"", flags, ctypes.byref(change), ctypes.sizeof(change)), "mount_setattr")


def move_mount(mount: int, target: str | int) -> None:
    """move_mount(2): attach a detached mount to a folder, or to what an fd names."""
    if isinstance(target, int):
        result = _LIBC.syscall(_MOVE_MOUNT, mount, b"", target, b"", _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH)
    else:
        result = _LIBC.syscall(_MOVE_MOUNT, mount, b"", -100, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
    _check(result, f"move_mount {target}")


def mount_file_system(kind: str, source: str, *, read_only: bool = False, options: Sequence[str] = (),
                      attributes: int = 0) -> int:
    """A detached mount of a file, a block device or what else a file system takes. ``options``: the file system's own,
    KEY or KEY=VALUE; ``attributes``: MOUNT_ATTR_* bits. Raises OSError."""
    context = fsopen(kind)
    try:
        if read_only:
            fsconfig_flag(context, "ro")
        fsconfig_string(context, "source", source)
        for option in options:
            key, equals, value = option.partition("=")
            try:
                fsconfig_string(context, key, value) if equals else fsconfig_flag(context, key)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror}{_said(context)}", option) from error
        fsconfig_create(context)
        return fsmount(context, attributes | (ATTR_READ_ONLY if read_only else 0))
    finally:
        os.close(context)


def mount_tmpfs(target: str, size: int, mode: int, owner: tuple[int, int]) -> None:
    """A tmpfs of ``size`` bytes on a folder, private, without devices, programs and set-user-id."""
    options = f"size={size},mode={mode:o},uid={owner[0]},gid={owner[1]}"
    _check(_LIBC.mount(b"tmpfs", os.fsencode(target), b"tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options.encode()),
           f"mount tmpfs on {target}")
    _check(_LIBC.mount(None, os.fsencode(target), None, _MS_PRIVATE, None), f"make {target} private")


def unmount(target: str) -> None:
    """umount2(2) with MNT_DETACH; nothing happens when nothing is mounted there."""
    if _LIBC.umount2(os.fsencode(target), _MNT_DETACH) < 0 and ctypes.get_errno() != 22:
        _check(-1, f"umount {target}")


def _said(context: int) -> str:
    try:
        return ": " + os.read(context, 300).decode("utf-8", "replace")[2:].strip()
    except OSError:
        return ""  # the kernel had nothing to add


def mount_overlay(lowers: Sequence[str | int], upper: str, work: str, *, on: int = -1, volatile: bool = False) -> int:
    """A detached overlay mount; ``lowers`` top first: folders, or fds of detached mounts. Closing the fd unmounts it when
    nobody attached it. ``on``: a detached mount that ``upper`` and ``work`` are paths inside of. Mounts that are given are
    used up: an older kernel attaches them for a moment, and a mount can be attached but once.

    Lower folders are given one by one (lowerdir+, Linux 6.8); before that by mount(2). ``volatile``: what is written need
    not outlive a power cut: nothing is synced, and unmounting does not wait for upper's whole file system. It leaves a mark
    that refuses another mount, ``work/incompat`` in the work folder.
    """
    context = fsopen("overlay")
    try:
        fsconfig_string(context, "source", "overlay")
        for path in lowers:
            fsconfig_string(context, "lowerdir+", f"/proc/self/fd/{path}" if isinstance(path, int) else path)
        if upper:
            before = f"/proc/self/fd/{on}/" if on >= 0 else ""
            fsconfig_string(context, "upperdir", before + upper)
            fsconfig_string(context, "workdir", before + work)
        if volatile:
            fsconfig_flag(context, "volatile")
        fsconfig_create(context)
        return fsmount(context)
    except OSError as error:
        if error.errno != 22:  # an overlayfs of before 6.5 takes any option and refuses the mount
            raise
        try:
            return _mount_overlay_by_path(lowers, upper, work, on, volatile)
        except OSError as second:
            raise (second if second.errno == 7 else error) from None
    finally:
        os.close(context)


@contextlib.contextmanager
def attached(mount: int) -> Iterator[str]:
    """A folder where a detached mount is attached for a moment; after that it can be no more."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="dolium-") as place:
        move_mount(mount, place)
        try:
            yield place
        finally:
            _check(_LIBC.umount2(place.encode(), _MNT_DETACH), "umount2")


def _mount_overlay_by_path(lowers: Sequence[str | int], upper: str, work: str, on: int = -1, volatile: bool = False) -> int:
    """The same as it was done before: the options are one text of at most a page, so folders are named by fds (200 fit);
    the mount has a path until it is cloned. A detached mount was refused as a layer: it is attached meanwhile."""
    import tempfile

    folders: dict[str | int, int] = {}
    places = contextlib.ExitStack()
    try:
        if on >= 0 and upper:
            place = places.enter_context(attached(on))
            upper, work = f"{place}/{upper}", f"{place}/{work}"
        for path in (*lowers, *([upper, work] if upper else [])):
            if path not in folders:
                folder = places.enter_context(attached(path)) if isinstance(path, int) else path
                folders[path] = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        name = {path: f"/proc/self/fd/{fd}" for path, fd in folders.items()}
        options = "lowerdir=" + ":".join(name[path] for path in lowers)
        if upper:
            options += f",upperdir={name[upper]},workdir={name[work]}{',volatile' if volatile else ''}"
        if len(options) >= 4096:  # the kernel would cut it off without a word
            raise OSError(7, f"{os.strerror(7)}: {len(lowers)} layers, before Linux 6.8")
        with tempfile.TemporaryDirectory(prefix="dolium-") as place:
            _check(_LIBC.mount(b"overlay", place.encode(), b"overlay", 0, options.encode()), "mount overlay")
            try:
                _check(_LIBC.mount(None, place.encode(), None, _MS_PRIVATE, None), "mount --make-private")
                return _check(_LIBC.syscall(_OPEN_TREE, -100, place.encode(), _OPEN_TREE_CLONE | os.O_CLOEXEC), "open_tree")
            finally:
                _check(_LIBC.umount2(place.encode(), _MNT_DETACH), "umount2")
    finally:
        for fd in folders.values():
            os.close(fd)
        places.close()


def read_in_root(root: int, path: str, limit: int = 1 << 20) -> bytes | None:
    """Content of a regular file inside an untrusted root; None when absent or no regular file."""
    try:
        fd = open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno in (2, 20, 40):
            return None
        raise
    try:
        if not stat_module.S_ISREG(os.fstat(fd).st_mode):
            return None
        return os.read(fd, limit)
    finally:
        os.close(fd)


def make_dirs_in_root(root: int, path: str, *, mode: int = 0o755, owner: tuple[int, int] = (0, 0)) -> None:
    """Make a folder and its parents inside an untrusted root; what is there stays as it is.

    Raises NotADirectoryError when something else stands in the way.
    """
    done = ""
    parent = os.dup(root)
    try:
        for part in [part for part in path.split("/") if part not in ("", ".")]:
            done += f"/{part}"
            try:
                child = open_in_root(root, done, os.O_PATH | os.O_DIRECTORY)
            except FileNotFoundError:
                os.mkdir(part, mode, dir_fd=parent)
                child = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
                if owner != (0, 0):
                    os.chown(part, *owner, dir_fd=parent, follow_symlinks=False)
            os.close(parent)
            parent = child
    finally:
        os.close(parent)
