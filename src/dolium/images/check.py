"""fsck of the store: every digest computed again, every reference followed, every unpacked file compared with its layer.

What is found is a list of problems, each naming the object and what is wrong with it. Nothing here changes anything; the
store's ``check`` repairs.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from dolium.errors import DoliumError, FailedPrecondition, InvalidArgument
from dolium.images import decompress
from dolium.images.content import CHUNK, ContentStore
from dolium.images.manifest import CONFIG_MAX, MANIFEST_MAX, Manifest, parse_config, parse_manifest
from dolium.images.records import ImageRecord, LayerRecord
from dolium.linux import syscalls

WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
_MOST = 5  # differing files that are named, of one layer


@dataclass(slots=True)
class Problem:
    """``kind``: blob, layer, image, name, artifact, index, lease or container; ``subject`` its digest or name; ``images``
    the IDs that need it. ``outcome`` is what a repair made of it: "" when none was asked for.
    """

    kind: str
    subject: str
    text: str
    images: list[str] = field(default_factory=list)
    outcome: str = ""
    repaired: bool = False


def check_blob(content: ContentStore, digest: str, size: int | None) -> str:
    """What is wrong with a blob, or "". Blocks."""
    if not content.has(digest):
        return "missing"
    if not content.verify(digest):
        return "damaged: it does not have its digest any more"
    if size is not None and content.size(digest) != size:
        return f"has {content.size(digest)} bytes, its record says {size}"
    return ""


def check_record(content: ContentStore, record: ImageRecord) -> str:
    """Do manifest and config, both whole, say what the record says? What does not fit, or ""."""
    try:
        manifest = parse_manifest(content.read(record.manifest, limit=MANIFEST_MAX), record.media_type)
        config = parse_config(content.read(record.id, limit=CONFIG_MAX))
    except DoliumError as error:
        return str(error)
    if not isinstance(manifest, Manifest) or manifest.config.digest != record.id:
        return "its manifest names another config"
    if [layer.digest for layer in manifest.layers] != [layer.digest for layer in record.layers]:
        return "its manifest names other layers"
    if config.diff_ids != tuple(layer.diff_id for layer in record.layers) or config.chain_ids != record.chains():
        return "its config names other layers"
    return ""


class _Hashed:
    """Decompressed chunks as a file for tarfile, hashed as they pass."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = b""
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        while len(self._left) < size:
            more = next(self._chunks, b"")
            if not more:
                break
            self.digest.update(more)
            self._left += more
        data, self._left = self._left[:size], self._left[size:]
        return data

    def drain(self) -> None:
        while self.read(CHUNK):
            continue


def check_layer(content: ContentStore, layer: LayerRecord, folder: Path | None) -> tuple[str, str]:
    """What is wrong with a layer's blob beyond its digest, and with the unpacked layer in ``folder``, or "" for each.

    Blocks: reads the layer twice, once compressed and once unpacked. The blob must be whole.
    """
    wanted: dict[str, tuple[Any, ...]] = {}
    with content.open(layer.digest) as blob:
        try:
            stream = _Hashed(decompress.chunks(blob))
            with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r|", bufsize=CHUNK) as archive:
                for member in archive:
                    _expect(wanted, archive, member)
            stream.drain()
        except (InvalidArgument, tarfile.TarError, EOFError, ValueError) as error:
            return f"cannot be unpacked: {error}", ""
    found = f"sha256:{stream.digest.hexdigest()}"
    if found != layer.diff_id:
        return f"unpacks to {found}, the image says {layer.diff_id}", ""
    return "", _compare(folder, wanted) if folder is not None else ""


def _expect(wanted: dict[str, tuple[Any, ...]], archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """What the layer's folder must have for this entry; a later one of the same name wins."""
    name = posixpath.normpath("/" + member.name).lstrip("/")
    folder, base = posixpath.split(name)
    if base == OPAQUE:
        return
    if base.startswith(WHITEOUT):
        wanted[posixpath.join(folder, base.removeprefix(WHITEOUT))] = ("deleted",)
        return
    kinds: dict[bytes, int] = {tarfile.DIRTYPE: stat.S_IFDIR, tarfile.SYMTYPE: stat.S_IFLNK, tarfile.CHRTYPE: stat.S_IFCHR,
                               tarfile.BLKTYPE: stat.S_IFBLK, tarfile.FIFOTYPE: stat.S_IFIFO}
    if member.islnk():
        target = posixpath.normpath("/" + member.linkname).lstrip("/")
        if target in wanted:
            wanted[name] = wanted[target]
    elif member.isreg():
        digest = hashlib.sha256()
        data = archive.extractfile(member)
        while data is not None and (piece := data.read(CHUNK)):
            digest.update(piece)
        wanted[name] = stat.S_IFREG, member.mode & 0o7777, member.uid, member.gid, digest.digest()
    elif member.type == tarfile.SYMTYPE:
        wanted[name] = stat.S_IFLNK, 0, member.uid, member.gid, member.linkname
    elif member.type in kinds:
        device = (member.devmajor, member.devminor) if member.isdev() and not member.isfifo() else None
        wanted[name] = kinds[member.type], member.mode & 0o7777, member.uid, member.gid, device


def _compare(folder: Path, wanted: dict[str, tuple[Any, ...]]) -> str:
    root = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    wrong: list[str] = []
    try:
        for name, expected in wanted.items():
            said = _differs(root, name, expected)
            if said:
                wrong.append(f"/{name} {said}")
    finally:
        os.close(root)
    more = f" and {len(wrong) - _MOST} more" if len(wrong) > _MOST else ""
    return f"unpacked files differ: {', '.join(wrong[:_MOST])}{more}" if wrong else ""


def _differs(root: int, name: str, expected: tuple[Any, ...]) -> str:
    try:
        fd = syscalls.open_in_root(root, f"/{name}", os.O_PATH | os.O_NOFOLLOW)
    except OSError as error:
        return "is missing" if error.errno in (2, 20, 40) else f"cannot be read: {error.strerror}"
    try:
        info = os.fstat(fd)
        if expected == ("deleted",):
            return "" if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0 else "is no whiteout"
        kind, mode, uid, gid, content = expected
        if stat.S_IFMT(info.st_mode) != kind:
            return "is of another type"
        if kind == stat.S_IFLNK:
            return "" if os.readlink("", dir_fd=fd) == content else "leads elsewhere"
        if stat.S_IMODE(info.st_mode) != mode or (info.st_uid, info.st_gid) != (uid, gid):
            return "has another mode or owner"
        if kind == stat.S_IFREG:
            digest = hashlib.sha256()
            with open(f"/proc/self/fd/{fd}", "rb", buffering=0) as file:
                while piece := file.read(CHUNK):
                    digest.update(piece)
            return "" if digest.digest() == content else "has other content"
        if content is not None and (os.major(info.st_rdev), os.minor(info.st_rdev)) != content:
            return "is another device"
        return ""
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    finally:
        os.close(fd)


def needs(problem: Problem, record: ImageRecord) -> bool:
    """Is the image of no use without what the problem names? A compressed layer that is unpacked is only for push."""
    layers = {layer.digest for layer in record.layers}
    return not (problem.kind == "blob" and problem.subject in layers)


def unrepaired(problems: list[Problem]) -> list[Problem]:
    """Those that remain."""
    return [problem for problem in problems if not problem.repaired]


def refuse_live(users: list[str]) -> None:
    """A layer under a running container is not exchanged. Raises FailedPrecondition."""
    if users:
        raise FailedPrecondition(f"running container {users[0][:12]} uses it", hint="stop it, then repair again")
