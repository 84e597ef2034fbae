"""``dolium cp``: tar streams to and from the daemon."""

from __future__ import annotations

import base64
import io
import json
import os
import tarfile
import tempfile

from dolium.cli.context import Context
from dolium.cli.flags import UsageError
from dolium.cli.stream import write_all
from dolium.cli.transport import ApiError, Client, query, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO, Any

GO_DIRECTORY = 1 << 31
# Debian 12's Python 3.11.2 has no filters; where there are, none may take modes and owners away: cp keeps them
_AS_IT_IS: dict[str, Any] = {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}


def _target(name: str, path: str) -> str:
    return f"/containers/{quote(name)}/archive{query(path=path)}"


def out(client: Client, context: Context, name: str, path: str, target: str) -> int:
    """Container to here. ``-`` writes the tar to standard output."""
    response = client.open("GET", _target(name, path))
    if target == "-":
        context.stdout.flush()
        for chunk in response.chunks():
            write_all(context.stdout_fd, chunk)
        return 0
    place = context.path(target)
    content = path.endswith("/.")
    into_folder = os.path.isdir(place)
    if not into_folder and target.endswith("/"):
        raise UsageError(f"{target}: no such folder")
    with tempfile.TemporaryFile() as spool:
        for chunk in response.chunks():
            spool.write(chunk)
        spool.seek(0)
        _extract(spool, place, into_folder and not content)
    return 0


def _extract(spool: IO[bytes], place: str, keep_name: bool) -> None:
    """Under its own name into a folder, or as ``place``."""
    with tarfile.open(fileobj=spool, mode="r:") as archive:
        for member in archive:
            _, slash, rest = member.name.partition("/")
            base = place
            if {"..", ""} & set(member.name.rstrip("/").split("/")) and member.name != "/":
                raise ApiError(0, f"the daemon sent a path that leaves the folder: {member.name!r}")
            if keep_name:
                member.name = member.name.lstrip("/")
            else:
                if member.islnk():
                    member.linkname = member.linkname.partition("/")[2]
                member.name = rest if slash else "."
                if not slash and not member.isdir():
                    base, member.name = os.path.split(place)
                elif not slash:
                    os.makedirs(place, exist_ok=True)
            archive.extract(member, base or ".", **_AS_IT_IS)


def into(client: Client, context: Context, source: str, name: str, path: str) -> int:
    """Here to container. ``-`` reads a tar from standard input."""
    if source == "-":
        with open(context.stdin_fd, "rb", closefd=False) as stream:
            client.open("PUT", _target(name, path), stream=iter(lambda: stream.read(1 << 18), b"")).read()
        return 0
    place = context.path(source)
    if not os.path.lexists(place):
        raise UsageError(f"{source}: no such file or folder")
    parent, base = os.path.split(path.rstrip("/"))
    try:
        head = client.open("HEAD", _target(name, path)).headers["x-docker-container-path-stat"]
        folder = bool(json.loads(base64.b64decode(head))["mode"] & GO_DIRECTORY)
    except ApiError as error:
        if error.status != 404:
            raise
        folder = False
        if path.endswith("/"):
            raise UsageError(f"{name}:{path}: no such folder") from error
    if folder:
        arcname = "." if source.endswith("/.") else os.path.basename(place)
        parent = path
    else:
        arcname = base
    client.open("PUT", _target(name, parent or "/"), stream=_pack(place, arcname)).read()
    return 0


class _Sink(io.RawIOBase):
    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.parts.append(bytes(data))
        return len(data)


def _pack(place: str, arcname: str) -> Iterator[bytes]:
    """The tar of a file or tree, member by member; a large file is held in pieces of its own size at most."""
    names = [(path, os.path.relpath(path, place)) for path in [place, *_below(place)]]
    return _tar([(path, arcname if rest == "." else f"{arcname}/{rest}") for path, rest in names])


def pack_files(paths: list[str]) -> Iterator[bytes]:
    """The tar of files, each under its own name."""
    return _tar([(path, os.path.basename(path)) for path in paths])


def _tar(names: list[tuple[str, str]]) -> Iterator[bytes]:
    sink = _Sink()
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for path, name in names:
            archive.add(path, name, recursive=False)
            yield from sink.parts
            sink.parts.clear()
    yield from sink.parts


def _below(place: str) -> Iterator[str]:
    if os.path.isdir(place) and not os.path.islink(place):
        for base, folders, files in os.walk(place):
            folders.sort()
            yield from (os.path.join(base, name) for name in sorted([*folders, *files]))
