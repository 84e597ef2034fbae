"""Loop devices: a file as a block device, which lets go of itself when the last mount of it is gone (loop(4))."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

_CONTROL = "/dev/loop-control"
_CTL_GET_FREE, _CONFIGURE = 0x4C82, 0x4C0A
_READ_ONLY, _AUTOCLEAR = 1, 4
_TRIES = 64


class _Info(ctypes.Structure):
    _fields_ = [("device", ctypes.c_uint64), ("inode", ctypes.c_uint64), ("rdevice", ctypes.c_uint64),
                ("offset", ctypes.c_uint64), ("sizelimit", ctypes.c_uint64), ("number", ctypes.c_uint32),
                ("encrypt_type", ctypes.c_uint32), ("encrypt_key_size", ctypes.c_uint32), ("flags", ctypes.c_uint32),
                ("file_name", ctypes.c_char * 64), ("crypt_name", ctypes.c_char * 64), ("encrypt_key", ctypes.c_char * 32),
                ("init", ctypes.c_uint64 * 2)]


class _Config(ctypes.Structure):
    _fields_ = [("fd", ctypes.c_uint32), ("block_size", ctypes.c_uint32), ("info", _Info), ("reserved", ctypes.c_uint64 * 8)]


def attach(path: str, *, read_only: bool = False) -> tuple[int, str]:
    """(an fd of a loop device of the file, the device's path). The device goes when this fd is closed and no mount has it.

    Raises OSError: ENOENT or EPERM where loop devices are not to be had.
    """
    file = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):  # between asking for a free one and taking it somebody else may have
            control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
            try:
                device = f"/dev/loop{fcntl.ioctl(control, _CTL_GET_FREE)}"
            finally:
                os.close(control)
            fd = os.open(device, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
            config = _Config(fd=file)
            config.info.flags = _AUTOCLEAR | (_READ_ONLY if read_only else 0)
            config.info.file_name = os.fsencode(path)[-63:]
            try:
                fcntl.ioctl(fd, _CONFIGURE, bytes(config))
                return fd, device
            except OSError as error:
                os.close(fd)
                if error.errno != errno.EBUSY:
                    raise OSError(error.errno, os.strerror(error.errno or 0), f"{device} of {path}") from error
        raise OSError(errno.EBUSY, "every free loop device was taken by somebody else", path)
    finally:
        os.close(file)


def find(path: str) -> tuple[int, str] | None:
    """(an fd of the loop device that has this very file already, its path), or None: two devices of one file would be two
    file systems of it. As long as the fd is open the device stays the file's. Raises OSError."""
    wanted = os.path.realpath(path)
    for name in os.listdir("/sys/block"):
        if _backing(name) != wanted:
            continue
        try:
            fd = os.open(f"/dev/{name}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENXIO):
                continue  # let go of just now
            raise
        if _backing(name) == wanted:
            return fd, f"/dev/{name}"
        os.close(fd)  # somebody else's by now
    return None


def _backing(name: str) -> str:
    """The file a block device has; "" for no loop device, or a free one."""
    try:
        with open(f"/sys/block/{name}/loop/backing_file") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""
