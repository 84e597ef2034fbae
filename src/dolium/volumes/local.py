"""Options of the driver local, in mount(8)'s words: ``type``, ``device`` and ``o``; or ``size``, for a folder that is full.

What they name is mounted at the volume's folder while a container has it, and goes with the last one: a tmpfs is empty then.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Mapping

from dolium.errors import FailedPrecondition, InvalidArgument
from dolium.linux import syscalls
from dolium.linux.disk_file import SMALLEST
from dolium.linux.mounts import MS_PRIVATE, MS_REC, Options
from dolium.units import parse_size

_NEEDS = {"type": ("device",), "device": ("type",), "o": ("device", "type"), "size": ()}


def check(options: Mapping[str, str]) -> None:
    """Raises InvalidArgument in Docker's words."""
    for key in options:
        if key not in _NEEDS:
            raise InvalidArgument(f"invalid option: {key!r}", hint="type, device and o, as of mount(8), or size")
    for key in options:
        for other in _NEEDS[key]:
            if not options.get(other):
                raise InvalidArgument(f"missing required option: {other!r}")
    if "size" in options:
        if len(options) > 1:
            raise InvalidArgument("the option size is for a volume without a type", hint="for a tmpfs: o=size=64m")
        if size(options) < SMALLEST:
            raise InvalidArgument(f"size={options['size']}: at least {SMALLEST >> 20} MiB")
    if options.get("type") == "none" and not bind(options):
        raise InvalidArgument("type=none needs o=bind or o=rbind: there is no file system of that name")


def size(options: Mapping[str, str]) -> int:
    """Bytes it may take; 0 for no limit. Raises InvalidArgument."""
    return parse_size(options["size"], name="volume size") if "size" in options else 0


def bind(options: Mapping[str, str]) -> bool:
    """Is it a folder of the host?"""
    return Options(options.get("o", "").split(",")).bind is not None


def kept(options: Mapping[str, str]) -> bool:
    """Does its content outlive its mount?"""
    return options.get("type") not in ("tmpfs", "ramfs")


def _resolved(kind: str, data: Iterable[str]) -> list[str]:
    """A file system's own options, where the kernel wants a number for a server's name. Blocks. Raises OSError."""
    found = list(data)
    for place, option in enumerate(found):
        if kind in ("nfs", "nfs4", "cifs") and option.startswith("addr="):
            try:
                found[place] = "addr=" + str(socket.getaddrinfo(option[5:], None, type=socket.SOCK_STREAM)[0][4][0])
            except (socket.gaierror, UnicodeError) as error:
                raise OSError(errno.ENOENT, f"{option[5:]} is not found: {error.args[-1]}") from error
    return found


def _told(options: str) -> str:
    """As an error says them: nobody's password."""
    return ",".join("password=****" if one.startswith(("password=", "pass=")) else one for one in options.split(","))


def mount(options: Mapping[str, str], target: str) -> None:
    """Mount what ``type``, ``device`` and ``o`` say. Blocks. Raises FailedPrecondition."""
    given = Options(options.get("o", "").split(","))
    kind, device = options["type"], options["device"]
    fd = -1
    try:
        if given.bind is not None:
            fd = syscalls.open_tree(device, recursive=given.bind == "rbind")
            syscalls.set_attributes(fd, given.set, given.clear)
            if given.recursive_set or given.recursive_clear:
                syscalls.set_attributes(fd, given.recursive_set, given.recursive_clear, recursive=True)
        else:
            fd = syscalls.mount_file_system(kind, device, read_only=bool(given.set & syscalls.ATTR_READ_ONLY),
                                            options=_resolved(kind, given.data), attributes=given.set)
        syscalls.move_mount(fd, target)
        try:  # below a shared mount it is one, too
            syscalls.set_attributes(fd, 0, 0, propagation=given.propagation & ~MS_REC or MS_PRIVATE,
                                    recursive=bool(given.propagation & MS_REC))
        except OSError:
            syscalls.unmount(target)
            raise
    except OSError as error:
        raise FailedPrecondition(
            f"error while mounting volume '{target}': failed to mount local volume: mount {device}:{target}, "
            f"type: {kind}, o: {_told(options.get('o', ''))}: {(error.strerror or '').lower()}", errno=error.errno,
            hint=f"the kernel has no file system {kind}" if error.errno == errno.ENODEV else "") from error
    finally:
        if fd >= 0:
            os.close(fd)
