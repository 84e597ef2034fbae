"""A file with an ext4 of its own, for a folder of a size on a file system that cannot count."""

from __future__ import annotations

import errno
import os
import subprocess

from dolium.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from dolium.linux import loop, syscalls

SMALLEST = 4 << 20
"""Bytes; an ext4 has no room for anything in less."""


def make(path: str, size: int, what: str) -> None:
    """A new file of ``size`` bytes, of which the file system takes what is written. ``what``: the option that asked for it.

    Raises InvalidArgument, FailedPrecondition, ResourceExhausted, OSError; then the file may be there, and is of no use.
    """
    if size < SMALLEST:
        raise InvalidArgument(f"{what}={size}: at least {SMALLEST >> 20} MiB")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise InvalidArgument(f"{what}={size}: larger than a file can be on this file system") from error
    finally:
        os.close(fd)
    try:
        done = subprocess.run(
            ["mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", path],
            capture_output=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise FailedPrecondition(f"{what}: this file system has no quotas, and mkfs.ext4 is not installed",
                                 hint="apt-get install e2fsprogs") from error
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip()
        kind = ResourceExhausted if "No space left" in text else FailedPrecondition
        raise kind(f"{what}={size}: mkfs.ext4: {text}")


def device(path: str) -> tuple[int, str]:
    """(an fd of its loop device, the device's path): the one it has already, or a new one. Raises OSError."""
    return loop.find(path) or loop.attach(path)


def mount(path: str) -> int:
    """A detached mount of it. Raises OSError."""
    fd, name = device(path)
    try:
        return syscalls.mount_file_system("ext4", name)
    finally:
        os.close(fd)
