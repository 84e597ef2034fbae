"""What a container changed: as a list for ``diff``, as a layer's tar for ``commit``.

Read from the writable layer of an overlay (a name that is a character device 0:0 was deleted, a folder with
``trusted.overlay.opaque`` hides what is below it) through fds: a container that runs meanwhile may exchange folders for
links, and leads nobody out of its layer.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import IO, Any

from dolium import depth

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPAQUE = "trusted.overlay.opaque"
_OVERLAY = ("trusted.overlay.", "user.overlay.")


class Kind(IntEnum):
    """Docker's numbers; ``letter`` is what ``docker diff`` prints."""

    CHANGED = 0
    ADDED = 1
    DELETED = 2

    @property
    def letter(self) -> str:
        return "CAD"[self]


@dataclass(frozen=True, slots=True)
class Difference:
    """One path, from the container's root."""

    path: str
    kind: Kind


def differences(upper: str, lower: int) -> list[Difference]:
    """What the writable layer at ``upper`` makes of the image, whose root is the folder ``lower``; sorted by path.

    A folder is listed as changed when something in it is, as Docker does. Blocks. Raises OSError.
    """
    found: list[Difference] = []
    root = os.open(upper, _FOLDER)
    try:
        depth.run(_compare(root, lower, "", found))
    finally:
        os.close(root)
    return sorted(found, key=lambda one: one.path)


def _lstat(folder: int | None, name: str) -> os.stat_result | None:
    if folder is None:
        return None
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextlib.contextmanager
def _inside(folder: int, name: str) -> Iterator[int | None]:
    """The folder of that name as an fd; None when it went, or became something else, just now."""
    try:
        fd = os.open(name, _FOLDER, dir_fd=folder)
    except OSError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _compare(upper: int, lower: int | None, path: str, found: list[Difference]) -> depth.Steps[None]:
    for name in sorted(os.listdir(upper)):
        info, before, here = _lstat(upper, name), _lstat(lower, name), f"{path}/{name}"
        if info is None:
            continue
        if _is_whiteout(info):
            if before is not None:
                found.append(Difference(here, Kind.DELETED))
            continue
        folder = stat.S_ISDIR(info.st_mode)
        both = folder and before is not None and stat.S_ISDIR(before.st_mode)
        if before is None:
            found.append(Difference(here, Kind.ADDED))
        elif not both:
            found.append(Difference(here, Kind.CHANGED))
        if not folder:
            continue
        with _inside(upper, name) as child:
            if child is None:
                continue
            inner: list[Difference] = []
            if both and lower is not None:
                with _inside(lower, name) as below:
                    if below is not None and _is_opaque(child):
                        inner += [Difference(f"{here}/{gone}", Kind.DELETED)
                                  for gone in os.listdir(below) if _lstat(child, gone) is None]
                    yield _compare(child, below, here, inner)
                if inner or _changed(info, before) or _marks(upper, name) != _marks(lower, name):
                    found.append(Difference(here, Kind.CHANGED))
            else:
                yield _compare(child, None, here, inner)
            found += inner


def _changed(info: os.stat_result, before: os.stat_result | None) -> bool:
    """Has a folder that is in both other attributes? Its times change with what is in it."""
    return before is None or (info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns) != (
        before.st_mode, before.st_uid, before.st_gid, before.st_mtime_ns)


def _marks(folder: int, name: str) -> dict[str, bytes]:
    """Extended attributes that are not overlayfs's own."""
    path, found = f"/proc/self/fd/{folder}/{name}", {}
    with contextlib.suppress(OSError):  # gone meanwhile, or a file system without any
        for key in os.listxattr(path, follow_symlinks=False):
            if not key.startswith(_OVERLAY):
                found[key] = os.getxattr(path, key, follow_symlinks=False)
    return found


def _is_whiteout(info: os.stat_result) -> bool:
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


def _is_opaque(folder: int) -> bool:
    try:
        return os.getxattr(folder, _OPAQUE) == b"y"
    except OSError:
        return False


OVERFLOW = 65534


def inside(owner: int, ids: Sequence[int]) -> int:
    """An id as it is seen in a user namespace that has the range (first, how many) of the host's ids, from 0 on; what is not
    of the range is nobody's there. Without a range the id itself."""
    if not ids:
        return owner
    return owner - ids[0] if ids[0] <= owner < ids[0] + ids[1] else OVERFLOW


