"""Limits of what one folder takes on its file system: project quotas (ext4, xfs) and btrfs qgroups."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import struct

_LIBC = ctypes.CDLL(None, use_errno=True)
_QUOTACTL_FD = 443  # Linux 5.14
_SETQUOTA, _PROJECT = 0x800008, 2
_BLOCK_LIMITS = 1  # QIF_BLIMITS
_FSGETXATTR, _FSSETXATTR = 0x801C581F, 0x401C5820
_INHERIT = 0x200  # FS_XFLAG_PROJINHERIT
_PROJECTS = 1 << 30
"""Project ids begin here, drawn at random: administrators count from 1."""
_BTRFS_MAGIC = 0x9123683E
_SUBVOL_CREATE, _QGROUP_LIMIT, _QUOTA_CTL = 0x5000940E, 0x8030942B, 0xC0109428
_QUOTA_ENABLE, _LIMIT_MAX_REFERENCED = 1, 1
_LACKING = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.ESRCH, errno.ENODEV, errno.EPERM)


def limit_project(folder: str, size: int) -> bool:
    """Everything below an empty folder may take ``size`` bytes, counted under a project id of its own. False where
    the file system has no project quotas, or they are off; then nothing is changed. Raises OSError."""
    project = _PROJECTS | secrets.randbits(29)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # struct if_dqblk, sizes in 1024-byte blocks
        blocks = (size + 1023) // 1024
        quota = struct.pack("=QQQQQQQQI4x", blocks, blocks, 0, 0, 0, 0, 0, 0, _BLOCK_LIMITS)
        if _LIBC.syscall(_QUOTACTL_FD, fd, ctypes.c_uint((_SETQUOTA << 8) | _PROJECT), project, quota) < 0:
            number = ctypes.get_errno()
            if number in _LACKING:
                return False
            raise OSError(number, os.strerror(number), folder)
        try:
            attributes = bytearray(fcntl.ioctl(fd, _FSGETXATTR, bytes(28)))
            flags, = struct.unpack_from("=I", attributes)
            struct.pack_into("=I", attributes, 0, flags | _INHERIT)
            struct.pack_into("=I", attributes, 12, project)
            fcntl.ioctl(fd, _FSSETXATTR, bytes(attributes))
        except OSError as error:
            if error.errno in _LACKING:
                return False
            raise
        return True
    finally:
        os.close(fd)


def is_btrfs(folder: str) -> bool:
    """Does the folder lie on a btrfs?"""
    buffer = ctypes.create_string_buffer(256)
    if _LIBC.statfs(os.fsencode(folder), buffer) < 0:
        return False
    return int(struct.unpack_from("@L", buffer)[0]) & 0xFFFFFFFF == _BTRFS_MAGIC


def make_limited_subvolume(path: str, size: int) -> None:
    """A new btrfs subvolume that may refer to ``size`` bytes. Quotas are turned on when they are off. It goes by rmdir(2)
    once it is empty, as any folder. Raises OSError; then there is none."""
    parent = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.ioctl(parent, _QUOTA_CTL, struct.pack("=QQ", _QUOTA_ENABLE, 0))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EEXIST, errno.EINPROGRESS):  # they are on
                raise
        fcntl.ioctl(parent, _SUBVOL_CREATE, bytearray(struct.pack("=q4088s", 0, os.fsencode(os.path.basename(path)))))
    finally:
        os.close(parent)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # struct btrfs_ioctl_qgroup_limit_args: qgroup 0 is the one of this subvolume
        fcntl.ioctl(fd, _QGROUP_LIMIT, struct.pack("=QQQQQQ", 0, _LIMIT_MAX_REFERENCED, size, 0, 0, 0))
    except OSError:
        os.rmdir(path)
        raise
    finally:
        os.close(fd)