class _Packer:
    """Writes one tar; hard links are told by their inodes."""

    def __init__(self, archive: tarfile.TarFile, convert: bool, ids: Sequence[int]) -> None:
        self._archive, self._ids = archive, ids
        self._convert = convert
        self._links: dict[tuple[int, int], str] = {}
        self.entries = 0

    def folder(self, fd: int, prefix: str) -> depth.Steps[None]:
        """What is in a folder, in the order of its names."""
        if self._convert and prefix and _is_opaque(fd):
            self._add(tarfile.TarInfo(f"{prefix}.wh..wh..opq"))
        for name in sorted(os.listdir(fd)):
            info = _lstat(fd, name)
            if info is None or stat.S_ISSOCK(info.st_mode):
                continue  # removed meanwhile; a tar has no word for a socket
            if self._convert and _is_whiteout(info):
                self._add(tarfile.TarInfo(f"{prefix}.wh.{name}"))
                continue
            # a name of the object itself, not of the path: what is opened is what was looked at
            try:
                child = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            except FileNotFoundError:
                continue
            try:
                yield self._entry(child, f"{prefix}{name}")
            finally:
                os.close(child)

    def _entry(self, fd: int, name: str) -> depth.Steps[None]:
        info = os.fstat(fd)
        entry = tarfile.TarInfo(name)
        entry.mode, entry.uid, entry.gid = stat.S_IMODE(info.st_mode), inside(info.st_uid, self._ids), inside(
            info.st_gid, self._ids)
        entry.mtime = info.st_mtime_ns // 10**9  # whole seconds, as every layer has them
        entry.pax_headers = self._attributes(fd, info)
        if stat.S_ISLNK(info.st_mode):
            entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink("", dir_fd=fd)
        elif stat.S_ISDIR(info.st_mode):
            entry.type = tarfile.DIRTYPE
        elif stat.S_ISFIFO(info.st_mode):
            entry.type = tarfile.FIFOTYPE
        elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
            entry.type = tarfile.CHRTYPE if stat.S_ISCHR(info.st_mode) else tarfile.BLKTYPE
            entry.devmajor, entry.devminor = os.major(info.st_rdev), os.minor(info.st_rdev)
        key = (info.st_dev, info.st_ino)
        if info.st_nlink > 1 and not entry.isdir():
            if key in self._links:
                entry.type, entry.linkname = tarfile.LNKTYPE, self._links[key]
                entry.pax_headers = {}
                self._add(entry)
                return
            self._links[key] = name
        if stat.S_ISREG(info.st_mode):
            with open(f"/proc/self/fd/{fd}", "rb") as content:
                entry.size = info.st_size
                self._add(entry, _Exactly(content, info.st_size))
            return
        self._add(entry)
        if entry.isdir():
            folder = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                yield self.folder(folder, f"{name}/")
            finally:
                os.close(folder)

    def _attributes(self, fd: int, info: os.stat_result) -> dict[str, str]:
        """Extended attributes as tar programs write them: SCHILY.xattr. A link's own are left out."""
        if stat.S_ISLNK(info.st_mode):
            return {}
        path, found = f"/proc/self/fd/{fd}", {}
        try:
            names = os.listxattr(path)
        except OSError:
            return {}
        for name in sorted(names):
            if self._convert and name.startswith(_OVERLAY):
                continue
            with contextlib.suppress(OSError):  # gone meanwhile
                found[f"SCHILY.xattr.{name}"] = os.getxattr(path, name).decode("utf-8", "surrogateescape")
        return found

    def _add(self, entry: tarfile.TarInfo, content: Any = None) -> None:
        self._archive.addfile(entry, content)
        self.entries += 1


class _Exactly:
    """A file that has the size its header says, whatever a container does to it meanwhile."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._file.read(wanted)
        data += b"\0" * (wanted - len(data))
        self._left -= wanted
        return data


class _Sink:
    """What tarfile writes to."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write

    def write(self, data: bytes) -> int:
        self._write(data)
        return len(data)


def pack(folder: int, write: Callable[[bytes], object], *, layer: bool, ids: Sequence[int] = ()) -> int:
    """The tar of what is in a folder; returns the number of entries. ``layer``: the folder is a writable layer, deleted
    names become ``.wh.`` entries (OCI image-spec layer.md). ``ids``: see ``inside``. Blocks. Raises OSError,
    and what ``write`` raises.
    """
    sink: Any = _Sink(write)
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 18) as archive:
        packer = _Packer(archive, layer, ids)
        depth.run(packer.folder(folder, ""))
    return packer.entries
